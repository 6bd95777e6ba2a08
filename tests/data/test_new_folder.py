"""A folder that appears whole, in one rename, or not at all: the place is checked, an error leaves no trace."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from strokenet.data import files
from strokenet.data.errors import InputError
from strokenet.data.files import new_folder

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
ABSENT = Path("new") / "model"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def tree(root: Path) -> set[str]:
    """Every path below `root`; a link with where it leads, a file with its content."""
    kinds = {
        path: f" -> {path.readlink()}" if path.is_symlink() else f" {path.read_text()}" if path.is_file() else ""
        for path in root.rglob("*")
    }
    return {f"{path.relative_to(root)}{kind}" for path, kind in kinds.items()}


def filled(path: Path, error: BaseException | None = None) -> None:
    """Makes the folder with a file in a folder of its own; ends with `error` where one is given."""
    with new_folder(path) as folder:
        (folder / "fold_0").mkdir()
        (folder / "fold_0" / "weights").write_text("numbers")
        if error is not None:
            raise error


def refused(path: Path, root: Path, says: str) -> None:
    """One line that names the path and says why; below `root` all is as before."""
    before = tree(root)
    with pytest.raises(InputError) as caught:
        filled(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert says in message
    assert "-o" in message
    assert len(message.splitlines()) == 1
    assert tree(root) == before


# --- the place


def full_folder(path: Path) -> None:
    path.mkdir()
    (path / "mine").write_text("kept")


def link_to_an_empty_folder(path: Path) -> None:
    (path.parent / "empty").mkdir()
    path.symlink_to("empty")


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda path: path.write_text("mine"), id="file"),
        pytest.param(full_folder, id="full folder"),
        pytest.param(link_to_an_empty_folder, id="link to an empty folder"),
        pytest.param(lambda path: path.symlink_to("nowhere"), id="link to nowhere"),
        pytest.param(os.mkfifo, id="FIFO"),
    ],
)
def test_what_is_there_is_refused_and_kept(here: Path, make: Callable[[Path], None]) -> None:
    make(Path("model"))
    refused(Path("model"), here, "is there already")


def test_an_empty_folder_is_taken(here: Path) -> None:
    Path("model").mkdir()
    filled(Path("model"))
    assert tree(here) == {"model", "model/fold_0", "model/fold_0/weights numbers"}


@pytest.mark.parametrize("name", [".", "../here", "sub/..", "{here}", "../link", "../above/here"])
def test_the_folder_that_the_command_runs_in_is_refused(here: Path, name: str) -> None:
    """Replaced by a new folder of its name, it would leave the shell in one that is gone."""
    (here.parent / "link").symlink_to(here)
    (here.parent / "above").symlink_to(here.parent)
    was = here.stat().st_ino
    says = "-o" if name == "../link" else "is the folder that the command runs in"  # a link is refused anyway
    refused(Path(name.format(here=here)), here, says)
    assert here.stat().st_ino == was


@pytest.mark.parametrize("name", ["..", "../.."])
def test_a_folder_above_is_refused(here: Path, name: str) -> None:
    refused(Path(name), here, "is there already")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("x" * 300, "File name too long"),
        (f"new/{'x' * 300}", "File name too long"),
        (f"new/{'x' * 300}/model", "File name too long"),
        (f"new/{'x' * 250}", "File name too long"),  # it fits, its temporary name does not
        ("file/model", "Not a directory"),
        ("file/new/model", "Not a directory"),
        ("dangling/model", "File exists"),
    ],
)
def test_a_place_that_cannot_be_made_is_refused_in_one_line(here: Path, name: str, says: str) -> None:
    Path("file").touch()
    Path("dangling").symlink_to("nowhere")
    refused(Path(name), here, f"cannot be written ({says})")


def test_a_read_only_place_is_refused(here: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("the superuser writes everywhere")
    Path("locked").mkdir(mode=0o555)
    for name in ("locked/model", "locked/new/model"):
        refused(Path(name), here, "cannot be written (Permission denied)")


# --- an error inside


@pytest.mark.parametrize("error", [FULL, InputError("fold 1: damaged"), ValueError("x"), KeyboardInterrupt()])
def test_an_error_leaves_no_trace_of_the_folder_or_of_parents_made_for_it(here: Path, error: BaseException) -> None:
    Path("given").mkdir()
    with pytest.raises((InputError, type(error))):
        filled(Path("given/new/newer/model"), error)
    assert tree(here) == {"given"}


def test_an_error_leaves_the_empty_folder_that_was_there(here: Path) -> None:
    Path("model").mkdir()
    with pytest.raises(KeyError):
        filled(Path("model"), KeyError())
    assert tree(here) == {"model"}


def test_parents_in_which_someone_else_has_put_a_file_stay(here: Path) -> None:
    def fail() -> None:
        with new_folder(Path("new/newer/newest/model")):
            Path("new/newer/theirs").write_text("kept")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert tree(here) == {"new", "new/newer", "new/newer/theirs kept"}


def test_what_someone_else_has_put_in_the_place_meanwhile_is_kept(here: Path) -> None:
    def raced() -> None:
        with new_folder(ABSENT) as folder:
            (folder / "ours").touch()
            ABSENT.mkdir()
            (ABSENT / "theirs").write_text("kept")

    with pytest.raises(InputError, match="new/model: cannot be written"):
        raced()
    assert tree(here) == {"new", "new/model", "new/model/theirs kept"}


def test_a_full_disk_is_told_in_one_line(here: Path) -> None:
    with pytest.raises(InputError, match="^new/model: cannot be written \\(No space left on device\\)"):
        filled(ABSENT, FULL)
    assert tree(here) == set()


def test_a_disk_that_fails_at_the_last_flush_leaves_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(handle: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(InputError, match="cannot be written"):
        filled(ABSENT)
    assert tree(here) == set()


# --- a block that ends well


def test_the_folder_is_not_there_before_the_block_ends(here: Path) -> None:
    with new_folder(ABSENT) as folder:
        assert folder.parent == here / "new"
        assert folder.name.startswith(".")
        assert not ABSENT.exists()
    assert tree(here) == {"new", "new/model"}


def test_the_folder_is_flushed_before_the_rename_and_its_parent_after(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int | str] = []
    rename = os.replace

    def remember(old: Path, new: Path) -> None:
        rename(old, new)
        steps.append("rename")

    monkeypatch.setattr(files.os, "fsync", lambda handle: steps.append(os.fstat(handle).st_ino))
    monkeypatch.setattr(files.os, "replace", remember)
    filled(ABSENT)
    assert steps == [ABSENT.stat().st_ino, "rename", ABSENT.parent.stat().st_ino]
