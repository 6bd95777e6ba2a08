"""A run that goes on where another ended: what counts as finished, and what must be computed again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from strokenet.data.errors import InputError
from strokenet.infer import infer as station
from strokenet.infer.infer import CaseResult, InferConfig, infer_folder, infer_one
from strokenet.infer.manifest import FOLDER, manifest_path
from strokenet.model.checkpoint import load_model, save_weights
from strokenet.workspace import Workspace
from tests.infer.models import head, write_case, write_model, write_scan

DEFAULT = InferConfig()


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """Cases a and b."""
    for seed, case in enumerate("ab"):
        write_case(tmp_path / "scans", case, seed)
    return tmp_path / "scans"


@pytest.fixture
def predicted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The cases that are computed, in order."""
    real, seen = station.predict_case, []

    def watching(engine: Any, case: Any, *rest: Any) -> Any:
        seen.append(case.case_id)
        return real(engine, case, *rest)

    monkeypatch.setattr(station, "predict_case", watching)
    return seen


def rows(out: Path) -> list[tuple[str, str, bool]]:
    content = json.loads((out / "results.json").read_text())
    return [(row["case"], row["status"], row["kept"]) for row in content["cases"]]


def numbers(results: tuple[CaseResult, ...]) -> list[CaseResult]:
    return [replace(result, kept=False) for result in results]


def test_what_is_finished_is_not_computed_again(model: Path, scans: Path, tmp_path: Path, predicted: list[str]) -> None:
    out = tmp_path / "out"
    first = infer_folder(model, scans, out, DEFAULT)
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.nii.gz")}
    again = infer_folder(model, scans, out, DEFAULT)
    assert predicted == ["a", "b"]
    assert numbers(again) == list(first)
    assert all(result.kept for result in again)
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.nii.gz")} == before
    assert rows(out) == [("a", "ok", True), ("b", "ok", True)]
    write_case(scans, "c", 3)
    infer_folder(model, scans, out, DEFAULT)
    assert predicted == ["a", "b", "c"]
    assert rows(out) == [("a", "ok", True), ("b", "ok", True), ("c", "ok", False)]
    infer_folder(model, scans, out, replace(DEFAULT, recompute=True))
    assert predicted[3:] == ["a", "b", "c"]


def _other_scan(model: Path, scans: Path, out: Path) -> None:
    write_case(scans, "a", 9)


def _other_weights(model: Path, scans: Path, out: Path) -> None:
    weights = load_model(model).networks[0].state_dict()
    changed = {name: tensor * 1.001 for name, tensor in weights.items()}
    save_weights(Workspace(model).fold("0").last, changed, note={})


def _other_plan(model: Path, scans: Path, out: Path) -> None:
    plan = Workspace(model).read_plan()
    Workspace(model).write_plan(replace(plan, postprocess=replace(plan.postprocess, threshold=0.3)))


def _lost_mask(model: Path, scans: Path, out: Path) -> None:
    (out / "a.nii.gz").unlink()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (_other_scan, ["a"]),
        (_other_weights, ["a", "b"]),
        (_other_plan, ["a", "b"]),
        (_lost_mask, ["a"]),
    ],
)
def test_what_has_changed_is_computed_again(
    model: Path,
    scans: Path,
    tmp_path: Path,
    predicted: list[str],
    change: Callable[[Path, Path, Path], None],
    expected: list[str],
) -> None:
    out = tmp_path / "out"
    infer_folder(model, scans, out, DEFAULT)
    predicted.clear()
    change(model, scans, out)
    results = infer_folder(model, scans, out, DEFAULT)
    assert predicted == expected
    assert [result.kept for result in results] == [case not in expected for case in "ab"]


@pytest.mark.parametrize(
    "config",
    [
        replace(DEFAULT, tta="none"),
        replace(DEFAULT, threshold=0.4),
        replace(DEFAULT, min_volume_mm3=9),
        replace(DEFAULT, probabilities=True),
        replace(DEFAULT, semantics="exact"),
        replace(DEFAULT, precision="bf16"),
        replace(DEFAULT, postprocess=False),
    ],
)
def test_other_settings_compute_again(
    model: Path, scans: Path, tmp_path: Path, predicted: list[str], config: InferConfig
) -> None:
    infer_folder(model, scans, tmp_path / "out", DEFAULT)
    infer_folder(model, scans, tmp_path / "out", config)
    assert predicted == ["a", "b"] * 2


def test_what_changes_no_mask_computes_nothing_again(
    model: Path, scans: Path, tmp_path: Path, predicted: list[str]
) -> None:
    infer_folder(model, scans, tmp_path / "out", DEFAULT)
    for path in scans.iterdir():
        os.utime(path, ns=(1, 1))  # touched, of the same content
    infer_folder(model, scans, tmp_path / "out", replace(DEFAULT, precision="fp32", device="cpu", folds=("0",)))
    assert predicted == ["a", "b"]


def test_a_failed_case_is_tried_again(model: Path, scans: Path, tmp_path: Path, predicted: list[str]) -> None:
    good = (scans / "a_0000.nii.gz").read_bytes()
    (scans / "a_0000.nii.gz").write_bytes(good[: len(good) // 2])
    infer_folder(model, scans, tmp_path / "out", DEFAULT)
    assert rows(tmp_path / "out") == [("a", "failed", False), ("b", "ok", False)]
    (scans / "a_0000.nii.gz").write_bytes(good)
    infer_folder(model, scans, tmp_path / "out", DEFAULT)
    assert predicted == ["b", "a"]
    assert rows(tmp_path / "out") == [("a", "ok", False), ("b", "ok", True)]


def _corrected(out: Path) -> None:
    """A finished mask, edited."""


def _damaged_manifest(out: Path) -> None:
    manifest_path(out, "b").write_text('{"format": 1, "row"')


def _older_manifest(out: Path) -> None:
    path = manifest_path(out, "b")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 0}))


def _no_manifests(out: Path) -> None:
    shutil.rmtree(out / FOLDER)  # as versions before manifests left it


@pytest.mark.parametrize("change", [_corrected, _damaged_manifest, _older_manifest, _no_manifests])
def test_a_mask_that_an_expert_has_corrected_is_never_lost(
    model: Path,
    scans: Path,
    tmp_path: Path,
    predicted: list[str],
    caplog: pytest.LogCaptureFixture,
    change: Callable[[Path], None],
) -> None:
    out = tmp_path / "out"
    infer_folder(model, scans, out, DEFAULT)
    corrected = np.random.default_rng(0).bytes(100)
    (out / "b.nii.gz").write_bytes(corrected)
    change(out)
    write_case(scans, "c", 3)
    predicted.clear()
    for config in (DEFAULT, replace(DEFAULT, threshold=0.4)):
        results = {result.case: result for result in infer_folder(model, scans, out, config)}
        assert (out / "b.nii.gz").read_bytes() == corrected
        assert results["b"].status == "skipped"
        assert "b.nii.gz is not as a run left it, so it stays; move it, or --recompute" in str(results["b"].error)
        assert results["c"].status == "ok"  # the others go on
    assert "b" not in predicted
    assert "b.nii.gz is not as a run left it" in caplog.text
    infer_folder(model, scans, out, replace(DEFAULT, recompute=True))
    assert "b" in predicted


def test_a_mask_drawn_by_hand_where_a_case_had_failed_stays(
    model: Path, scans: Path, tmp_path: Path, predicted: list[str]
) -> None:
    (scans / "a_0000.nii.gz").write_bytes(b"no scan")
    out = tmp_path / "out"
    infer_folder(model, scans, out, DEFAULT)
    (out / "a.nii.gz").write_bytes(b"an hour of an expert")
    results = infer_folder(model, scans, out, DEFAULT)
    assert [result.status for result in results] == ["skipped", "ok"]
    assert (out / "a.nii.gz").read_bytes() == b"an hour of an expert"


def test_the_same_file_as_another_channel_is_another_case(tmp_path: Path, predicted: list[str]) -> None:
    write_model(tmp_path / "model", dropout=0.5)
    first, _ = write_case(tmp_path / "scans", "a", 0)
    for channel in ("T1", "FLAIR"):
        results = infer_one(tmp_path / "model", {channel: first}, tmp_path / "out", DEFAULT, case_id="a")
        assert results[0].channels == (channel,)
    assert predicted == ["a", "a"]


def test_files_of_one_size_and_time_are_told_apart_by_their_content(
    model: Path, scans: Path, tmp_path: Path, predicted: list[str]
) -> None:
    """T1 and FLAIR in the wrong order, from an archive that gives all files one time; then the right way round."""
    files = [tmp_path / name for name in ("first.nii", "second.nii")]
    for seed, path in enumerate(files):
        write_scan(path, head(seed=seed))
        os.utime(path, ns=(10**18, 10**18))
    for t1, flair in (files, files[::-1]):
        infer_one(model, {"T1": t1, "FLAIR": flair}, tmp_path / "out", DEFAULT, case_id="x")
    assert predicted == ["x", "x"]


@pytest.mark.parametrize("row", [{"case": "old"}, {"case": "old", "status": 3}, "no row", {"status": "ok"}])
def test_rows_that_are_none_are_no_error(model: Path, scans: Path, tmp_path: Path, row: Any) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "results.json").write_text(json.dumps({"cases": [row]}))
    infer_folder(model, scans, out, DEFAULT)
    content = json.loads(manifest_path(out, "a").read_text())
    del content["row"]["channels"]
    manifest_path(out, "a").write_text(json.dumps(content))
    results = infer_folder(model, scans, out, DEFAULT)
    assert [result.kept for result in results] == [False, True]


def test_results_json_that_cannot_be_replaced_is_said_before_the_first_case(
    model: Path, scans: Path, tmp_path: Path, predicted: list[str]
) -> None:
    (tmp_path / "out" / "results.json").mkdir(parents=True)
    with pytest.raises(InputError, match="cannot be written"):
        infer_folder(model, scans, tmp_path / "out", DEFAULT)
    assert predicted == []


def test_a_run_killed_between_a_mask_and_its_manifest_leaves_no_stranger(
    model: Path, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After `kill -9` the mask is there, and neither results.json nor a manifest with its digest."""
    out = tmp_path / "out"
    real = station.write_manifest

    def without_the_last(*args: Any, **rest: Any) -> None:
        if rest.get("begun"):
            real(*args, **rest)

    monkeypatch.setattr(station, "write_manifest", without_the_last)
    infer_folder(model, scans, out, DEFAULT)
    (out / "results.json").unlink()
    monkeypatch.setattr(station, "write_manifest", real)
    results = infer_folder(model, scans, out, DEFAULT)
    assert [(result.status, result.kept) for result in results] == [("ok", False)] * 2
