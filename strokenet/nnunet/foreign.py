"""A model of nnU-Net in our terms: what v1.py and v2.py read, and what importing.py writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from planner.plan import Plan
from strokenet.data.errors import InputError
from strokenet.model.checkpoint import expected_shapes
from strokenet.nnunet.checkpoints import StoredTensor

CheckpointKind = Literal["final", "best"]
SHOWN = 3  # names in a message
_NUMBERS = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64)  # the last: counters of a norm


@dataclass(frozen=True, kw_only=True, eq=False)
class ForeignModel:
    """A trained nnU-Net, read and checked.

    weights: fold ("0" .. or "all") -> parameters under our names. checkpoint: the kind of file they come from.
    notes: what the user should know, one line each.
    """

    generation: Literal["v1", "v2"]
    trainer: str
    configuration: str
    plan: Plan
    weights: Mapping[str, dict[str, Tensor]]
    checkpoint: CheckpointKind
    notes: tuple[str, ...] = ()


def checkpoints(
    source: Path, folds: Mapping[str, Path], names: Mapping[CheckpointKind, str]
) -> tuple[CheckpointKind, dict[str, Path], tuple[str, ...]]:
    """The folds with a final checkpoint, or where there is none those with a best one; and a note on the others.

    folds: fold -> folder. names: kind -> file name, the one that nnU-Net predicts with first.
    """
    for kind, name in names.items():
        there = {fold: path / name for fold, path in folds.items() if (path / name).is_file()}
        if there:
            left = sorted(set(folds) - set(there))
            return kind, there, (f"fold {', '.join(left)} has no {name} and was left out",) if left else ()
    raise InputError(f"{source}: no fold_K/{' or '.join(names.values())}; give a trained results folder")


def parameters(value: Any, file: Path) -> dict[str, Tensor]:
    """The state dict of a checkpoint, its numbers read.

    Raises:
        InputError: no dictionary of names and tensors, an empty one, or numbers that are damaged.
    """
    if not isinstance(value, dict) or not value:
        raise InputError(f"{file}: holds no parameters of a network; give a checkpoint that nnU-Net wrote")
    for name, stored in value.items():
        if not isinstance(name, str) or not isinstance(stored, StoredTensor) or stored.storage.dtype not in _NUMBERS:
            shown = name if isinstance(name, str) else f"a {type(name).__name__}"
            raise InputError(f"{file}: {shown:.100} is no tensor of real numbers; the file is damaged")
    read = {stored: stored.read() for stored in dict.fromkeys(value.values())}  # v2 names each up to four times
    return {name: read[stored] for name, stored in value.items()}


def checked_weights(where: str, weights: Mapping[str, Tensor], plan: Plan) -> dict[str, Tensor]:
    """Copies in float32, once names, shapes and numbers are those of the plan's network.

    Raises:
        InputError: a parameter is missing, unknown, of another shape, or holds NaN or infinity.
    """
    shapes = expected_shapes(plan)
    missing, unknown = sorted(set(shapes) - set(weights)), sorted(set(weights) - set(shapes))
    if missing or unknown:
        raise InputError(
            f"{where}: not the network of its plans: {len(missing)} parameters missing ({_first(missing)}), "
            f"{len(unknown)} unknown ({_first(unknown)}); only nnU-Net's own networks are read"
        )
    checked = {}
    for name, shape in shapes.items():
        if tuple(weights[name].shape) != shape:
            raise InputError(
                f"{where}: {name} is {tuple(weights[name].shape)}, its plans and dataset.json ask for {shape}"
            )
        if not weights[name].is_floating_point():
            raise InputError(f"{where}: {name} holds whole numbers; the file is damaged")
        checked[name] = weights[name].float().clone()
        if not bool(checked[name].isfinite().all()):
            raise InputError(f"{where}: {name} holds NaN or infinity; the file is damaged")
    return checked


def renamed_note(stored: tuple[str, ...], plan: Plan) -> tuple[str, ...]:
    """What to say where the model's channels had to be told apart."""
    if stored == plan.channels:
        return ()
    return (f"several channels had one name; they are {', '.join(plan.channels)} now",)


def _first(names: list[str]) -> str:
    return f"{', '.join(names[:SHOWN]):.200}" or "none"
