"""The paper's protocol at scale smoke, stopped once by its clock: all stages run, and no tested case was trained on."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from strokenet.data.dataset import CaseFiles
from strokenet.data.errors import InputError
from strokenet.data.geometry import Geometry
from strokenet.data.nifti import header_of, write_mask
from strokenet.data.splits import make_splits
from strokenet.train.curve import draw_curve
from strokenet.train.run import fold_cases
from strokenet.workspace import Workspace
from tests.conftest import ROOT
from tests.planner.fingerprints import fingerprint
from tests.plans import tiny_plan
from tests.prepare.heads import write_head
from tests.train.workspaces import make_workspace
from tools.paper.protocol import FOLD, Protocol, dice_of, one_channel, plan_at, stages, validation_cases
from tools.paper.results import keep, reproduce
from tools.paper.scales import SCALES, Scale
from tools.paper.stages import Clock, Stopped

TOOL = ROOT / "tools" / "reproduce_paper.py"


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[subprocess.CompletedProcess[str]]]:
    """OUT of a run that its clock stopped and that was called again, and both calls."""
    pytest.importorskip("SimpleITK", reason="needs SimpleITK: pip install 'strokenet[mri]'")
    pytest.importorskip("deepbet", reason="needs deepbet: pip install 'strokenet[mri]'")
    out = tmp_path_factory.mktemp("paper") / "out"
    command = [sys.executable, str(TOOL), "-o", str(out), "--scale", "smoke", "--jobs", "1"]
    command += ["--save", str(out / "kept.json")]
    limited = subprocess.run([*command, "--max-minutes", "0.01"], capture_output=True, text=True, timeout=300)
    marks = [path.name for path in (out / "marks").iterdir()]
    assert marks == ["atlas.json"], f"{marks}\n{limited.stderr}"
    return out, [limited, subprocess.run(command, capture_output=True, text=True, timeout=600)]


@pytest.fixture(scope="session")
def found(smoke: tuple[Path, list[subprocess.CompletedProcess[str]]]) -> dict[str, Any]:
    """OUT/results.json."""
    out, (_, whole) = smoke
    assert whole.returncode == 0, whole.stderr
    return json.loads((out / "results.json").read_text())  # type: ignore[no-any-return]


@pytest.mark.slow
def test_out_of_time_is_said_by_a_line_and_a_status_and_the_next_call_goes_on(
    smoke: tuple[Path, list[subprocess.CompletedProcess[str]]],
) -> None:
    _, (limited, whole) = smoke
    assert limited.returncode == 75
    assert "the time is up; what is done is kept, the same command goes on from here" in " ".join(
        limited.stderr.split()
    )
    assert whole.returncode == 0, whole.stderr
    assert "draw the ATLAS-like cohort" in limited.stderr
    assert "draw the ATLAS-like cohort" not in whole.stderr


@pytest.mark.slow
def test_the_end_shows_the_papers_numbers_beside_ours_and_says_what_did_not_show(
    smoke: tuple[Path, list[subprocess.CompletedProcess[str]]], found: dict[str, Any]
) -> None:
    text = smoke[1][1].stdout
    assert "semi-synthetic: drawn heads, drawn strokes; no patient" in text
    for number in ("(0.633)", "(0.210)", "(0.158)", "(0.692)", "(0.655)", "(0.707)", "0.6315", "0.5945", "0.952"):
        assert number in text
    for shape in found["shapes"]:
        assert f"shape not judged: {shape['expected']}" in text  # one validation case


@pytest.mark.slow
def test_no_case_is_on_both_sides_and_no_tested_case_was_trained_on(
    smoke: tuple[Path, list[subprocess.CompletedProcess[str]]], found: dict[str, Any]
) -> None:
    out, _ = smoke
    for name in ("t1", "t1_flair", "t1_short", "t1_flair_other"):
        workspace = Workspace(out / name)
        cases = fold_cases(workspace, workspace.read_plan(), FOLD)
        train, val = ({case.case_id for case in side} for side in (cases.train, cases.val))
        tested = {"t1": {"ATLAS"}, "t1_flair": {"T1+FLAIR", "adapted", "other"}}.get(name, set())
        assert train
        assert val
        assert not train & val
        for test in tested:
            assert set(found["dice"][test]) == val
            assert {path.name for path in (out / "predictions" / test).glob("*.nii.gz")} == {f"{v}.nii.gz" for v in val}
    assert set(found["validation"]) == set(found["dice"]["T1+FLAIR"])
    assert set(found["dice"]["T1"]) == set(found["dice"]["FLAIR"]) == {"clinic_0000", "clinic_0001"}


@pytest.mark.slow
def test_the_networks_are_trained_and_tuned_as_the_scale_says(
    smoke: tuple[Path, list[subprocess.CompletedProcess[str]]], found: dict[str, Any]
) -> None:
    out, _ = smoke
    assert found["steps"] == {"train_short": 6, "train_t1": 15, "finetune": 3, "finetune_other": 3}
    rates = {}
    for name in ("t1", "t1_flair", "t1_flair_other"):
        rows = (Workspace(out / name).fold(FOLD).log).read_text().splitlines()
        rates[name] = float(rows[1].split(",")[1])
        plan = Workspace(out / name).read_plan()
        assert plan.spacing == (5.0, 5.0, 5.0)
        assert plan.network.features[0] == 8
        assert len(plan.channels) == (1 if name == "t1" else 2)
    assert rates == {"t1": 1e-2, "t1_flair": 1e-5, "t1_flair_other": 1e-3}
    adapted = json.loads((out / "adapted" / "adapt.json").read_text())
    assert adapted["channels"] == {"T1": {"T1": 0.5}, "FLAIR": {"T1": 0.5}}
    assert adapted["warnings"] == []  # both networks see one spacing and one normalisation


@pytest.mark.slow
def test_the_figures_show_something(
    smoke: tuple[Path, list[subprocess.CompletedProcess[str]]], found: dict[str, Any]
) -> None:
    folder = smoke[0] / "figures"
    cases = [folder / "cases" / f"{case}.png" for case in found["validation"]]
    for picture in (*(folder / f"fig_{n}.png" for n in (2, 3, 5, 6)), *cases):
        assert np.asarray(Image.open(picture).convert("RGB")).std() > 10


@pytest.mark.slow
def test_the_results_name_the_machine_and_no_folder_of_it(
    smoke: tuple[Path, list[subprocess.CompletedProcess[str]]], found: dict[str, Any]
) -> None:
    assert found["machine"]["processor"]
    assert found["versions"]["SimpleITK"]
    assert found["scale"]["name"] == "smoke"
    assert found["seconds"].keys() >= {"atlas", "prepare", "finetune", "test_T1+FLAIR"}
    assert str(smoke[0].parent) not in json.dumps(found)
    assert json.loads((smoke[0] / "kept.json").read_text())["scales"] == {"smoke": found}


def test_the_cases_of_a_test_are_those_of_the_folds_other_side(tmp_path: Path) -> None:
    """Fold 0 of this workspace trains on a and b and validates on c."""
    workspace = make_workspace(tmp_path)
    assert [case.case_id for case in validation_cases(workspace)] == ["c"]
    flair = one_channel(workspace.read_dataset().cases, 1)
    assert [[path.name for path in case.images] for case in flair] == [[f"{name}_0001.nii.gz"] for name in "abc"]


def test_dice_is_that_of_the_mask_and_the_label(tmp_path: Path) -> None:
    """3 voxels and 4 voxels, 2 in common: 2 * 2 / 7."""
    grid = Geometry(shape=(1, 1, 8), spacing=(1.0, 1.0, 1.0), affine=np.eye(4)[:, [2, 1, 0, 3]])
    for name, voxels in (("masks/a", slice(1, 4)), ("label", slice(2, 6))):
        array = np.zeros(grid.shape, np.uint8)
        array[0, 0, voxels] = 1
        write_mask(tmp_path / f"{name}.nii.gz", array, header_of(grid))
    case = CaseFiles(case_id="a", images=(), label=tmp_path / "label.nii.gz")
    assert dice_of([case], tmp_path / "masks") == {"a": pytest.approx(4 / 7)}


def test_prepared_cases_are_kept_when_the_time_is_up(tmp_path: Path) -> None:
    pytest.importorskip("SimpleITK", reason="needs SimpleITK: pip install 'strokenet[mri]'")
    patients = tmp_path / "clinic" / "patients"
    for name in ("p1", "p2"):
        write_head(patients / name)
    scale = replace(SCALES["smoke"], prepare=replace(SCALES["smoke"].prepare, brain="none", bias=False))
    prepare = next(s for s in stages(Protocol(out=tmp_path, scale=scale, jobs=1)) if s.name == "prepare")
    with pytest.raises(Stopped):
        prepare.run(Clock(deadline=0))
    records = tmp_path / "prepared" / "prepare"
    assert [path.name for path in records.glob("*.json")] == ["p1.json"]
    made = (records / "p1.json").stat().st_mtime_ns
    facts = prepare.run(Clock())
    assert (facts["cases"], facts["failed"]) == (2, [])
    assert (records / "p1.json").stat().st_mtime_ns == made


def test_a_training_out_of_time_stops_with_its_status_and_goes_on_to_the_same_end(tmp_path: Path) -> None:
    ends = []
    for name, clocks in (("broken", (Clock(deadline=0), Clock())), ("whole", (Clock(),))):
        make_workspace(tmp_path / name / "t1")
        asked = Protocol(out=tmp_path / name, scale=SCALES["smoke"])
        training = next(stage for stage in stages(asked) if stage.name == "train_t1")
        if len(clocks) > 1:
            with pytest.raises(Stopped) as stopped:
                training.run(clocks[0])
            assert stopped.value.exit_code == 75
        ends.append(training.run(clocks[-1]))
    assert ends[0]["steps"] == 15
    losses = [[(row["train_loss"], row["val_loss"]) for row in end["history"]] for end in ends]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 5


def test_a_folder_of_another_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Protocol(out=tmp_path / "out", scale=SCALES["smoke"])
    over = Clock(deadline=0)
    with pytest.raises(Exception, match="the time is up"):
        reproduce(asked, over)
    with pytest.raises(InputError, match="holds a run with another seed; choose another folder"):
        reproduce(replace(asked, seed=1), over)
    with pytest.raises(InputError, match="holds a run with another scale"):
        reproduce(replace(asked, scale=replace(asked.scale, atlas=4)), over)
    monkeypatch.setattr("tools.paper.results.CODE", ("planner",))
    with pytest.raises(InputError, match="holds a run with another code; choose another folder"):
        reproduce(asked, over)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("all of it")
    with pytest.raises(InputError, match="is not empty and holds no earlier run"):
        reproduce(replace(asked, out=tmp_path / "thesis"), over)


def test_another_scales_numbers_stay_where_they_are_kept(tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    for name, seed in (("gpu", 0), ("cpu", 1), ("cpu", 2)):
        keep(kept, {"scale": {"name": name}, "seed": seed})
    scales = json.loads(kept.read_text())["scales"]
    assert {name: found["seed"] for name, found in scales.items()} == {"cpu": 2, "gpu": 0}


@pytest.mark.parametrize("scale", [s for s in SCALES.values() if s.name != "smoke"], ids=lambda scale: scale.name)
def test_a_fifth_of_either_cohort_is_held_out(scale: Scale) -> None:
    for cases in (scale.atlas, scale.clinic):
        split = make_splits([f"case_{n:04d}" for n in range(cases)])[int(FOLD)]
        assert not set(split.train) & set(split.val)
        assert len(split.train) + len(split.val) == cases
        assert len(split.val) == pytest.approx(cases / 5, abs=0.8)


def test_the_plan_is_made_at_the_scales_spacing() -> None:
    """Thick slices of 3 x 0.7 x 0.7 mm: nnU-Net's own plan would be anisotropic, the paper's has 1 mm everywhere."""
    thick = fingerprint([(47, 240, 200)] * 5, [(3.0, 0.7, 0.7)] * 5)
    wide = replace(thick, median_relative_size=0.3)  # an MNI grid around a brain; z-scores over the crop
    plan = plan_at(wide, tiny_plan(), replace(SCALES["cpu"], spacing_mm=2.0, gpu_memory_gb=None))
    assert plan.use_mask_for_norm == (False, False)
    assert plan.spacing == (2.0, 2.0, 2.0)
    assert plan.median_shape == (round(47 * 1.5), round(240 * 0.35), round(200 * 0.35))
    assert all(p >= m for p, m in zip(plan.patch, (64, 80, 64), strict=True))
    assert set(plan.network.kernels) == {(3, 3, 3)}
    assert plan.network.features[:3] == (16, 32, 64)


@pytest.mark.parametrize("change", [{"clinic": 1}, {"stop_epoch": 61}, {"spacing_mm": 0.0}, {"narrower": 0}])
def test_a_scale_that_cannot_be_run_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="needed"):
        replace(SCALES["cpu"], **change)


@pytest.mark.parametrize("scale", SCALES.values(), ids=lambda scale: scale.name)
def test_every_schedule_has_the_papers_ratios(scale: Scale) -> None:
    """1,000 epochs (Fig. 2), 3,000 stopped at 2,500 (Fig. 3), 500 of fine-tuning."""
    short = scale.short_epochs
    assert (scale.long_epochs, scale.stop_epoch, scale.finetune_epochs) == (3 * short, 5 * short // 2, short // 2)


def test_the_full_scale_is_the_papers() -> None:
    full = SCALES["full"]
    assert (full.atlas, full.clinic, full.spacing_mm, full.narrower) == (655, 47, 1.0, 1)
    assert (full.short_epochs, full.long_epochs, full.stop_epoch, full.finetune_epochs) == (1000, 3000, 2500, 500)
    assert (full.iterations, full.other_lr) == (250, None)


def test_a_change_is_a_line_in_the_curve(tmp_path: Path) -> None:
    names = ("epoch", "train_loss", "val_loss", "pseudo_dice", "ema_dice", "seconds")
    history = [dict.fromkeys(names, 0.5) | {"epoch": float(n)} for n in range(4)]
    draw_curve(history, tmp_path / "plain.png")
    draw_curve(history, tmp_path / "changed.png", {2: "fine-tuning"})
    plain, changed = (np.asarray(Image.open(tmp_path / f"{name}.png").convert("L")) for name in ("plain", "changed"))
    columns = np.flatnonzero((plain != changed).sum(0) > 100)  # dashes from top to bottom
    assert 0.4 * plain.shape[1] < columns.min()
    assert columns.max() - columns.min() <= 3
