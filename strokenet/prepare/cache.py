"""Cache: the result of a step on the disk, under a name that holds all that it depends on.

Comes in: a step's name, its key (the sha256 of its inputs' content and its settings), and how to compute it. Goes out:
the result, read where it is there and computed where it is not. A file of another key is never read: nothing is ever
stale. A file that cannot be read is computed again. OUT/prepare/cache may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from strokenet.data.errors import InputError
from strokenet.data.files import read_json, write_bytes, write_json


def array_sha256(mask: NDArray[np.bool_]) -> str:
    """sha256 of a mask's voxels."""
    return hashlib.sha256(np.packbits(mask).tobytes()).hexdigest()


def key_of(*parts: Any) -> str:
    """One key of plain JSON values; equal for equal values only."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def cached_json(folder: Path, step: str, key: str, compute: Callable[[], Any]) -> Any:
    """A result of plain JSON values."""
    path = folder / f"{step}-{key}.json"
    if path.exists():
        try:
            return read_json(path)
        except InputError:
            pass  # half a disk's worth of bad luck: computed again
    value = compute()
    _forget(folder, step)
    write_json(path, value)
    return value


def cached_array(folder: Path, step: str, key: str, compute: Callable[[], NDArray[Any]]) -> NDArray[Any]:
    """A result that is one array; its type and shape are kept."""
    path = folder / f"{step}-{key}.npy"
    if path.exists():
        try:
            return np.asarray(np.load(path, allow_pickle=False))
        except (OSError, ValueError, EOFError):
            pass
    value = compute()
    content = io.BytesIO()
    np.save(content, value, allow_pickle=False)
    _forget(folder, step)
    write_bytes(path, content.getbuffer(), durable=False)
    return value


def _forget(folder: Path, step: str) -> None:
    """Takes away the step's results under other keys, which nobody will ask for again."""
    for path in folder.glob(f"{step}-*"):
        path.unlink(missing_ok=True)
