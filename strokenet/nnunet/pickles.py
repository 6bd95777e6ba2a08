"""Foreign files: nnU-Net's checkpoints and pickles, read so that nothing in them can run. No other file reads any.

Comes in: a path that a stranger may have filled. Goes out: plain values, numpy scalars and arrays, tensors. What a file
may name is listed here; any other name is refused before it is looked up. Files of v1 were written by numpy 1, whose
module was numpy.core; numpy 2 calls it numpy._core.
"""

from __future__ import annotations

import collections
import pickle
import pickletools
import re
import stat
import warnings
import zipfile
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from strokenet.data.errors import InputError

MAX_PICKLE_BYTES = 256 * 2**20  # plans.pkl of 655 cases has 100 kB
MAX_CHECKPOINT_BYTES = 32 * 2**30
_NUMPY_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")
_KIND = re.compile(r"[biuf][1248]")
_NAMED = re.compile(r"unsupported global:? (?:GLOBAL )?(\S+)", re.IGNORECASE)  # torch's refusals


class _Kind:
    """Stands for numpy.dtype, whose own __setstate__ would let a file say that its bytes are pointers."""

    def __init__(self, code: str = "", *_: bool) -> None:
        if not isinstance(code, str) or _KIND.fullmatch(code) is None:
            raise pickle.UnpicklingError(f"holds an array of {code!r:.40}, which is not allowed")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 5 or state[1] not in ("<", ">", "|", "=") or any(state[2:5]):
            raise pickle.UnpicklingError("holds an array of fields, which is not allowed")
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray[Any, Any]):
    """An array that takes its content from bytes of a plain number type alone."""

    def __setstate__(self, state: Any) -> None:
        version, shape, kind, fortran, content = state
        if type(kind) is not _Kind or type(content) is not bytes:
            raise pickle.UnpicklingError("holds an array of objects, which is not allowed")
        super().__setstate__((version, shape, kind.dtype, fortran, content))


def _empty_array(*_: Any) -> _Array:
    return np.ndarray.__new__(_Array, (0,))


def _number(kind: Any, content: Any) -> Any:
    if type(kind) is not _Kind or type(content) is not bytes or len(content) != kind.dtype.itemsize:
        raise pickle.UnpicklingError("holds a number that is none")
    return np.frombuffer(content, kind.dtype)[0]


def _latin_1(text: str, encoding: str) -> bytes:
    """How pickles of protocol 2 spell bytes; of all the codecs that this name could reach only the one they use."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"encodes as {encoding!r:.40}, which is not allowed")
    return text.encode("latin-1")


_PICKLE_NAMES: Mapping[str, Any] = {
    **{f"{module}.scalar": _number for module in _NUMPY_MODULES},
    **{f"{module}._reconstruct": _empty_array for module in _NUMPY_MODULES},
    "_codecs.encode": _latin_1,
    "numpy.ndarray": object(),  # only ever named as what _reconstruct makes: to call it would read a file's pointers
    "numpy.dtype": _Kind,
    "collections.OrderedDict": collections.OrderedDict,
}
_CHECKPOINT_NAMES: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_Kind, "numpy.dtype"),
    *((_number, f"{module}.scalar") for module in _NUMPY_MODULES),
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of strange text in a damaged file
        for code, argument, _ in pickletools.genops(content):
            if "PUT" in code.name and isinstance(argument, int) and argument > len(content):
                raise ValueError("is no valid pickle")


def _reason(error: BaseException) -> str:
    """One line: what is wrong with the file."""
    text = " ".join(str(error).split()).split("WeightsUnpickler error: ")[-1]  # torch puts its advice before it
    if found := _NAMED.search(text):
        return f"names {found[1]:.120}, which is not allowed (only tensors and numpy numbers are read)"
    return f"cannot be read ({type(error).__name__}{f': {text:.150}' if text else ''})"
