"""Resumable state: all that a killed run needs to go on as if nothing had happened.

One file, written to a temporary name, flushed and renamed; the one before it is kept. It ends with the SHA-256 of its
content, so that a damaged file is noticed and the previous one taken. It is hashed while it is written, so that writing
needs no second copy of it in memory. No random state is stored, because none lives longer than a sample
(patches.sample_rng). Read with torch's weights_only loader: nothing in it can run code.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import pickle
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from strokenet.data.errors import InputError
from strokenet.data.files import replacing
from strokenet.workspace import FoldFolder

_log = logging.getLogger("strokenet")

VERSION = 1
_DIGEST_BYTES = 32
_TEMPORARY = re.compile(r"\.[0-9a-f]{12}\..+")  # the names of files.replacing
_NO_STATE = (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, ValueError, TypeError, AttributeError)


@dataclass(kw_only=True)
class Progress:
    """Where a run stands: `step` steps of epoch `epoch` are done, with these sums over them.

    bad_in_row: steps skipped one after the other because the loss was not finite. seconds: of the steps, waiting
    for data included; waited: that part of them.
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
    fields = {name: getattr(state, name) for name in ("network", "optimizer", "scaler", "history", "settings")}
    content = {"version": VERSION, "progress": asdict(state.progress), **fields}
    with replacing(folder.state) as temporary:
        with temporary.open("wb") as file:
            signed = _Signed(file)
            torch.save(content, signed)  # type: ignore[arg-type]  # it asks for write and flush alone
            signed.finish()
        if folder.state.is_file():  # only now: a disk that is full has taken neither of the two
            _keep(folder.state, folder.previous_state)


def has_state(folder: FoldFolder) -> bool:
    """True where a run left something to resume from, whole or not."""
    return folder.state.is_file() or folder.previous_state.is_file()


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


def remove_leftovers(folder: FoldFolder) -> None:
    """Temporary files of a run that was killed while it wrote; a state is large."""
    for path in folder.root.glob(".*"):
        if _TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


class _Signed:
    """A file that gets the SHA-256 of what was written to it as its end.

    torch writes from C++ and turns an error of the disk into one of its own, without the reason: here the first error
    is kept, what follows goes nowhere, and `finish` raises it.
    """

    def __init__(self, file: IO[bytes]):
        self._file, self._sum = file, hashlib.sha256()
        self._error: OSError | None = None

    def write(self, content: bytes | memoryview) -> int:
        if self._error is None:
            try:
                self._file.write(content)
                self._sum.update(content)
            except OSError as error:
                self._error = error
        return len(content)

    def flush(self) -> None:
        """Asked for by torch; the file is flushed when it is closed."""

    def finish(self) -> None:
        """Raises OSError: something could not be written."""
        self.write(self._sum.digest())
        if self._error is not None:
            raise self._error


def _keep(path: Path, previous: Path) -> None:
    """`previous` becomes a second name of `path`'s content; `path` itself is never missing."""
    with replacing(previous, durable=False) as temporary:
        try:
            os.link(path, temporary)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, temporary)


def _read(path: Path) -> State:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the disk and its permissions") from None
    body, digest = memoryview(content)[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
    if hashlib.sha256(body).digest() != digest:
        raise InputError(f"{path}: damaged or cut short")
    try:
        data = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
        version, progress = data.pop("version"), data.pop("progress")
        state = State(progress=Progress(**progress), **data)
    except _NO_STATE as error:
        raise InputError(f"{path}: no state of strokenet ({type(error).__name__})") from None
    if version != VERSION:
        raise InputError(f"{path}: written by another version of strokenet")
    return state
