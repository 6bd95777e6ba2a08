"""Contenders in processes of their own: they take turns, and one that is lost says why and leaves nothing behind."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import remote
from bench.peers import OF_HERE
from bench.remote import Job, Program, describe, epoch_turn, in_turn_apart, running

CPU = torch.device("cpu")


def program(folder: Path, task: str, units: int = 1, **settings: Any) -> Program:
    job = Job(task=task, folder=str(folder), device="cpu", threads=1, settings=settings)
    return Program(python=sys.executable, module="tests.bench.children", job=job, units=units, environment=OF_HERE)


def is_running(pid: int) -> bool:
    """Not ended, and not a zombie that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_contenders_take_turns_and_the_warm_up_is_not_counted(tmp_path: Path) -> None:
    programs = {
        "ours": program(tmp_path, "counting", name="o", ms=10.0),
        "peer": program(tmp_path, "counting", units=3, name="p", ms=20.0),
    }
    with running(programs) as remotes:
        assert [of.ask_answer() for of in remotes.values()] == [{"threads": 1}] * 2
        measured = in_turn_apart("x", "y", remotes, device=CPU, repeats=3, seconds=60, warm_up=1)
    assert (tmp_path / "order").read_text() == "op" * 4
    assert measured.times_ms == {"ours": (10.0,) * 3, "peer": (60.0,) * 3}
    assert measured.parts_ms == {"ours": {"half": 5.0}, "peer": {"half": 30.0}}
    assert all(0.05 < peak < 10 for peak in measured.peaks_gb.values())


def test_a_round_that_would_end_too_late_is_not_begun_but_two_are_made(tmp_path: Path) -> None:
    with running({"ours": program(tmp_path, "counting", name="o", ms=1.0)}) as remotes:
        measured = in_turn_apart("x", "y", remotes, device=CPU, repeats=9, seconds=0)
    assert len(measured.times_ms["ours"]) == 2


def test_one_that_cannot_be_built_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match=r"(?s)peer ended with 1:.*last words, while it is built"),
        running({"peer": program(tmp_path, "failing", when="built")}),
    ):
        pass


def test_one_that_is_killed_says_why_at_once_and_its_workers_end_with_it(tmp_path: Path) -> None:
    began = time.monotonic()
    with (
        pytest.raises(RuntimeError, match=r"(?s)peer ended with -9:.*last words, in a turn"),
        running({"peer": program(tmp_path, "failing", when="turn")}) as remotes,
    ):
        remotes["peer"].ask_turn()
    assert time.monotonic() - began < 30  # its workers would hold the pipe open for a minute
    worker = int((tmp_path / "worker").read_text())
    while is_running(worker) and time.monotonic() - began < 50:
        time.sleep(0.1)
    assert time.monotonic() - began < 50


def test_one_that_is_gone_is_not_asked_in_vain(tmp_path: Path) -> None:
    with running({"peer": program(tmp_path, "counting", name="p", ms=1.0)}) as remotes:
        os.kill(remotes["peer"]._process.pid, 9)
        remotes["peer"]._process.wait()
        with pytest.raises(RuntimeError, match="peer is gone|peer ended with -9"):
            remotes["peer"].ask_turn()


def test_silence_is_not_waited_for_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running({"peer": program(tmp_path, "silent")}) as remotes:
        monkeypatch.setattr(remote, "PATIENCE_SECONDS", 3.0)
        with pytest.raises(RuntimeError, match=r"(?s)peer said nothing for 3 s:.*last words before the silence"):
            remotes["peer"].ask_turn()


def test_an_epoch_is_what_its_log_says_and_its_parts_are_a_mean() -> None:
    turn = epoch_turn([2.0, 4.0], waited_seconds=1.0, wall_seconds=7.0)
    assert turn.ms == 3000.0
    assert turn.parts_ms == {"data wait": 500.0, "after it": 500.0}


def test_a_batch_is_described_by_what_every_draw_keeps() -> None:
    image, label = torch.ones(2, 3, 4, 4, 4), torch.zeros(2, 4, 4, 4, dtype=torch.int16)
    image[0, 0, 0, 0, 0], label[1, 0, 0, 0] = float("inf"), -1
    said = describe(image, label)
    assert (said["image_voxels"], said["label_voxels"]) == (192, 64)
    assert (said["not_finite"], said["lowest_label"]) == (1, -1)
