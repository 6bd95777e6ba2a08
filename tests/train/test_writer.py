"""The checkpoint writer: what it takes is the run at that moment, training goes on, and nothing fails in silence."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from strokenet.data.errors import InputError
from strokenet.train import record
from strokenet.train import train as loop
from strokenet.train import writer as writers
from strokenet.train.run import Run, fold_cases, start_run
from strokenet.train.state import State, load_state
from strokenet.train.train import train
from strokenet.train.writer import CheckpointWriter
from strokenet.workspace import FoldFolder
from tests.train.workspaces import assert_same_run, make_workspace, short


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run with one step behind it: its optimizer has momentum."""
    workspace = make_workspace(tmp_path)
    plan = workspace.read_plan()
    run = start_run(workspace, plan, short(), fold_cases(workspace, plan, "0"))
    generator = torch.Generator().manual_seed(0)
    for parameter in run.network.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    run.optimizer.step()
    run.progress.step = 1
    return run


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set: states are written. Until then every write stands still."""
    gate, save = threading.Event(), record.save

    def standing(folder: FoldFolder, state: State) -> None:
        assert gate.wait(30)
        save(folder, state)

    monkeypatch.setattr(record, "save", standing)
    return gate


def change(run: Run) -> None:
    """What a step does: weights, momentum and progress are others, in place."""
    with torch.no_grad():
        for parameter in run.network.parameters():
            parameter.add_(1)
            run.optimizer.state[parameter]["momentum_buffer"].mul_(2)
    run.progress.step += 1


def test_a_checkpoint_is_the_run_at_its_moment_though_training_goes_on(run: Run, gate: threading.Event) -> None:
    weights = {name: tensor.clone() for name, tensor in run.network.state_dict().items()}
    momentum = [state["momentum_buffer"].clone() for state in run.optimizer.state.values()]
    with CheckpointWriter(run) as writer:
        writer.save()
        change(run)
        assert load_state(run.folder) is None  # it is not written yet
        assert not writer.due()
        gate.set()
    state = load_state(run.folder)
    assert state is not None
    assert state.progress.step == 1
    assert all(torch.equal(state.network[name], weights[name]) for name in weights)
    kept = [entry["momentum_buffer"] for entry in state.optimizer["state"].values()]
    assert len(kept) > 0
    assert all(torch.equal(one, other) for one, other in zip(kept, momentum, strict=True))


def test_a_second_checkpoint_waits_for_the_first_and_both_are_written(run: Run, gate: threading.Event) -> None:
    with CheckpointWriter(run) as writer:
        writer.save()
        change(run)
        threading.Timer(0.2, gate.set).start()
        began = time.monotonic()
        writer.save()
        assert time.monotonic() - began > 0.1
    steps = []
    for path in (run.folder.state, run.folder.previous_state):
        path.replace(run.folder.state)
        state = load_state(run.folder)
        assert state is not None
        steps.append(state.progress.step)
    assert steps == [2, 1]


def test_every_snapshot_uses_the_same_memory(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[list[int]] = []

    def look(folder: FoldFolder, state: State) -> None:
        momentum = [kept["momentum_buffer"] for kept in state.optimizer["state"].values()]
        places.append([tensor.data_ptr() for tensor in (*state.network.values(), *momentum)])

    monkeypatch.setattr(record, "save", look)
    with CheckpointWriter(run) as writer:
        for _ in range(3):
            writer.save()
            change(run)
    assert places[0] == places[1] == places[2]
    own = {tensor.data_ptr() for tensor in run.network.state_dict().values()}
    assert own.isdisjoint(places[0])


def fail(*_: object) -> None:
    raise InputError("fold_0: cannot be written (No space left on device)")


@pytest.mark.parametrize("call", [CheckpointWriter.due, CheckpointWriter.wait, CheckpointWriter.save])
def test_what_could_not_be_written_is_raised_in_the_next_call(
    run: Run, monkeypatch: pytest.MonkeyPatch, call: Callable[[CheckpointWriter], object]
) -> None:
    writer = CheckpointWriter(run)
    with monkeypatch.context() as patch:
        patch.setattr(record, "save", fail)
        writer.save()
        assert writer._writing is not None
        writer._writing.exception(timeout=30)
    with pytest.raises(InputError, match="No space left"), writer:
        call(writer)
    writer.wait()  # once


def test_the_end_of_the_block_waits_and_raises(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "save", fail)
    with pytest.raises(InputError, match="No space left"), CheckpointWriter(run) as writer:
        writer.save()


def test_the_error_that_ends_a_run_is_told_and_not_the_one_of_the_disk(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(record, "save", fail)
    writer = CheckpointWriter(run)
    writer.save()
    with pytest.raises(ZeroDivisionError), writer:
        raise ZeroDivisionError
    assert "No space left on device" in caplog.text


def test_a_checkpoint_is_due_after_the_minutes_since_the_last(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(writers, "time", SimpleNamespace(monotonic=lambda: now))
    run.config = short(checkpoint_minutes=2)
    with CheckpointWriter(run) as writer:
        now = 119.0
        assert not writer.due()
        now = 121.0
        assert writer.due()
        writer.save()
        writer.wait()
        now = 240.0
        assert not writer.due()
        now = 241.0
        assert writer.due()


def test_the_log_tells_what_training_waited(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "strokenet")
    with CheckpointWriter(run) as writer:
        writer.save()
    assert "checkpoint of epoch 1, step 1: training waited " in caplog.text


def test_long_epochs_are_saved_within_and_end_with_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash after the fifth step of six costs no step that is on disk, and the end is the undisturbed run's."""
    whole, stopped = make_workspace(tmp_path / "whole"), make_workspace(tmp_path / "stopped")
    train(whole, short(epochs=2))
    due = CheckpointWriter.due

    def after_the_last(writer: CheckpointWriter) -> bool:
        writer.wait()  # a tiny network's steps are shorter than a write
        return due(writer)

    step, steps = loop._step, []

    def crash(*values: object) -> None:
        steps.append(1)
        if len(steps) == 6:
            raise RuntimeError("power cut")
        step(*values)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "due", after_the_last)
        patch.setattr(loop, "_step", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            train(stopped, short(epochs=2, checkpoint_minutes=0))
    state = load_state(stopped.fold("0"))
    assert state is not None
    assert (state.progress.epoch, state.progress.step, len(state.history)) == (1, 2, 1)
    train(stopped, short(epochs=2, resume=True))
    assert_same_run(stopped, whole)


def test_training_goes_on_while_the_disk_is_slow(tmp_path: Path, gate: threading.Event) -> None:
    """The steps of the second epoch are done while the first one's checkpoint stands still."""
    workspace = make_workspace(tmp_path)
    seen: list[bool] = []

    def track(items: object, *, total: int, what: str) -> object:
        for item in items:  # type: ignore[attr-defined]
            if what == "validation patches":
                seen.append(gate.is_set())
                if len(seen) == 3:  # the second epoch's validation
                    gate.set()
            yield item

    train(workspace, short(epochs=2), track)  # type: ignore[arg-type]
    assert seen == [False, False, False, True]
