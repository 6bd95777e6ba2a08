"""The drawn cohort: reproducible, readable, varied, and a task that needs more than a threshold."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from strokenet.data.case import Case, read_case
from strokenet.data.dataset import CaseFiles, read_dataset
from strokenet.data.errors import InputError
from strokenet.synth.acquisition import GRIDS
from strokenet.synth.cohort import Cohort, CohortConfig, DrawnCase, draw_case, draw_cohort, write_case

LABELS = {"background": 0, "lesion": 1}


@cache
def drawn(index: int) -> DrawnCase:
    """Case `index` of a cohort, in memory."""
    return draw_case(np.random.default_rng([7, 0, index]), GRIDS[index % len(GRIDS)])


def read(files: CaseFiles) -> Case:
    return read_case(files.case_id, dict(zip(("T1", "FLAIR"), files.images, strict=True)), files.label, LABELS)


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    """2 + 1 cases, seed 3, drawn under a Track that counts."""
    seen = []

    def track(items, *, total, what):  # type: ignore[no-untyped-def]
        for item in items:
            seen.append((total, what))
            yield item

    cohort = draw_cohort(tmp_path_factory.mktemp("cohort"), CohortConfig(train=2, held_out=1, seed=3), track)
    assert seen == [(3, "draw")] * 3
    return cohort


@pytest.fixture(scope="module")
def folder(cohort: Cohort) -> Path:
    return cohort.dataset.root


def test_the_folder_is_an_nnunet_dataset_that_the_reader_accepts(folder: Path) -> None:
    dataset = read_dataset(folder)
    assert dataset.channels == ("T1", "FLAIR")
    assert dataset.labels == LABELS
    assert [case.case_id for case in dataset.cases] == ["train_000", "train_001"]
    assert sorted(p.name for p in (folder / "imagesTs").iterdir()) == ["test_000_0000.nii.gz", "test_000_0001.nii.gz"]
    for files in dataset.cases:
        case = read(files)
        assert case.label is not None
        assert set(np.unique(case.label)) == {0, 1}
        assert case.image.min() == 0


def test_the_held_out_cases_are_other_patients_and_come_with_their_labels(cohort: Cohort) -> None:
    assert len(cohort.dataset.cases) == 2
    (files,) = cohort.held_out
    held_out = read(files)
    assert held_out.label is not None
    assert held_out.label.any()
    trained = [path.read_bytes() for case in cohort.dataset.cases for path in case.images]
    assert not set(trained) & {path.read_bytes() for path in files.images}


def test_a_case_is_the_same_bytes_whatever_the_size_of_the_cohort_and_differs_by_seed(
    folder: Path, tmp_path: Path
) -> None:
    stale = tmp_path / "same" / "imagesTr" / "train_000_0000.nii.gz"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"from an earlier version")
    draw_cohort(tmp_path / "same", CohortConfig(train=1, held_out=1, seed=3))
    draw_cohort(tmp_path / "other", CohortConfig(train=1, held_out=0, seed=4))
    larger, same, other = contents(folder), contents(tmp_path / "same"), contents(tmp_path / "other")
    scans = set(same) - {"dataset.json"}
    assert len(scans) == 6
    assert all(same[name] == larger[name] for name in scans)
    assert all(same[name] != other[name] for name in other)


def test_a_folder_with_other_scans_is_refused_and_left_alone(folder: Path) -> None:
    before = contents(folder)
    with pytest.raises(InputError, match=r"3 scans of another cohort, first train_001_0000\.nii\.gz"):
        draw_cohort(folder, CohortConfig(train=1, held_out=1, seed=3))
    assert contents(folder) == before


@pytest.mark.parametrize("wrong", [{"train": 0}, {"held_out": -1}, {"seed": -1}])
def test_impossible_cohorts_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(InputError, match="at least 1, 0 and 0"):
        CohortConfig(**wrong)


@pytest.mark.parametrize("index", [2, 5])
def test_what_is_read_back_is_what_was_drawn_at_its_place_in_the_world(index: int, tmp_path: Path) -> None:
    paths = tuple(tmp_path / f"case_000{channel}.nii.gz" for channel in range(2))
    files = CaseFiles(case_id="case", images=paths, label=tmp_path / "case.nii.gz")
    write_case(files, drawn(index))
    case = read(files)
    np.testing.assert_array_equal(case.image, drawn(index).image)
    np.testing.assert_array_equal(case.label, drawn(index).label)
    np.testing.assert_allclose(case.geometry.affine, drawn(index).geometry.affine, atol=1e-4)
    assert case.geometry.spacing == pytest.approx(drawn(index).geometry.spacing)


def test_header_says_scanner_space_in_both_forms_and_millimetres(folder: Path) -> None:
    for path in sorted(folder.glob("*T[rs]/*")):
        header = nibabel.load(path).header
        assert int(header["sform_code"]) == int(header["qform_code"]) == 1
        assert header.get_xyzt_units()[0] == "mm"
        np.testing.assert_allclose(header.get_qform(), header.get_sform(), atol=1e-3)


def test_a_dozen_cases_hold_oblique_anisotropic_and_turned_grids() -> None:
    geometries = [drawn(index).geometry for index in range(len(GRIDS))]
    codes = ["".join(nibabel.aff2axcodes(g.affine[:, [2, 1, 0, 3]])) for g in geometries]
    cosines = [np.abs(g.affine[:3, :3]) / g.spacing for g in geometries]
    tilts = [np.degrees(np.arccos(c.max(0).min().clip(0, 1))) for c in cosines]
    assert len(GRIDS) <= 12
    assert {"RAS", "LAS", "LPS"} <= set(codes)
    assert any(code[2] in "RL" for code in codes)  # a sagittal stack: the axes are permuted too
    assert sum(tilt > 5 for tilt in tilts) >= 1
    assert sum(max(g.spacing) / min(g.spacing) > 2 for g in geometries) == 1
    assert sum(max(g.spacing) / min(g.spacing) < 1.2 for g in geometries) >= 4
    assert max(np.prod(g.shape) for g in geometries) < 700_000


@pytest.mark.parametrize("index", range(len(GRIDS)))
def test_the_whole_brain_is_in_the_grid_in_world_orientation(index: int) -> None:
    """No edge is cut, the head is longer than wide, and stem and cerebellum lie below, by the affine alone."""
    case = drawn(index)
    brain = case.image[0] > 0
    for axis in range(3):
        assert not brain.take(0, axis).any()
        assert not brain.take(-1, axis).any()
    volume_ml = brain.sum() * case.geometry.voxel_volume_mm3 / 1000
    assert 900 < volume_ml < 1700
    points = np.argwhere(brain) @ case.geometry.affine[:3, :3].T + case.geometry.affine[:3, 3]
    extent = points.max(0) - points.min(0)
    assert extent[1] > extent[0] > 100  # longer than wide
    right, front, _ = np.median(points[points[:, 2] < points[:, 2].min() + 12], 0)  # the lowest: stem and cerebellum
    assert abs(right) < 15
    assert -60 < front < -8


@pytest.mark.parametrize("index", range(len(GRIDS)))
def test_label_lies_in_the_brain_and_has_the_volume_of_its_strokes(index: int) -> None:
    case = drawn(index)
    label_ml = case.label.sum() * case.geometry.voxel_volume_mm3 / 1000
    assert set(np.unique(case.label)) == {0, 1}
    assert not (case.label.astype(bool) & (case.image == 0).any(0)).any()
    assert label_ml == pytest.approx(sum(case.stroke_ml), rel=0.12)
    assert label_ml > 1.2


def core(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Without the voxels at the edge, which hold two tissues."""
    return np.asarray(ndimage.binary_erosion(mask))


@pytest.mark.parametrize("index", [0, 1, 3, 5])
def test_hyperintensities_are_as_bright_as_the_rim_and_no_lesion(index: int) -> None:
    case = drawn(index)
    t1, flair = case.image
    brain = t1 > 0
    stroke = case.label.astype(bool)
    white = brain & (t1 > np.percentile(t1[brain], 60)) & ~stroke & ~case.hyperintensity
    bright = stroke & (flair > np.percentile(flair[stroke], 70))
    assert case.hyperintensity.sum() * case.geometry.voxel_volume_mm3 > 2000
    assert not (case.hyperintensity & stroke).any()
    assert np.median(flair[case.hyperintensity]) > 1.25 * np.median(flair[white])
    assert np.median(flair[bright]) > 1.3 * np.median(flair[white])
    assert np.percentile(flair[case.hyperintensity], 90) > 0.9 * np.median(flair[bright])
    assert np.median(t1[core(stroke)]) < 0.75 * np.median(t1[white])
    assert np.median(t1[case.hyperintensity]) > 0.75 * np.median(t1[white])


def test_no_single_threshold_finds_the_strokes() -> None:
    """All thresholds of both z-scored channels, both directions, brute force: far below what a network must reach."""
    best = 0.0
    for channel in range(2):
        for direction in (1, -1):
            for level in np.linspace(-3, 3, 25):
                best = max(best, np.mean([_dice_of(drawn(k), channel, direction, level) for k in range(len(GRIDS))]))
    assert 0.1 < best < 0.5


def _dice_of(case: DrawnCase, channel: int, direction: int, level: float) -> float:
    image, brain = case.image[channel], case.image[0] > 0
    found = brain & (direction * (image - image[brain].mean()) / image[brain].std() > level)
    return float(2 * (found & (case.label > 0)).sum() / (found.sum() + case.label.sum()))
