"""Files that a stranger may send: what pickle, zip and torch.load would do with them is not what their writer says."""

from __future__ import annotations

import json
import os
import pickle
import pickletools
import struct
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch

from strokenet.data.errors import InputError
from strokenet.nnunet.importing import import_nnunet

ROOT = Path(__file__).resolve().parents[2]
START = b"\x80\x02"  # protocol 2, which torch reads
MIB = 2**20
LONGEST = 2000  # characters of a message
READ = "was read"
_LEGACY_HEADER = (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}})


class Touch:
    """Makes a file when it is unpickled by a loader that runs what it reads."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


class Call:
    """Pickles as a call of `function` with what BUILD then sets."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None):
        self.pickled = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.pickled


def refused(source: Path, out: Path, message: str, file: str = "") -> None:
    """The import says one line that holds `message` and names `file`, and writes nothing."""
    before = sorted(out.rglob("*"))
    with pytest.raises(InputError) as caught:
        import_nnunet(source, out / "model")
    said = str(caught.value)
    assert message in said
    assert file in said
    assert said.isprintable()
    assert len(said) < LONGEST
    assert caught.value.exit_code == 4
    assert sorted(out.rglob("*")) == before


def spelled(text: str) -> bytes:
    """The opcode that pushes a text."""
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


def storage(numbers: int, kind: str = "FloatStorage") -> bytes:
    """The opcodes that push storage "0" of a checkpoint."""
    parts = (spelled("storage"), f"ctorch\n{kind}\n".encode(), spelled("0"), spelled("cpu"), _whole(numbers))
    return b"(" + b"".join(parts) + b"tQ"


def tensor(shape: tuple[int, ...], stride: tuple[int, ...], held: bytes) -> bytes:
    """The opcodes that push a tensor over the storage that `held` pushes."""
    numbers = [b"(" + b"".join(map(_whole, values)) + b"t" for values in (shape, stride)]
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + held + _whole(0) + b"".join(numbers) + b"\x89NtR"


def _whole(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


def write_zip(path: Path, pickled: bytes, records: Mapping[str, bytes] | None = None) -> None:
    """A checkpoint of today with this data.pkl."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {"data.pkl": pickled, "version": b"3\n", **(records or {})}.items():
            archive.writestr(f"archive/{name}", content)


def write_legacy(path: Path, pickled: bytes, keys: tuple[str, ...] = (), numbers: bytes = b"") -> None:
    """A checkpoint of before 1.6: magic number, version, byte order, content, keys of storages; then their numbers."""
    parts = [pickle.dumps(value, 2) for value in _LEGACY_HEADER]
    path.write_bytes(b"".join([*parts, pickled, pickle.dumps(list(keys), 2), numbers]))


def legacy_parts(content: bytes) -> tuple[list[bytes], bytes]:
    """The five pickles of such a file, and the numbers after them."""
    stream, parts = BytesIO(content), []
    for _ in range(5):
        begin = stream.tell()
        for _ in pickletools.genops(stream):
            pass
        parts.append(content[begin : stream.tell()])
    return parts, stream.read()


def write_plain(path: Path, pickled: bytes) -> None:
    path.write_bytes(pickled)


def save_zip(path: Path, value: Any) -> None:
    torch.save(value, path)


def save_legacy(path: Path, value: Any) -> None:
    torch.save(value, path, _use_new_zipfile_serialization=False)


def save_plain(path: Path, value: Any) -> None:
    path.write_bytes(pickle.dumps(value, protocol=2))


# Reads each file in a process of its own: one of these may end it, take all memory, or never return.
_READER = f"""
import json, os, resource, signal, sys
from pathlib import Path
from strokenet.data.errors import InputError
from strokenet.nnunet.checkpoints import load_checkpoint
from strokenet.nnunet.pickles import load_pickle

def read(path):
    signal.alarm(6)
    resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30, 8 * 2**30))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        (load_pickle if path.suffix == ".pkl" else load_checkpoint)(path)
        said = {READ!r}
    except InputError as error:
        said = str(error)
    except BaseException as error:
        said = "raised " + repr(error)[:{LONGEST}]
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 2**10
    print(json.dumps([path.name, said, grown]), flush=True)
    os._exit(0)

for path in sorted(Path(sys.argv[1]).iterdir()):
    child = os.fork()
    if not child:
        read(path)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        print(json.dumps([path.name, f"ended with {{status}}", 0]), flush=True)
"""


def read_apart(folder: Path) -> dict[str, tuple[str, int]]:
    """File name -> what its reader said, and the MiB of memory that it took for it."""
    command = [sys.executable, "-c", _READER, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=300)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return {name: (said, grown) for name, said, grown in found}
