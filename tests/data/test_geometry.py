"""Geometry: turns equal nibabel's closest canonical, invert exactly, and corners are compared in mm."""

from __future__ import annotations

import itertools
from typing import Any

import nibabel
import numpy as np
import pytest
from nibabel.orientations import axcodes2ornt, inv_ornt_aff
from scipy.spatial.transform import Rotation

from strokenet.data.geometry import (
    AS_STORED,
    Geometry,
    corner_distance_mm,
    corners_mm,
    turn_to_ras,
    turned,
)

SIZE_IJK = (5, 6, 7)
ORIENTATIONS = [
    "".join(codes)
    for order in itertools.permutations(range(3))
    for codes in itertools.product(*(("RL", "AP", "SI")[axis] for axis in order))
]
OBLIQUE = {
    "straight": (0.0, 0.0, 0.0),
    "oblique": (17.0, -11.0, 23.0),
    "nearly diagonal": (0.0, 0.0, 44.9),
    "past the diagonal": (45.1, 0.0, 0.0),
}


def affine_of(orientation: str, degrees: tuple[float, float, float], spacing: tuple[float, float, float]) -> Any:
    """(i, j, k) -> RAS mm of a grid with these axis codes, tilted in the scanner."""
    affine = np.diag([*spacing, 1.0]) @ inv_ornt_aff(axcodes2ornt(orientation), SIZE_IJK)
    tilt = np.eye(4)
    tilt[:3, :3] = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix()
    shift = np.eye(4)
    shift[:3, 3] = -40.5, 12.25, 7.0
    return shift @ tilt @ affine


def geometry_of(affine: Any, shape_ijk: tuple[int, int, int] = SIZE_IJK) -> Geometry:
    i, j, k = shape_ijk
    x, y, z = np.linalg.norm(affine[:3, :3], axis=0)
    return Geometry(shape=(k, j, i), spacing=(float(z), float(y), float(x)), affine=affine[:, [2, 1, 0, 3]])


@pytest.mark.parametrize("tilt", OBLIQUE)
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_the_turn_to_ras_equals_nibabels_closest_canonical(orientation: str, tilt: str) -> None:
    affine = affine_of(orientation, OBLIQUE[tilt], (0.9, 1.2, 5.0))
    array = np.random.default_rng(3).random(SIZE_IJK, np.float32)
    canonical = nibabel.as_closest_canonical(nibabel.Nifti1Image(array, affine))
    geometry = geometry_of(affine)
    turn = turn_to_ras(geometry)
    stored = array.transpose(2, 1, 0)
    np.testing.assert_array_equal(turn.apply(stored), np.asarray(canonical.dataobj).transpose(2, 1, 0))
    new = turned(geometry, turn)
    np.testing.assert_allclose(new.affine[:, [2, 1, 0, 3]], canonical.affine, atol=1e-4)
    np.testing.assert_allclose(new.spacing, canonical.header.get_zooms()[::-1], rtol=1e-6)
    assert new.shape == turn.apply(stored).shape
    np.testing.assert_array_equal(turn.invert(turn.apply(stored)), stored)
    channels = np.stack([stored, -stored])
    np.testing.assert_array_equal(turn.apply(channels)[1], -turn.apply(stored))
    np.testing.assert_array_equal(turn.invert(turn.apply(channels)), channels)


def test_there_are_48_orientations() -> None:
    assert len(set(ORIENTATIONS)) == 48


def test_a_turned_grid_keeps_every_voxel_where_it_was() -> None:
    geometry = geometry_of(affine_of("PIR", OBLIQUE["oblique"], (0.9, 1.2, 5.0)))
    turn = turn_to_ras(geometry)
    index = np.arange(np.prod(geometry.shape)).reshape(geometry.shape)
    new, new_index = turned(geometry, turn), turn.apply(index)
    for voxel in [(0, 0, 0), (2, 3, 1), (4, 2, 3)]:
        old = np.argwhere(index == new_index[voxel])[0]
        np.testing.assert_allclose(new.affine @ [*voxel, 1], geometry.affine @ [*old, 1], atol=1e-9)


def test_a_transposition_after_a_turn_is_one_turn() -> None:
    array = np.random.default_rng(0).random((3, 4, 5))
    turn = turn_to_ras(geometry_of(affine_of("PIR", (0, 0, 0), (1, 1, 1))))
    for order in itertools.permutations(range(3)):
        both = turn.then(order)
        np.testing.assert_array_equal(both.apply(array), turn.apply(array).transpose(order))
        np.testing.assert_array_equal(both.invert(both.apply(array)), array)
        assert both.permute((3, 4, 5)) == both.apply(array).shape


def test_as_stored_changes_nothing() -> None:
    array = np.random.default_rng(0).random((3, 4, 5))
    assert AS_STORED.apply(array) is not array
    np.testing.assert_array_equal(AS_STORED.apply(array), array)


def test_corners_are_the_centres_of_the_corner_voxels() -> None:
    affine = affine_of("LPS", OBLIQUE["oblique"], (0.9, 1.2, 5.0))
    expected = [(affine @ [i, j, k, 1])[:3] for k in (0, 6) for j in (0, 5) for i in (0, 4)]
    np.testing.assert_allclose(corners_mm(geometry_of(affine)), expected)


def test_the_distance_of_two_grids_is_that_of_their_farthest_corner() -> None:
    one, other = np.eye(4), np.eye(4)
    other[:3, 3] = 0.0, 0.3, 0.4
    assert corner_distance_mm(geometry_of(one), geometry_of(other)) == pytest.approx(0.5)
    tilted = np.eye(4)
    tilted[:3, :3] = Rotation.from_euler("z", 1, degrees=True).as_matrix()
    far = np.hypot(4, 5) * 2 * np.sin(np.radians(0.5))  # the corner at i = 4, j = 5 turns about the origin
    assert corner_distance_mm(geometry_of(one), geometry_of(tilted)) == pytest.approx(far)


def test_the_volume_of_a_voxel_is_the_product_of_the_spacing() -> None:
    rounded = affine_of("RAS", OBLIQUE["oblique"], (1.0, 1.0, 1.0)).astype(np.float32).astype(np.float64)
    geometry = Geometry(shape=(7, 6, 5), spacing=(1.0, 1.0, 1.0), affine=rounded[:, [2, 1, 0, 3]])
    assert abs(np.linalg.det(rounded[:3, :3])) != 1.0
    assert geometry.voxel_volume_mm3 == 1.0


@pytest.mark.parametrize(
    ("shape", "spacing", "affine"),
    [
        ((0, 6, 5), (1.0, 1.0, 1.0), np.eye(4)),
        ((7, 6, 5), (1.0, 0.0, 1.0), np.eye(4)),
        ((7, 6, 5), (1.0, float("nan"), 1.0), np.eye(4)),
        ((7, 6, 5), (1.0, 1.0, 1.0), np.eye(3)),
        ((7, 6, 5), (1.0, 1.0, 1.0), np.full((4, 4), np.nan)),
    ],
)
def test_a_grid_that_is_none_is_refused(shape: Any, spacing: Any, affine: Any) -> None:
    with pytest.raises(ValueError, match="is needed|are needed"):
        Geometry(shape=shape, spacing=spacing, affine=affine)
