"""The start of a run: what is asked for, which cases, and a network that is fresh, given, or where a run left it."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from planner import plan as plans
from planner.plan import Plan
from strokenet.data.errors import InputError
from strokenet.model.checkpoint import load_weights
from strokenet.model.device import Precision, choose_device, choose_dtype
from strokenet.model.network import UNet, build_network
from strokenet.preprocess.store import Store, StoredCase
from strokenet.train.feed import Augmentation
from strokenet.train.state import Progress, State, load_state
from strokenet.workspace import FoldFolder, Workspace

_log = logging.getLogger("strokenet")

MOMENTUM = 0.99
WEIGHT_DECAY = 3e-5


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


@dataclass(kw_only=True, eq=False)
class Run:
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


def fold_cases(workspace: Workspace, fold: str) -> tuple[list[StoredCase], list[StoredCase]]:
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


def start_run(workspace: Workspace, plan: Plan, config: TrainConfig) -> Run:
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
    )
    if state is not None:
        _restore(run, state)
    return run


def _settings(plan: Plan, config: TrainConfig) -> dict[str, str]:
    """What a resumed run must share with the one that was stopped, as text."""
    content = json.dumps(plans.to_json(plan), sort_keys=True).encode()
    names = ("iterations", "val_iterations", "batch_size", "lr", "augment", "seed")
    return {"plan": hashlib.sha256(content).hexdigest(), **{name: str(getattr(config, name)) for name in names}}


def _restore(run: Run, state: State) -> None:
    changed = [name for name in run.settings if run.settings[name] != state.settings.get(name)]
    if changed:
        pairs = "; ".join(f"{name} was {state.settings.get(name)}, is {run.settings[name]}" for name in changed)
        raise InputError(f"{run.folder.root}: cannot resume with other settings: {pairs}")
    run.network.load_state_dict(state.network)
    run.optimizer.load_state_dict(state.optimizer)
    run.scaler.load_state_dict(state.scaler)
    run.progress, run.history, run.settings = state.progress, state.history, state.settings
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
