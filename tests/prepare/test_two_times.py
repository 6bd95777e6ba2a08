"""Two times of one head: which scan is registered to which, one border for both, and the common field of view."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from strokenet.data.case import read_case
from strokenet.data.dataset import read_dataset
from strokenet.data.geometry import Geometry
from strokenet.data.nifti import header_of, read_volume, write_image, write_mask
from strokenet.infer.postprocess import common_field
from strokenet.prepare.cohort import Preparation, prepare_cohort
from strokenet.prepare.config import PrepareConfig
from strokenet.prepare.inputs import CaseInputs
from strokenet.prepare.itk import Matrix
from strokenet.prepare.prepare import prepare_case
from strokenet.prepare.record import read_record, to_native
from strokenet.prepare.register import RegisterConfig, displacement_mm
from strokenet.prepare.steps import pairs
from tests.prepare.heads import dice, head, write_head

pytest.importorskip("SimpleITK", reason="needs SimpleITK: pip install 'strokenet[mri]'")
QUICK = PrepareConfig(brain="none", bias=False)
STILL = replace(QUICK, registration=RegisterConfig(shrink=(4,), smooth_mm=(2.0,), samples=(0.5,), iterations=1))
CUT = 9  # slices that the second FLAIR lacks at the top
AIR = np.float32(5)  # of a scan that was not stripped


def motion(degrees: float, shift: tuple[float, float, float]) -> Matrix:
    """About the axis from foot to head."""
    angle = np.deg2rad(degrees)
    matrix = np.eye(4)
    matrix[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    matrix[:3, 3] = shift
    return matrix


BETWEEN = motion(-5.0, (36.0, -12.0, 8.0))  # the patient lies anew: far more than within a time
WITHIN_2 = motion(3.0, (2.0, 3.0, -1.0))  # of the second T1 after the second FLAIR, beside what the first T1 has


def elsewhere(geometry: Geometry, matrix: Matrix) -> Geometry:
    return replace(geometry, affine=matrix @ geometry.affine)


def noisy(array: NDArray[np.float32], seed: int) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    return np.where(array == 0, 0, np.maximum(1, array + 15 * rng.standard_normal(array.shape))).astype(np.float32)


def write_pair(folder: Path) -> CaseInputs:
    """The drawn head, and the same with other noise in another place."""
    first, drawn = write_head(folder), head()
    write_image(folder / "flair_2.nii.gz", noisy(drawn.flair, 1), header_of(elsewhere(drawn.flair_grid, BETWEEN)))
    write_image(folder / "t1_2.nii.gz", noisy(drawn.t1, 2), header_of(elsewhere(drawn.t1_grid, BETWEEN @ WITHIN_2)))
    return replace(first, t1_2=folder / "t1_2.nii.gz", flair_2=folder / "flair_2.nii.gz")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Preparation]:
    root = tmp_path_factory.mktemp("pair")
    return root / "out", prepare_cohort([write_pair(root / "p")], root / "out", QUICK)


@pytest.mark.parametrize(
    ("scans", "reference", "expected"),
    [
        ("t1 flair", "flair", "t1>flair"),
        ("t1 flair", "t1", "flair>t1"),
        ("flair", "flair", ""),
        ("t1 flair t1_2 flair_2", "flair", "t1>flair flair_2>flair t1_2>flair_2"),
        ("t1 flair t1_2 flair_2", "flair_2", "t1_2>flair_2 flair>flair_2 t1>flair"),
        ("t1 flair t1_2 flair_2", "t1", "flair>t1 flair_2>flair t1_2>flair_2"),
        ("t1 flair t1_2", "flair", "t1>flair t1_2>t1"),
        ("flair t1_2 flair_2", "flair", "flair_2>flair t1_2>flair_2"),
        ("t1 t1_2", "t1", "t1_2>t1"),
        ("flair t1_2", "flair", "t1_2>flair"),
        ("t1 flair_2", "t1", "flair_2>t1"),
    ],
)
def test_a_scan_is_registered_to_its_own_time_and_like_to_like_between(
    scans: str, reference: str, expected: str
) -> None:
    found = pairs(scans.split(), reference)
    assert {f"{moving}>{fixed}" for moving, fixed in found} == set(expected.split())
    reached = {reference}
    for moving, fixed in found:  # what a transform is composed with is there before it
        assert fixed in reached
        reached.add(moving)


def test_two_times_are_four_channels_of_one_dataset(pair: tuple[Path, Preparation]) -> None:
    out, preparation = pair
    assert not preparation.failed
    dataset = read_dataset(out)
    assert dataset.channels == ("T1", "FLAIR", "T1_2", "FLAIR_2")
    (files,) = dataset.cases
    case = read_case(files.case_id, dict(zip(dataset.channels, files.images, strict=True)), files.label, dataset.labels)
    first, second = (case.image[n][case.image[1] > 0] for n in (1, 3))
    assert np.corrcoef(first, second)[0, 1] > 0.95  # the second FLAIR lies on the first


def test_the_record_holds_the_composed_motions(pair: tuple[Path, Preparation]) -> None:
    record = read_record(pair[0] / "prepare" / "p.json")
    points = np.argwhere(head().flair) @ head().flair_grid.affine[:3, :3].T + head().flair_grid.affine[:3, 3]
    truth = {"flair_2": BETWEEN, "t1_2": BETWEEN @ WITHIN_2 @ head().flair_to_t1, "t1": head().flair_to_t1}
    for name, matrix in truth.items():
        found = np.array(record["transforms"][name]["matrix"])
        assert displacement_mm(points, found, matrix).mean() < 0.5, name
        assert displacement_mm(points, np.eye(4), matrix).mean() > 5
    assert {name: fields["fixed"] for name, fields in record["registration"].items()} == {
        "t1": "flair",
        "flair_2": "flair",
        "t1_2": "flair_2",
    }


def test_a_patient_who_lies_anew_is_no_flag(pair: tuple[Path, Preparation]) -> None:
    record = read_record(pair[0] / "prepare" / "p.json")
    assert record["registration"]["flair_2"]["displacement_mm"] > 30
    assert record["quality"]["displacement_mm"] < 15
    assert not pair[1].flags["p"]
    metrics = [fields["metric_end"] for fields in record["registration"].values()]
    assert record["quality"]["metric"] == max(metrics)


def test_the_label_goes_back_to_either_time(pair: tuple[Path, Preparation]) -> None:
    label = read_volume(pair[0] / "labelsTr" / "p.nii.gz").array.astype(np.uint8)
    record = read_record(pair[0] / "prepare" / "p.json")
    back, _ = to_native(label, record)
    np.testing.assert_array_equal(back, head().lesion)
    second, header = to_native(label, record, "flair_2")  # the same voxels of the same head, elsewhere in the world
    np.testing.assert_allclose(header.affine_rows, (BETWEEN @ head().flair_grid.affine)[:3, [2, 1, 0, 3]], atol=1e-3)
    assert dice(second, head().lesion) > 0.95


def test_one_time_has_the_record_that_it_had(tmp_path: Path) -> None:
    prepare_case(write_head(tmp_path / "x"), tmp_path / "out", STILL)
    record = read_record(tmp_path / "out" / "prepare" / "x.json")
    wanted = {"matrix", "displacement_mm", "start", "metric_start", "metric_end", "iterations", "stop", "seconds"}
    assert set(record["registration"]) == wanted
    assert record["brain"]["source"] == "t1"


def test_what_one_time_did_not_scan_is_outside_the_common_field(tmp_path: Path) -> None:
    """The oracle walks every prepared voxel into the second FLAIR's own grid. A 0 within the grid is inside."""
    drawn, folder = head(), tmp_path / "p"
    inside = drawn.flair != 0
    first, second = (np.where(inside, array, AIR) for array in (drawn.flair, noisy(drawn.flair, 1)))
    edge = tuple(np.argwhere(inside)[len(np.argwhere(inside)) // 2])
    second[edge[0], edge[1] :, edge[2]] = 0  # a line from the middle of the brain out of it, but not out of the scan
    second[edge[0], -1, edge[2]] = AIR
    grid = drawn.flair_grid
    kept = Geometry(shape=(grid.shape[0] - CUT, *grid.shape[1:]), spacing=grid.spacing, affine=grid.affine)
    write_image(folder / "flair.nii.gz", first, header_of(grid))
    write_image(folder / "flair_2.nii.gz", second[:-CUT], header_of(kept))
    write_mask(folder / "mask.nii.gz", inside.astype(np.uint8), header_of(grid))
    case = CaseInputs(case_id="p", flair=folder / "flair.nii.gz", flair_2=folder / "flair_2.nii.gz")
    for zscore in (False, True):
        config = replace(STILL, brain=folder / "mask.nii.gz", zscore=zscore)
        done = prepare_case(case, tmp_path / "out", config)
        brain = read_volume(tmp_path / "out" / "prepare" / "p_brain.nii.gz")
        found = common_field(torch.from_numpy(np.stack([read_volume(path).array for path in done.images]))).numpy()
        matrix = np.array(read_record(tmp_path / "out" / "prepare" / "p.json")["transforms"]["flair_2"]["matrix"])
        voxels = np.argwhere(brain.array > 0)
        points = np.c_[voxels, np.ones(len(voxels))] @ brain.geometry.affine.T @ matrix.T @ np.linalg.inv(kept.affine).T
        ends = np.array(kept.shape) - 0.5
        room = np.minimum(points[:, :3] + 0.5, ends - points[:, :3]).min(1)  # voxels to the nearest end of the scan
        clear = np.abs(room) > 0.05
        seen = found[tuple(voxels.T)]
        np.testing.assert_array_equal(seen[clear], (room > 0)[clear])
        assert not found[brain.array == 0].any()
        assert 0.5 < seen.mean() < 0.95


def test_both_times_are_cut_along_the_border_of_either_brain(tmp_path: Path) -> None:
    """The first T1 lacks a part of the brain: it stays, because the second has it, and is outside the common field."""
    drawn = head()
    cut = drawn.t1.copy()
    cut[: drawn.t1_grid.shape[0] // 2] = 0
    write_image(tmp_path / "p" / "t1.nii.gz", cut, header_of(drawn.t1_grid))
    write_image(tmp_path / "p" / "t1_2.nii.gz", drawn.t1, header_of(drawn.t1_grid))
    case = CaseInputs(case_id="p", t1=tmp_path / "p" / "t1.nii.gz", t1_2=tmp_path / "p" / "t1_2.nii.gz")
    done = prepare_case(case, tmp_path / "out", STILL)
    first, second = (read_volume(path).array for path in done.images)
    brain = read_volume(tmp_path / "out" / "prepare" / "p_brain.nii.gz").array > 0
    assert brain.sum() > 0.95 * (drawn.t1 != 0).sum()
    assert (second[brain] > 0).mean() > 0.95
    assert (first[brain] > 0).mean() == pytest.approx((cut != 0).sum() / (drawn.t1 != 0).sum(), abs=0.05)
    assert read_record(tmp_path / "out" / "prepare" / "p.json")["brain"]["source"] == "t1 and t1_2"
