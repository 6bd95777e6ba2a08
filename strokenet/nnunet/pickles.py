"""Foreign files: nnU-Net's checkpoints and pickles, read so that nothing in them can run. No other file reads any.

Comes in: a path that a stranger may have filled. Goes out: plain values, numpy scalars and arrays, tensors. What a file
may name is listed here; any other name is refused before it is looked up. Files of v1 were written by numpy 1, whose
module was numpy.core; numpy 2 calls it numpy._core.
"""

from __future__ import annotations

import collections
import pickle
import pickletools
import stat
import zipfile
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy._core.multiarray import _reconstruct, scalar

from strokenet.data.errors import InputError

MAX_PICKLE_BYTES = 256 * 2**20  # plans.pkl of 655 cases has 100 kB
MAX_CHECKPOINT_BYTES = 32 * 2**30
_NUMPY: Mapping[str, Any] = {
    f"{module}.{name}": value
    for module in ("numpy.core.multiarray", "numpy._core.multiarray")
    for name, value in (("scalar", scalar), ("_reconstruct", _reconstruct))
}


def _latin_1(text: str, encoding: str) -> bytes:
    """How pickles of protocol 2 spell bytes; of all the codecs that this name could reach only the one they use."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"encodes as {encoding!r:.40}, which is not allowed")
    return text.encode("latin-1")


_PICKLE_NAMES: Mapping[str, Any] = {
    **_NUMPY,
    "_codecs.encode": _latin_1,
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
    "collections.OrderedDict": collections.OrderedDict,
}
_DTYPES = tuple(
    type(np.dtype(kind)) for kind in ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?")
)
_CHECKPOINT_NAMES: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    *((value, name) for name, value in _NUMPY.items() if value is scalar),
    np.dtype,
    *_DTYPES,
]
_BROKEN = (
    RuntimeError,
    pickle.UnpicklingError,
    EOFError,
    KeyError,
    IndexError,
    ValueError,
    TypeError,
    AttributeError,
    UnicodeError,
    OverflowError,
    MemoryError,
    RecursionError,
    AssertionError,
    NotImplementedError,
    zipfile.BadZipFile,
)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The dictionary that torch.save wrote: tensors on the CPU, numbers, texts. Never `weights_only=False`.

    Raises:
        InputError: missing, cut short, no checkpoint, larger unpacked than on disk, or it names anything but tensors
            and numpy scalars.
    """
    _check_regular(path, MAX_CHECKPOINT_BYTES)
    try:
        _check_archive(path)
        with torch.serialization.safe_globals(_CHECKPOINT_NAMES):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except _BROKEN as error:
        raise InputError(f"{path}: {_reason(error)}; download or copy it again") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, an nnU-Net checkpoint holds a dictionary")
    return content


def load_pickle(path: Path) -> Any:
    """The value of a pickle made of plain values, OrderedDict and numpy arrays: v1's plans.pkl and *.model.pkl.

    Raises:
        InputError: missing, larger than 256 MiB, cut short, or it names anything else.
    """
    _check_regular(path, MAX_PICKLE_BYTES)
    try:
        content = path.read_bytes()
        _check_memo(content)
        return _Restricted(BytesIO(content)).load()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except _BROKEN as error:
        raise InputError(f"{path}: {_reason(error)}; download or copy it again") from None


class _Restricted(pickle.Unpickler):
    """An unpickler that knows the names above and no other."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _PICKLE_NAMES[f"{module}.{name}"]
        except KeyError:
            raise pickle.UnpicklingError(f"names {module}.{name:.80}, which is not allowed") from None

    def persistent_load(self, identifier: Any) -> Any:
        raise pickle.UnpicklingError("refers to something outside the file")


def _check_regular(path: Path, limit: int) -> None:
    try:
        status = path.stat()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path}: is no regular file")
    if status.st_size > limit:
        raise InputError(f"{path}: {status.st_size} bytes; at most {limit} are read")


def _check_archive(path: Path) -> None:
    """torch stores its archives unpacked: one that grows when it is read is no checkpoint but a trap."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > path.stat().st_size:
            raise ValueError("is a compressed archive; torch writes none")


def _check_memo(content: bytes) -> None:
    """Python's unpickler makes room for the largest memo number that a file names: one byte could ask for 64 GB."""
    for code, argument, _ in pickletools.genops(content):
        if "PUT" in code.name and isinstance(argument, int) and argument > len(content):
            raise ValueError("is no valid pickle")


def _reason(error: BaseException) -> str:
    """One line: what is wrong with the file."""
    text = " ".join(str(error).split())
    if isinstance(error, pickle.UnpicklingError):
        for mark in ("Unsupported global: GLOBAL ", "Unsupported class "):
            if mark in text:
                name = text.split(mark, 1)[1].split()[0]
                return f"names {name:.120}, which is not allowed (only tensors and numpy numbers are read)"
    return (
        f"cannot be read ({type(error).__name__}: {text:.150})" if text else f"cannot be read ({type(error).__name__})"
    )
