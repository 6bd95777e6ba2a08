"""One case of each style: its grids, its truth, and that its lesion is where its label says."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from strokenet.synth.burden import Burden
from strokenet.synth.styles import CaseRecipe, SynthCase, draw_synth_case, marked_voxels, slice_mean
from tests.synth.phantom import write_mask_mni, write_phantom


def dice(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    return 2 * float((a & b).sum()) / float(a.sum() + b.sum())


@cache
def atlas() -> SynthCase:
    burden = Burden(side="left", volume_ml=20.0)
    return draw_synth_case(CaseRecipe(case_id="a", style="atlas", domain="natural", seed=1, index=0, burden=burden))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> CaseRecipe:
    folder = tmp_path_factory.mktemp("clinic")
    return CaseRecipe(
        case_id="c",
        style="clinic",
        domain="natural",
        seed=3,
        index=2,
        burden=Burden(side="right", volume_ml=2.0),
        label_maps=(write_phantom(folder / "head.nii.gz"),),
        masks=(write_mask_mni(folder / "ball.nii.gz", (30.0, 5.0, 25.0), 10.0),),
    )


@pytest.fixture(scope="module")
def clinic(recipe: CaseRecipe) -> SynthCase:
    return draw_synth_case(recipe)


@pytest.mark.parametrize(("thickness", "expected"), [(1, [0, 4, 0]), (2, [1, 2, 1]), (3, [4 / 3, 4 / 3, 4 / 3])])
def test_a_thick_slice_is_a_mean_about_its_own_voxel(thickness: int, expected: list[float]) -> None:
    volume = np.zeros((9, 1, 1), np.float32)
    volume[4] = 4
    np.testing.assert_allclose(slice_mean(volume, thickness)[3:6, 0, 0], expected, rtol=1e-6)
    np.testing.assert_allclose(slice_mean(volume, thickness).sum(), 4, rtol=1e-6)


def test_an_atlas_case_lies_on_the_mni_grid_and_is_stripped() -> None:
    case = atlas()
    scan, brain = case.scans["t1"], case.brains["t1"]
    assert list(case.scans) == ["t1"]
    assert scan.geometry.shape == (189, 233, 197)
    np.testing.assert_array_equal(scan.geometry.affine @ [0, 0, 0, 1], [-98, -134, -72, 1])
    assert (scan.image[~brain] == 0).all()
    assert (scan.image[brain] >= 1).all()
    world = np.argwhere(brain) @ scan.geometry.affine[:3, :3].T + scan.geometry.affine[:3, 3]
    assert np.abs((world.min(0) + world.max(0)) / 2 - [0, -17, 7]).max() < 10  # the middle of the box in MNI space
    assert 1.0 < brain.sum() / 1e6 < 1.8


def test_an_atlas_lesion_is_dark_on_its_side_and_of_its_volume() -> None:
    case = atlas()
    image, label = case.scans["t1"].image, case.label > 0
    assert case.volume_ml == pytest.approx(20.0, rel=0.08)
    right = case.scans["t1"].geometry.affine[0, 2] * np.argwhere(label)[:, 2] - 98
    assert (right < 0).all()
    assert case.brains["t1"][label].all()
    white = np.percentile(image[case.brains["t1"]], 80)
    assert np.median(image[label]) < 0.7 * white


def test_a_clinic_case_has_two_grids_as_in_a_hospital(clinic: SynthCase) -> None:
    t1, flair = clinic.scans["t1"].geometry, clinic.scans["flair"].geometry
    assert t1.spacing == (1.0, 1.0, 1.0)
    assert flair.spacing == (3.0, 0.7, 0.7)
    along = flair.affine[:3, :3] / flair.spacing
    np.testing.assert_allclose(along.T @ along, np.eye(3), atol=1e-9)
    tilt = np.degrees(np.arccos(along[2, 0]))
    assert 3 < tilt < 18
    assert clinic.label.shape == flair.shape
    assert (clinic.scans["t1"].image[:3] > 0).any()  # noise reaches the edge: nothing is stripped
    assert clinic.scans["flair"].image[~clinic.brains["flair"]].max() > 100


def test_the_saved_matrix_brings_the_brain_of_t1_onto_that_of_flair(clinic: SynthCase) -> None:
    """The oracle walks the points itself: FLAIR voxel -> FLAIR world -> matrix -> T1 world -> T1 voxel."""
    t1, flair = clinic.scans["t1"].geometry, clinic.scans["flair"].geometry
    voxels = np.stack(np.meshgrid(*(np.arange(n) for n in flair.shape), indexing="ij"), -1).reshape(-1, 3)
    points = np.c_[voxels, np.ones(len(voxels))] @ flair.affine.T
    brain = clinic.brains["t1"].astype(np.float32)

    def overlap(matrix: NDArray[np.float64]) -> float:
        at = (points @ matrix.T @ np.linalg.inv(t1.affine).T)[:, :3]
        there = ndimage.map_coordinates(brain, at.T, order=1).reshape(flair.shape) > 0.5
        return dice(there, clinic.brains["flair"])

    assert overlap(clinic.matrices["t1"]) > 0.97
    assert overlap(np.eye(4)) < 0.95
    assert overlap(np.linalg.inv(clinic.matrices["t1"]).astype(np.float64)) < 0.95


def test_the_motion_between_the_scans_is_rigid_and_within_ten_degrees_and_mm_an_axis(recipe: CaseRecipe) -> None:
    angles = []
    for index in range(4):
        matrix = draw_synth_case(replace(recipe, index=index)).matrices["t1"]
        np.testing.assert_allclose(matrix[:3, :3] @ matrix[:3, :3].T, np.eye(3), atol=1e-12)
        assert np.linalg.det(matrix[:3, :3]) == pytest.approx(1)
        angles.append(np.degrees(np.arccos((np.trace(matrix[:3, :3]) - 1) / 2)))
    assert 1 < max(angles) < np.sqrt(3) * 10.5


def test_the_label_lies_on_the_flair_lesion(clinic: SynthCase) -> None:
    image, label, brain = clinic.scans["flair"].image, clinic.label > 0, clinic.brains["flair"]
    edge = label & ~ndimage.binary_erosion(label, iterations=2)
    tissue = brain & ~ndimage.binary_dilation(label, iterations=4)
    assert np.median(image[edge]) > 1.15 * np.median(image[tissue])
    assert clinic.volume_ml == pytest.approx(2.0, rel=0.1)
    assert brain[label].mean() > 0.99


def test_a_case_is_the_same_again_and_another_by_seed_and_number(recipe: CaseRecipe, clinic: SynthCase) -> None:
    again = draw_synth_case(recipe)
    np.testing.assert_array_equal(again.scans["flair"].image, clinic.scans["flair"].image)
    np.testing.assert_array_equal(again.label, clinic.label)
    for other in (replace(recipe, seed=4), replace(recipe, index=3)):
        drawn = draw_synth_case(other)
        assert not np.allclose(drawn.matrices["t1"], clinic.matrices["t1"])


def test_a_lesion_thinner_than_half_a_slice_is_marked_all_the_same() -> None:
    share = np.zeros((4, 4, 4), np.float32)
    share[1, 1, 1:3] = 0.3, 0.1
    np.testing.assert_array_equal(np.argwhere(marked_voxels(share)), [[1, 1, 1]])
    share[2, 2, 2] = 0.9
    np.testing.assert_array_equal(np.argwhere(marked_voxels(share)), [[2, 2, 2]])
    assert not marked_voxels(np.zeros((2, 2, 2), np.float32)).any()


def test_random_contrast_changes_the_image_and_not_the_anatomy(recipe: CaseRecipe, clinic: SynthCase) -> None:
    wild = draw_synth_case(replace(recipe, domain="random"))
    assert wild.scans["t1"].image.shape == clinic.scans["t1"].image.shape
    np.testing.assert_array_equal(wild.brains["t1"], clinic.brains["t1"])
    assert (wild.scans["t1"].image != clinic.scans["t1"].image).mean() > 0.5


def test_facts_say_what_the_case_was_made_from(clinic: SynthCase, recipe: CaseRecipe) -> None:
    assert clinic.facts["head"] == "head.nii.gz"
    assert clinic.facts["masks"] == ["ball.nii.gz"]
    assert clinic.facts["wanted_ml"] == recipe.burden.total_ml
    assert Path(str(clinic.facts["head"])).name == clinic.facts["head"]  # no path of the machine
