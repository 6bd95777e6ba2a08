"""The folder of a cohort over several runs: what stays, what is refused, and what becomes of a label."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from strokenet.data.dataset import read_dataset
from strokenet.data.errors import InputError
from strokenet.data.geometry import Geometry
from strokenet.data.nifti import header_of, read_volume, write_image, write_mask
from strokenet.prepare.cohort import prepare_cohort
from strokenet.prepare.config import PrepareConfig
from strokenet.prepare.inputs import CaseInputs, read_inputs
from tests.prepare.heads import head, write_head

pytest.importorskip("SimpleITK", reason="needs SimpleITK: pip install 'strokenet[mri]'")
QUICK = PrepareConfig(brain="none", bias=False)


def test_cases_of_an_earlier_run_stay_in_the_folder_and_its_table_and_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    prepare_cohort([write_head(tmp_path / "a", t1=False)], out, QUICK)
    done = prepare_cohort([write_head(tmp_path / "b", t1=False)], out, QUICK)
    assert ([row.case_id for row in done.cases], [row.case_id for row in done.earlier]) == (["b"], ["a"])
    assert "keeps the cases of earlier runs, 1: a;" in caplog.text
    assert [row["case"] for row in json.loads((out / "prepare.json").read_text())["cases"]] == ["b", "a"]
    assert [case.case_id for case in read_dataset(out).cases] == ["a", "b"]
    caplog.clear()
    prepare_cohort([write_head(tmp_path / "a", t1=False), write_head(tmp_path / "b", t1=False)], out, QUICK)
    assert "earlier runs" not in caplog.text


def test_cases_of_other_channels_are_refused_and_fewer_keep_their_numbers(tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare_cohort([write_head(tmp_path / "a", t1=False)], out, QUICK)
    with pytest.raises(InputError, match="holds 1 other cases with channels FLAIR; these have T1; choose another -o"):
        prepare_cohort([write_head(tmp_path / "b", flair=False)], out, QUICK)
    assert read_dataset(out).channels == ("FLAIR",)
    both = tmp_path / "both"
    files = write_head(tmp_path / "c", label=False)
    alone = CaseInputs(case_id="d", flair=files.flair)
    quick = replace(
        QUICK, registration=replace(QUICK.registration, iterations=1, shrink=(4,), smooth_mm=(2.0,), samples=(0.1,))
    )
    prepare_cohort([files], both, quick)
    (row,) = prepare_cohort([alone], both, quick).cases
    assert (row.images[0].name, row.missing) == ("d_0001.nii.gz", ("t1",))


def test_the_folder_of_another_dataset_is_not_described_anew(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "dataset.json").write_text('{"channel_names": {"0": "DWI"}}')
    with pytest.raises(InputError, match=r"no prepare\.json of ours beside it; choose another -o"):
        prepare_cohort([write_head(tmp_path / "a", t1=False)], out, QUICK)
    assert json.loads((out / "dataset.json").read_text()) == {"channel_names": {"0": "DWI"}}


def test_a_mask_or_a_scan_that_would_be_removed_is_refused_and_kept(tmp_path: Path) -> None:
    out, inputs = tmp_path / "out", write_head(tmp_path / "a", t1=False)
    prepare_cohort([inputs], out, QUICK)
    edited = out / "prepare" / "a_brain.nii.gz"
    with pytest.raises(InputError, match=r"a_brain\.nii\.gz: the output would replace this input; .* copy it first"):
        prepare_cohort([inputs], out, replace(QUICK, brain=edited))
    second = out / "imagesTr" / "a_0001.nii.gz"  # of no channel of this cohort, but removed all the same
    write_image(second, head().flair, header_of(head().flair_grid))
    with pytest.raises(InputError, match="would replace this input"):
        prepare_cohort([CaseInputs(case_id="a", flair=second)], out, QUICK)
    assert edited.is_file()
    assert second.is_file()


def test_a_step_that_fails_in_any_way_is_named_and_leaves_no_case_to_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: object, **__: object) -> None:
        raise TypeError("unforeseen")

    out, inputs = tmp_path / "out", write_head(tmp_path / "a", t1=False)
    prepare_cohort([inputs], out, QUICK)
    monkeypatch.setattr("strokenet.prepare.prepare.draw_preparation", breaks)
    done = prepare_cohort([inputs], out, replace(QUICK, zscore=True))
    assert [(row.step, row.error) for row in done.failed] == [("picture", "TypeError: unforeseen")]
    assert not list(out.glob("*/a*"))


def test_one_slice_is_prepared(tmp_path: Path) -> None:
    grid = Geometry(
        shape=(1, 40, 36), spacing=(5.0, 2.0, 2.0), affine=np.eye(4)[[2, 1, 0, 3]] @ np.diag([5.0, 2, 2, 1])
    )
    image = np.zeros(grid.shape, np.float32)
    image[0, 5:35, 5:30] = np.random.default_rng(0).normal(100, 5, (30, 25))
    (tmp_path / "p").mkdir()
    write_image(tmp_path / "p" / "flair.nii.gz", image, header_of(grid))
    write_mask(tmp_path / "p" / "label.nii.gz", (image > 105).astype(np.uint8), header_of(grid))
    done = prepare_cohort(read_inputs(tmp_path), tmp_path / "out", QUICK)
    assert not done.failed


def test_a_lesion_between_two_thick_slices_is_kept(tmp_path: Path) -> None:
    """A plate of 4 mm that no slice centre of 5.5 mm meets: most of a slice is lesion, and so is the slice."""
    fine = Geometry(
        shape=(66, 40, 36), spacing=(1.0, 2.0, 2.0), affine=np.eye(4)[[2, 1, 0, 3]] @ np.diag([1.0, 2, 2, 1])
    )
    thick = replace(fine, shape=(12, 40, 36), spacing=(5.5, 2.0, 2.0), affine=fine.affine @ np.diag([5.5, 1, 1, 1.0]))
    thick.affine[2, 3] = 2.25  # both begin at -0.5 mm: slices are centred at 2.25, 7.75, 13.25 ...
    folder = tmp_path / "p"
    folder.mkdir()
    for name, grid in (("t1", fine), ("flair", thick)):
        image = np.zeros(grid.shape, np.float32)
        image[:, 4:36, 4:32] = np.random.default_rng(0).normal(100, 5, (grid.shape[0], 32, 28))
        write_image(folder / f"{name}.nii.gz", image, header_of(grid))
    label = np.zeros(fine.shape, np.uint8)
    label[23:27, 15:25, 15:25] = 1  # 22.5 to 26.5 mm, in the slice 21.5 to 27 mm, centred at 24.25
    label[39:41, 15:25, 15:25] = 1  # 2 mm of a slice: less than half of it, and lost
    write_mask(folder / "label.nii.gz", label, header_of(fine))
    still = replace(
        QUICK, registration=replace(QUICK.registration, iterations=1, shrink=(4,), smooth_mm=(2.0,), samples=(0.1,))
    )
    done = prepare_cohort(read_inputs(tmp_path), tmp_path / "out", still)
    (row,) = done.cases
    assert row.label is not None
    kept = read_volume(row.label).array > 0
    assert kept.any((1, 2)).sum() == 1
    assert kept.sum() == pytest.approx(100, abs=25)  # one registration step may move it a little
    assert row.label_ml is not None
    assert row.label_ml["given"] == pytest.approx(600 * 4 / 1000)
    assert row.label_ml["kept"] == pytest.approx(kept.sum() * 22 / 1000)


def test_what_becomes_of_a_label_is_flagged(tmp_path: Path) -> None:
    inputs, out = write_head(tmp_path / "a", t1=False), tmp_path / "out"
    outside = np.zeros(head().flair.shape, np.uint8)
    air = np.argwhere(head().flair == 0)
    outside[tuple(air[np.linspace(0, len(air) - 1, 500).astype(int)].T)] = 1
    assert inputs.label is not None
    write_mask(inputs.label, outside, header_of(head().flair_grid))
    done = prepare_cohort([inputs], out, QUICK)
    assert any("ml of the label lie outside the brain, where the scans are 0" in line for line in done.flags["a"])


def test_a_folder_whose_files_have_other_names_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_head(tmp_path / "study" / "good", t1=False)
    (tmp_path / "study" / "p2").mkdir()
    (tmp_path / "study" / "p2" / "T1w.nii.gz").write_bytes(b"")
    (tmp_path / "study" / "notes").mkdir()
    with caplog.at_level(logging.WARNING, "strokenet"):
        cases = read_inputs(tmp_path / "study")
    assert [case.case_id for case in cases] == ["good"]
    assert "p2: left out: it holds T1w.nii.gz, but no t1.nii.gz" in caplog.text
    assert "notes" not in caplog.text


def test_a_label_a_little_off_its_scan_is_told_how_far(tmp_path: Path) -> None:
    inputs = write_head(tmp_path / "a", t1=False)
    grid = head().flair_grid
    moved = replace(grid, affine=grid.affine.copy())
    moved.affine[0, 3] += 0.01
    assert inputs.label is not None
    write_mask(inputs.label, head().lesion, header_of(moved))
    (failed,) = prepare_cohort([inputs], tmp_path / "out", QUICK).failed
    assert re.search(r", (0\.01|0\.0099\d*) mm away, below 0\.001 is allowed", failed.error)
