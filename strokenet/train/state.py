"""Resumable state: all that a killed run needs to go on as if nothing had happened.

One file, written to a temporary name, flushed and renamed; the one before it is kept. It ends with the SHA-256 of its
content, so that a damaged file is noticed and the previous one taken. No random state is stored, because none lives
longer than a sample (see patches.sample_rng). Read with torch's weights_only loader: nothing in it can run code.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import pickle
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from strokenet.data.errors import InputError
from strokenet.data.files import write_bytes
from strokenet.workspace import FoldFolder

_log = logging.getLogger("strokenet")

VERSION = 1
_DIGEST_BYTES = 32


@dataclass(kw_only=True)
class Progress:
    """Where a run stands: `step` steps of epoch `epoch` are done, with these sums over them.

    bad_in_row: steps skipped one after the other because the loss was not finite.
    """

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    skipped: int = 0
    bad_in_row: int = 0
    seconds: float = 0.0
    waited: float = 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class State:
    """One checkpoint. history: the rows of log.csv. settings: what must not change on resume."""

    progress: Progress
    network: dict[str, Tensor]
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    history: list[dict[str, float]]
    settings: dict[str, str]


def save_state(folder: FoldFolder, state: State) -> None:
    """Writes state.pt; what was there becomes state.prev.pt. A kill at any moment leaves at least one whole file."""
    buffer = io.BytesIO()
    fields = {name: getattr(state, name) for name in ("network", "optimizer", "scaler", "history", "settings")}
    torch.save({"version": VERSION, "progress": asdict(state.progress), **fields}, buffer)
    content = buffer.getvalue()
    if folder.state.is_file():
        _keep(folder.state, folder.previous_state)
    write_bytes(folder.state, content + hashlib.sha256(content).digest())


def load_state(folder: FoldFolder) -> State | None:
    """The newest whole state of a fold, None where the fold was never started.

    Raises:
        InputError: states are there, and none can be read.
    """
    problems = []
    for path in (folder.state, folder.previous_state):
        if not path.is_file():
            continue
        try:
            state = _read(path)
        except InputError as error:
            problems.append(str(error))
            continue
        if problems:
            _log.warning("%s; going on from %s", problems[0], path.name)
        return state
    if problems:
        raise InputError(f"{'; '.join(problems)}; remove {folder.root} to start again")
    return None


def _keep(path: Path, previous: Path) -> None:
    """`previous` becomes a second name of `path`'s content; `path` itself is never missing."""
    temporary = previous.with_name(f".{previous.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:  # a file system without hard links
        temporary.write_bytes(path.read_bytes())
    os.replace(temporary, previous)


def _read(path: Path) -> State:
    content = path.read_bytes()
    body, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
    if hashlib.sha256(body).digest() != digest:
        raise InputError(f"{path}: damaged or cut short")
    try:
        data = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
        if data.pop("version") != VERSION:
            raise InputError(f"{path}: written by another version of strokenet")
        return State(progress=Progress(**data.pop("progress")), **data)
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: no state of strokenet ({type(error).__name__})") from None
