"""The flow of a case and of a cohort on drawn heads, which are stripped: brain none."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest

from strokenet.data.case import read_case
from strokenet.data.dataset import input_cases, read_dataset
from strokenet.data.errors import InputError
from strokenet.data.nifti import header_of, read_volume, write_image, write_mask
from strokenet.prepare import grid, steps
from strokenet.prepare.brain import Brain
from strokenet.prepare.cohort import Preparation, prepare_cohort
from strokenet.prepare.config import PrepareConfig
from strokenet.prepare.inputs import CaseInputs
from strokenet.prepare.prepare import StepFailed, prepare_case
from strokenet.prepare.record import read_record, to_native
from strokenet.prepare.register import RegisterConfig, displacement_mm
from strokenet.prepare.scans import read_scan
from tests.prepare.heads import dice, head, write_head

pytest.importorskip("SimpleITK", reason="needs SimpleITK: pip install 'strokenet[mri]'")
QUICK = PrepareConfig(brain="none", bias=False)
ROUGH = replace(QUICK, registration=RegisterConfig(shrink=(4,), smooth_mm=(2.0,), samples=(0.5,), iterations=3))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Preparation]:
    """One whole case, one without its FLAIR, one without a label."""
    root = tmp_path_factory.mktemp("prepared")
    cases = [
        write_head(root / "whole"),
        write_head(root / "lone", flair=False, label=False),
        write_head(root / "unlabelled", label=False),
    ]
    return root / "out", prepare_cohort(cases, root / "out", QUICK)


def test_the_folder_is_an_nnunet_dataset(prepared: tuple[Path, Preparation]) -> None:
    out, preparation = prepared
    assert not preparation.failed
    dataset = read_dataset(out)
    assert dataset.channels == ("T1", "FLAIR")
    (files,) = dataset.cases
    case = read_case(files.case_id, dict(zip(dataset.channels, files.images, strict=True)), files.label, dataset.labels)
    assert case.label is not None
    assert case.image.shape[1:] == case.label.shape
    image = nibabel.Nifti1Image.from_filename(files.images[0])
    assert nibabel.aff2axcodes(image.affine) == ("R", "A", "S")
    assert json.loads((out / "dataset.json").read_text())["numTraining"] == 1


def test_t1_and_flair_show_the_same_brain_in_its_tight_box(prepared: tuple[Path, Preparation]) -> None:
    out, _ = prepared
    t1, flair = (read_volume(out / "imagesTr" / f"whole_{n:04d}.nii.gz").array for n in (0, 1))
    brain = read_volume(out / "prepare" / "whole_brain.nii.gz").array > 0
    assert not t1[~brain].any()
    assert not flair[~brain].any()
    assert all(brain.any(axis=axes).take(end) for axes, end in (((1, 2), 0), ((1, 2), -1), ((0, 1), 0), ((0, 1), -1)))
    assert dice(flair, brain) > 0.95  # the FLAIR's own brain, of which nothing was told to the T1's


def test_a_voxel_of_the_reference_is_taken_as_it_is(prepared: tuple[Path, Preparation]) -> None:
    out, _ = prepared
    image = nibabel.Nifti1Image.from_filename(out / "imagesTr" / "whole_0001.nii.gz")
    d, h, w = 9, 30, 20
    point = image.affine @ [w, h, d, 1]
    native = head().flair[tuple(np.rint(np.linalg.inv(head().flair_grid.affine) @ point)[:3].astype(int))]
    value = image.get_fdata()[w, h, d]
    assert value == native
    assert value > 0


def test_the_record_holds_the_motion(prepared: tuple[Path, Preparation]) -> None:
    record = read_record(prepared[0] / "prepare" / "whole.json")
    transform = record["transforms"]["t1"]
    assert (transform["from"], transform["to"]) == ("flair", "t1")
    points = np.argwhere(head().flair) @ head().flair_grid.affine[:3, :3].T + head().flair_grid.affine[:3, 3]
    assert displacement_mm(points, np.array(transform["matrix"]), head().flair_to_t1).mean() < 0.5
    assert record["quality"]["agreement"] > 0.95


def test_a_label_comes_back_to_the_voxels_that_it_was_drawn_on(prepared: tuple[Path, Preparation]) -> None:
    out, _ = prepared
    label = read_volume(out / "labelsTr" / "whole.nii.gz").array.astype(np.uint8)
    record = read_record(out / "prepare" / "whole.json")
    back, header = to_native(label, record)
    np.testing.assert_array_equal(back, head().lesion)
    np.testing.assert_allclose(header.affine_rows, head().flair_grid.affine[:3, [2, 1, 0, 3]], atol=1e-4)
    on_t1, _ = to_native(label, record, "t1")
    assert on_t1.shape == head().t1.shape
    spot = np.argwhere(on_t1) @ head().t1_grid.affine[:3, :3].T + head().t1_grid.affine[:3, 3]
    true = np.argwhere(head().lesion) @ head().flair_grid.affine[:3, :3].T + head().flair_grid.affine[:3, 3]
    motion = head().flair_to_t1
    np.testing.assert_allclose(spot.mean(0), true.mean(0) @ motion[:3, :3].T + motion[:3, 3], atol=0.7)


def test_a_label_drawn_on_the_other_scan_survives_both_ways(tmp_path: Path) -> None:
    """--reference t1 with a label on the FLAIR: carried to the T1's grid, and back to the FLAIR's."""
    case = prepare_case(write_head(tmp_path / "x"), tmp_path / "out", replace(QUICK, reference="t1"))
    assert case.label is not None
    label = read_volume(case.label).array.astype(np.uint8)
    record = read_record(tmp_path / "out" / "prepare" / "x.json")
    assert record["label"]["drawn_on"] == "flair"
    back, _ = to_native(label, record, "flair")
    assert dice(back, head().lesion) >= 0.95


def test_a_missing_scan_is_recorded_and_keeps_out_of_training(prepared: tuple[Path, Preparation]) -> None:
    out, preparation = prepared
    lone = next(case for case in preparation.cases if case.case_id == "lone")
    assert (lone.part, lone.missing) == ("Ts", ("flair",))
    assert "FLAIR is missing" in preparation.flags["lone"][0]
    problems = {files.case_id: files.problem for files in input_cases(out / "imagesTs", ("T1", "FLAIR"))}
    assert problems["unlabelled"] is None
    assert "lacks FLAIR" in str(problems["lone"])


def test_a_cohort_of_one_scan_each_has_one_channel(tmp_path: Path) -> None:
    preparation = prepare_cohort([write_head(tmp_path / "a", t1=False)], tmp_path / "out", QUICK)
    assert preparation.channels == ("FLAIR",)
    assert read_dataset(tmp_path / "out").channels == ("FLAIR",)


def test_a_case_that_fails_names_its_step_and_the_others_go_on(tmp_path: Path) -> None:
    broken = write_head(tmp_path / "broken", t1=False)
    assert broken.flair is not None
    broken.flair.write_bytes(broken.flair.read_bytes()[:-40])
    preparation = prepare_cohort([broken, write_head(tmp_path / "good", t1=False)], tmp_path / "out", QUICK)
    (failed,) = preparation.failed
    assert (failed.case_id, failed.step, preparation.exit_code) == ("broken", "read", 3)
    assert "truncated" in failed.error
    rows = json.loads((tmp_path / "out" / "prepare.json").read_text())["cases"]
    assert [(row["case"], row["status"]) for row in rows] == [("good", "ok"), ("broken", "failed")]


@pytest.mark.slow
def test_two_workers_write_what_one_writes(tmp_path: Path) -> None:
    broken = write_head(tmp_path / "broken", t1=False)
    assert broken.flair is not None
    broken.flair.write_bytes(broken.flair.read_bytes()[:-40])
    cases = [write_head(tmp_path / "a"), broken]
    results = [prepare_cohort(cases, tmp_path / str(jobs), ROUGH, jobs=jobs) for jobs in (1, 2)]
    assert [(failed.case_id, failed.step) for failed in results[1].failed] == [("broken", "read")]
    for one, two in zip(results[0].cases[0].images, results[1].cases[0].images, strict=True):
        assert one.read_bytes() == two.read_bytes()


def test_a_case_that_fails_now_leaves_nothing_of_an_earlier_run(tmp_path: Path) -> None:
    inputs, out = write_head(tmp_path / "x", t1=False), tmp_path / "out"
    (row,) = prepare_cohort([inputs], out, QUICK).cases
    assert row.label is not None
    assert inputs.flair is not None
    inputs.flair.write_bytes(inputs.flair.read_bytes()[:-40])
    assert prepare_cohort([inputs], out, QUICK).exit_code == 4
    assert not row.images[0].exists()
    assert not row.label.exists()


def test_a_second_run_takes_what_is_there_and_a_changed_scan_does_not(tmp_path: Path) -> None:
    inputs, out = write_head(tmp_path / "x", t1=False), tmp_path / "out"
    assert not prepare_case(inputs, out, QUICK).cached
    assert prepare_case(inputs, out, QUICK).cached
    assert not prepare_case(inputs, out, replace(QUICK, zscore=True)).cached
    assert inputs.flair is not None
    volume = read_volume(inputs.flair)
    write_image(inputs.flair, volume.array * 2, volume.header)
    assert not prepare_case(inputs, out, replace(QUICK, zscore=True)).cached


def test_a_run_that_was_killed_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, out = write_head(tmp_path / "x"), tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(grid, "resample_mask", _killed)
        with pytest.raises(KeyboardInterrupt):
            prepare_case(inputs, out, ROUGH)
    monkeypatch.setattr(steps, "register", _killed)  # must not be asked again
    assert prepare_case(inputs, out, ROUGH).part == "Tr"


def test_zscore_leaves_mean_0_and_deviation_1_in_the_brain(tmp_path: Path) -> None:
    case = prepare_case(write_head(tmp_path / "x", t1=False), tmp_path / "out", replace(QUICK, zscore=True))
    inside = read_volume(tmp_path / "out" / "prepare" / "x_brain.nii.gz").array > 0
    values = read_volume(case.images[0]).array[inside]
    assert abs(values.mean()) < 1e-3
    assert abs(values.std() - 1) < 1e-3


def test_a_label_on_no_scans_grid_is_refused(tmp_path: Path) -> None:
    inputs = write_head(tmp_path / "x")
    wrong = CaseInputs(case_id="x", t1=inputs.t1, label=inputs.label)
    with pytest.raises(StepFailed, match="x: read: .* label of .* lies not on the grid of any scan"):
        prepare_case(wrong, tmp_path / "out", QUICK)
    with pytest.raises(StepFailed, match="lies not on the grid of t1"):
        prepare_case(inputs, tmp_path / "out", replace(QUICK, label_on="t1"))


def test_a_given_mask_is_carried_to_the_other_scan(tmp_path: Path) -> None:
    mask = tmp_path / "mask.nii.gz"
    write_mask(mask, (head().flair != 0).astype(np.uint8), header_of(head().flair_grid))
    prepare_case(write_head(tmp_path / "x"), tmp_path / "out", replace(QUICK, brain=mask))
    record = read_record(tmp_path / "out" / "prepare" / "x.json")
    assert record["brain"]["flair"]["method"] == "given"
    assert record["brain"]["t1"]["method"] == "carried"
    assert record["quality"]["agreement"] > 0.97


def test_another_mask_of_the_same_volume_gets_its_own_bias_field(tmp_path: Path) -> None:
    inputs = write_head(tmp_path / "x", t1=False, label=False)
    assert inputs.flair is not None
    scan = read_scan(inputs.flair)
    whole = scan.array != 0
    half = whole & (np.arange(whole.shape[2]) < whole.shape[2] // 2)
    voxels = min(int(half.sum()), int((whole & ~half).sum()))
    fields = []
    for side in (half, whole & ~half):
        mask = np.zeros(whole.shape, bool)
        mask.flat[np.flatnonzero(side)[:voxels]] = True
        brain = Brain(mask=mask, volume_ml=1.0, method="given")
        fields.append(steps.correct_bias(scan, brain, PrepareConfig(brain="none"), tmp_path / "cache"))
    assert np.abs(fields[0] - fields[1]).max() > 1


def test_files_of_others_are_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "out" / "imagesTr").mkdir(parents=True)
    (tmp_path / "out" / "imagesTr" / "x_0000.nii.gz").write_bytes(b"a stranger's")
    with pytest.raises(InputError, match="choose another -o"):
        prepare_cohort([write_head(tmp_path / "x")], tmp_path / "out", QUICK)


def _killed(*_: object, **__: object) -> None:
    raise KeyboardInterrupt
