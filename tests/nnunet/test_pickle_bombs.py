"""Small files that ask for all memory, all time, or the end of the process: one line, and little memory.

Each is read in a process of its own, and its memory measured.
"""

from __future__ import annotations

import collections
import os
import pickle
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.nnunet import v1_folders
from tests.nnunet.hostile import (
    LONGEST,
    MIB,
    READ,
    ROOT,
    START,
    Call,
    legacy_parts,
    read_apart,
    save_legacy,
    save_plain,
    save_zip,
    spelled,
    storage,
    write_legacy,
    write_plain,
    write_zip,
)

MOST = 200  # MiB that a refused file may take
SAVED: dict[str, Callable[[Path, Any], None]] = {"zip": save_zip, "legacy": save_legacy, "pkl": save_plain}
WRITTEN: dict[str, Callable[[Path, bytes], None]] = {"zip": write_zip, "legacy": write_legacy, "pkl": write_plain}
HUGE = 10**11
NAMED: dict[str, Any] = {  # torch's own list has the first eight
    "bytearray": Call(bytearray, HUGE),
    "set": Call(set, [1]),
    "complex": Call(complex, 1, 2),
    "counter": Call(collections.Counter, {"a": HUGE}),
    "storage": Call(torch.UntypedStorage, HUGE),
    "meta": Call(torch._utils._rebuild_meta_tensor_no_storage, torch.float32, (HUGE,), (1,), False),
    "tensor": Call(torch.FloatTensor, HUGE),
    "type": Call(torch._utils._rebuild_sparse_tensor, 1, 2),
    "defaultdict": Call(collections.defaultdict, None, {}),
    "deque": Call(collections.deque, [1]),
    "zeros": Call(np.zeros, HUGE),
    "bytes": Call(bytes, HUGE),
}


def all_refused(folder: Path, message: str, *, or_read: bool = False) -> None:
    """Each file of the folder gets one line with `message` (or_read: or is read), for little memory."""
    found = read_apart(folder)
    assert set(found) == set(os.listdir(folder))
    wrong = []
    for name, (said, grown) in found.items():
        is_line = said.startswith(f"{folder / name}: ") and message in said and len(said) < LONGEST
        if grown > MOST or not (is_line or (or_read and said == READ)):
            wrong.append(f"{name}: {said[:200]} ({grown} MiB)")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("form", SAVED)
def test_what_nnunet_does_not_hold_is_refused_by_name(tmp_path: Path, form: str) -> None:
    for name, value in NAMED.items():
        SAVED[form](tmp_path / f"{name}.{form}", {"value": value})
    all_refused(tmp_path, ", which is not allowed")


def test_each_of_the_five_pickles_of_an_old_checkpoint_is_looked_at(tmp_path: Path) -> None:
    save_legacy(tmp_path / "good", {"value": torch.ones(3)})
    parts, numbers = legacy_parts((tmp_path / "good").read_bytes())
    (tmp_path / "good").unlink()
    for place in range(5):
        changed = [*parts[:place], pickle.dumps(Call(bytearray, HUGE), 2), *parts[place + 1 :]]
        (tmp_path / f"{place}.legacy").write_bytes(b"".join(changed) + numbers)
    all_refused(tmp_path, "bytearray, which is not allowed")


DEEP = b")" + b"\x85" * 200_000  # ((((),),),): to hash it takes one frame of C a level
SHARED = b"K\x01K\x01\x86" + b"q\x00h\x00\x86" * 60  # a pair of pairs of pairs: to hash it takes 2^60 steps
ENCODE = b"c_codecs\nencode\n"
COPIES = 4000
PICKLED: dict[str, bytes] = {
    "deep-key": START + b"}" + DEEP + b"K\x01s.",
    "deep-name": START + b"}" + spelled("network_weights") + b"}" + DEEP + b"K\x01ss.",
    "shared-key": START + b"}" + SHARED + b"K\x01s.",
    "deep-key-of-an-argument": START + b"ccollections\nOrderedDict\n](" + DEEP + b"K\x01\x86e\x85R.",
    # each of these calls has a result of twice its argument's size: 4 bytes become 1 GiB
    "doubling-codec": START
    + ENCODE * 29
    + spelled("abcd")
    + spelled("latin1")
    + b"\x86R"
    + (spelled("hex") + b"\x86R") * 28
    + b".",
    "copied-text": START
    + b"]("
    + ENCODE
    + b"q\x00"
    + spelled("a" * 2**18)
    + b"q\x01"
    + spelled("latin1")
    + b"q\x02\x86R"
    + b"h\x00h\x01h\x02\x86R" * COPIES
    + b"e.",
    "copied-dictionary": START
    + b"](ccollections\nOrderedDict\nq\x00}("
    + b"".join(b"M" + struct.pack("<H", key) + b"N" for key in range(5000))
    + b"uq\x01\x85R"
    + b"h\x00h\x01\x85R" * COPIES
    + b"e.",
    "far-memo": START + b"K\x01r\xff\xff\xff\x7f.",
    "far-memo-text": START + b"K\x01p2147483647\n.",
}
DEEP_STORAGE = START + storage(4).replace(spelled("0"), DEEP) + b"."


@pytest.mark.parametrize("form", WRITTEN)
def test_a_small_pickle_takes_little(tmp_path: Path, form: str) -> None:
    for name, pickled in PICKLED.items():
        WRITTEN[form](tmp_path / f"{name}.{form}", pickled)
    if form != "pkl":
        WRITTEN[form](tmp_path / f"deep-key-of-a-storage.{form}", DEEP_STORAGE)
        WRITTEN[form](tmp_path / f"huge-storage.{form}", START + storage(HUGE) + b".")
    all_refused(tmp_path, "", or_read=True)


def write_two_directories(path: Path, seen: bytes, packed: bytes) -> None:
    """A zip whose end record points to a directory with `packed`, compressed; before it stands one with `seen`.

    Python takes the directory that stands before the end record; torch the one that the record points to.
    """
    body, directories, other = b"", [b"", b""], (b"a/version", b"3\n", b"3\n", 0)
    deflated = zlib.compress(packed, 1, wbits=-15)
    entries = ((b"a/data.pkl", deflated, packed, 8), (b"a/data.pkl", seen, seen, 0))
    for number, entry in enumerate(entries):
        for name, stored, content, method in (entry, other):
            sizes = struct.pack("<HHLLLHH", 0, 0x21, zlib.crc32(content), len(stored), len(content), len(name), 0)
            start = struct.pack("<4sHHH", b"PK\x01\x02", 20, 20, 0) + struct.pack("<H", method) + sizes
            directories[number] += start + struct.pack("<HHHLL", 0, 0, 0, 0, len(body)) + name
            body += struct.pack("<4sHHH", b"PK\x03\x04", 20, 0, method) + sizes + name + stored
    end = struct.pack("<4sHHHHLLH", b"PK\x05\x06", 0, 0, 2, 2, len(directories[0]), len(body), 0)
    path.write_bytes(body + b"".join(directories) + end)


def test_an_archive_with_two_directories_is_refused(tmp_path: Path) -> None:
    good = pickle.dumps({"a": 1}, 2)
    write_two_directories(tmp_path / "unpacked", good, good + bytes(400 * MIB))
    all_refused(tmp_path, "")


# BUILD with a pair sets attributes of whatever is on the stack, a class or a function of ours too.
PATCHES = {
    f"{name}.{attribute}": START + f"c{name}\n".encode() + b"N}" + spelled(attribute) + value + b"s\x86b0}."
    for name, attribute, value in (
        *(("collections\nOrderedDict", method, spelled("x")) for method in ("__contains__", "__setitem__", "items")),
        ("collections\nOrderedDict", "__getitem__", b"c_codecs\nencode\n"),
        ("numpy\ndtype", "dtype", spelled("x")),
        ("numpy.core.multiarray\nscalar", "__defaults__", b"K\x01K\x02\x86"),
        ("numpy.core.multiarray\n_reconstruct", "__kwdefaults__", b"}" + spelled("x") + b"K\x02s"),
        ("_codecs\nencode", "__defaults__", b"K\x01K\x02\x86"),
    )
}


@pytest.mark.parametrize("form", ["zip", "pkl"])
def test_a_file_changes_nothing_for_the_next_one(tmp_path: Path, form: str) -> None:
    """In a process of its own: what such a file sets would stay for all files after it."""
    v1_folders.write_pickle(tmp_path / "good", v1_folders.record(v1_folders.plans()))
    for number, pickled in enumerate(PATCHES.values()):
        WRITTEN[form](tmp_path / f"{number}.{form}", pickled)
    program = f"""
from pathlib import Path
from strokenet.data.errors import InputError
from strokenet.nnunet import checkpoints, pickles
def state():
    made = [value for value in pickles.ARRAYS.values() if value not in (None, dict)]
    kept = [(getattr(f, "__defaults__", None), getattr(f, "__kwdefaults__", None), dict(vars(f))) for f in made]
    return repr(kept), repr(pickles.load_pickle(folder / "good"))
folder = Path({str(tmp_path)!r})
before = state()
for path in sorted(folder.glob("*.*")):
    try:
        (pickles.load_pickle if path.suffix == ".pkl" else checkpoints.load_checkpoint)(path)
    except InputError:
        pass
    assert state() == before, path.name
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-500:] + str(list(enumerate(PATCHES)))
