"""Atomic writes, JSON that a stranger wrote, and names that are safe as file names."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from strokenet.data import files
from strokenet.data.errors import InputError
from strokenet.data.files import read_json, replacing, safe_name, write_bytes, write_json


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- writing


@pytest.mark.parametrize("durable", [True, False])
def test_a_block_that_ends_well_replaces_the_file(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "new" / "folder" / "scan.nii.gz"
    for content in (b"first", b"second"):
        with replacing(path, durable=durable) as temporary:
            assert temporary.parent == path.parent
            assert temporary.name.startswith(".")
            assert temporary.name.endswith(".scan.nii.gz")
            temporary.write_bytes(content)
        assert path.read_bytes() == content
        assert names(path.parent) == ["scan.nii.gz"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt(), SystemExit(143)])
def test_a_block_that_fails_leaves_the_old_content_and_no_temporary_file(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "plan.json"
    path.write_text("old")

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half of the ne")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["plan.json"]


def test_a_reader_sees_the_old_content_until_the_rename(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_file_and_folder_are_flushed_around_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    opened: dict[int, str] = {}
    original_open, original_replace = os.open, os.replace

    def remember(path: Any, *arguments: Any) -> int:
        handle = original_open(path, *arguments)
        opened[handle] = "folder" if Path(path).is_dir() else "file"
        return handle

    def rename(old: Any, new: Any) -> None:
        steps.append("rename")
        original_replace(old, new)

    monkeypatch.setattr(files.os, "open", remember)
    monkeypatch.setattr(files.os, "fsync", lambda handle: steps.append(opened[handle]))
    monkeypatch.setattr(files.os, "replace", rename)
    write_bytes(tmp_path / "state.pt", b"content")
    assert steps == ["file", "rename", "folder"]
    steps.clear()
    write_bytes(tmp_path / "state.pt", b"content", durable=False)
    assert steps == ["rename"]


def test_two_writers_of_one_file_do_not_share_a_temporary_name(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with replacing(path) as one, replacing(path) as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one"  # the outer block ends last
    assert names(tmp_path) == ["a.json"]


def test_json_comes_back_as_it_was_written(tmp_path: Path) -> None:
    value = {"läsion": [1, 2.5, None, True], "path": "a/b"}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    assert (tmp_path / "a.json").read_bytes().endswith(b"\n")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_json_has_no_nan_and_a_refused_value_writes_nothing(tmp_path: Path, number: float) -> None:
    with pytest.raises(ValueError, match="Out of range"):
        write_json(tmp_path / "a.json", {"dice": number})
    assert not names(tmp_path)


# --- reading


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "no valid JSON"),
        (b"{'single': 'quotes'}", "no valid JSON"),
        (b'{"cut": [1, 2', "no valid JSON"),
        (b'{"latin": "l\xe4sion"}', "no valid JSON"),
        (b"[" * 200_000, "no valid JSON"),
        (b"1" * 5000, "no valid JSON"),
        (b"\x00" * 100, "no valid JSON"),
    ],
)
def test_a_file_that_is_no_json_is_refused_in_one_line(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "dataset.json"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_json(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert says in message
    assert len(message.splitlines()) == 1
    assert len(message) < 600


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_bytes(b"\xef\xbb\xbf" + b'{"a": 1}')
    assert read_json(tmp_path / "dataset.json") == {"a": 1}


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")  # reading it would wait for ever
    (tmp_path / "loop.json").symlink_to(tmp_path / "loop.json")
    (tmp_path / "file").write_text("{}")
    for path, says in (
        (tmp_path / "missing.json", "not found"),
        (tmp_path, "no regular file"),
        (tmp_path / "pipe.json", "no regular file"),
        (tmp_path / "loop.json", "cannot be read"),
        (tmp_path / "file" / "dataset.json", "cannot be read"),
    ):
        with pytest.raises(InputError, match=says):
            read_json(path)


def test_a_giant_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "giant.json"
    with path.open("wb") as file:
        file.truncate(64 * 2**20 + 1)
    with pytest.raises(InputError, match="larger than 64 MiB"):
        read_json(path)


# --- names


@pytest.mark.parametrize(
    "name",
    ["sub-01_ses-1", "Patient 7", "läsion", "患者01", "a.b.c", "x" * 200, "it's", "(1)", "[red]", "=cmd", "console"],
)
def test_ordinary_names_are_kept(name: str) -> None:
    assert safe_name(name, "case") == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        " padded",
        "padded ",
        "..",
        ".",
        ".hidden",
        "../up",
        "/etc/passwd",
        "a/b",
        "a\\b",
        "C:scan",
        "what?",
        "star*",
        'quote"',
        "<script>",
        "a|b",
        "nul\0byte",
        "two\nlines",
        "tab\there",
        "escape\x1b[31m",
        "delete\x7f",
        "next line\x85",
        "line\u2028separator",
        "gpj\u202eexe",
        "half \ud83d",
        "x" * 201,
        "患" * 67,
        "con",
        "NUL.txt",
        "Com1",
        7,
        None,
        ["a"],
    ],
)
def test_names_that_some_system_cannot_hold_are_refused(name: Any) -> None:
    with pytest.raises(InputError) as caught:
        safe_name(name, "case")
    message = str(caught.value)
    assert message.startswith("case ")
    assert "; rename it" in message
    assert message.isprintable()


def test_the_longest_allowed_name_can_be_written(tmp_path: Path) -> None:
    name = safe_name("患" * 66 + "xx", "case")
    write_bytes(tmp_path / f"{name}_lesion.nii.gz", b"")


# --- the error


def test_an_error_is_one_printable_line_whatever_it_quotes() -> None:
    error = InputError("two\nlines, \x1b[31mred, \udc80, ümlaut, 患")
    assert str(error) == "two\\nlines, \\x1b[31mred, \\udc80, ümlaut, 患"


def test_an_error_survives_the_way_from_a_worker_process() -> None:
    error = pickle.loads(pickle.dumps(InputError("sub-1: bad\nfile")))
    assert isinstance(error, InputError)
    assert str(error) == "sub-1: bad\\nfile"
    assert json.dumps(str(error))
