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
from strokenet.data.description import json_object
from strokenet.data.errors import InputError
from strokenet.data.files import read_json
from strokenet.nnunet.foreign import CheckpointKind, ForeignModel, checked_weights, checkpoints
from strokenet.nnunet.pickles import load_checkpoint
from strokenet.nnunet.plans import DATASET, PLANS, configuration_of, plan_from_json, resampling_notes
from strokenet.workspace import FOLD

FILES: dict[CheckpointKind, str] = {"final": "checkpoint_final.pth", "best": "checkpoint_best.pth"}
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
    plan: Plan | None = None
    weights, first = {}, ("", "")
    for fold, file in files.items():
        checkpoint = load_checkpoint(file)
        named = (_text(checkpoint, "trainer_name", file), _configuration_name(checkpoint, file))
        if plan is None:
            first = named
            plan = plan_from_json(stored, description, named[1], _mirror_axes(checkpoint, file), source)
            notes += resampling_notes(configuration_of(stored, named[1], source / PLANS))
        elif named != first:
            raise InputError(f"{file}: is of {' '.join(named)}, the first fold of {' '.join(first)}; import each alone")
        weights[fold] = own_weights(checkpoint, plan, file)
    assert plan is not None
    return ForeignModel(
        generation="v2",
        trainer=first[0],
        configuration=first[1],
        plan=plan,
        weights=weights,
        checkpoint=kind,
        notes=notes,
    )


def own_weights(checkpoint: Mapping[str, Any], plan: Plan, where: Path) -> dict[str, Tensor]:
    """Parameters under one name each, float32: nnU-Net stores each block twice and the encoder twice again.

    Raises:
        InputError: no parameters, others than the plan's network has, or two copies of one that differ.
    """
    stored = checkpoint.get("network_weights")
    if not isinstance(stored, Mapping) or not stored or not all(isinstance(w, Tensor) for w in stored.values()):
        raise InputError(f"{where}: holds no network_weights; give a checkpoint of nnU-Net v2")
    names = {alias: _own_name(str(alias)) for alias in stored}
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


def _text(checkpoint: Mapping[str, Any], key: str, where: Path) -> str:
    value = checkpoint.get(key)
    if not isinstance(value, str) or not value.isprintable():
        raise InputError(f"{where}: has no {key}; give a checkpoint of nnU-Net v2")
    return value


def _configuration_name(checkpoint: Mapping[str, Any], where: Path) -> str:
    arguments = checkpoint.get("init_args")
    return _text(arguments if isinstance(arguments, Mapping) else {}, "configuration", where)


def _mirror_axes(checkpoint: Mapping[str, Any], where: Path) -> tuple[int, ...]:
    axes = checkpoint.get("inference_allowed_mirroring_axes") or ()
    if not isinstance(axes, (tuple, list)) or not all(type(axis) is int and 0 <= axis < 3 for axis in axes):
        raise InputError(f"{where}: inference_allowed_mirroring_axes is {axes!r:.80}; axes 0, 1, 2 are allowed")
    return tuple(dict.fromkeys(axes))
