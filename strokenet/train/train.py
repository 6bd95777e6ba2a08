"""Training: the loop, top to bottom (Isensee 2021, Methods; Meddahi 2024, VI.A).

Comes in: a workspace with a plan, splits and preprocessed cases. Goes out: fold_K/ with weights, log and curve.
An epoch is a fixed number of steps on drawn patches, then validation. After each epoch the state is on disk; a run
that is killed at any moment and resumed ends with the weights of one that was not.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from types import FrameType

import torch
from torch import Tensor, nn

from strokenet.data.track import Track, silent
from strokenet.infer.shard import Shard
from strokenet.signals import heeded
from strokenet.train.distributed import Ranks, joined
from strokenet.train.feed import Batch, Feed, WorkersLost
from strokenet.train.loss import deep_supervision_loss
from strokenet.train.record import checkpoint, derive, save
from strokenet.train.run import FoldCases, Run, TrainConfig, fold_cases, start_run
from strokenet.train.state import Progress
from strokenet.train.validate import validate_patches, validate_volumes
from strokenet.workspace import FoldFolder, Workspace

_log = logging.getLogger("strokenet")

GRADIENT_NORM = 12.0
POLY_EXPONENT = 0.9
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
    """Why to stop after the step at hand: a signal that came, or the time that is up, on any of the ranks.

    signal: what came to this process. agreed: what came to one of them and ends all after the same step.
    """

    deadline: float
    ranks: Ranks
    signal: int | None = None
    agreed: int | None = None

    def __call__(self) -> bool:
        number, late = self.ranks.most(self.signal or 0, time.monotonic() >= self.deadline)
        self.agreed = int(number) or None
        return bool(number or late)


def train(
    workspace: Workspace, config: TrainConfig, track: Track = silent, launched: Shard | None = None
) -> TrainResult:
    """Trains one fold. launched: this process among those that train it together (distributed.py); None: it is alone.

    Raises:
        InputError: no plan, a case that is not preprocessed by it, a fold that does not exist, a run that is there and
            --resume was not asked for, settings that changed since, five steps in a row without a finite loss, or a
            folder that cannot be written; of several ranks, that they cannot meet, that one is lost, or more of them
            than patches in a batch.
    """
    with joined(launched, config.device) as ranks:
        return _train(workspace, config, track if ranks.first else silent, ranks)


def _train(workspace: Workspace, config: TrainConfig, track: Track, ranks: Ranks) -> TrainResult:
    config = replace(config, resume=any(ranks.most(config.resume)))  # torchrun tells a restart where it happened
    minutes = config.max_time_minutes
    stop = _Stop(deadline=time.monotonic() + 60 * minutes if minutes is not None else math.inf, ranks=ranks)
    with ranks.together():
        plan = workspace.read_plan()
        cases = fold_cases(workspace, plan, config.fold)
        run = start_run(workspace, plan, config, cases, ranks)
        share = ranks.share(run.batch_size)
    place = {"fold": config.fold, "epoch": str(run.progress.epoch), "step": str(run.progress.step)}
    ranks.require_same(place | run.settings)
    with ranks.together():  # not before all have read what is there
        derive(run)  # what a kill may have left undone; and the folder can be written
    _freeze_unread_head(run)
    run.levels = ranks.wrap(run.levels)
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
    )
    with _arithmetic(config.deterministic), _listening(stop), feed:
        left = range(run.progress.epoch, last)
        for _ in track(left, total=len(left), what=f"train fold {config.fold}"):
            if stop() or not _epoch(run, feed, cases, track, stop):
                break
        finished = run.progress.epoch >= last
        if not finished:
            if run.progress.step:  # else the state on disk is this one
                checkpoint(run)
            _log.info("stopped in epoch %d; --resume goes on from here", run.progress.epoch + 1)
    ended_by = stop.agreed or stop.signal
    return TrainResult(folder=run.folder, history=tuple(run.history), signal=ended_by, finished=finished)


def _freeze_unread_head(run: Run) -> None:
    """The coarsest level has no weight in the loss: DDP must not wait for a gradient of its head."""
    heads = run.network.decoder.seg_layers
    if len(heads) > 1:
        heads[0].requires_grad_(False)


def poly_lr(lr: float, epoch: int, epochs: int) -> float:
    """Learning rate of an epoch: lr (1 - epoch / epochs)^0.9 (Meddahi 2024, VI.A)."""
    return float(lr * (1 - epoch / epochs) ** POLY_EXPONENT)


def moving_average(history: list[dict[str, float]], dice: float) -> float:
    """EMA of the pseudo-Dice: the first value, then 0.9 old + 0.1 new. An epoch without a value leaves it as it was."""
    before = history[-1]["ema_dice"] if history else math.nan
    if math.isnan(before) or math.isnan(dice):
        return dice if math.isnan(before) else before
    return EMA_KEEP * before + (1 - EMA_KEEP) * dice


def _epoch(run: Run, feed: Feed, cases: FoldCases, track: Track, stop: _Stop) -> bool:
    """What is left of one epoch. False where it was stopped: between two steps, or in the validation, which is redone.

    Whatever the validation ends with, the steps before it are on disk.
    """
    if not _train_steps(run, feed, track, stop):
        return False
    try:
        row = _validate(run, feed, cases, track, stop)
    except BaseException:
        save(run)
        raise
    if row is None:
        return False
    run.history.append(row)
    run.progress = Progress(epoch=run.progress.epoch + 1, bad_in_row=run.progress.bad_in_row)
    checkpoint(run)
    return True


def _train_steps(run: Run, feed: Feed, track: Track, stop: _Stop) -> bool:
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
                now = time.monotonic()
                progress.seconds, began = progress.seconds + now - began, now
                if stop():
                    return False
    except WorkersLost:
        if stop.signal is None or not run.ranks.alone:
            raise
        return False  # the signal went to the whole group of processes
    return True


def _step(run: Run, batch: Batch) -> None:
    """Forward, backward, clip, update. A loss or gradient that is not finite skips the update and names the cases."""
    run.optimizer.zero_grad(set_to_none=True)
    with run.autocast():
        levels = run.levels(batch.image)
    loss = deep_supervision_loss(levels, batch.label, batch_dice=run.plan.batch_dice, part=run.part)
    value = float(run.ranks.mean(loss.detach()))  # the same on all ranks: they skip together
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
    cases = [name for part in run.ranks.gathered(batch.cases) for name in part]
    where = f"epoch {run.progress.epoch + 1}, step {run.progress.step + 1}, cases {', '.join(cases)}"
    if run.ranks.first:
        _log.warning("loss or gradient is not finite (%s): step skipped", where)
    if run.progress.bad_in_row >= MAX_BAD_STEPS:
        raise run.ranks.error(
            f"{run.folder.root}: {MAX_BAD_STEPS} steps in a row without a finite loss and gradient ({where}); the last "
            "good checkpoint is kept; mend these cases, preprocess and --resume, or start again with a lower --lr"
        )


def _validate(run: Run, feed: Feed, cases: FoldCases, track: Track, stop: _Stop) -> dict[str, float] | None:
    """Validation patches, whole volumes where they are due. The epoch's row of the log; None where stopped."""
    progress, config = run.progress, run.config
    began = time.monotonic()
    score = validate_patches(run, feed, track, stop)
    if score is None:
        return None
    volume_dice: float | None = math.nan
    if due := bool(config.validate_every) and (progress.epoch + 1) % config.validate_every == 0:
        save(run)  # whole volumes take long and much memory
        volume_dice = validate_volumes(run, cases.val, track, stop)
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
    """A signal asks to stop after the step at hand; a second one ends at once."""

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
