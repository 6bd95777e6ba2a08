"""Foreign files: nnU-Net's checkpoints and pickles, read so that nothing in them can run. No other file reads any.

Comes in: a path that a stranger may have filled. Goes out: plain values, numpy scalars and arrays, tensors. What a file
may name is listed here; any other name is refused before it is looked up. Files of v1 were written by numpy 1, whose
module was numpy.core; numpy 2 calls it numpy._core.
"""

from __future__ import annotations

import pickle
import pickletools
import re
import stat
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from strokenet.data.errors import InputError

MAX_PICKLE_BYTES = 16 * 2**20  # plans.pkl of 655 cases has 100 kB, the pickle of a checkpoint less than 1 MB
MAX_CHECKPOINT_BYTES = 32 * 2**30
_NUMPY_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")
_KIND = re.compile(r"[biuf][1248]")
_ZIP, _PICKLE = b"PK\x03\x04", "data.pkl"
_OLD_PICKLES = 5  # magic number, version, byte order, content, keys: torch before 1.6


class ForeignError(ValueError):
    """A file that is refused; the message follows its name. Torch would put its advice around an UnpicklingError."""


class _Kind:
    """Stands for numpy.dtype, whose own __setstate__ would let a file say that its bytes are pointers."""

    def __init__(self, code: str = "", *_: bool) -> None:
        if not isinstance(code, str) or _KIND.fullmatch(code) is None:
            raise ForeignError(f"holds an array of {code!r:.40}, which is not allowed")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 5 or state[1] not in ("<", ">", "|", "=") or any(state[2:5]):
            raise ForeignError("holds an array of fields, which is not allowed")
        self.dtype = self.dtype.newbyteorder(state[1])


class Array(np.ndarray[Any, Any]):
    """An array that takes its content from bytes of a plain number type alone."""

    def __setstate__(self, state: Any) -> None:
        version, shape, kind, fortran, content = state
        if type(kind) is not _Kind or type(content) is not bytes:
            raise ForeignError("holds an array of objects, which is not allowed")
        super().__setstate__((version, shape, kind.dtype, fortran, content))


class _Ordered(dict[Any, Any]):
    """An OrderedDict to whose instances a file can give no attributes."""

    __slots__ = ()


def _empty_array(*_: Any) -> Array:
    return np.ndarray.__new__(Array, (0,))


def _number(kind: Any, content: Any) -> Any:
    if type(kind) is not _Kind or type(content) is not bytes or len(content) != kind.dtype.itemsize:
        raise ForeignError("holds a number of another size than its bytes; download or copy it again")
    return np.frombuffer(content, kind.dtype)[0]


def _latin_1(text: str, encoding: str) -> bytes:
    """How pickles of protocol 2 spell bytes; of all the codecs that this name could reach only the one they use."""
    if encoding != "latin1":
        raise ForeignError(f"encodes as {encoding!r:.40}, which is not allowed")
    return text.encode("latin-1")


_PICKLE_NAMES: Mapping[str, Any] = {
    **{f"{module}.scalar": _number for module in _NUMPY_MODULES},
    **{f"{module}._reconstruct": _empty_array for module in _NUMPY_MODULES},
    "_codecs.encode": _latin_1,
    "numpy.ndarray": object(),  # only ever named as what _reconstruct makes: to call it would read a file's pointers
    "numpy.dtype": _Kind,
    "collections.OrderedDict": _Ordered,
}
_CHECKPOINT_NAMES: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_Kind, "numpy.dtype"),
    *((_number, f"{module}.scalar") for module in _NUMPY_MODULES),
]
# What of torch's own list a checkpoint of nnU-Net holds; the rest of that list can ask for any amount of memory.
_CHECKPOINT_NAME = re.compile(
    r"""numpy\.dtype | numpy\._?core\.multiarray\.scalar | _codecs\.encode | collections\.OrderedDict
    | torch\.(\w+Storage | device | Size | (b?float|u?int)\d+ | bool)
    | torch\._utils\._rebuild_(tensor_v2 | parameter)""",
    re.VERBOSE,
)


def load_checkpoint(path: Path) -> dict[Any, Any]:
    """The dictionary that torch.save wrote: tensors on the CPU, numbers, texts. Never `weights_only=False`.

    Every name in the file is checked before torch reads it. Dictionaries may be OrderedDict, to whose instances a file
    can give attributes: take their entries by `dict.get` and `dict.items`.

    Raises:
        InputError: missing, cut short, no checkpoint, larger unpacked than on disk, or it names anything but tensors
            and numpy scalars.
    """
    _check_regular(path, MAX_CHECKPOINT_BYTES)
    with _one_line(path):
        _check_checkpoint(path)
        with torch.serialization.safe_globals(_CHECKPOINT_NAMES):
            content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, an nnU-Net checkpoint holds a dictionary")
    return dict(dict.items(content))


def load_pickle(path: Path) -> Any:
    """The value of a pickle made of plain values, OrderedDict and numpy arrays: v1's plans.pkl and *.model.pkl.

    Raises:
        InputError: missing, larger than 16 MiB, cut short, or it names anything else.
    """
    _check_regular(path, MAX_PICKLE_BYTES)
    with _one_line(path):
        content = path.read_bytes()
        _check_opcodes(BytesIO(content))
        return _Restricted(BytesIO(content)).load()


class _Restricted(pickle.Unpickler):
    """An unpickler that knows the names above and no other."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _PICKLE_NAMES[f"{module}.{name}"]
        except KeyError:
            raise ForeignError(f"names {module}.{name:.80}, which is not allowed") from None

    def persistent_load(self, identifier: Any) -> Any:
        raise ForeignError("refers to something outside the file")


def _check_regular(path: Path, limit: int) -> None:
    try:
        status = path.stat()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path}: is no regular file")
    if status.st_size > limit:
        raise InputError(f"{path}: {status.st_size} bytes; at most {limit} are read")


def _check_checkpoint(path: Path) -> None:
    """The names in the pickles of a checkpoint, and that an archive is stored unpacked: torch packs none."""
    with path.open("rb") as file:
        if file.read(len(_ZIP)) == _ZIP:  # as torch tells the two forms apart
            content = _archive_pickle(path)
            _check_opcodes(BytesIO(content), _CHECKPOINT_NAME)
            return
        file.seek(0)
        for _ in range(_OLD_PICKLES):
            _check_opcodes(file, _CHECKPOINT_NAME)


def _archive_pickle(path: Path) -> bytes:
    with zipfile.ZipFile(path) as archive:
        sizes = {entry.filename.partition("/")[2]: entry.file_size for entry in archive.infolist()}
    if sum(sizes.values()) > path.stat().st_size:
        raise ForeignError("is a compressed archive; torch writes none")
    reader = torch._C.PyTorchFileReader(str(path))  # torch.load's own, so that both see the same file
    if sorted(reader.get_all_records()) != sorted(sizes):
        raise ForeignError("lists its content twice and not alike; torch writes one list")
    if not 0 < sizes.get(_PICKLE, 0) <= MAX_PICKLE_BYTES:
        raise ForeignError(f"holds no {_PICKLE} of at most {MAX_PICKLE_BYTES // 2**20} MiB; it is no checkpoint")
    content: bytes = reader.get_record(_PICKLE)
    return content


def _check_opcodes(stream: BinaryIO, allowed: re.Pattern[str] | None = None) -> None:
    """Reads one pickle without running it. allowed: the names that it may hold, None where find_class looks at them.

    Python's unpickler makes room for the largest memo number that a file names: one opcode could ask for 64 GB. They
    count up, so each is smaller than its place in the file.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of strange text in a damaged file
        begin = stream.tell()
        for code, argument, position in pickletools.genops(stream):
            place = position or 0
            if place - begin > MAX_PICKLE_BYTES or ("PUT" in code.name and int(argument or 0) > place):
                raise ForeignError("is no valid pickle")
            if allowed is not None and code.name in ("GLOBAL", "STACK_GLOBAL", "INST"):
                name = str(argument or code.name).replace(" ", ".", 1)
                if not allowed.fullmatch(name):
                    raise ForeignError(f"names {name:.120}, which is not allowed (only tensors and numbers are read)")


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """Whatever a damaged file makes its reader raise becomes one line; a file can make it raise nearly anything."""
    try:
        yield
    except ForeignError as error:
        raise InputError(f"{path}: {error}") from None
    except Exception as error:
        text = " ".join(str(error).split()).split("WeightsUnpickler error: ")[-1]  # torch puts its advice before it
        what = f"{type(error).__name__}{f': {text:.150}' if text else ''}"
        raise InputError(
            f"{path}: damaged or cut short, it cannot be read ({what}); download or copy it again"
        ) from None
