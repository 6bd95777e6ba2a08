"""A run that was killed, stopped or interrupted, and resumed, is the run that was not."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from strokenet.data.errors import InputError
from strokenet.infer.sliding_window import predict_logits
from strokenet.model.checkpoint import load_model
from strokenet.train import feed as feeds
from strokenet.train import train as loop
from strokenet.train import validate
from strokenet.train.state import load_state
from strokenet.train.train import train
from strokenet.workspace import Workspace
from tests.conftest import ROOT
from tests.train.workspaces import assert_same_run, make_workspace, rows, short

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A run of three epochs that nothing disturbed."""
    workspace = make_workspace(tmp_path_factory.mktemp("whole"))
    train(workspace, short())
    return workspace


@pytest.mark.slow
def test_a_run_killed_before_any_of_its_renames_resumes_bit_for_bit(tmp_path: Path) -> None:
    make_workspace(tmp_path / "whole")
    command = [sys.executable, "-W", "ignore", "-m", "tests.train.killed", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # 1 empty log; 5 or 6 files an epoch; the state before whole volumes; the second name of a state that is replaced;
    # and as many states within an epoch as the disk has time for.
    assert done.stdout.count(": same") >= 13


@pytest.mark.slow
def test_the_command_line_killed_at_random_moments_ends_bit_for_bit(tmp_path: Path) -> None:
    """Two kills here; fifty by python -m tests.train.unkillable OUT."""
    command = [sys.executable, "-m", "tests.train.unkillable", str(tmp_path), "--kills", "2"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "2 kills in " in done.stdout


def command(workspace: Workspace) -> list[str]:
    options = ["--epochs=3", "--iters-per-epoch=40", "--val-iters=2", "--seed=3", "--device=cpu", "--resume", "-q"]
    return [sys.executable, "-m", "strokenet", "train", str(workspace.root), *options]


def start(workspace: Workspace) -> subprocess.Popen[str]:
    """The command line in a process of its own, at its first steps when this returns."""
    before = workspace.fold("0").log.stat().st_mtime_ns if workspace.fold("0").log.exists() else 0
    process = subprocess.Popen(
        command(workspace), cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    log = workspace.fold("0").log
    while process.poll() is None and not (log.exists() and log.stat().st_mtime_ns > before):
        time.sleep(0.01)
    return process


@pytest.mark.slow
def test_the_command_line_killed_and_signalled_ends_as_the_run_that_was_left_alone(tmp_path: Path) -> None:
    whole, stopped = make_workspace(tmp_path / "whole"), make_workspace(tmp_path / "stopped")
    subprocess.run(command(whole), cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)
    wait, codes = random.Random(0), set()
    for number, code in ((signal.SIGTERM, 143), (signal.SIGKILL, -9), (signal.SIGINT, 130)):
        process = start(stopped)
        time.sleep(wait.uniform(0.02, 0.3))
        process.send_signal(number)
        _, error = process.communicate(timeout=120)
        assert process.returncode in (code, 0), error  # 0: on a fast machine it was done before
        codes.add(process.returncode)
        assert "Traceback" not in error
    assert codes - {0}, "every run was done before its signal: make it longer"
    subprocess.run(command(stopped), cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)
    assert_same_run(stopped, whole)
    assert [row["epoch"] for row in rows(stopped)] == ["0", "1", "2"]


def after(count: int, then: Callable[[], None], function: Callable[..., Any]) -> Callable[..., Any]:
    """The function; `then` happens when it was called `count` times."""
    calls = 0

    def counting(*values: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        out = function(*values, **named)
        if calls == count:
            then()
        return out

    return counting


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(("step", "epoch", "left"), [(1, 0, 1), (5, 1, 2), (6, 1, 3)])
def test_a_signal_stops_after_the_step_with_a_checkpoint(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    whole: Workspace,
    number: signal.Signals,
    step: int,
    epoch: int,
    left: int,
) -> None:
    workspace = make_workspace(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_step", after(step, lambda: os.kill(os.getpid(), number), loop._step))
        result = train(workspace, short())
    assert (result.signal, result.finished, len(result.history)) == (number, False, epoch)
    state = load_state(workspace.fold("0"))
    assert state is not None
    assert (state.progress.epoch, state.progress.step) == (epoch, left)
    assert load_model(workspace.root).folds == ("0",)  # a model at any time
    result = train(workspace, short(resume=True))
    assert (result.signal, result.finished) == (None, True)
    assert_same_run(workspace, whole)


def test_a_signal_in_the_validation_stops_there_and_it_is_redone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Workspace
) -> None:
    workspace = make_workspace(tmp_path)
    with monkeypatch.context() as patch:
        stop = after(3, lambda: os.kill(os.getpid(), signal.SIGTERM), validate.confusion)  # second epoch
        patch.setattr(validate, "confusion", stop)
        assert train(workspace, short()).signal == signal.SIGTERM
    state = load_state(workspace.fold("0"))
    assert state is not None
    assert (state.progress.epoch, state.progress.step, len(state.history)) == (1, 3, 1)
    train(workspace, short(resume=True))
    assert_same_run(workspace, whole)


def test_a_crash_in_the_validation_loses_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Workspace
) -> None:
    workspace = make_workspace(tmp_path)

    def crash(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "validate_patches", crash)
        with pytest.raises(RuntimeError, match="out of memory"):
            train(workspace, short())
    state = load_state(workspace.fold("0"))
    assert state is not None
    assert (state.progress.epoch, state.progress.step) == (0, 3)
    train(workspace, short(resume=True))
    assert_same_run(workspace, whole)


def test_whole_volumes_that_do_not_fit_do_not_end_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, whole: Workspace
) -> None:
    workspace = make_workspace(tmp_path)

    def too_large(*_: object, **__: object) -> None:
        raise MemoryError("17 GB")

    monkeypatch.setattr(validate, "predict_logits", too_large)
    assert train(workspace, short(validate_every=1)).finished
    assert "c: whole-volume validation failed (17 GB)" in caplog.text
    assert_same_run(workspace, whole)


def test_no_time_left_stops_before_the_first_step(tmp_path: Path, whole: Workspace) -> None:
    workspace = make_workspace(tmp_path)
    result = train(workspace, short(max_time_minutes=0))
    assert (result.finished, result.signal, result.history) == (False, None, ())
    train(workspace, short(resume=True, max_time_minutes=60))
    assert_same_run(workspace, whole)


def test_stopping_early_keeps_the_schedule_and_can_go_on(tmp_path: Path, whole: Workspace) -> None:
    workspace = make_workspace(tmp_path)
    assert train(workspace, short(stop_epoch=2)).finished
    assert rows(workspace) == rows(whole)[:2]
    train(workspace, short(resume=True))
    assert_same_run(workspace, whole)


def test_a_folder_that_cannot_be_written_is_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = make_workspace(tmp_path)
    workspace.fold("0").root.write_text("a file where the folder should be")
    monkeypatch.setattr(loop, "_step", lambda *_: pytest.fail("a step was computed"))
    with pytest.raises(InputError, match="fold_0: cannot be written"):
        train(workspace, short())


def test_how_far_the_feed_looks_ahead_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Workspace
) -> None:
    workspace = make_workspace(tmp_path)
    monkeypatch.setattr(feeds, "SPARE", 0)
    train(workspace, short())
    assert_same_run(workspace, whole)


def test_a_run_can_be_used_while_it_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = make_workspace(tmp_path)
    seen = []

    def look() -> None:
        while workspace.fold("0").weights is None:  # the first epoch's are on their way to the disk
            time.sleep(0.01)
        model = load_model(workspace.root)
        image = loop.torch.zeros(2, 16, 16, 16).normal_(generator=loop.torch.Generator().manual_seed(0))
        seen.append(predict_logits(model.networks, image, patch=model.plan.patch).shape)

    monkeypatch.setattr(loop, "_step", after(5, look, loop._step))  # within the second epoch
    train(workspace, short(epochs=2))
    assert seen == [(2, 16, 16, 16)]


def test_a_copied_workspace_goes_on(tmp_path: Path, whole: Workspace) -> None:
    train(make_workspace(tmp_path / "here"), short(stop_epoch=1))
    shutil.move(tmp_path / "here", tmp_path / "there")
    workspace = Workspace(tmp_path / "there")
    train(workspace, replace(short(), resume=True))
    assert_same_run(workspace, whole)
