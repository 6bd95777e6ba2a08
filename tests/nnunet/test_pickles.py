"""What a stranger's pickle can do: hold numbers. Nothing in it runs."""

from __future__ import annotations

import codecs
import collections
import pickle
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy._core.multiarray import _reconstruct, scalar

from strokenet.data.errors import InputError
from strokenet.nnunet import checkpoints, pickles
from strokenet.nnunet.checkpoints import load_checkpoint
from strokenet.nnunet.pickles import load_pickle
from tests.nnunet.hostile import (
    ROOT,
    START,
    Call,
    Touch,
    save_legacy,
    save_plain,
    save_zip,
    spelled,
    storage,
    tensor,
    write_zip,
)


class Foreign:
    """A class that the loader does not know."""


LOADERS = [
    pytest.param(load_checkpoint, save_zip, id="checkpoint"),
    pytest.param(load_checkpoint, save_legacy, id="old-checkpoint"),
    pytest.param(load_checkpoint, save_plain, id="pickle-as-checkpoint"),
    pytest.param(load_pickle, save_plain, id="pickle"),
]


@pytest.mark.parametrize(("load", "save"), LOADERS)
def test_a_pickle_that_would_run_does_not(
    tmp_path: Path, load: Callable[[Path], Any], save: Callable[[Path, Any], None]
) -> None:
    save(tmp_path / "file", {"weights": Touch(tmp_path / "made")})
    with pytest.raises(InputError, match=r"mkdir.*not allowed|cannot be read") as caught:
        load(tmp_path / "file")
    assert not (tmp_path / "made").exists()
    assert "\n" not in str(caught.value)
    pickle.loads(pickle.dumps(Touch(tmp_path / "made")))  # the trap is one: a loader that runs what it reads falls in
    assert (tmp_path / "made").exists()


@pytest.mark.parametrize(("load", "save"), LOADERS)
@pytest.mark.parametrize("value", [Foreign(), np.random.default_rng(0), Path("x"), collections.Counter("abc")])
def test_foreign_classes_are_refused(
    tmp_path: Path, load: Callable[[Path], Any], save: Callable[[Path, Any], None], value: Any
) -> None:
    save(tmp_path / "file", {"value": value})
    with pytest.raises(InputError):
        load(tmp_path / "file")


NUMBERS: dict[str, Any] = {
    "float64": np.float64(0.25),
    "float32": np.float32(0.25),
    "int64": np.int64(-3),
    "bool": np.bool_(True),
    "nested": [{"a": np.float64(1.5)}, (1, 2.0, "x", None)],
}


@pytest.mark.parametrize(("load", "save"), LOADERS[:2] + LOADERS[3:])
def test_numbers_of_numpy_are_read(
    tmp_path: Path, load: Callable[[Path], Any], save: Callable[[Path, Any], None]
) -> None:
    save(tmp_path / "file", NUMBERS)
    assert load(tmp_path / "file") == NUMBERS


def test_arrays_and_ordered_dictionaries_are_read_from_a_pickle(tmp_path: Path) -> None:
    value = collections.OrderedDict(spacing=np.array([1.0, 2.0, 3.0]), kernels=[[3, 3, 3]])
    save_plain(tmp_path / "file", value)
    read = load_pickle(tmp_path / "file")
    assert list(read) == ["spacing", "kernels"]
    np.testing.assert_array_equal(read["spacing"], value["spacing"])


def test_no_codec_but_latin_1_is_reached(tmp_path: Path) -> None:
    class Packed:
        def __reduce__(self) -> Any:
            return (codecs.encode, ("uryyb", "rot13"))

    save_plain(tmp_path / "file", Packed())
    with pytest.raises(InputError, match="encodes as something else than 'latin1', which is not allowed"):
        load_pickle(tmp_path / "file")


def test_names_of_numpy_1_are_read(tmp_path: Path) -> None:
    """Files written before 2024 name numpy.core; numpy 2 writes numpy._core."""
    content = pickle.dumps({"array": np.arange(3.0), "number": np.float64(2)}, protocol=2)
    assert b"numpy._core" in content
    (tmp_path / "file").write_bytes(content.replace(b"numpy._core", b"numpy.core"))
    assert load_pickle(tmp_path / "file")["array"].tolist() == [0.0, 1.0, 2.0]


def test_a_checkpoint_of_numpy_1_is_read(tmp_path: Path) -> None:
    torch.save({"best": np.float64(0.5)}, tmp_path / "new")
    with zipfile.ZipFile(tmp_path / "new") as source, zipfile.ZipFile(tmp_path / "old", "w") as target:
        for entry in source.infolist():
            target.writestr(entry, source.read(entry).replace(b"numpy._core", b"numpy.core"))
    assert load_checkpoint(tmp_path / "old") == {"best": 0.5}


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    torch.save({"weights": torch.zeros(1_000_000)}, tmp_path / "plain")
    with (
        zipfile.ZipFile(tmp_path / "plain") as source,
        zipfile.ZipFile(tmp_path / "bomb", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    assert (tmp_path / "bomb").stat().st_size < 10_000
    with pytest.raises(InputError, match="compressed archive; torch writes none"):
        load_checkpoint(tmp_path / "bomb")


@pytest.mark.parametrize("content", [b"", b"\x80", b"PK\x03\x04", b"hello world", b"\x80\x02]q\x00", bytes(1000)])
def test_files_that_are_no_pickles_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    for load in (load_checkpoint, load_pickle):
        with pytest.raises(InputError, match="file: ") as caught:
            load(tmp_path / "file")
        assert "\n" not in str(caught.value)


def test_a_checkpoint_that_is_no_dictionary_is_refused(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "file")
    with pytest.raises(InputError, match="holds a list"):
        load_checkpoint(tmp_path / "file")


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    for load in (load_checkpoint, load_pickle):
        with pytest.raises(InputError, match="No such file"):
            load(tmp_path / "none")
        with pytest.raises(InputError, match="is no regular file"):
            load(tmp_path)


# An 8-byte number that the file calls a pointer: what reads it as an object ends the process.
HIDDEN = Call(np.dtype, "V8", False, True, state=(3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 0))
DISGUISED = Call(np.dtype, "f8", False, True, state=(3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 0))
BYTES = b"A" * 8
POINTERS: dict[str, Any] = {
    "array-call": Call(np.ndarray, (1,), np.dtype("O"), BYTES),
    "array-of-a-hidden-object": Call(_reconstruct, np.ndarray, (0,), b"b", state=(1, (1,), HIDDEN, False, BYTES)),
    "array-of-a-disguised-object": Call(_reconstruct, np.ndarray, (0,), b"b", state=(1, (1,), DISGUISED, False, BYTES)),
    "array-of-objects": Call(_reconstruct, np.ndarray, (0,), b"b", state=(1, (1,), np.dtype("O"), False, [1])),
    "number-with-a-hidden-object": [Call(scalar, HIDDEN, BYTES)],
    "number-of-an-object": [Call(scalar, np.dtype("O"), BYTES)],
    "number-too-long": [Call(scalar, np.dtype("f8"), BYTES * 2)],
    "huge-array": Call(np.ndarray, (10**11,), np.dtype("f8")),
}


@pytest.mark.parametrize(("load", "save"), LOADERS)
def test_bytes_are_never_taken_for_objects(
    tmp_path: Path, load: Callable[[Path], Any], save: Callable[[Path, Any], None]
) -> None:
    """In a process of its own: where one of these works, Python does not raise, it ends."""
    for name, value in POINTERS.items():
        save(tmp_path / name, {"value": Call(collections.OrderedDict, value)})
    program = f"""
from pathlib import Path
from strokenet.data.errors import InputError
from {load.__module__} import {load.__name__}
for path in Path({str(tmp_path)!r}).iterdir():
    try:
        repr({load.__name__}(path))
    except InputError as error:
        assert any(text in str(error) for text in ("cannot be read", "not allowed", "another size")), error
        print(path.name)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == set(POINTERS)


def test_arrays_and_numbers_of_the_other_byte_order_are_read_right(tmp_path: Path) -> None:
    """A file of another machine; the numbers are not those that the bytes would be here."""
    values = np.array([[1.0, -2.5], [3.0, 1e10]])
    for order in "<>":
        number = Call(scalar, np.dtype(f"{order}f4"), np.array(0.1, f"{order}f4").tobytes())
        save_plain(tmp_path / "file", {"array": values.astype(f"{order}f8"), "number": number})
        read = load_pickle(tmp_path / "file")
        np.testing.assert_array_equal(read["array"], values)
        assert read["number"] == np.float32(0.1)


def test_a_checkpoint_of_the_other_byte_order_is_read_right(tmp_path: Path) -> None:
    pickled = START + b"}" + spelled("a") + tensor((3,), (1,), storage(3)) + b"s."
    for order, name in (("<", b"little"), (">", b"big")):
        numbers = np.array([1.0, -2.5, 1e10], f"{order}f4").tobytes()
        write_zip(tmp_path / "file", pickled, {"byteorder": name, "data/0": numbers})
        assert load_checkpoint(tmp_path / "file")["a"].read().tolist() == [1.0, -2.5, 1e10]


@pytest.mark.parametrize(("load", "save"), LOADERS)
def test_a_pickle_larger_than_allowed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: Callable[[Path], Any], save: Callable[[Path, Any], None]
) -> None:
    monkeypatch.setattr(pickles, "MAX_PICKLE_BYTES", 10_000)
    monkeypatch.setattr(checkpoints, "MAX_CONTENT_BYTES", 10_000)
    save(tmp_path / "file", {"text": "x" * 10_000, "more": 1})
    with pytest.raises(InputError, match="at most 10000 are read|more than 10000 bytes"):
        load(tmp_path / "file")
    if save is not save_plain or load is load_pickle:
        save(tmp_path / "file", {"text": "x" * 9_000, "more": 1})
        assert len(load(tmp_path / "file")["text"]) == 9_000


def test_torch_prints_no_warning_of_its_own(tmp_path: Path) -> None:
    write_zip(tmp_path / "protocol", pickle.dumps({"a": 1}, 3))
    write_zip(tmp_path / "script", pickle.dumps({"a": 1}, 2), {"constants.pkl": pickle.dumps((), 2)})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for path in tmp_path.iterdir():
            with suppress(InputError):
                load_checkpoint(path)
    assert [str(warning.message) for warning in caught] == []
