"""Checkpoints: what torch.save wrote, today as a zip archive, before torch 1.6 as five pickles and then the numbers.

    archive/data.pkl       the content; a tensor in it is a reference to a storage, with offset, shape and strides
    archive/data/KEY       the numbers of one storage

Comes in: a path that a stranger may have filled. Goes out: the content, in which tensors are records that read their
numbers when asked. Optimizer states, half of the file, are thus never read. torch.load is not used, not even with
weights_only: small files make it take gigabytes, or end the process.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
import torch
from torch import Tensor

from strokenet.data.errors import InputError
from strokenet.nnunet.pickles import NUMBERS, ForeignError, Make, Name, check_regular, one_line, read_pickle

MAX_CHECKPOINT_BYTES = 32 * 2**30
MAX_CONTENT_BYTES = 256 * 2**20  # data.pkl: 70 bytes of log a class and epoch, 31 MB at 117 classes and 4000 epochs
MAX_AXES = 8
_ZIP, _CONTENT = b"PK\x03\x04", "data.pkl"
_OLD = (0x1950A86A20F9469CFC6C, 1001)  # magic number and version of the form before 1.6
_TYPES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")


@dataclass(frozen=True, kw_only=True)
class Storage:
    """A row of numbers in the file. count: how many."""

    key: str
    dtype: torch.dtype
    count: int

    @property
    def bytes(self) -> int:
        """Its size."""
        return self.count * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor whose numbers are still in the file. Two are equal that are the same numbers of it."""

    file: StoredNumbers
    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def read(self) -> Tensor:
        """The numbers.

        Raises:
            InputError: the file does not hold them, or they are damaged.
        """
        with one_line(self.file.path):
            flat = torch.frombuffer(bytearray(self.file.numbers(self.storage) or b"\0" * 8), dtype=self.storage.dtype)
            return flat.as_strided(self.shape, self.strides, self.offset).clone()


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredNumbers:
    """Where the numbers of every storage are.

    root: of the archive's names. big_endian: as some machines stored them. starts: key -> first byte, in the form
    before 1.6; None for an archive.
    """

    path: Path
    root: str = ""
    big_endian: bool = False
    starts: dict[str, int] | None = None

    def numbers(self, storage: Storage) -> bytes:
        """The bytes of a storage, their checksum compared where the file has one."""
        if self.starts is not None:
            with self.path.open("rb") as file:
                file.seek(self.starts[storage.key])
                content = file.read(storage.bytes)
        else:
            with zipfile.ZipFile(self.path) as archive:
                content = _entry(archive, f"{self.root}data/{storage.key}", storage.bytes)
        if self.big_endian and storage.dtype.itemsize > 1:
            content = (
                np.frombuffer(content, f">u{storage.dtype.itemsize}").astype(f"<u{storage.dtype.itemsize}").tobytes()
            )
        if len(content) != storage.bytes:
            raise ForeignError(
                f"holds {len(content)} bytes of {storage.bytes} for a parameter; download or copy it again"
            )
        return content


def load_checkpoint(path: Path) -> dict[Any, Any]:
    """The dictionary that torch.save wrote: StoredTensors, numbers, texts.

    Raises:
        InputError: missing, cut short, no checkpoint, packed, or it names anything but tensors and numpy's numbers.
    """
    with one_line(path):
        check_regular(path, MAX_CHECKPOINT_BYTES)
        with path.open("rb") as file:
            is_archive = file.read(len(_ZIP)) == _ZIP
        content = _read_archive(path) if is_archive else _read_old(path)
    if type(content) is not dict:
        raise InputError(f"{path}: holds a {type(content).__name__}, an nnU-Net checkpoint holds a dictionary")
    return content


def _read_archive(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        root = next((name.removesuffix(_CONTENT) for name in names if name.endswith(f"/{_CONTENT}")), None)
        if root is None:
            raise ForeignError(f"holds no {_CONTENT}; it is no checkpoint")
        if len(set(names)) < len(names) or not all(name.startswith(root) for name in names):
            raise ForeignError("is an archive with an entry named twice or of another root; torch writes none")
        big = f"{root}byteorder" in names and _entry(archive, f"{root}byteorder", 16) == b"big"
        content = _entry(archive, f"{root}{_CONTENT}", MAX_CONTENT_BYTES)
    return read_pickle(BytesIO(content), *_rules(StoredNumbers(path=path, root=root, big_endian=big)))


def _entry(archive: zipfile.ZipFile, name: str, most: int) -> bytes:
    entry = archive.getinfo(name)
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
        raise ForeignError("is a compressed archive; torch writes none")
    if entry.file_size > most:
        raise ForeignError(f"its {name.rpartition('/')[2]:.40} has {entry.file_size} bytes; at most {most} are read")
    return archive.read(entry)


def _read_old(path: Path) -> Any:
    """Magic number, version, byte order, content, keys; then each storage: how many numbers, and the numbers."""
    starts, storages = dict[str, int](), dict[str, Storage]()
    rules = _rules(StoredNumbers(path=path, starts=starts), storages)
    with path.open("rb") as file:
        magic, version, machine, content, keys = (read_pickle(file, *rules) for _ in range(5))
        if (magic, version) != _OLD or not isinstance(machine, dict) or machine.get("little_endian") is not True:
            raise ForeignError("is no checkpoint of torch, or of another byte order")
        if type(keys) is not list or sorted(keys) != sorted(storages):
            raise ForeignError("lists other numbers than its content names; download or copy it again")
        for key in keys:
            _place_storage(file, storages[key], starts)
    return content


def _place_storage(file: BinaryIO, storage: Storage, starts: dict[str, int]) -> None:
    """Notes where a storage's numbers start and goes behind them."""
    count = int.from_bytes(file.read(8), "little")
    if count != storage.count:
        raise ForeignError(f"holds {count} numbers where its content names {storage.count}; download or copy it again")
    starts[storage.key] = file.tell()
    file.seek(storage.bytes, 1)


def _rules(
    file: StoredNumbers, storages: dict[str, Storage] | None = None
) -> tuple[Mapping[str, Make | None], int, Make]:
    """What the content may name, how long it may be, and what its references make. storages: takes each, by key."""
    found = {} if storages is None else storages

    def storage(identifier: Any) -> Storage:
        made = _storage(identifier)
        if found.setdefault(made.key, made) != made:
            raise ForeignError("names one storage in two ways; download or copy it again")
        return made

    def tensor(source: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> StoredTensor:
        return _tensor(file, source, offset, shape, strides)

    names: dict[str, Make | None] = {
        **NUMBERS,
        **dict.fromkeys(_TYPES),
        **{f"torch.{name}": None for name in _DTYPES},
        "torch.device": lambda *parts: parts,
        "torch.Size": lambda *parts: parts,
        "torch._utils._rebuild_tensor_v2": tensor,
        "torch._utils._rebuild_parameter": lambda stored, *_: stored,
    }
    return names, MAX_CONTENT_BYTES, storage


def _storage(identifier: Any) -> Storage:
    """("storage", type, key, device, count), and in the form before 1.6 a last None."""
    if (
        type(identifier) is not tuple
        or len(identifier) not in (5, 6)
        or any(part is not None for part in identifier[5:])
    ):
        _refuse("a storage")
    word, kind, key, _, count = identifier[:5]
    if type(kind) is not Name or kind.name not in _TYPES or type(key) is not str or not key.isprintable():
        _refuse("a storage")
    if word != "storage" or type(count) is not int or not 0 <= count <= MAX_CHECKPOINT_BYTES:
        _refuse("a storage")
    return Storage(key=key, dtype=_TYPES[kind.name], count=count)


def _tensor(file: StoredNumbers, storage: Any, offset: Any, shape: Any, strides: Any) -> StoredTensor:
    """A tensor that lies in its storage, each number once."""
    for numbers in (shape, strides, (offset,)):
        if type(numbers) is not tuple or len(numbers) > MAX_AXES:
            _refuse("a tensor")
        if not all(type(n) is int and 0 <= n <= MAX_CHECKPOINT_BYTES for n in numbers):
            _refuse("a tensor")
    if type(storage) is not Storage or len(shape) != len(strides):
        _refuse("a tensor")
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if math.prod(shape) > storage.count or (math.prod(shape) and last >= storage.count):
        _refuse("a tensor larger than its numbers")
    return StoredTensor(file=file, storage=storage, offset=offset, shape=shape, strides=strides)


def _refuse(what: str) -> NoReturn:
    raise ForeignError(f"holds {what} that is none of nnU-Net's; download or copy it again")
