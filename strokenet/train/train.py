"""Training: the loop, top to bottom (Isensee 2021, Methods; Meddahi 2024, VI.A).

Comes in: a workspace with a plan, splits and preprocessed cases. Goes out: fold_K/ with weights, log and curve.
An epoch is a fixed number of steps on drawn patches, then validation patches. After each epoch the state is on disk;
a run that is killed at any moment and resumed ends with the weights of one that was not.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import math
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from planner import plan as plans
from planner.plan import Plan
from strokenet.data.errors import InputError
from strokenet.data.files import write_bytes
from strokenet.data.track import Track, silent
from strokenet.infer.sliding_window import predict_logits
from strokenet.model.checkpoint import load_weights, save_weights
from strokenet.model.device import Precision, choose_device, choose_dtype
from strokenet.model.network import UNet, build_network
from strokenet.preprocess.store import Store, StoredCase
from strokenet.train.curve import draw_curve
from strokenet.train.feed import Augmentation, Batch, Feed
from strokenet.train.loss import deep_supervision_loss
from strokenet.train.state import Progress, State, load_state, save_state
from strokenet.workspace import FoldFolder, Workspace

_log = logging.getLogger("strokenet")

MOMENTUM = 0.99
WEIGHT_DECAY = 3e-5
GRADIENT_NORM = 12.0
POLY_EXPONENT = 0.9
EMA_KEEP = 0.9
MAX_BAD_STEPS = 5
COLUMNS = (
    *("epoch", "lr", "train_loss", "val_loss", "pseudo_dice", "ema_dice"),
    *("seconds", "data_wait_share", "skipped_steps", "volume_dice"),
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long and with what; the defaults are nnU-Net's.

    fold: "0" .. "4" or "all". epochs: length of the schedule. stop_epoch: stop there, the schedule stays (the paper
    stops 3,000 epochs at 2,500). batch_size: None takes the plan's. init: a model folder whose weights to start from.
    validate_every: whole validation volumes every so many epochs, 0 never. max_time_minutes: None for no limit.
    """

    fold: str = "0"
    epochs: int = 1000
    stop_epoch: int | None = None
    iterations: int = 250
    val_iterations: int = 50
    batch_size: int | None = None
    lr: float = 1e-2
    init: Path | None = None
    init_heads: Literal["keep", "new"] = "keep"
    augment: Augmentation = "device"
    validate_every: int = 0
    precision: Precision = "auto"
    device: str = "auto"
    resume: bool = False
    max_time_minutes: float | None = None
    seed: int = 0
    deterministic: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "iterations", "val_iterations", "batch_size", "stop_epoch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}; allowed: 1 or more")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise InputError(f"lr is {self.lr}; a positive number is needed")


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """How a run ended. signal: the number of the signal that stopped it, else None. finished: no epoch is left."""

    folder: FoldFolder
    history: tuple[Mapping[str, float], ...]
    signal: int | None
    finished: bool


@dataclass(kw_only=True, eq=False)
class _Run:
    """What changes while a fold trains."""

    plan: Plan
    config: TrainConfig
    folder: FoldFolder
    device: torch.device
    dtype: torch.dtype
    network: UNet
    optimizer: torch.optim.SGD
    scaler: torch.amp.GradScaler
    settings: dict[str, str]
    progress: Progress = field(default_factory=Progress)
    history: list[dict[str, float]] = field(default_factory=list)

    @property
    def batch_size(self) -> int:
        return self.config.batch_size or self.plan.batch_size


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
    train_cases, val_cases = _cases(workspace, config.fold)
    run = _start(workspace, plan, config)
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


def _cases(workspace: Workspace, fold: str) -> tuple[list[StoredCase], list[StoredCase]]:
    store = Store(workspace.preprocessed)
    dataset = workspace.read_dataset()
    if fold == "all":
        names = tuple(case.case_id for case in dataset.cases)
        opened = [store.open(name) for name in names]
        return opened, opened
    splits = workspace.read_splits()
    if not fold.isdigit() or int(fold) >= len(splits):
        allowed = ", ".join([*(str(i) for i in range(len(splits))), "all"])
        raise InputError(f"fold {fold!r}: {workspace.splits_file} has {len(splits)} folds; allowed: {allowed}")
    split = splits[int(fold)]
    return [store.open(name) for name in split.train], [store.open(name) for name in split.val]


def _start(workspace: Workspace, plan: Plan, config: TrainConfig) -> _Run:
    """A run at its first step, or where the state on disk left it."""
    folder = workspace.fold(config.fold)
    device = choose_device(config.device)
    dtype = choose_dtype(config.precision, device)
    settings = _settings(plan, config)
    state = load_state(folder)
    if state is not None and not config.resume:
        raise InputError(f"{folder.root}: a run is there; `--resume` continues it, or remove the folder to start again")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = build_network(plan)
    if state is None and config.init is not None:
        settings["init"] = _initialise(network, plan, config)
    network.to(device)
    run = _Run(
        plan=plan,
        config=config,
        folder=folder,
        device=device,
        dtype=dtype,
        network=network,
        optimizer=torch.optim.SGD(
            network.parameters(), config.lr, MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True
        ),
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
        settings=settings,
    )
    if state is not None:
        _restore(run, state)
    return run


def _settings(plan: Plan, config: TrainConfig) -> dict[str, str]:
    """What a resumed run must share with the one that was stopped, as text."""
    content = json.dumps(plans.to_json(plan), sort_keys=True).encode()
    names = ("iterations", "val_iterations", "batch_size", "lr", "augment", "seed")
    return {"plan": hashlib.sha256(content).hexdigest(), **{name: str(getattr(config, name)) for name in names}}


def _restore(run: _Run, state: State) -> None:
    changed = [name for name in run.settings if run.settings[name] != state.settings.get(name)]
    if changed:
        pairs = "; ".join(f"{name} was {state.settings.get(name)}, is {run.settings[name]}" for name in changed)
        raise InputError(f"{run.folder.root}: cannot resume with other settings: {pairs}")
    run.network.load_state_dict(state.network)
    run.optimizer.load_state_dict(state.optimizer)
    run.scaler.load_state_dict(state.scaler)
    run.progress, run.history, run.settings = state.progress, state.history, state.settings
    _derive(run)
    _log.info("resuming at epoch %d, step %d", run.progress.epoch, run.progress.step)


def _initialise(network: UNet, plan: Plan, config: TrainConfig) -> str:
    """Weights of another model with the same shapes; says what became of the heads.

    The heads are kept when the label sets agree; --init-heads new leaves them at random (nnU-Net's rule).
    """
    assert config.init is not None
    source = Workspace(config.init)
    source_plan = source.read_plan()
    folds = source.trained_folds()
    if not folds:
        raise InputError(f"--init {config.init}: no trained fold there")
    file = source.fold(folds[0]).weights
    assert file is not None
    weights = load_weights(file, source_plan)
    keep = config.init_heads == "keep" and dict(source_plan.labels) == dict(plan.labels)
    if not keep:
        weights = {name: tensor for name, tensor in weights.items() if ".seg_layers." not in name}
    own = network.state_dict()
    body = [name for name in own if keep or ".seg_layers." not in name]
    wrong = [name for name in body if name not in weights or weights[name].shape != own[name].shape]
    wrong += [name for name in weights if name not in own]
    if wrong:
        raise InputError(
            f"--init {config.init}: {len(wrong)} parameters differ from the plan's network, first {wrong[0]}; "
            "the two plans must give networks of one shape and the same number of channels"
        )
    network.load_state_dict(weights, strict=False)
    heads = "heads kept" if keep else "heads new"
    _log.info("initialised from %s (fold %s), %s", config.init, folds[0], heads)
    return f"{config.init.name}, fold {folds[0]}, {heads}"


def _train_epoch(run: _Run, feed: Feed, epoch: int, stop: _Stop) -> bool:
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


def _step(run: _Run, batch: Batch) -> None:
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


def _skip(run: _Run, batch: Batch) -> None:
    run.progress.skipped += 1
    run.progress.bad_in_row += 1
    where = f"epoch {run.progress.epoch}, step {run.progress.step}, cases {', '.join(batch.cases)}"
    _log.warning("the loss is not finite (%s): step skipped", where)
    if run.progress.bad_in_row >= MAX_BAD_STEPS:
        raise InputError(
            f"{run.folder.root}: {MAX_BAD_STEPS} steps in a row without a finite loss ({where}); the last good "
            "checkpoint is kept; look at these cases, or lower --lr, and --resume"
        )


def _loss(run: _Run, batch: Batch) -> Tensor:
    with torch.autocast(run.device.type, dtype=run.dtype, enabled=run.dtype != torch.float32):
        levels = run.network.forward_levels(batch.image)
    return deep_supervision_loss(levels, batch.label, batch_dice=run.plan.batch_dice)


def _validate(run: _Run, feed: Feed, epoch: int, cases: Sequence[StoredCase]) -> None:
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


def _validation_patches(run: _Run, feed: Feed, epoch: int) -> tuple[float, float]:
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


def _volume_dice(run: _Run, cases: Sequence[StoredCase]) -> float:
    """Mean over the validation cases of the Dice of whole volumes, by the sliding window, on the plan's grid."""
    scores = []
    for case in cases:
        image = torch.from_numpy(np.array(case.image))
        logits = predict_logits([run.network], image, patch=run.plan.patch, dtype=run.dtype, device=run.device)
        label = torch.from_numpy(np.array(case.label)).clamp_min(0).to(run.device)
        scores.append(_mean_dice(_confusion(logits.argmax(0), label, run.plan.foreground)))
    return float(np.mean(scores))


def _checkpoint(run: _Run) -> None:
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


def _derive(run: _Run) -> None:
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
    writer.writerows({k: "" if isinstance(v, float) and math.isnan(v) else v for k, v in r.items()} for r in run.history)
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
