"""A run can be made longer: after its end, in its middle, and the schedule says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from strokenet.cli import cli
from strokenet.data.errors import InputError
from strokenet.train import train as loop
from strokenet.train.schedule import poly_lr
from strokenet.train.state import load_state
from strokenet.train.stopping import Stop
from strokenet.train.train import train
from strokenet.workspace import Workspace
from tests.train.workspaces import assert_same_run, make_workspace, rows, short


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return make_workspace(tmp_path / "work")


def rates(workspace: Workspace) -> list[float]:
    return [float(row["lr"]) for row in rows(workspace)]


def test_a_finished_run_goes_on_by_the_longer_schedule_and_says_so(
    workspace: Workspace, caplog: pytest.LogCaptureFixture
) -> None:
    assert train(workspace, short(epochs=2)).finished
    before = rows(workspace)
    caplog.set_level("INFO", "strokenet")
    result = train(workspace, short(epochs=6, resume=True))
    assert result.finished
    assert len(result.history) == 6
    assert rows(workspace)[:2] == before
    assert rates(workspace) == pytest.approx([poly_lr(1e-2, n, 2 if n < 2 else 6) for n in range(6)])
    line = (
        "6 epochs instead of 2: from epoch 3 on the learning rate is that of the longer schedule, 0.00694 instead of 0,"
    )
    assert line in caplog.text  # 0.01 (1 - 2/6)^0.9, as for 3000 epochs after 1000
    assert "nothing to do" not in caplog.text


def test_a_run_in_its_middle_can_be_extended_too(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped by the clock after the first step of the second epoch: the rest of that epoch has the new rate."""
    seen = []
    step = loop._step

    def look(training: Any, batch: Any) -> None:
        seen.append(training.run.optimizer.param_groups[0]["lr"])
        step(training, batch)
        if len(seen) == 4:
            monkeypatch.setattr(Stop, "__call__", lambda _: True)

    call = Stop.__call__
    monkeypatch.setattr(loop, "_step", look)
    assert not train(workspace, short(epochs=2)).finished
    monkeypatch.setattr(Stop, "__call__", call)
    assert train(workspace, short(epochs=3, resume=True)).finished
    old, new = [poly_lr(1e-2, n, 2) for n in (0, 1)], [poly_lr(1e-2, n, 3) for n in (1, 2)]
    assert seen == [old[0]] * 3 + [old[1]] + [new[0]] * 2 + [new[1]] * 3


def test_an_extended_run_that_was_stopped_ends_as_the_one_that_was_not(tmp_path: Path) -> None:
    whole, stopped = make_workspace(tmp_path / "whole"), make_workspace(tmp_path / "stopped")
    for workspace in (whole, stopped):
        train(workspace, short(epochs=1))
    train(whole, short(epochs=3, resume=True))
    train(stopped, short(epochs=3, resume=True, max_time_minutes=0))  # the state still says 1
    train(stopped, short(epochs=3, resume=True, stop_epoch=2))
    train(stopped, short(epochs=3, resume=True))
    assert_same_run(stopped, whole)


def test_a_schedule_never_becomes_shorter(workspace: Workspace) -> None:
    train(workspace, short(epochs=1))
    train(workspace, short(epochs=4, resume=True, stop_epoch=2))
    state = load_state(workspace.fold("0"))
    assert state is not None
    assert state.settings["epochs"] == "4"
    for epochs in (1, 3):
        with pytest.raises(InputError, match=rf"--epochs was 4, is {epochs} \(a schedule can only become longer; --st"):
            train(workspace, short(epochs=epochs, resume=True))


def test_more_epochs_excuse_no_other_setting(workspace: Workspace) -> None:
    train(workspace, short(epochs=1))
    with pytest.raises(InputError, match="cannot resume with other settings: --lr was 0.01, is 0.02; repeat"):
        train(workspace, short(epochs=2, lr=0.02, resume=True))


def test_the_command_line_names_it() -> None:
    (option,) = [o for o in cli.commands["train"].params if o.name == "checkpoint_minutes"]
    assert option.opts == ["--checkpoint-every"]
