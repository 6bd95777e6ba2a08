"""What a disk does to a run: full, read-only, damaged. It goes on, or stops with one line; nothing whole is lost."""

from __future__ import annotations

import itertools
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest
import torch

from strokenet.data.errors import InputError
from strokenet.model.checkpoint import load_model
from strokenet.train import train as loop
from strokenet.train.state import load_state
from strokenet.train.train import train
from strokenet.workspace import FoldFolder, Workspace
from tests.train.workspaces import assert_same_run, make_workspace, short, weights


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A run of three epochs that nothing disturbed."""
    workspace = make_workspace(tmp_path_factory.mktemp("whole"))
    train(workspace, short())
    return workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return make_workspace(tmp_path / "work")


@pytest.fixture
def small_disk(workspace: Workspace) -> Iterator[FoldFolder]:
    """The fold's folder is a file system of its own, of 2 MiB."""
    folder = workspace.fold("0")
    folder.root.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder.root)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no small disk here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder.root)], check=True)


def after_step(count: int, then: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """`then` happens once, when so many steps are done."""
    step, done = loop._step, []

    def counting(*values: Any) -> None:
        step(*values)
        done.append(1)
        if len(done) == count:
            then()

    monkeypatch.setattr(loop, "_step", counting)


def fill(folder: FoldFolder) -> None:
    """Until there is no room left for anything."""
    full = pytest.raises(OSError, match="No space left on device")
    with full, (folder.root / "other").open("wb", buffering=0) as file:
        file.writelines(itertools.repeat(bytes(4096)))


def contents(folder: FoldFolder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.root.iterdir() if path.name != "other"}


def assert_one_line(error: InputError, reason: str) -> None:
    assert f"fold_0: cannot be written ({reason}); free space or mend the permissions, then --resume" in str(error)
    assert "\n" not in str(error)


def test_a_disk_that_fills_up_ends_in_one_line_and_loses_nothing_written(
    workspace: Workspace, small_disk: FoldFolder, monkeypatch: pytest.MonkeyPatch, whole: Workspace
) -> None:
    train(workspace, short(stop_epoch=1))
    before = contents(small_disk)
    with monkeypatch.context() as patch:
        after_step(1, lambda: fill(small_disk), patch)
        with pytest.raises(InputError) as caught:
            train(workspace, short(resume=True))
    assert_one_line(caught.value, "No space left on device")
    assert contents(small_disk) == before
    with pytest.raises(InputError) as caught:  # still full: before the first step
        train(workspace, short(resume=True))
    assert_one_line(caught.value, "No space left on device")
    (small_disk.root / "other").unlink()
    train(workspace, short(resume=True))
    assert_same_run(workspace, whole)


def test_a_disk_that_becomes_read_only_ends_in_one_line_and_loses_nothing_written(
    workspace: Workspace, small_disk: FoldFolder, monkeypatch: pytest.MonkeyPatch, whole: Workspace
) -> None:
    train(workspace, short(stop_epoch=1))
    before = contents(small_disk)

    def remount(how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", str(small_disk.root)], check=True)

    with monkeypatch.context() as patch:
        after_step(1, lambda: remount("ro"), patch)
        with pytest.raises(InputError) as caught:
            train(workspace, short(resume=True))
    remount("rw")
    assert_one_line(caught.value, "Read-only file system")
    assert contents(small_disk) == before
    train(workspace, short(resume=True))
    assert_same_run(workspace, whole)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_nobody_may_write_is_refused_before_the_first_step(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(workspace, short(stop_epoch=1))
    root = workspace.fold("0").root
    root.chmod(0o500)
    monkeypatch.setattr(loop, "_step", lambda *_: pytest.fail("a step was computed"))
    try:
        with pytest.raises(InputError) as caught:
            train(workspace, short(resume=True))
    finally:
        root.chmod(0o700)
    assert_one_line(caught.value, "Permission denied")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
@pytest.mark.parametrize("file", ["state.pt", "last.safetensors"])
def test_a_full_disk_at_any_file_keeps_what_is_there(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, whole: Workspace, file: str
) -> None:
    """The write of one file of the second epoch meets a disk that is full; of others it is not."""
    train(workspace, short(stop_epoch=1))
    folder = workspace.fold("0")
    before = contents(folder)
    opened = Path.open

    def full(path: Path, mode: str = "r", *options: Any, **named: Any) -> IO[Any]:
        if mode == "wb" and path.name.endswith(f".{file}"):
            path.touch()
            path = Path("/dev/full")
        return opened(path, mode, *options, **named)

    with monkeypatch.context() as patch:
        after_step(1, lambda: patch.setattr(Path, "open", full), patch)
        with pytest.raises(InputError) as caught:
            train(workspace, short(resume=True))
    assert_one_line(caught.value, "No space left on device")
    after = contents(folder)
    assert after.keys() == before.keys() | ({"state.prev.pt"} if file != "state.pt" else set())
    assert (after["state.pt"] == before["state.pt"]) == (file == "state.pt")
    assert after["last.safetensors"] == before["last.safetensors"]
    train(workspace, short(resume=True))
    assert_same_run(workspace, whole)


def spoil(path: Path) -> None:
    """One bit in the middle is another; the file is a new one, because state.prev.pt may be a second name of it."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()
    path.write_bytes(content)


def test_a_damaged_newest_state_is_told_and_costs_what_came_after_the_one_before(
    workspace: Workspace, caplog: pytest.LogCaptureFixture, whole: Workspace
) -> None:
    train(workspace, short(stop_epoch=2))
    spoil(workspace.fold("0").state)
    caplog.set_level("INFO", "strokenet")
    train(workspace, short(resume=True))
    assert "state.pt: damaged or cut short; going on from state.prev.pt" in caplog.text
    assert "resuming at epoch 2, step 0" in caplog.text
    assert_same_run(workspace, whole)


def test_two_damaged_states_end_in_one_line_and_change_nothing(workspace: Workspace) -> None:
    train(workspace, short(stop_epoch=2))
    folder = workspace.fold("0")
    spoil(folder.state)
    spoil(folder.previous_state)
    before = contents(folder)
    with pytest.raises(InputError, match=r"state\.pt: damaged .*state\.prev\.pt: damaged .*to start again$") as caught:
        train(workspace, short(resume=True))
    assert "\n" not in str(caught.value)
    assert contents(folder) == before


@pytest.mark.parametrize("left", [0, 100, 5000])
def test_weights_that_were_cut_are_made_again_from_the_state(workspace: Workspace, left: int) -> None:
    train(workspace, short(stop_epoch=2))
    folder = workspace.fold("0")
    content = folder.last.read_bytes()
    folder.last.write_bytes(content[:left])
    with pytest.raises(InputError):
        load_model(workspace.root)
    train(workspace, short(resume=True, stop_epoch=2))  # nothing to train
    assert folder.last.read_bytes() == content
    state = load_state(folder)
    assert state is not None
    assert all(torch.equal(tensor, state.network[name]) for name, tensor in weights(folder.last).items())
