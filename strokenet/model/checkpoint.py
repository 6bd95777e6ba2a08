"""Weights on disk: safetensors, checked against the plan before a byte of them is used.

Comes in: a network, or a folder with plan.json and fold_K/. Goes out: Model, the plan with the weights of each fold.
Nothing here reads a pickle.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from planner.plan import Plan
from strokenet.data.errors import InputError
from strokenet.data.files import replacing
from strokenet.model.network import UNet, build_network
from strokenet.workspace import Workspace

MAX_HEADER_BYTES = 4 * 2**20


@dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """A plan and one network a fold, in evaluation mode on one device."""

    root: Path
    plan: Plan
    folds: tuple[str, ...]
    networks: tuple[UNet, ...]


def save_weights(path: Path, weights: Mapping[str, Tensor], *, note: Mapping[str, str]) -> None:
    """Writes named tensors as safetensors, atomically. note: short facts kept in the file's header (epoch ...)."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    with replacing(path) as temporary:
        save_file(contiguous, temporary, metadata=dict(note))


def load_weights(path: Path, plan: Plan) -> dict[str, Tensor]:
    """The weights of the plan's network, float32.

    Raises:
        InputError: no safetensors file, or names, shapes or types other than those of the plan's network.
    """
    _check_header(path, plan)
    try:
        return {name: tensor.float() for name, tensor in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: weights cannot be read ({error}); copy the model again") from None


def load_model(root: Path, *, folds: Sequence[str] | None = None, device: torch.device | None = None) -> Model:
    """A model folder with the networks of the chosen folds (default: every numbered fold, else `all`).

    Raises:
        InputError: no plan, no trained fold, a fold that is not there, or weights that do not fit the plan.
    """
    workspace = Workspace(root)
    if not root.is_dir():
        raise InputError(f"{root}: no such model folder")
    plan = workspace.read_plan()
    chosen = _chosen_folds(workspace, folds)
    networks = []
    for fold in chosen:
        file = workspace.fold(fold).weights
        assert file is not None
        networks.append(network_with(plan, load_weights(file, plan)).to(device or torch.device("cpu")).eval())
    return Model(root=root, plan=plan, folds=chosen, networks=tuple(networks))


def network_with(plan: Plan, weights: Mapping[str, Tensor]) -> UNet:
    """The plan's network holding these weights; nothing is drawn at random."""
    with torch.device("meta"):
        network = build_network(plan)
    network.load_state_dict(dict(weights), assign=True)
    return network


def expected_shapes(plan: Plan) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter of the plan's network, without allocating one."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in build_network(plan).state_dict().items()}


def _chosen_folds(workspace: Workspace, folds: Sequence[str] | None) -> tuple[str, ...]:
    trained = workspace.trained_folds()
    if not trained:
        raise InputError(f"{workspace.root}: no trained fold; run `strokenet train {workspace.root}` first")
    if folds is None:
        return tuple(fold for fold in trained if fold != "all") or trained
    missing = [fold for fold in folds if fold not in trained]
    if missing:
        raise InputError(f"{workspace.root}: no weights for fold {', '.join(missing)}; trained: {', '.join(trained)}")
    return tuple(folds)


def _check_header(path: Path, plan: Plan) -> None:
    """Names, shapes, types and sizes in the file's header against the plan, before anything is allocated."""
    header = _read_header(path)
    shapes = expected_shapes(plan)
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    missing, unknown = sorted(set(shapes) - set(tensors)), sorted(set(tensors) - set(shapes))
    if missing or unknown:
        raise InputError(
            f"{path}: weights do not fit plan.json: {len(missing)} missing ({', '.join(missing[:3])}), "
            f"{len(unknown)} unknown ({', '.join(unknown[:3])}); use the plan that the weights were trained with"
        )
    for name, shape in shapes.items():
        entry = tensors[name]
        given = tuple(entry.get("shape", ())) if isinstance(entry, dict) else ()
        if given != shape or entry.get("dtype") not in ("F32", "F16", "BF16"):
            raise InputError(f"{path}: {name} is {given}, plan.json asks for {shape} in F32, F16 or BF16")


def _read_header(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > MAX_HEADER_BYTES:
                raise InputError(f"{path}: safetensors header of {length} bytes; at most {MAX_HEADER_BYTES} are read")
            header = json.loads(file.read(length))
    except (struct.error, UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        raise InputError(f"{path}: no safetensors file, or cut short; copy the model again") from None
    except OSError as error:
        raise InputError(f"{path}: weights cannot be read ({error.strerror})") from None
    if not isinstance(header, dict):
        raise InputError(f"{path}: no safetensors header; copy the model again")
    return header
