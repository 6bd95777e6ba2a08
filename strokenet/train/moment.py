"""Moments: what a live view shows of a run (console.watching draws them; a run without a terminal has none).

Comes in: a Run between two steps. Goes out: its numbers, in plain types, so that nothing that draws knows torch.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from strokenet.memory import peak_bytes
from strokenet.train.run import Run

RECENT = 10  # epochs whose median length says how long the others will take


@dataclass(frozen=True, kw_only=True)
class Moment:
    """A run between two steps.

    epoch, step: how many are done, of epochs and steps. loss: mean of this epoch's steps, None before the first one.
    step_seconds: mean, waiting included; waiting: share of it. memory_gb: peak of the device, on a CPU of the process;
    None where it is not known. seconds_left: None before there is a step to go by. history: rows of log.csv.
    """

    fold: str
    device: str
    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float | None
    step_seconds: float | None
    waiting: float
    memory_gb: float | None
    seconds_left: float | None
    history: tuple[Mapping[str, float], ...]


View = Callable[[Moment], None]


def unseen(moment: Moment) -> None:
    """The View of library calls: shows nothing."""


def moment_of(run: Run, last_epoch: int) -> Moment:
    """last_epoch: after which the run ends."""
    progress, config = run.progress, run.config
    step_seconds = progress.seconds / progress.step if progress.step else None
    return Moment(
        fold=config.fold,
        device=str(run.device),
        epoch=progress.epoch,
        epochs=last_epoch,
        step=progress.step,
        steps=config.iterations,
        loss=progress.loss_sum / progress.loss_count if progress.loss_count else None,
        step_seconds=step_seconds,
        waiting=progress.waited / progress.seconds if progress.seconds else 0.0,
        memory_gb=_memory_gb(run.device),
        seconds_left=_seconds_left(run, last_epoch, step_seconds),
        history=tuple(run.history),
    )


def _seconds_left(run: Run, last_epoch: int, step_seconds: float | None) -> float | None:
    """The epochs left by the median of the last ones; in the first one, by its steps, a validation step as half one."""
    progress, config = run.progress, run.config
    if run.history:
        epoch_seconds = statistics.median(row["seconds"] for row in run.history[-RECENT:])
    elif step_seconds is not None:
        epoch_seconds = step_seconds * (config.iterations + config.val_iterations / 2)
    else:
        return None
    return max(0.0, (last_epoch - progress.epoch) * epoch_seconds - progress.seconds)


def _memory_gb(device: torch.device) -> float | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    peak = peak_bytes()
    return None if peak is None else peak / 2**30
