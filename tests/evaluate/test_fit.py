"""--fit-postprocessing: the grid is what inference and evaluation give, and only unseen cases count."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from scipy import ndimage

from planner.plan import PostprocessRule
from strokenet.cli import cli
from strokenet.data.dataset import CaseFiles, Dataset
from strokenet.data.errors import InputError
from strokenet.data.files import read_json, write_json
from strokenet.data.splits import Split
from strokenet.evaluate.evaluate import evaluate_paths
from strokenet.evaluate.fit import best_rule, dice_table, fit_postprocessing
from strokenet.infer.infer import InferConfig
from strokenet.infer.validation import infer_validation
from strokenet.workspace import Workspace
from tests.infer.models import head, write_case, write_model, write_scan
from tests.plans import tiny_plan

CASES = ("a", "b", "c", "d")
MAPS = InferConfig(probabilities=True, device="cpu")


def lumps(seed: int, shape: tuple[int, int, int] = (14, 15, 16)) -> np.ndarray:
    """A smooth map in 0 .. 1 of many separate lumps, (D, H, W) float32."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 1.0)
    return np.asarray(ndimage.zoom((noise - noise.min()) / np.ptp(noise), 1), dtype=np.float32)


def plain_dice(
    probability: np.ndarray, reference: np.ndarray, threshold: float, volume_mm3: float, voxel_mm3: float
) -> float:
    """By scipy's labels, a component at a time, in the words of the paper: above the threshold, above the volume."""
    labels, count = ndimage.label(probability > np.float32(threshold), np.ones((3, 3, 3)))
    mask = np.zeros(probability.shape, bool)
    for number in range(1, count + 1):
        if (labels == number).sum() * voxel_mm3 > volume_mm3 * 1.000001 or volume_mm3 == 0:
            mask |= labels == number
    if not mask.any() and not reference.any():
        return 1.0
    return float(2 * (mask & reference).sum() / (mask.sum() + reference.sum()))


@pytest.fixture
def work(tmp_path: Path) -> Workspace:
    """Two trained folds with random weights; a and b validate fold 0, c and d fold 1. Labels: the brightest voxels."""
    root = tmp_path / "work"
    write_model(root, tiny_plan(), folds=("0", "1"))
    raw = tmp_path / "raw"
    files = []
    for seed, case in enumerate(CASES):
        images = write_case(raw / "imagesTr", case, seed=10 * seed)
        label = write_scan(raw / "labelsTr" / f"{case}.nii.gz", (head(seed=10 * seed) > 118).astype(np.uint8))
        files.append(CaseFiles(case_id=case, images=images, label=label))
    labels = {"background": 0, "lesion": 1}
    workspace = Workspace(root)
    workspace.write_dataset(
        Dataset(
            root=raw, name="raw", channels=("T1", "FLAIR"), labels=labels, file_ending=".nii.gz", cases=tuple(files)
        )
    )
    workspace.write_splits([Split(train=("c", "d"), val=("a", "b")), Split(train=("a", "b"), val=("c", "d"))])
    return workspace


def mean_dice(masks: Path, labels: Path) -> float:
    return evaluate_paths(masks, labels).summary.all_cases["dice"].mean


@pytest.mark.parametrize("seed", range(4))
def test_the_table_is_that_of_every_mask_made_by_itself(seed: int) -> None:
    probability, reference = lumps(seed), lumps(seed + 100) > 0.7
    thresholds, volumes, voxel_mm3 = (0.3, 0.5, 0.62, 0.7, 0.999), (0.0, 4.0, 8.4, 30.0, 4000.0), 2.1
    table = dice_table(probability, reference, voxel_mm3, thresholds, volumes)
    expected = [[plain_dice(probability, reference, t, v, voxel_mm3) for v in volumes] for t in thresholds]
    np.testing.assert_allclose(table, expected, rtol=1e-12)
    assert len(np.unique(table)) > 8  # the cases differ


def test_two_empty_masks_agree() -> None:
    nothing = np.zeros((4, 4, 4), bool)
    table = dice_table(lumps(0, (4, 4, 4)), nothing, 1.0, (0.5, 1.0), (0.0, 100.0))
    assert table.tolist() == [[0.0, 1.0], [1.0, 1.0]]


def test_among_equal_pairs_the_nearest_to_the_present_rule_is_taken() -> None:
    now = PostprocessRule(threshold=0.2, min_volume_mm3=4.0)
    dice = np.array([[0.5, 0.7, 0.7], [0.7, 0.6, 0.7]])
    assert best_rule(dice, (0.1, 0.25), (0.0, 4.0, 8.0), now) == replace(now, threshold=0.25, min_volume_mm3=0.0)
    assert best_rule(np.ones((2, 3)), (0.2, 0.25), (0.0, 4.0, 8.0), now) == now


@pytest.mark.parametrize(
    "rule",
    [
        PostprocessRule(threshold=0.2, min_volume_mm3=4.0),
        PostprocessRule(threshold=0.45, min_volume_mm3=12.5, connectivity=6),
        PostprocessRule(threshold=0.2, min_volume_mm3=4.0, min_peak=0.6, trim_below=0.5),
        PostprocessRule(threshold=0.2, min_volume_mm3=4.0, common_field=True),
        PostprocessRule(threshold=0.2, min_volume_mm3=4.0, scanned_only=True),
    ],
)
def test_inference_by_the_fitted_plan_has_the_dice_of_the_grid(
    rule: PostprocessRule, work: Workspace, tmp_path: Path
) -> None:
    labels = tmp_path / "raw" / "labelsTr"
    write_scan(tmp_path / "raw" / "imagesTr" / "a_0001.nii.gz", np.where(np.indices((20, 18, 16))[0] < 9, head(), 0))
    work.write_plan(replace(work.read_plan(), postprocess=rule))
    rows = infer_validation(work.root, tmp_path / "before", MAPS)
    assert {row.case: row.folds for row in rows} == {"a": ("0",), "b": ("0",), "c": ("1",), "d": ("1",)}
    fit = fit_postprocessing(tmp_path / "before", labels, work.root)
    assert fit.cases == CASES
    assert mean_dice(tmp_path / "before", labels) == pytest.approx(fit.dice_of(rule), abs=1e-12)
    assert work.read_plan().postprocess == fit.after != rule
    infer_validation(work.root, tmp_path / "after", MAPS)
    assert mean_dice(tmp_path / "after", labels) == pytest.approx(fit.dice_of(fit.after), abs=1e-12)
    assert fit.dice_of(fit.after) == fit.dice.max() > fit.dice_of(rule)


def test_a_case_that_its_fold_was_trained_on_is_left_out(work: Workspace, tmp_path: Path) -> None:
    masks, labels = tmp_path / "masks", tmp_path / "raw" / "labelsTr"
    infer_validation(work.root, masks, MAPS)
    content = read_json(masks / "results.json")
    by_case = {row["case"]: row for row in content["cases"]}
    by_case["a"]["folds"], by_case["b"]["folds"], by_case["c"]["folds"] = ["1"], ["all"], ["0", "1"]
    write_json(masks / "results.json", content)
    fit = fit_postprocessing(masks, labels, work.root)
    assert fit.cases == ("d",)
    assert fit.left_out == {
        "a": "fold 1 was trained on it",
        "b": "fold all trains on every case",
        "c": "fold 0 was trained on it",
    }


def test_without_a_case_to_fit_on_the_plan_stays(work: Workspace, tmp_path: Path) -> None:
    masks, before = tmp_path / "masks", work.plan_file.read_bytes()
    infer_validation(work.root, masks, replace(MAPS, probabilities=False))
    with pytest.raises(InputError, match=r"no case to fit on \(no probability map, infer with --probabilities\); run"):
        fit_postprocessing(masks, tmp_path / "raw" / "labelsTr", work.root)
    (masks / "results.json").unlink()
    with pytest.raises(InputError, match="does not say which folds made its mask"):
        fit_postprocessing(masks, tmp_path / "raw" / "labelsTr", work.root)
    assert work.plan_file.read_bytes() == before


def test_a_plan_without_a_threshold_is_refused(work: Workspace, tmp_path: Path) -> None:
    work.write_plan(replace(work.read_plan(), postprocess=PostprocessRule()))
    with pytest.raises(InputError, match="a plan with a threshold is needed"):
        fit_postprocessing(tmp_path, tmp_path / "raw" / "labelsTr", work.root)


def test_cases_of_other_folds_are_said_to_be_left_out(
    work: Workspace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    infer_validation(work.root, tmp_path / "masks", replace(MAPS, folds=("0",)))
    fit = fit_postprocessing(tmp_path / "masks", tmp_path / "raw" / "labelsTr", work.root)
    assert (fit.cases, fit.left_out) == (("a", "b"), {})
    assert "no prediction for c, d; left out" in caplog.text
    assert "empty" not in caplog.text


def test_maps_of_another_model_are_refused(work: Workspace, tmp_path: Path) -> None:
    infer_validation(work.root, tmp_path / "masks", MAPS)
    other = tmp_path / "other"
    shutil.copytree(work.root, other)
    before = Workspace(other).plan_file.read_bytes()
    with pytest.raises(InputError, match="model work made these maps, not other; run `strokenet infer .*other --valid"):
        fit_postprocessing(tmp_path / "masks", tmp_path / "raw" / "labelsTr", other)
    assert Workspace(other).plan_file.read_bytes() == before


@pytest.mark.parametrize(
    "name", ["raw/dataset.json", "work/plan.json", "work/splits.json", "masks/results.json", "grid.csv"]
)
def test_the_grid_is_never_written_over_what_is_read(work: Workspace, tmp_path: Path, name: str) -> None:
    infer_validation(work.root, tmp_path / "masks", replace(MAPS, folds=("0",)))
    write_json(tmp_path / "raw" / "dataset.json", {"labels": {"background": 0, "lesion": 1}})
    files = [tmp_path / name, work.plan_file]
    before = [file.read_bytes() if file.exists() else None for file in files]
    with pytest.raises(InputError, match=re.escape(name)):
        fit_postprocessing(tmp_path / "masks", tmp_path / "raw" / "labelsTr", work.root, out=tmp_path / name)
    assert [file.read_bytes() if file.exists() else None for file in files] == before


def test_a_damaged_map_is_one_line_and_the_plan_stays(work: Workspace, tmp_path: Path) -> None:
    infer_validation(work.root, tmp_path / "masks", MAPS)
    before, file = work.plan_file.read_bytes(), tmp_path / "masks" / "probabilities" / "c.nii.gz"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(InputError, match=r"c\.nii\.gz"):
        fit_postprocessing(tmp_path / "masks", tmp_path / "raw" / "labelsTr", work.root, out=tmp_path / "fit.json")
    assert work.plan_file.read_bytes() == before
    assert not (tmp_path / "fit.json").exists()


def test_the_commands(work: Workspace, tmp_path: Path) -> None:
    masks, labels, out = str(tmp_path / "masks"), str(tmp_path / "raw" / "labelsTr"), tmp_path / "fit.json"
    words: list[Any] = ["infer", str(work.root), "--validation", "--probabilities", "--device", "cpu", "-o", masks]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.output
    words = ["evaluate", masks, labels, "--fit-postprocessing", str(work.root), "-o", str(out)]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.output
    assert "was threshold 0.2, components above 4 mm3: Dice" in done.output
    content = json.loads(out.read_text())
    assert np.shape(content["dice"]) == (len(content["thresholds"]), len(content["min_volumes_mm3"]))
    assert content["after"]["threshold"] == work.read_plan().postprocess.threshold
    again = json.loads(CliRunner().invoke(cli, [*words, "--json"]).stdout)
    assert again["before"] == again["after"] == content["after"]  # fitted twice, nothing more to change
    assert CliRunner().invoke(cli, [*words, "--against", masks]).exit_code == 2
    assert CliRunner().invoke(cli, ["infer", str(work.root), labels, "--validation", "-o", masks]).exit_code == 2


def test_only_folds_that_leave_cases_out_can_validate(work: Workspace, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--validation needs trained folds with validation cases, not all"):
        infer_validation(work.root, tmp_path / "masks", replace(MAPS, folds=("all",)))
