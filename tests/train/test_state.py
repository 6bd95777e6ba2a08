"""The resumable state: what comes back, what damage does, and that nothing in it runs."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
from pathlib import Path

import pytest
import torch

from strokenet.data.errors import InputError
from strokenet.train.state import Progress, State, has_state, load_state, remove_leftovers, save_state
from strokenet.workspace import FoldFolder


def state(epoch: int) -> State:
    return State(
        progress=Progress(epoch=epoch, step=2, loss_sum=0.1, loss_count=2, waited=0.5),
        network={"weight": torch.full((3,), float(epoch))},
        optimizer={"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        scaler={},
        history=[{"epoch": float(n), "volume_dice": float("nan")} for n in range(epoch)],
        settings={"seed": "0"},
    )


@pytest.fixture
def folder(tmp_path: Path) -> FoldFolder:
    return FoldFolder(tmp_path / "fold_0")


def epoch_on_disk(folder: FoldFolder) -> int:
    loaded = load_state(folder)
    assert loaded is not None
    return loaded.progress.epoch


def test_a_state_comes_back_as_it_was(folder: FoldFolder) -> None:
    saved = state(3)
    save_state(folder, saved)
    loaded = load_state(folder)
    assert loaded is not None
    assert loaded.progress == saved.progress
    assert torch.equal(loaded.network["weight"], saved.network["weight"])
    assert torch.equal(loaded.optimizer["state"][0]["momentum_buffer"], torch.ones(3))
    assert [row["epoch"] for row in loaded.history] == [0, 1, 2]
    assert loaded.settings == saved.settings


def test_nothing_there_is_no_state(folder: FoldFolder) -> None:
    assert load_state(folder) is None
    assert not has_state(folder)


def test_two_states_are_kept(folder: FoldFolder) -> None:
    for epoch in (1, 2, 3):
        save_state(folder, state(epoch))
    assert epoch_on_disk(folder) == 3
    folder.state.unlink()
    assert has_state(folder)
    assert epoch_on_disk(folder) == 2
    assert sorted(path.name for path in folder.root.iterdir()) == ["state.prev.pt"]


def test_two_states_are_kept_without_hard_links(folder: FoldFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", no_links)
    save_state(folder, state(1))
    save_state(folder, state(2))
    assert epoch_on_disk(folder) == 2
    folder.state.unlink()
    assert epoch_on_disk(folder) == 1


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "cut":
        content = content[:-100]
    elif how == "empty":
        content = bytearray()
    else:
        content[len(content) // 3] ^= 1
    path.unlink()  # state.prev.pt may be a second name of it
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["cut", "empty", "bit"])
def test_a_damaged_state_falls_back_to_the_one_before(
    folder: FoldFolder, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    save_state(folder, state(1))
    save_state(folder, state(2))
    damage(folder.state, how)
    assert epoch_on_disk(folder) == 1
    assert "state.pt: damaged or cut short; going on from state.prev.pt" in caplog.text


def test_two_damaged_states_are_one_line(folder: FoldFolder) -> None:
    save_state(folder, state(1))
    save_state(folder, state(2))
    damage(folder.state, "bit")
    damage(folder.previous_state, "cut")
    with pytest.raises(InputError, match=r"state\.pt: damaged.*state\.prev\.pt: damaged.*remove .*fold_0") as caught:
        load_state(folder)
    assert "\n" not in str(caught.value)


class Malicious:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_code_in_a_state_is_not_run(folder: FoldFolder, tmp_path: Path, form: str) -> None:
    mark = tmp_path / "was-run"
    content = {"version": 1, "progress": Malicious(mark)}
    buffer = io.BytesIO()
    if form == "torch":
        torch.save(content, buffer)
    else:
        pickle.dump(content, buffer, protocol=2)  # the one that torch writes
    folder.root.mkdir()
    folder.state.write_bytes(buffer.getvalue() + hashlib.sha256(buffer.getvalue()).digest())
    with pytest.raises(InputError, match=r"state\.pt: no state of strokenet"):
        load_state(folder)
    assert not mark.exists()


@pytest.mark.parametrize("content", [{}, [1], {"version": 1, "progress": {"epoch": 0, "unknown": 1}}])
def test_another_file_of_torch_is_no_state(folder: FoldFolder, content: object) -> None:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    folder.root.mkdir()
    folder.state.write_bytes(buffer.getvalue() + hashlib.sha256(buffer.getvalue()).digest())
    with pytest.raises(InputError, match="no state of strokenet"):
        load_state(folder)


def test_only_temporary_files_are_leftovers(folder: FoldFolder) -> None:
    folder.root.mkdir()
    for name in (".0123456789ab.state.pt", ".nfs0001", "last.safetensors", ".0123456789ab"):
        (folder.root / name).touch()
    remove_leftovers(folder)
    assert sorted(path.name for path in folder.root.iterdir()) == [".0123456789ab", ".nfs0001", "last.safetensors"]
