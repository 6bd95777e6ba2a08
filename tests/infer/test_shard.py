"""Several processes on one cohort: who takes which case, what a death costs, and one results.json in the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from strokenet.data.errors import InputError
from strokenet.infer.infer import InferConfig, infer_folder, infer_one
from strokenet.infer.shard import Shard, launched_shard, shard_from_words
from tests.infer.models import write_case, write_model

CASES = tuple("abcdefg")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_model(tmp_path / "model")
    return tmp_path / "model"


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
    second = infer_folder(model, scans, parts, InferConfig())
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
    assert infer_one(model, files, tmp_path / "out", InferConfig())[0].status == "ok"  # a launched script's own case


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
