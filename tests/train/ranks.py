"""One of two ranks, for test_distributed.py: python -m tests.train.ranks ROOT PORT ..., with RANK, WORLD_SIZE=2 set.

ROOT holds the workspaces that are trained, by their names here. Each training meets at a port of its own, so that one
start of torch serves them all. Goes out: ROOT/rank_R.json, what became of each.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from planner.plan import Plan
from strokenet.infer.shard import launched_shard
from strokenet.train import train as loop
from strokenet.train.run import TrainConfig
from strokenet.train.train import TrainResult, train
from strokenet.workspace import Workspace
from tests.plans import tiny_plan
from tests.train.workspaces import short

# Equal to one process, whatever the loss and however the batch splits: name -> plan, settings.
EQUAL: dict[str, tuple[Plan, TrainConfig]] = {
    f"{'batch' if batch_dice else 'sample'}-{size}": (
        tiny_plan(batch_dice=batch_dice, batch_size=size),
        short(fold="all", validate_every=3, modality_dropout=0.3),
    )
    for batch_dice in (False, True)
    for size in (2, 3)
}
LONG = short(epochs=3, iterations=40, val_iterations=2, seed=3)  # as the command line of the test that kills a rank


def main(root: Path, ports: list[str]) -> None:
    """Every training in turn."""
    rank = int(os.environ["RANK"])
    outcomes = {}
    for (name, scenario), port in zip(SCENARIOS.items(), ports, strict=True):
        os.environ["MASTER_PORT"] = port
        outcomes[name] = outcome(lambda: scenario(Workspace(root / name), rank))  # noqa: B023
    (root / f"rank_{rank}.json").write_text(json.dumps(outcomes))


def outcome(scenario: Callable[[], TrainResult]) -> dict[str, Any]:
    """What a training ended with here: its result or its error, what it wrote, what it warned of."""
    written: list[str] = []
    warned: list[str] = []
    real = os.replace

    def noted(source: Path, target: Path) -> None:
        written.append(Path(target).name)
        real(source, target)

    class Note(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            warned.append(record.getMessage())

    log, note = logging.getLogger("strokenet"), Note(logging.WARNING)
    log.addHandler(note)
    os.replace = noted  # type: ignore[assignment]
    found: dict[str, Any] = {"error": None, "kind": None, "signal": None, "finished": None, "history": []}
    try:
        result = scenario()
        found |= {"signal": result.signal, "finished": result.finished, "history": list(map(dict, result.history))}
    except Exception as error:
        found |= {"error": str(error), "kind": type(error).__name__}
    finally:
        os.replace = real
        log.removeHandler(note)
    return found | {"written": written, "warned": warned, "left": torch.distributed.is_initialized()}


def run(workspace: Workspace, config: TrainConfig) -> TrainResult:
    """The two ranks together."""
    return train(workspace, config, launched=launched_shard())


def equal(config: TrainConfig) -> Callable[[Workspace, int], TrainResult]:
    return lambda workspace, rank: run(workspace, config)


def at_step(number: int, then: Callable[[], object], workspace: Workspace, config: TrainConfig) -> TrainResult:
    """The training; before that step of it, counted from 1, something happens on this rank."""
    real, steps = loop._step, 0

    def counting(*values: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == number:
            then()
        real(*values)

    loop._step = counting
    try:
        return run(workspace, config)
    finally:
        loop._step = real


def signalled(workspace: Workspace, rank: int) -> TrainResult:
    """The request to stop reaches rank 1 alone, in the fourth step of six."""
    stop = (lambda: os.kill(os.getpid(), signal.SIGTERM)) if rank == 1 else int
    return at_step(4, stop, workspace, short(epochs=2))


def out_of_time(workspace: Workspace, rank: int) -> TrainResult:
    """The clock of rank 1 alone says that the time is up."""
    return run(workspace, short(max_time_minutes=0 if rank == 1 else None))


def other_fold(workspace: Workspace, rank: int) -> TrainResult:
    return run(workspace, short(fold=str(rank)))


def not_shared(workspace: Workspace, rank: int) -> TrainResult:
    """Rank 1 looks at a copy of the workspace in which nothing was trained."""
    return run(Workspace(workspace.root / "copy") if rank else workspace, short(resume=True))


def no_plan(workspace: Workspace, rank: int) -> TrainResult:
    return run(Workspace(workspace.root / "nowhere") if rank else workspace, short())


def dies(workspace: Workspace, rank: int) -> TrainResult:
    """Rank 1 ends by an error of its own in the fifth step."""

    def crash() -> None:
        raise ZeroDivisionError

    return at_step(5, crash if rank == 1 else int, workspace, short())


SCENARIOS: dict[str, Callable[[Workspace, int], TrainResult]] = {
    **{name: equal(config) for name, (_, config) in EQUAL.items()},
    "long": equal(LONG),
    "bad": equal(short(iterations=8, augment="none", stop_epoch=1)),
    "all-bad": equal(short(iterations=8, augment="none")),
    "signalled": signalled,
    "out-of-time": out_of_time,
    "trained": equal(short()),
    "crowded": equal(replace(short(), batch_size=1)),
    "other-fold": other_fold,
    "not-shared": not_shared,
    "no-plan": no_plan,
    "dies": dies,
}


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
