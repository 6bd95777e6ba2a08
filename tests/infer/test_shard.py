"""Several processes on one cohort: who takes which case, what a death costs, and one results.json in the end."""

from __future__ import annotations

import itertools
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from strokenet.cli import cli
from strokenet.data.errors import InputError
from strokenet.infer import infer as station
from strokenet.infer import result
from strokenet.infer.infer import InferConfig, infer_folder, infer_one
from strokenet.infer.shard import Shard, launched_shard, shard_from_words
from tests.infer.models import write_case

CASES = tuple("abcdefg")


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    for seed, case in enumerate(CASES):
        write_case(tmp_path / "scans", case, seed)
    return tmp_path / "scans"


def rows(out: Path) -> dict[str, dict[str, Any]]:
    content = json.loads((out / "results.json").read_text())
    return {row["case"]: row for row in content["cases"]}


def test_parts_hold_every_case_once() -> None:
    for count in range(1, 10):
        parts = [shard_from_words(f"{part}/{count}").share(CASES) for part in range(1, count + 1)]
        assert sorted(case for part in parts for case in part) == list(CASES)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("words", ["0/4", "5/4", "1", "a/b", "1/0", "-1/2", "1/2/3", ""])
def test_no_part_of_a_whole_is_refused(words: str) -> None:
    with pytest.raises(InputError, match="allowed"):
        shard_from_words(words)


def test_launchers_say_which_part() -> None:
    torchrun = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    assert launched_shard(torchrun) == Shard(index=2, count=4, local=1, of="torchrun")
    srun = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"}
    assert launched_shard(srun) == Shard(index=0, count=2, local=0, of="srun")
    assert launched_shard(srun | torchrun) == launched_shard(torchrun)
    for alone in (
        {},
        {"RANK": "1"},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"},  # the script of a job: one process
    ):
        assert launched_shard(alone) is None
    for wrong in ({"RANK": "x", "WORLD_SIZE": "2"}, {"RANK": "2", "WORLD_SIZE": "2"}):
        with pytest.raises(InputError, match="torchrun"):
            launched_shard(wrong)


def test_parts_one_after_the_other_make_the_whole(
    model: Path, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    (scans / "b_0000.nii.gz").write_bytes(b"no scan")
    infer_folder(model, scans, whole, InferConfig())
    first = infer_folder(model, scans, parts, InferConfig(shard=shard_from_words("1/2")))
    assert [result.case for result in first] == ["a", "c", "e", "g"]
    assert sorted(rows(parts)) == ["a", "c", "e", "g"]
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    second = infer_folder(model, scans, parts, InferConfig(shard=launched_shard()))
    assert [result.case for result in second] == ["b", "d", "f"]
    timeless = [{case: row | {"seconds": 0} for case, row in rows(out).items()} for out in (whole, parts)]
    assert timeless[0] == timeless[1]
    for path in whole.glob("*.nii.gz"):
        assert path.read_bytes() == (parts / path.name).read_bytes()


def test_more_parts_than_cases_leave_some_without_work(model: Path, scans: Path, tmp_path: Path) -> None:
    assert infer_folder(model, scans, tmp_path / "out", InferConfig(shard=shard_from_words("9/9"))) == ()
    assert rows(tmp_path / "out") == {}


def test_one_case_is_not_shared(model: Path, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"T1": scans / "a_0000.nii.gz", "FLAIR": scans / "a_0001.nii.gz"}
    with pytest.raises(InputError, match="one case cannot be shared"):
        infer_one(model, files, tmp_path / "out", InferConfig(shard=shard_from_words("1/2")))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    out = str(tmp_path / "out")
    words = ["infer", str(model), "--t1", str(files["T1"]), "--flair", str(files["FLAIR"]), "-o", out]
    assert CliRunner().invoke(cli, words).exit_code == 0  # a launched script's own case
    assert sorted(rows(tmp_path / "out")) == ["a"]


def test_a_share_says_that_it_is_one(
    model: Path, scans: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "strokenet"):
        infer_folder(model, scans, tmp_path / "out", InferConfig(shard=Shard(index=0, count=4, of="srun")))
    assert "part 1/4, as srun says: 2 of 7 cases" in caplog.messages


@pytest.mark.parametrize(("launcher", "code"), [("torchrun", 0), ("srun", 3)])
def test_a_bad_case_does_not_make_torchrun_stop_the_others(
    model: Path, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launcher: str, code: int
) -> None:
    (scans / "a_0000.nii.gz").write_bytes(b"no scan")
    names = {"torchrun": ("RANK", "WORLD_SIZE"), "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")}[launcher]
    for name, value in zip(names, "02", strict=True):
        monkeypatch.setenv(name, value)
    out = tmp_path / "out"
    assert CliRunner().invoke(cli, ["infer", str(model), str(scans), "-o", str(out)]).exit_code == code
    assert {case: row["status"] for case, row in rows(out).items()} == {"a": "failed", "c": "ok", "e": "ok", "g": "ok"}


def test_an_interrupted_process_takes_no_mask_of_another_with_it(
    model: Path, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, real = tmp_path / "out", station.predict_case

    def interrupted(engine: Any, case: Any, *rest: Any) -> Any:
        if case.case_id == "b":  # meanwhile another process has done the other half
            monkeypatch.setattr(station, "predict_case", real)
            infer_folder(model, scans, out, InferConfig(shard=shard_from_words("1/2")))
            raise KeyboardInterrupt
        return real(engine, case, *rest)

    monkeypatch.setattr(station, "predict_case", interrupted)
    with pytest.raises(KeyboardInterrupt):
        infer_folder(model, scans, out, InferConfig())
    assert sorted(path.name[0] for path in out.glob("*.nii.gz")) == ["a", "c", "e", "g"]


def test_a_share_ends_while_others_still_write(
    model: Path, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(result, "_stamps", lambda out: {"other.json": next(ticks)})  # changes at every look
    assert len(infer_folder(model, scans, tmp_path / "out", InferConfig(shard=shard_from_words("1/7")))) == 1
    assert sorted(rows(tmp_path / "out")) == ["a"]


def test_two_processes_share_a_cohort_and_the_death_of_one_costs_a_case_at_most(
    model: Path, scans: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = [sys.executable, "-m", "strokenet", "infer", str(model), str(scans), "-o", str(out), "--device", "cpu"]

    def start(rank: int) -> subprocess.Popen[str]:
        launched = os.environ | {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(words, env=launched, **pipes)

    processes = [start(rank) for rank in (0, 1)]
    limit = time.monotonic() + 120
    while not (out / "a.nii.gz").exists() and time.monotonic() < limit:
        time.sleep(0.002)
    processes[0].send_signal(signal.SIGKILL)
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert processes[1].returncode == 0, said[1]
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.nii.gz")}
    assert {"a.nii.gz", "b.nii.gz", "d.nii.gz", "f.nii.gz"} <= before.keys()
    again = [start(rank) for rank in (0, 1)]
    said = [process.communicate(timeout=120)[0] for process in again]
    assert [process.returncode for process in again] == [0, 0], said
    found = rows(out)
    assert {case: row["status"] for case, row in found.items()} == dict.fromkeys(CASES, "ok")
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("*.nii.gz")}
    computed_twice = [name for name, stamp in before.items() if after[name] != stamp]
    assert len(computed_twice) <= 1
