"""A run that goes on where another ended: what counts as finished, and what must be computed again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from strokenet.data.errors import InputError
from strokenet.infer import infer as station
from strokenet.infer.infer import CaseResult, InferConfig, infer_folder
from strokenet.infer.manifest import manifest_path
from strokenet.model.checkpoint import load_model, save_weights
from strokenet.workspace import Workspace
from tests.infer.models import write_case, write_model

DEFAULT = InferConfig()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_model(tmp_path / "model")
    return tmp_path / "model"


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


def _damaged_manifest(model: Path, scans: Path, out: Path) -> None:
    manifest_path(out, "a").write_text('{"format": 1, "row"')


def _older_version(model: Path, scans: Path, out: Path) -> None:
    path = manifest_path(out, "a")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 0}))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (_other_scan, ["a"]),
        (_other_weights, ["a", "b"]),
        (_other_plan, ["a", "b"]),
        (_lost_mask, ["a"]),
        (_damaged_manifest, ["a"]),
        (_older_version, ["a"]),
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


def test_a_mask_that_an_expert_has_corrected_is_never_lost(
    model: Path, scans: Path, tmp_path: Path, predicted: list[str]
) -> None:
    out = tmp_path / "out"
    infer_folder(model, scans, out, DEFAULT)
    corrected = np.random.default_rng(0).bytes(100)
    (out / "b.nii.gz").write_bytes(corrected)
    predicted.clear()
    for config in (DEFAULT, replace(DEFAULT, threshold=0.4)):
        with pytest.raises(InputError, match="b.nii.gz: was changed after it was written; move it, or --recompute"):
            infer_folder(model, scans, out, config)
        assert (out / "b.nii.gz").read_bytes() == corrected
    infer_folder(model, scans, out, replace(DEFAULT, recompute=True))
    assert predicted == ["a", "b"]


def test_a_run_killed_between_a_mask_and_its_manifest_leaves_no_stranger(
    model: Path, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After `kill -9` the mask is there, and neither results.json nor a manifest with its digest."""
    out = tmp_path / "out"
    real = station.write_manifest

    def without_the_last(*args: Any, **rest: Any) -> None:
        if not rest:
            real(*args)

    monkeypatch.setattr(station, "write_manifest", without_the_last)
    infer_folder(model, scans, out, DEFAULT)
    (out / "results.json").unlink()
    monkeypatch.setattr(station, "write_manifest", real)
    results = infer_folder(model, scans, out, DEFAULT)
    assert [(result.status, result.kept) for result in results] == [("ok", False)] * 2
