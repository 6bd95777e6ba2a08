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
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace

import torch

from strokenet.data.track import Track, silent
from strokenet.infer.shard import Shard
from strokenet.train.distributed import Ranks, joined
from strokenet.train.feed import Batch, Feed, WorkersLost
from strokenet.train.launch import Outcome, Steps, make_steps
from strokenet.train.moment import View, moment_of, unseen
from strokenet.train.record import derive, draw, state_of
from strokenet.train.resident import Source, fold_source
from strokenet.train.run import FoldCases, Run, TrainConfig, fold_cases, start_run
from strokenet.train.schedule import poly_lr
from strokenet.train.state import Progress
from strokenet.train.step import REFERENCE, Speedups
from strokenet.train.stopping import Stop, listening
from strokenet.train.validate import validate_patches, validate_volumes
from strokenet.train.writer import CheckpointWriter
from strokenet.workspace import FoldFolder, Workspace

_log = logging.getLogger("strokenet")

EMA_KEEP = 0.9
MAX_BAD_STEPS = 5


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """How a run ended. signal: the number of the signal that stopped it, else None. finished: no epoch is left."""

    folder: FoldFolder
    history: tuple[Mapping[str, float], ...]
    signal: int | None
    finished: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class _Training:
    """What the loop works with. last: the epoch after which it ends."""

    run: Run
    steps: Steps
    feed: Feed
    writer: CheckpointWriter
    cases: FoldCases
    last: int
    track: Track
    view: View
    stop: Stop


def train(
    workspace: Workspace,
    config: TrainConfig,
    track: Track = silent,
    view: View = unseen,
    launched: Shard | None = None,
) -> TrainResult:
    """Trains one fold.

    view: shown the run after every step. launched: this process among those that train it together (distributed.py),
    of which the first one shows and writes; None: it is alone.

    Raises:
        InputError: no plan, a case that is not preprocessed by it, a fold that does not exist, a run that is there and
            --resume was not asked for, settings that changed since, five steps in a row without a finite loss, or a
            folder that cannot be written; of several ranks, that they cannot meet, that one is lost, or more of them
            than patches in a batch.
    """
    with joined(launched, config.device) as ranks:
        shown = (track, view) if ranks.first else (silent, unseen)
        return _train(workspace, config, *shown, ranks)


def _train(workspace: Workspace, config: TrainConfig, track: Track, view: View, ranks: Ranks) -> TrainResult:
    config = replace(config, resume=any(ranks.most(config.resume)))  # torchrun tells a restart where it happened
    minutes = config.max_time_minutes
    stop = Stop(deadline=time.monotonic() + 60 * minutes if minutes is not None else math.inf, ranks=ranks)
    with ranks.together():
        plan = workspace.read_plan()
        cases = fold_cases(workspace, plan, config.fold)
        run = start_run(workspace, plan, config, cases, ranks)
        share = ranks.share(run.batch_size)
    place = {"fold": config.fold, "epoch": str(run.progress.epoch), "step": str(run.progress.step)}
    ranks.require_same(place | run.settings)
    with ranks.together():  # not before all have read what is there
        if ranks.first:
            derive(run.folder, state_of(run))  # what a kill may have left undone; and the folder can be written
            draw(run.folder, state_of(run))
    steps = make_steps(run, speedups_of(config, run.device))
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
        share=share,
        neighbours=ranks.neighbours,
        source=_source(run, cases, track, len(share)),
    )
    with _arithmetic(config.deterministic), listening(stop), feed, CheckpointWriter(run) as writer:
        training = _Training(
            run=run, steps=steps, feed=feed, writer=writer, cases=cases, last=last, track=track, view=view, stop=stop
        )
        left = range(run.progress.epoch, last)
        for _ in track(left, total=len(left), what=f"train fold {config.fold}"):
            if stop() or not _epoch(training):
                break
        finished = run.progress.epoch >= last
        if not finished:
            if run.progress.step:  # else the state on disk is this one
                writer.checkpoint()
            writer.wait()
            _log.info("stopped in epoch %d; --resume goes on from here", run.progress.epoch + 1)
    ended_by = stop.agreed or stop.signal
    return TrainResult(folder=run.folder, history=tuple(run.history), signal=ended_by, finished=finished)


def speedups_of(config: TrainConfig, device: torch.device) -> Speedups:
    """What makes a step fast where it is computed; Apple's GPUs take torch's own layers and update."""
    fast = config.step == "fast" and device.type in ("cpu", "cuda")
    return replace(Speedups() if fast else REFERENCE, compile=config.compile)


def moving_average(history: list[dict[str, float]], dice: float) -> float:
    """EMA of the pseudo-Dice: the first value, then 0.9 old + 0.1 new. An epoch without a value leaves it as it was."""
    before = history[-1]["ema_dice"] if history else math.nan
    if math.isnan(before) or math.isnan(dice):
        return dice if math.isnan(before) else before
    return EMA_KEEP * before + (1 - EMA_KEEP) * dice


def _source(run: Run, cases: FoldCases, track: Track, samples: int) -> Source:
    """Cases on the device as far as --resident-gb or its memory goes; none where worker processes cut on the CPU.

    samples: of a step, on this device.
    """
    return fold_source(
        (*cases.train, *cases.val),
        run.plan,
        asked_gb=0 if run.config.augment == "batchgenerators" else run.config.resident_gb,
        batch_size=samples,
        dtype=run.dtype,
        device=run.device,
        track=track,
    )


def _epoch(training: _Training) -> bool:
    """What is left of one epoch. False where it was stopped: between two steps, or in the validation, which is redone.

    Whatever the validation ends with, the steps before it are on disk.
    """
    run = training.run
    if not _train_steps(training):
        return False
    try:
        row = _validate(training)
    except BaseException:
        training.writer.save()
        raise
    if row is None:
        return False
    run.history.append(row)
    run.progress = Progress(epoch=run.progress.epoch + 1, bad_in_row=run.progress.bad_in_row)
    training.writer.checkpoint()
    return True


def _train_steps(training: _Training) -> bool:
    """The steps that are left of the epoch. False where it was stopped after one of them."""
    run, stop = training.run, training.stop
    progress, config = run.progress, run.config
    run.network.train()
    training.steps.begin(poly_lr(config.lr, progress.epoch, config.epochs))
    steps = range(progress.step, config.iterations)
    clock = _Clock(progress)
    try:
        with closing(training.feed.batches("train", progress.epoch, steps)) as batches:
            for batch in training.track(batches, total=len(steps), what=f"epoch {progress.epoch + 1}"):
                clock.waited()
                _step(training, batch)
                _checkpoint_if_due(training)
                clock.worked()
                training.view(moment_of(run, training.last))
                if stop():
                    break
    except WorkersLost:
        if stop.signal is None or not run.ranks.alone:
            raise  # else the signal went to the whole group of processes
    _note(run, training.steps.rest())
    clock.worked()
    return progress.step == config.iterations and not stop()


def _step(training: _Training, batch: Batch) -> None:
    """One step more, and what became of those that are known by now."""
    progress = training.run.progress
    _note(training.run, training.steps(batch, progress.step))
    progress.step += 1


def _checkpoint_if_due(training: _Training) -> None:
    """The state within an epoch, so that a kill costs minutes; what became of the steps in it is waited for."""
    if training.writer.due():
        _note(training.run, training.steps.rest())
        training.writer.save()


class _Clock:
    """Adds the time since it was last read to the seconds of the steps, and to those of waiting for data."""

    def __init__(self, progress: Progress):
        self._progress, self._read = progress, time.monotonic()

    def waited(self) -> None:
        """What was until now was waiting."""
        self._progress.waited += self._add()

    def worked(self) -> None:
        """What was until now was a step."""
        self._add()

    def _add(self) -> float:
        now = time.monotonic()
        passed, self._read = now - self._read, now
        self._progress.seconds += passed
        return passed


def _note(run: Run, outcomes: list[Outcome]) -> None:
    """Counts what became of steps. One whose loss or gradient is not finite has left the weights as they were."""
    for outcome in outcomes:
        if outcome.good:
            run.progress.loss_sum += outcome.loss
            run.progress.loss_count += 1
            run.progress.bad_in_row = 0
        else:
            _skipped(run, outcome)


def _skipped(run: Run, outcome: Outcome) -> None:
    run.progress.skipped += 1
    run.progress.bad_in_row += 1
    where = f"epoch {run.progress.epoch + 1}, step {outcome.number + 1}, cases {', '.join(outcome.cases)}"
    _log.warning("loss or gradient is not finite (%s): step skipped", where)
    if run.progress.bad_in_row >= MAX_BAD_STEPS:
        raise run.ranks.error(
            f"{run.folder.root}: {MAX_BAD_STEPS} steps in a row without a finite loss and gradient ({where}); the last "
            "good checkpoint is kept; mend these cases, preprocess and --resume, or start again with a lower --lr"
        )


def _validate(training: _Training) -> dict[str, float] | None:
    """Validation patches, whole volumes where they are due. The epoch's row of the log; None where stopped."""
    run, track, stop = training.run, training.track, training.stop
    progress, config = run.progress, run.config
    began = time.monotonic()

    def stopped() -> bool:
        _checkpoint_if_due(training)  # a long validation is no reason to lose the steps before it
        return stop()

    score = validate_patches(run, training.feed, track, stopped)
    if score is None:
        return None
    volume_dice: float | None = math.nan
    if due := bool(config.validate_every) and (progress.epoch + 1) % config.validate_every == 0:
        training.writer.save()
        training.writer.wait()  # whole volumes take long and much memory
        volume_dice = validate_volumes(run, training.cases.val, track, stopped)
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
