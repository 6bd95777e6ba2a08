"""nnU-Net v2: a results folder (plans.json, dataset.json, fold_K/checkpoint_final.pth) in our terms.

The network's parameters have our names already, because ours are the peer's; each is stored under two to four of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from planner.plan import Plan
from strokenet.data.description import json_object, listed_channels
from strokenet.data.errors import InputError
from strokenet.data.files import read_json
from strokenet.nnunet.checkpoints import load_checkpoint
from strokenet.nnunet.foreign import (
    CheckpointKind,
    ForeignModel,
    checked_weights,
    checkpoints,
    parameters,
    renamed_note,
)
from strokenet.nnunet.plans import DATASET, PLANS, answer_notes, configuration_of, plan_from_json
from strokenet.workspace import FOLD

FILES: dict[CheckpointKind, str] = {"final": "checkpoint_final.pth", "best": "checkpoint_best.pth"}
MAX_NAME = 200  # characters of a trainer's or configuration's name
# Trainers of nnunetv2 2.8.1 with the network of the plans, by what follows "nnUNetTrainer".
_TRAINERS = """
    Adam Adam1en3 Adam3en4 Adan Adan1en1 Adan1en3 Adan3en4 AdanCosAnneal Benchmark_5epochs
    Benchmark_5epochs_noDataLoading CELoss CELoss_5epochs CosAnneal DA5 DA5Segord0 DA5_10epochs DA5ord0
    DiceCELoss_noSmooth DiceLoss DiceTopK10Loss NoDA NoDeepSupervision NoMirroring Topk10Loss Topk10LossLS01
    VanillaAdam VanillaAdam1en3 VanillaAdam3en4 _1epoch _5epochs _10epochs _20epochs _50epochs _100epochs _250epochs
    _250epochs_NoMirroring _500epochs _750epochs _2000epochs _2000epochs_NoMirroring _4000epochs
    _4000epochs_NoMirroring _8000epochs _8000epochs_NoMirroring _DASegOrd0 _DASegOrd0_NoMirroring _noDummy2DDA
    _onlyMirror01 _onlyMirror01_1500ep _onlyMirror01_DA5 _onlyMirror01_DASegOrd0 _probabilisticOversampling
    _probabilisticOversampling_010 _probabilisticOversampling_033 _warmup
"""
TRAINERS = frozenset(("nnUNetTrainer", "nnUNet_Trainer_BS8", *(f"nnUNetTrainer{name}" for name in _TRAINERS.split())))
_PREFIXES = ("_orig_mod.", "module.")
_ALIASES = (
    (re.compile(r"^decoder\.encoder\."), "encoder."),
    (re.compile(r"\.all_modules\.0\."), ".conv."),
    (re.compile(r"\.all_modules\.1\."), ".norm."),
)


def read_v2(source: Path) -> ForeignModel:
    """A trained model of nnU-Net v2. Nothing is written.

    Raises:
        InputError: a file is missing, damaged or unsafe, or the model is of a kind that is not supported.
    """
    stored = json_object(read_json(source / PLANS), str(source / PLANS))
    description = json_object(read_json(source / DATASET), str(source / DATASET))
    folds = {match[1]: path for path in sorted(source.iterdir()) if (match := FOLD.fullmatch(path.name))}
    kind, files, notes = checkpoints(source, folds, FILES)
    first = next(iter(files.values()))
    checkpoint = load_checkpoint(first)
    trainer, name, axes = _training(checkpoint, first)
    plan = plan_from_json(stored, description, name, axes, source)
    weights = {}
    for fold, file in files.items():
        checkpoint = checkpoint if file == first else load_checkpoint(file)
        if _training(checkpoint, file)[:2] != (trainer, name):
            raise InputError(f"{file}: is not of {trainer} {name} as {first} is; import each alone")
        weights[fold] = own_weights(parameters(checkpoint.get("network_weights"), file), plan, file)
    notes += renamed_note(listed_channels(description, source / DATASET), plan) + _trainer_notes(trainer)
    notes += answer_notes(stored, configuration_of(stored, name, source / PLANS), source / PLANS)
    return ForeignModel(
        generation="v2",
        trainer=trainer,
        configuration=name,
        plan=plan,
        weights=weights,
        checkpoint=kind,
        notes=notes,
    )


def own_weights(stored: Mapping[str, Tensor], plan: Plan, where: Path) -> dict[str, Tensor]:
    """Parameters under one name each, float32: nnU-Net stores each block twice and the encoder twice again.

    Raises:
        InputError: others than the plan's network has, or two copies of one that differ.
    """
    names = {alias: _own_name(alias) for alias in stored}
    first = {name: alias for alias, name in reversed(names.items())}
    weights = checked_weights(str(where), {name: stored[alias] for name, alias in first.items()}, plan)
    for alias, name in names.items():
        copy = stored[alias]
        if copy.shape != weights[name].shape or not torch.equal(copy.float(), weights[name]):
            raise InputError(f"{where}: {alias} differs from its copy {name}; the file is damaged, copy it again")
    return weights


def _own_name(alias: str) -> str:
    for prefix in _PREFIXES:
        alias = alias.removeprefix(prefix)
    for pattern, replacement in _ALIASES:
        alias = pattern.sub(replacement, alias, count=1)
    return alias


def _training(checkpoint: Mapping[Any, Any], where: Path) -> tuple[str, str, tuple[int, ...]]:
    """Trainer, configuration and the axes to mirror along."""
    arguments = checkpoint.get("init_args")
    name = arguments.get("configuration") if isinstance(arguments, dict) else None
    trainer = _text(checkpoint.get("trainer_name"), "trainer_name", where)
    return trainer, _text(name, "init_args configuration", where), _mirror_axes(checkpoint, where)


def _text(value: Any, what: str, where: Path) -> str:
    if not isinstance(value, str) or not value.isprintable() or not 0 < len(value) <= MAX_NAME:
        raise InputError(f"{where}: has no {what}; give a checkpoint of nnU-Net v2")
    return value


def _mirror_axes(checkpoint: Mapping[Any, Any], where: Path) -> tuple[int, ...]:
    axes = checkpoint.get("inference_allowed_mirroring_axes")
    axes = () if axes is None else axes
    if not isinstance(axes, (tuple, list)) or not all(type(axis) is int and 0 <= axis < 3 for axis in axes):
        raise InputError(f"{where}: inference_allowed_mirroring_axes is no list of axes; 0, 1, 2 are allowed")
    return tuple(dict.fromkeys(axes))


def _trainer_notes(trainer: str) -> tuple[str, ...]:
    if trainer in TRAINERS:
        return ()
    return (f"{trainer} is not known here: its network is taken to be the one of plans.json, as nnU-Net's own",)
