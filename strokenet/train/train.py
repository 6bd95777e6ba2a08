"""Training: the loop, top to bottom (Isensee 2021, Methods; Meddahi 2024, VI.A).

Comes in: a workspace with a plan, splits and preprocessed cases. Goes out: fold_K/ with weights, log and curve.
An epoch is a fixed number of steps on drawn patches, then validation. After each epoch, and within long ones, a thread
brings the state to disk (writer.py); a run that is killed at any moment and resumed ends with the weights of one that
was not.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from types import FrameType

import torch
from torch import Tensor, nn

from strokenet.data.errors import InputError
from strokenet.data.track import Track, silent
from strokenet.signals import heeded
from strokenet.train.feed import Batch, Feed, WorkersLost
from strokenet.train.loss import deep_supervision_loss
from strokenet.train.record import derive, draw, state_of
from strokenet.train.run import FoldCases, Run, TrainConfig, fold_cases, start_run
from strokenet.train.schedule import poly_lr
from strokenet.train.state import Progress
from strokenet.train.validate import validate_patches, validate_volumes
from strokenet.train.writer import CheckpointWriter
from strokenet.workspace import FoldFolder, Workspace

_log = logging.getLogger("strokenet")

GRADIENT_NORM = 12.0
EMA_KEEP = 0.9
MAX_BAD_STEPS = 5


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """How a run ended. signal: the number of the signal that stopped it, else None. finished: no epoch is left."""

    folder: FoldFolder
    history: tuple[Mapping[str, float], ...]
    signal: int | None
    finished: bool


@dataclass
class _Stop:
    """Why to stop after the step at hand: a signal that came, or the time that is up."""

    deadline: float
    signal: int | None = None

    def __call__(self) -> bool:
        return self.signal is not None or time.monotonic() >= self.deadline


def train(workspace: Workspace, config: TrainConfig, track: Track = silent) -> TrainResult:
    """Trains one fold.

    Raises:
        InputError: no plan, a case that is not preprocessed by it, a fold that does not exist, a run that is there and
            --resume was not asked for, settings that changed since, five steps in a row without a finite loss, or a
            folder that cannot be written.
    """
    minutes = config.max_time_minutes
    stop = _Stop(deadline=time.monotonic() + 60 * minutes if minutes is not None else math.inf)
    plan = workspace.read_plan()
    cases = fold_cases(workspace, plan, config.fold)
    run = start_run(workspace, plan, config, cases)
    derive(run.folder, state_of(run))  # what a kill may have left undone; and the folder can be written
    draw(run.folder, state_of(run))
    last = min(config.epochs, config.stop_epoch or config.epochs)
    feed = Feed(
        plan,
        train=cases.train,
        val=cases.val,
        batch_size=run.batch_size,
        seed=config.seed,
        augmentation=config.augment,
        device=run.device,
        modality_dropout=config.modality_dropout,
    )
    with _arithmetic(config.deterministic), _listening(stop), feed, CheckpointWriter(run) as writer:
        left = range(run.progress.epoch, last)
        for _ in track(left, total=len(left), what=f"train fold {config.fold}"):
            if stop() or not _epoch(run, feed, writer, cases, track, stop):
                break
        finished = run.progress.epoch >= last
        if not finished:
            if run.progress.step:  # else the state on disk is this one
                writer.checkpoint()
            writer.wait()
            _log.info("stopped in epoch %d; --resume goes on from here", run.progress.epoch + 1)
    return TrainResult(folder=run.folder, history=tuple(run.history), signal=stop.signal, finished=finished)


def moving_average(history: list[dict[str, float]], dice: float) -> float:
    """EMA of the pseudo-Dice: the first value, then 0.9 old + 0.1 new. An epoch without a value leaves it as it was."""
    before = history[-1]["ema_dice"] if history else math.nan
    if math.isnan(before) or math.isnan(dice):
        return dice if math.isnan(before) else before
    return EMA_KEEP * before + (1 - EMA_KEEP) * dice


def _epoch(run: Run, feed: Feed, writer: CheckpointWriter, cases: FoldCases, track: Track, stop: _Stop) -> bool:
    """What is left of one epoch. False where it was stopped: between two steps, or in the validation, which is redone.

    Whatever the validation ends with, the steps before it are on disk.
    """
    if not _train_steps(run, feed, writer, track, stop):
        return False
    try:
        row = _validate(run, feed, writer, cases, track, stop)
    except BaseException:
        writer.save()
        raise
    if row is None:
        return False
    run.history.append(row)
    run.progress = Progress(epoch=run.progress.epoch + 1, bad_in_row=run.progress.bad_in_row)
    writer.checkpoint()
    return True


def _train_steps(run: Run, feed: Feed, writer: CheckpointWriter, track: Track, stop: _Stop) -> bool:
    """The steps that are left of the epoch. False where it was stopped after one of them."""
    progress, config = run.progress, run.config
    run.network.train()
    for group in run.optimizer.param_groups:
        group["lr"] = poly_lr(config.lr, progress.epoch, config.epochs)
    steps = range(progress.step, config.iterations)
    began = time.monotonic()
    try:
        with closing(feed.batches("train", progress.epoch, steps)) as batches:
            for batch in track(batches, total=len(steps), what=f"epoch {progress.epoch + 1}"):
                progress.waited += time.monotonic() - began
                _step(run, batch)
                progress.step += 1
                if writer.due():
                    writer.save()
                now = time.monotonic()
                progress.seconds, began = progress.seconds + now - began, now
                if stop():
                    return False
    except WorkersLost:
        if stop.signal is None:
            raise
        return False  # the signal went to the whole group of processes
    return True


def _step(run: Run, batch: Batch) -> None:
    """Forward, backward, clip, update. A loss or gradient that is not finite skips the update and names the cases."""
    run.optimizer.zero_grad(set_to_none=True)
    with run.autocast():
        levels = run.network.forward_levels(batch.image)
    loss = deep_supervision_loss(levels, batch.label, batch_dice=run.plan.batch_dice)
    value = float(loss.detach())
    if not (math.isfinite(value) and _update(run, loss)):
        _skip(run, batch)
        return
    run.progress.loss_sum += value
    run.progress.loss_count += 1
    run.progress.bad_in_row = 0


def _update(run: Run, loss: Tensor) -> bool:
    """Backward, clip, update. False where the gradient is not finite: the weights are then as before.

    float16 overflows now and then: the scaler skips such a step itself and lowers its scale, and that is fine. Below
    a scale of 1 it is no overflow any more.
    """
    run.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
    run.scaler.unscale_(run.optimizer)
    norm = float(nn.utils.clip_grad_norm_(run.network.parameters(), GRADIENT_NORM))
    finite = math.isfinite(norm)
    overflow = not finite and run.scaler.is_enabled() and run.scaler.get_scale() >= 1
    if finite or run.scaler.is_enabled():
        run.scaler.step(run.optimizer)
        run.scaler.update()
    return finite or overflow


def _skip(run: Run, batch: Batch) -> None:
    run.progress.skipped += 1
    run.progress.bad_in_row += 1
    where = f"epoch {run.progress.epoch + 1}, step {run.progress.step + 1}, cases {', '.join(batch.cases)}"
    _log.warning("loss or gradient is not finite (%s): step skipped", where)
    if run.progress.bad_in_row >= MAX_BAD_STEPS:
        raise InputError(
            f"{run.folder.root}: {MAX_BAD_STEPS} steps in a row without a finite loss and gradient ({where}); the last "
            "good checkpoint is kept; mend these cases, preprocess and --resume, or start again with a lower --lr"
        )


def _validate(
    run: Run, feed: Feed, writer: CheckpointWriter, cases: FoldCases, track: Track, stop: _Stop
) -> dict[str, float] | None:
    """Validation patches, whole volumes where they are due. The epoch's row of the log; None where stopped."""
    progress, config = run.progress, run.config
    began = time.monotonic()

    def stopped() -> bool:
        if writer.due():  # a long validation is no reason to lose the steps before it
            writer.save()
        return stop()

    score = validate_patches(run, feed, track, stopped)
    if score is None:
        return None
    volume_dice: float | None = math.nan
    if due := bool(config.validate_every) and (progress.epoch + 1) % config.validate_every == 0:
        writer.save()
        writer.wait()  # whole volumes take long and much memory
        volume_dice = validate_volumes(run, cases.val, track, stopped)
    if volume_dice is None:
        return None
    row = {
        "epoch": progress.epoch,
        "lr": poly_lr(config.lr, progress.epoch, config.epochs),
        "train_loss": progress.loss_sum / progress.loss_count if progress.loss_count else math.nan,
        "val_loss": score.loss,
        "pseudo_dice": score.dice,
        "ema_dice": moving_average(run.history, score.dice),
        "seconds": progress.seconds + time.monotonic() - began,
        "data_wait_share": progress.waited / progress.seconds,
        "skipped_steps": progress.skipped,
        "volume_dice": volume_dice,
    }
    _tell(row, config.epochs, with_volumes=due)
    return row


def _tell(row: Mapping[str, float], epochs: int, *, with_volumes: bool) -> None:
    _log.info(
        "epoch %d/%d  loss %.3f  val %.3f  pseudo-Dice %.3f (mean %.3f)  %.1f s, %.0f %% waiting for data%s",
        *(row["epoch"] + 1, epochs, row["train_loss"], row["val_loss"], row["pseudo_dice"], row["ema_dice"]),
        *(row["seconds"], 100 * row["data_wait_share"]),
        f"  volume Dice {row['volume_dice']:.3f}" if with_volumes else "",
    )


@contextmanager
def _arithmetic(deterministic: bool) -> Iterator[None]:
    """cuDNN times its algorithms and takes the fastest; or, on demand, nothing runs that is not reproducible."""
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it, and reads it at its first use
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not deterministic
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


@contextmanager
def _listening(stop: _Stop) -> Iterator[None]:
    """A signal asks to stop after the step at hand; a second one ends once the checkpoint in flight is on disk."""

    def note(number: int, frame: FrameType | None) -> None:
        if stop.signal is not None:
            raise SystemExit(128 + number)
        stop.signal = number
        _log.info("signal %d: finishing the step, then writing a checkpoint", number)

    try:
        before = {number: signal.signal(number, note) for number in heeded()}
    except ValueError:  # not in the main thread: the caller handles signals
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
