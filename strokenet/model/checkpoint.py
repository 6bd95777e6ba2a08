"""Weights on disk: safetensors, checked against the plan before a byte of them is used.

Comes in: a network, or a folder with plan.json and fold_K/. Goes out: Model, the plan with the weights of each fold.
Nothing here reads a pickle.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from planner.plan import Plan
from strokenet.data.errors import InputError
from strokenet.data.files import replacing
from strokenet.model.network import UNet, build_network
from strokenet.workspace import Workspace

NOTE = "strokenet"  # key of the note in a file's metadata
MAX_HEADER_BYTES = 4 * 2**20
DROPOUT = "modality_dropout"  # in the note: the probability with which training took channels away
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}  # of the weights: their names in a file


@dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """A plan and one network a fold, in evaluation mode on one device.

    modality_dropout: probability with which training took channels away; above 0 the networks know any subset of them.
    """

    root: Path
    plan: Plan
    folds: tuple[str, ...]
    networks: tuple[UNet, ...]
    modality_dropout: float = 0.0


def save_weights(path: Path, weights: Mapping[str, Tensor], *, note: Mapping[str, str]) -> None:
    """Writes named tensors as safetensors, atomically. note: short facts kept in the file's header (epoch ...).

    The bytes are those of safetensors' `save`, which holds Python's lock while it copies them twice: here they go from
    the tensors to the file, and a training beside it goes on. The same weights and note are the same bytes: the note is
    one entry, because safetensors shuffles several.
    """
    flat = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    flat = dict(sorted(flat.items(), key=lambda item: (-item[1].itemsize, item[0])))  # so each one's place is aligned
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(_header(flat, {NOTE: json.dumps(dict(note), sort_keys=True)}))
        for tensor in flat.values():
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


def load_weights(path: Path, plan: Plan) -> dict[str, Tensor]:
    """The weights of the plan's network, float32.

    Raises:
        InputError: no safetensors file, names, shapes or types other than those of the plan's network, or NaN.
    """
    _check_header(path, plan)
    try:
        weights = {name: tensor.float() for name, tensor in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: weights cannot be read ({error}); copy the model again") from None
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise InputError(f"{path}: {name} holds NaN or infinity; copy the model again or train it again")
    return weights


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
    dropout = _agreed_dropout(workspace, chosen)
    networks = []
    for fold in chosen:
        file = workspace.fold(fold).weights
        assert file is not None
        networks.append(network_with(plan, load_weights(file, plan)).to(device or torch.device("cpu")).eval())
    return Model(root=root, plan=plan, folds=chosen, networks=tuple(networks), modality_dropout=dropout)


def trained_dropout(root: Path, folds: Sequence[str] | None = None) -> float:
    """Model.modality_dropout of a model folder, from the headers of its weights alone; folds as in load_model.

    Raises:
        InputError: no trained fold, a note that is none of ours, or folds that were trained with different dropout.
    """
    workspace = Workspace(root)
    workspace.read_plan()  # what is no model is refused in its words
    return _agreed_dropout(workspace, _chosen_folds(workspace, folds))


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
    if missing or not folds:
        raise InputError(
            f"{workspace.root}: no weights for fold {', '.join(missing) or '(none named)'}; trained: "
            f"{', '.join(trained)}"
        )
    return tuple(dict.fromkeys(folds))  # a fold named twice counts once


def _agreed_dropout(workspace: Workspace, folds: Sequence[str]) -> float:
    found = {fold: _dropout_of(file) for fold in folds if (file := workspace.fold(fold).weights)}
    if len(set(found.values())) > 1:
        each = ", ".join(f"{p:g} (fold {fold})" for fold, p in found.items())
        raise InputError(
            f"{workspace.root}: its folds were trained with modality dropout {each}; choose folds of one kind by "
            "--folds, or train the others again"
        )
    return next(iter(found.values()))


def _dropout_of(path: Path) -> float:
    """The note's probability; 0 where there is no note of ours, as in files that other programs wrote."""
    metadata = _read_header(path).get("__metadata__")
    text = metadata.get(NOTE) if isinstance(metadata, dict) else None
    try:
        note = json.loads(text) if isinstance(text, str) else {}
        p = float(note.get(DROPOUT, 0)) if isinstance(note, dict) else 0.0
    except (ValueError, TypeError, OverflowError, RecursionError):
        p = math.nan
    if not 0 <= p <= 1:
        raise InputError(f"{path}: the note in its header is damaged ({text!s:.80}); copy the model again")
    return p


def _header(weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The start of a safetensors file: its length as 8 bytes, then JSON, with blanks up to a multiple of 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for name, tensor in weights.items():
        end = start + tensor.nbytes
        entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _check_header(path: Path, plan: Plan) -> None:
    """Names, shapes, types and sizes in the file's header against the plan, before anything is allocated."""
    header = _read_header(path)
    shapes = expected_shapes(plan)
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    missing, unknown = sorted(set(shapes) - set(tensors)), sorted(set(tensors) - set(shapes))
    if missing or unknown:
        raise InputError(
            f"{path}: weights do not fit plan.json: {len(missing)} missing ({_first(missing)}), "
            f"{len(unknown)} unknown ({_first(unknown)}); use the plan that the weights were trained with"
        )
    for name, shape in shapes.items():
        entry = tensors[name] if isinstance(tensors[name], dict) else {}
        given, dtype = entry.get("shape"), entry.get("dtype")
        if given != list(shape) or dtype not in DTYPES.values():
            raise InputError(
                f"{path}: {name} is {given!s:.60} {dtype!s:.20}, plan.json asks for {list(shape)} in "
                f"{', '.join(DTYPES.values())}; use the plan that the weights were trained with"
            )


def _first(names: Sequence[str]) -> str:
    return f"{', '.join(names[:3]):.200}"


def _read_header(path: Path) -> dict[str, Any]:
    broken = InputError(f"{path}: no safetensors file, or cut short; copy the model again")
    try:
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            content = file.read(length) if length <= MAX_HEADER_BYTES else b""
    except OSError as error:
        raise InputError(f"{path}: weights cannot be read ({error.strerror})") from None
    if len(start) < 8:
        raise broken
    if length > MAX_HEADER_BYTES:
        raise InputError(f"{path}: safetensors header of {length} bytes; at most {MAX_HEADER_BYTES} are read")
    try:
        header = json.loads(content)
    except (ValueError, RecursionError):  # no UTF-8, no JSON, a number of a million digits
        raise broken from None
    if not isinstance(header, dict):
        raise broken
    return header
