"""The start of a run: what is asked for, which cases, and a network that is fresh, given, or where a run left it."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from planner import plan as plans
from planner.plan import Plan
from strokenet.data.errors import InputError
from strokenet.model.device import Precision, choose_device, choose_dtype
from strokenet.model.network import UNet, build_network
from strokenet.preprocess.store import Store, StoredCase
from strokenet.train.distributed import ALONE, Ranks
from strokenet.train.dropout import check_dropout
from strokenet.train.feed import Augmentation
from strokenet.train.initial import InitHeads, initialise
from strokenet.train.loss import Part
from strokenet.train.schedule import poly_lr
from strokenet.train.state import Progress, State, has_state, load_state, remove_leftovers
from strokenet.workspace import FoldFolder, Workspace

_log = logging.getLogger("strokenet")

MOMENTUM = 0.99
WEIGHT_DECAY = 3e-5
StepForm = Literal["fast", "reference"]
_OPTIONS = {"iterations": "--iters-per-epoch", "val_iterations": "--val-iters"}  # not the setting's own name
_BEFORE = {"modality_dropout": "0.0"}  # settings that states of earlier versions do not name


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long and with what; the defaults are nnU-Net's.

    fold: "0" .. "4" or "all". epochs: length of the schedule. stop_epoch: stop there, the schedule stays (the paper
    stops 3,000 epochs at 2,500). batch_size: None takes the plan's. init: a model folder whose weights to start from;
    init_heads: keep its heads where the label sets agree, or start with new ones (nnU-Net's rule).
    modality_dropout: chance that a training patch loses some of its channels (dropout.py): one model for any of them.
    resident_gb: GPU memory (10^9 bytes) for cases (resident.py), 0 streams all, None what the network leaves free; on a
    CPU cases stay in their memory maps.
    validate_every: whole validation volumes every so many epochs, 0 never. max_time_minutes: None for no limit.
    step: "fast", or "reference": as torch's own layers and update compute it (step.py). compile: by torch.compile.
    checkpoint_minutes: the state goes to disk after every epoch, and within an epoch that often too; 0 after each step
    that finds the disk idle.
    """

    fold: str = "0"
    epochs: int = 1000
    stop_epoch: int | None = None
    iterations: int = 250
    val_iterations: int = 50
    batch_size: int | None = None
    lr: float = 1e-2
    init: Path | None = None
    init_heads: InitHeads = "keep"
    augment: Augmentation = "device"
    modality_dropout: float = 0.0
    resident_gb: float | None = None
    validate_every: int = 0
    precision: Precision = "auto"
    step: StepForm = "fast"
    compile: bool = False
    device: str = "auto"
    resume: bool = False
    max_time_minutes: float | None = None
    checkpoint_minutes: float = 10
    seed: int = 0
    deterministic: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "iterations", "val_iterations", "batch_size", "stop_epoch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}; allowed: 1 or more")
        for name in ("validate_every", "seed", "max_time_minutes", "checkpoint_minutes", "resident_gb"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise InputError(f"{name} is {value}; allowed: 0 or more")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise InputError(f"lr is {self.lr}; a positive number is needed")
        if self.resident_gb == math.inf:
            raise InputError("resident_gb is inf; give a number, or leave it out for what the network leaves free")
        if not 0 <= self.modality_dropout <= 1:  # not: NaN too
            raise InputError(f"modality_dropout is {self.modality_dropout}; allowed: 0 to 1")
        for name, kind in (
            ("init_heads", InitHeads),
            ("augment", Augmentation),
            ("precision", Precision),
            ("step", StepForm),
        ):
            if getattr(self, name) not in get_args(kind):
                raise InputError(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(get_args(kind))}")


@dataclass(frozen=True, kw_only=True, eq=False)
class FoldCases:
    """The preprocessed cases of one fold."""

    train: tuple[StoredCase, ...]
    val: tuple[StoredCase, ...]


@dataclass(kw_only=True, eq=False)
class Run:
    """What changes while a fold trains.

    settings: what a resumed run must share with it, and where its weights come from. history: the rows of log.csv.
    """

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
    ranks: Ranks = ALONE

    @property
    def batch_size(self) -> int:
        """Of the whole batch, all ranks together."""
        return self.config.batch_size or self.plan.batch_size

    @property
    def part(self) -> Part:
        """This rank's of the batch."""
        return self.ranks.part(self.batch_size)

    def autocast(self) -> AbstractContextManager[Any]:
        """The arithmetic of the forward pass: --precision."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)


def fold_cases(workspace: Workspace, plan: Plan, fold: str) -> FoldCases:
    """The cases of fold "0", "1" ..., or for "all" every case on both sides.

    Raises:
        InputError: no such fold, a side of it is empty, or a case is not preprocessed by this plan.
    """
    if fold == "all":
        names = [case.case_id for case in workspace.read_dataset().cases]
        sides = {"train": names, "val": names}
    else:
        splits = workspace.read_splits()
        numbers = [str(number) for number in range(len(splits))]
        if fold not in numbers:
            if not splits:
                raise InputError(f"{workspace.root}: one subject, so there are no folds; use --fold all")
            raise InputError(f"{workspace.root}: fold {fold} does not exist; allowed: {', '.join([*numbers, 'all'])}")
        split = splits[int(fold)]
        sides = {"train": list(split.train), "val": list(split.val)}
    for side, names in sides.items():
        if not names:
            raise InputError(f"{workspace.splits_file}: fold {fold} has no case to {side}; name one there")
    store = Store(workspace.preprocessed)
    opened = {name: store.open(name, plan) for name in dict.fromkeys(sides["train"] + sides["val"])}
    return FoldCases(train=tuple(opened[n] for n in sides["train"]), val=tuple(opened[n] for n in sides["val"]))


def start_run(workspace: Workspace, plan: Plan, config: TrainConfig, cases: FoldCases, ranks: Ranks = ALONE) -> Run:
    """A run at its first step, or where the state on disk left it, which all ranks read.

    Raises:
        InputError: a run is there and --resume was not asked for, its settings were others, its states are damaged,
            --init names no model that fits, or the plan's channels cannot be dropped.
    """
    check_dropout(plan, config.modality_dropout)
    folder = workspace.fold(config.fold)
    device = choose_device(config.device, local=ranks.local)
    dtype = choose_dtype(config.precision, device)
    state = _state_to_resume(folder, resume=config.resume, first=ranks.first)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = build_network(plan)
    settings = _settings(plan, config, cases)
    if state is None:
        settings |= _first_weights(network, plan, config)
    network.to(device)
    run = Run(
        plan=plan,
        config=config,
        folder=folder,
        device=device,
        dtype=dtype,
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), config.lr, MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True),
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
        settings=settings,
        ranks=ranks,
    )
    if state is not None:
        _restore(run, state)
    elif run.batch_size != plan.batch_size:
        _say_what_the_batch_does(run)
    return run


def _say_what_the_batch_does(run: Run) -> None:
    """The learning rate is never scaled unasked; what another batch means for it is said."""
    ratio = run.batch_size / run.plan.batch_size
    _log.info(
        "--batch-size %d, the plan has %d: --lr stays %g, a patch counts %.3g times as much as planned; to keep "
        "its share (linear rule, Goyal 2017) take --lr %.3g; an epoch sees %.3g times as many patches",
        *(run.batch_size, run.plan.batch_size, run.config.lr, 1 / ratio, run.config.lr * ratio, ratio),
    )


def _state_to_resume(folder: FoldFolder, *, resume: bool, first: bool) -> State | None:
    """The state to go on from, None for a new run. A trained fold is never overwritten unasked."""
    begun = has_state(folder)
    if begun and not resume:
        raise InputError(f"{folder.root}: a run is there; --resume continues it, or remove the folder first")
    if not begun and folder.weights is not None:
        raise InputError(
            f"{folder.root}: holds a trained model without the state to resume it; remove the folder to train anew, "
            "or start from it with --init in another workspace"
        )
    if resume and not begun:
        _log.info("%s: no checkpoint to resume from, starting at the first epoch", folder.root)
    if first:
        remove_leftovers(folder)
    return load_state(folder)


def _settings(plan: Plan, config: TrainConfig, cases: FoldCases) -> dict[str, str]:
    """What a resumed run must share with the one that was stopped, as text. Its epochs may become more (_restore).

    The place and the length of the computation may change: device, precision, --stop-epoch, --max-time. So may the
    plan's postprocess, which no step reads: `evaluate --fit-postprocessing` writes it when a fold is trained.
    """
    names = ("epochs", "iterations", "val_iterations", "batch_size", "lr", "augment", "modality_dropout", "seed")
    sides = [[case.case_id for case in side] for side in (cases.train, cases.val)]
    return {
        "plan": _digest({name: value for name, value in plans.to_json(plan).items() if name != "postprocess"}),
        "cases": f"{len(cases.train)} to train, {len(cases.val)} to validate ({_digest(sides)})",
        **{name: str(getattr(config, name)) for name in names},
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def _restore(run: Run, state: State) -> None:
    where = run.folder.root
    now = dict(run.settings)
    if run.config.init is not None:  # not given again: nothing to compare, the weights come from the state
        now |= {"init": _name(run.config.init), "init_heads": run.config.init_heads}
    before = _BEFORE | state.settings
    longer = run.config.epochs > int(before["epochs"])
    compared = [name for name in now if not (longer and name == "epochs")]
    changed = [_change(name, before.get(name), now[name]) for name in compared if now[name] != before.get(name)]
    if changed:
        raise InputError(
            f"{where}: cannot resume with other settings: {', '.join(changed)}; repeat the options, plan and cases of "
            "the first run, or remove the folder to start again"
        )
    try:
        run.network.load_state_dict(state.network)
        run.optimizer.load_state_dict(state.optimizer)
        if run.scaler.is_enabled() and state.scaler:  # empty where the run so far was not in float16
            run.scaler.load_state_dict(state.scaler)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        line = " ".join(str(error).split())[:200]
        raise InputError(f"{where}: the state does not fit the plan ({line}); remove the folder") from None
    run.progress, run.history, run.settings = state.progress, state.history, before | {"epochs": now["epochs"]}
    if longer:
        _tell_longer(run, int(before["epochs"]))
    if run.progress.epoch >= min(run.config.epochs, run.config.stop_epoch or run.config.epochs):
        _log.info(
            "%s: is finished after %d epochs, nothing to do; a larger --epochs extends it", where, run.progress.epoch
        )
    else:
        _log.info("resuming at epoch %d, step %d", run.progress.epoch + 1, run.progress.step)


def _tell_longer(run: Run, before: int) -> None:
    """The schedule of a run that was extended: that of its new length, from the epoch reached on."""
    lr, epoch, epochs = run.config.lr, run.progress.epoch, run.config.epochs
    _log.info(
        "%d epochs instead of %d: from epoch %d on the learning rate is that of the longer schedule, %.3g instead of "
        "%.3g, and falls to 0 again",
        *(epochs, before, epoch + 1, poly_lr(lr, epoch, epochs), poly_lr(lr, epoch, before)),
    )


def _change(name: str, before: str | None, now: str) -> str:
    """A setting that is another now, in the words of the command line."""
    if name in ("plan", "cases"):
        return f"the {name} changed"
    if name == "epochs":
        return f"--epochs was {before}, is {now} (a schedule can only become longer; --stop-epoch ends it early)"
    option = _OPTIONS.get(name, f"--{name.replace('_', '-')}")
    was, is_now = ("the plan's" if value == "None" else value for value in (before, now))
    return f"{option} was {was}, is {is_now}"


def _first_weights(network: UNet, plan: Plan, config: TrainConfig) -> dict[str, str]:
    """Those of --init, else what the network was drawn with; as settings of the run."""
    if config.init is None:
        return {"init": "random", "init_heads": config.init_heads, "heads": "new"}
    done = initialise(network, plan, config.init, fold=config.fold, heads=config.init_heads)
    return {"init": _name(config.init), "init_heads": config.init_heads, **done}


def _name(folder: Path) -> str:
    return folder.resolve().name
