"""Training: the loop, top to bottom (Isensee 2021, Methods; Meddahi 2024, VI.A).

Comes in: a workspace with a plan, splits and preprocessed cases. Goes out: fold_K/ with weights, log and curve.
An epoch is a fixed number of steps on drawn patches, then validation patches. After each epoch the state is on disk;
a run that is killed at any moment and resumed ends with the weights of one that was not.
"""

from __future__ import annotations

import csv
import io
import logging
import math
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import numpy as np
import torch
from torch import Tensor, nn

from strokenet.data.errors import InputError
from strokenet.data.files import write_bytes
from strokenet.data.track import Track, silent
from strokenet.infer.sliding_window import predict_logits
from strokenet.model.checkpoint import save_weights
from strokenet.preprocess.store import StoredCase
from strokenet.train.curve import draw_curve
from strokenet.train.feed import Batch, Feed
from strokenet.train.loss import deep_supervision_loss
from strokenet.train.run import Run, TrainConfig, fold_cases, start_run
from strokenet.train.state import Progress, State, save_state
from strokenet.workspace import FoldFolder, Workspace

_log = logging.getLogger("strokenet")

GRADIENT_NORM = 12.0
POLY_EXPONENT = 0.9
EMA_KEEP = 0.9
MAX_BAD_STEPS = 5
COLUMNS = (
    *("epoch", "lr", "train_loss", "val_loss", "pseudo_dice", "ema_dice"),
    *("seconds", "data_wait_share", "skipped_steps", "volume_dice"),
)


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

    def __bool__(self) -> bool:
        return self.signal is not None or time.monotonic() > self.deadline


def train(workspace: Workspace, config: TrainConfig, track: Track = silent) -> TrainResult:
    """Trains one fold.

    Raises:
        InputError: no plan, no preprocessed case, a fold that does not exist, a run that is there and --resume was not
            asked for, settings that changed since, or five steps in a row without a finite loss.
    """
    plan = workspace.read_plan()
    train_cases, val_cases = fold_cases(workspace, config.fold)
    run = start_run(workspace, plan, config)
    if run.history:
        _derive(run)  # what a kill may have left behind the state
    last = min(config.epochs, config.stop_epoch or config.epochs)
    minutes = config.max_time_minutes
    stop = _Stop(deadline=time.monotonic() + 60 * minutes if minutes is not None else math.inf)
    feed = Feed(
        plan,
        train=train_cases,
        val=val_cases,
        batch_size=run.batch_size,
        seed=config.seed,
        augmentation=config.augment,
        device=run.device,
    )
    with _reproducible(config.deterministic), _listening(stop), feed:
        left = range(run.progress.epoch, last)
        for epoch in track(left, total=len(left), what=f"train fold {config.fold}"):
            if stop or not _train_epoch(run, feed, epoch, stop):
                break
            _validate(run, feed, epoch, val_cases)
            _checkpoint(run)
    finished = run.progress.epoch >= last
    if not finished:
        _checkpoint(run)
        _log.info("stopped in epoch %d; `--resume` goes on from here", run.progress.epoch)
    return TrainResult(folder=run.folder, history=tuple(run.history), signal=stop.signal, finished=finished)


def poly_lr(lr: float, epoch: int, epochs: int) -> float:
    """Learning rate of an epoch: lr (1 - epoch / epochs)^0.9 (Meddahi 2024, VI.A)."""
    return float(lr * (1 - epoch / epochs) ** POLY_EXPONENT)


def _train_epoch(run: Run, feed: Feed, epoch: int, stop: _Stop) -> bool:
    """The steps that are left of one epoch. False where it was stopped between two of them."""
    progress, config = run.progress, run.config
    run.network.train()
    for group in run.optimizer.param_groups:
        group["lr"] = poly_lr(config.lr, epoch, config.epochs)
    began = time.monotonic()
    batches = feed.batches("train", epoch, range(progress.step, config.iterations))
    for batch in batches:
        ready = time.monotonic()
        progress.waited += ready - began
        _step(run, batch)
        progress.step += 1
        now = time.monotonic()
        progress.seconds, began = progress.seconds + now - began, now
        if stop and progress.step < config.iterations:
            batches.close()
            return False
    return True


def _step(run: Run, batch: Batch) -> None:
    """Forward, backward, clip, update. A loss that is not finite skips the update and names the batch's cases."""
    run.optimizer.zero_grad(set_to_none=True)
    loss = _loss(run, batch)
    value = float(loss.detach())
    norm = math.nan
    if math.isfinite(value):
        run.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        run.scaler.unscale_(run.optimizer)
        norm = float(nn.utils.clip_grad_norm_(run.network.parameters(), GRADIENT_NORM))
    overflow = run.scaler.is_enabled() and math.isfinite(value)  # float16: the scaler skips and lowers its scale itself
    if math.isfinite(norm) or overflow:
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.progress.loss_sum += value
        run.progress.loss_count += 1
        run.progress.bad_in_row = 0
        return
    _skip(run, batch)


def _skip(run: Run, batch: Batch) -> None:
    run.progress.skipped += 1
    run.progress.bad_in_row += 1
    where = f"epoch {run.progress.epoch}, step {run.progress.step}, cases {', '.join(batch.cases)}"
    _log.warning("the loss is not finite (%s): step skipped", where)
    if run.progress.bad_in_row >= MAX_BAD_STEPS:
        raise InputError(
            f"{run.folder.root}: {MAX_BAD_STEPS} steps in a row without a finite loss ({where}); the last good "
            "checkpoint is kept; look at these cases, or lower --lr, and --resume"
        )


def _loss(run: Run, batch: Batch) -> Tensor:
    with torch.autocast(run.device.type, dtype=run.dtype, enabled=run.dtype != torch.float32):
        levels = run.network.forward_levels(batch.image)
    return deep_supervision_loss(levels, batch.label, batch_dice=run.plan.batch_dice)


def _validate(run: Run, feed: Feed, epoch: int, cases: Sequence[StoredCase]) -> None:
    """Validation patches, then the epoch's row of the log. The next epoch becomes the current one."""
    progress, config = run.progress, run.config
    if progress.loss_count == 0:
        raise InputError(f"{run.folder.root}: epoch {epoch} had no step with a finite loss")
    began = time.monotonic()
    run.network.eval()
    val_loss, dice = _validation_patches(run, feed, epoch)
    due = config.validate_every and (epoch + 1) % config.validate_every == 0
    volume_dice = _volume_dice(run, cases) if due else math.nan
    previous = run.history[-1]["ema_dice"] if run.history else dice
    seconds = progress.seconds + time.monotonic() - began
    row = {
        "epoch": epoch,
        "lr": poly_lr(config.lr, epoch, config.epochs),
        "train_loss": progress.loss_sum / progress.loss_count,
        "val_loss": val_loss,
        "pseudo_dice": dice,
        "ema_dice": EMA_KEEP * previous + (1 - EMA_KEEP) * dice,
        "seconds": seconds,
        "data_wait_share": progress.waited / seconds,
        "skipped_steps": progress.skipped,
        "volume_dice": volume_dice,
    }
    run.history.append(row)
    run.progress = Progress(epoch=epoch + 1, bad_in_row=progress.bad_in_row)
    _log.info(
        "epoch %d/%d  loss %.3f  val %.3f  pseudo-Dice %.3f (mean %.3f)  %.1f s, %.0f %% waiting for data%s",
        *(epoch + 1, config.epochs, row["train_loss"], val_loss, dice, row["ema_dice"], seconds),
        *(100 * row["data_wait_share"], f"  volume Dice {volume_dice:.3f}" if due else ""),
    )


def _validation_patches(run: Run, feed: Feed, epoch: int) -> tuple[float, float]:
    """Mean loss, and the mean over labels of the Dice of all validation patches taken together ("pseudo-Dice")."""
    losses = []
    counts = torch.zeros(3, run.plan.heads - 1, dtype=torch.int64)  # true positive, false positive, false negative
    with torch.inference_mode():
        for batch in feed.batches("val", epoch, range(run.config.val_iterations)):
            with torch.autocast(run.device.type, dtype=run.dtype, enabled=run.dtype != torch.float32):
                levels = run.network.forward_levels(batch.image)
            losses.append(float(deep_supervision_loss(levels, batch.label, batch_dice=run.plan.batch_dice)))
            counts += _confusion(levels[0].argmax(1), batch.label, run.plan.foreground)
    return float(np.mean(losses)), _mean_dice(counts)


def _confusion(predicted: Tensor, label: Tensor, foreground: Sequence[int]) -> Tensor:
    rows = [
        ((predicted == v) & (label == v), (predicted == v) & (label != v), (predicted != v) & (label == v))
        for v in foreground
    ]
    return torch.tensor([[int(part.sum()) for part in row] for row in rows]).T


def _mean_dice(counts: Tensor) -> float:
    """Mean Dice of the labels that occur in reference or prediction; 0 where none does."""
    true_positive, false_positive, false_negative = counts.double()
    size = 2 * true_positive + false_positive + false_negative
    return float((2 * true_positive / size)[size > 0].mean()) if bool((size > 0).any()) else 0.0


def _volume_dice(run: Run, cases: Sequence[StoredCase]) -> float:
    """Mean over the validation cases of the Dice of whole volumes, by the sliding window, on the plan's grid."""
    scores = []
    for case in cases:
        image = torch.from_numpy(np.array(case.image))
        logits = predict_logits([run.network], image, patch=run.plan.patch, dtype=run.dtype, device=run.device)
        label = torch.from_numpy(np.array(case.label)).clamp_min(0).to(run.device)
        scores.append(_mean_dice(_confusion(logits.argmax(0), label, run.plan.foreground)))
    return float(np.mean(scores))


def _checkpoint(run: Run) -> None:
    """State first, then what is derived from it: a kill in between is mended by the next --resume."""
    state = State(
        progress=run.progress,
        network=run.network.state_dict(),
        optimizer=run.optimizer.state_dict(),
        scaler=run.scaler.state_dict(),
        history=run.history,
        settings=run.settings,
    )
    save_state(run.folder, state)
    _derive(run)


def _derive(run: Run) -> None:
    """last and best weights, log.csv and the curve, from the run as it stands."""
    note = {"epoch": str(run.progress.epoch), "init": run.settings.get("init", "random")}
    weights = run.network.state_dict()
    save_weights(run.folder.last, weights, note=note)
    if not run.history:
        return
    means = [row["ema_dice"] for row in run.history]
    if run.progress.step == 0 and means[-1] > max(means[:-1], default=-math.inf):
        save_weights(run.folder.best, weights, note=note)
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {k: "" if isinstance(v, float) and math.isnan(v) else v for k, v in r.items()} for r in run.history
    )
    write_bytes(run.folder.log, text.getvalue().encode())
    draw_curve(run.history, run.folder.curve)


@contextmanager
def _reproducible(deterministic: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic or before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def _listening(stop: _Stop) -> Iterator[None]:
    """SIGTERM and SIGINT ask to stop after the step at hand; a second one ends at once."""

    def note(number: int, frame: FrameType | None) -> None:
        if stop.signal is not None:
            raise KeyboardInterrupt
        stop.signal = number
        _log.info("signal %d: finishing the step, then writing a checkpoint", number)

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not in the main thread: the caller handles signals
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
