"""The turn between the house and ITK, against nibabel's affines and closed forms."""

from __future__ import annotations

import importlib

import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray

from strokenet.data.errors import InputError
from strokenet.data.geometry import Geometry
from strokenet.prepare.itk import resample, resample_label, resample_mask, sitk, to_image, to_matrix, to_transform

pytest.importorskip("SimpleITK", reason="needs SimpleITK: pip install 'strokenet[mri]'")


def oblique(seed: int, shape: tuple[int, int, int] = (6, 7, 8)) -> Geometry:
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.normal(size=(3, 3)))  # either handedness
    spacing = tuple(float(mm) for mm in rng.uniform(0.7, 3, 3))
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = q * spacing, rng.uniform(-40, 40, 3)
    return Geometry(shape=shape, spacing=(spacing[0], spacing[1], spacing[2]), affine=affine)


def centres(geometry: Geometry) -> NDArray[np.float64]:
    """World position of every voxel by nibabel: (D, H, W, 3)."""
    ijk = np.moveaxis(np.indices(geometry.shape[::-1]), 0, -1)  # (W, H, D, 3)
    world = nibabel.affines.apply_affine(geometry.affine[:, [2, 1, 0, 3]], ijk)
    return np.asarray(world.transpose(2, 1, 0, 3))


def rotation_about_z(degrees: float, shift: tuple[float, float, float]) -> NDArray[np.float64]:
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    return np.array([[c, -s, 0, shift[0]], [s, c, 0, shift[1]], [0, 0, 1, shift[2]], [0, 0, 0, 1]])


@pytest.mark.parametrize("seed", range(4))
def test_a_voxel_lies_where_nibabel_puts_it(seed: int) -> None:
    geometry = oblique(seed)
    array = np.arange(6 * 7 * 8, dtype=np.float32).reshape(6, 7, 8)
    image = to_image(array, geometry)
    for d, h, w in [(0, 0, 0), (5, 1, 2), (3, 6, 7)]:
        x, y, z = image.TransformIndexToPhysicalPoint((w, h, d))
        np.testing.assert_allclose([-x, -y, z], centres(geometry)[d, h, w], atol=1e-9)
        assert image.GetPixel(w, h, d) == array[d, h, w]


def test_a_transform_sends_a_point_of_ras_to_the_same_point() -> None:
    matrix = rotation_about_z(20, (3, -5, 7))
    point = np.array([10.0, 20.0, 30.0])
    x, y, z = to_transform(matrix).TransformPoint((-10.0, -20.0, 30.0))
    np.testing.assert_allclose([-x, -y, z], matrix[:3, :3] @ point + matrix[:3, 3], atol=1e-9)
    np.testing.assert_allclose(to_matrix(to_transform(matrix)), matrix, atol=1e-9)


@pytest.mark.parametrize("interpolation", ["linear", "cubic"])
def test_a_linear_ramp_is_resampled_exactly(interpolation: str) -> None:
    """value = 3x - 2y + z + 500 in the array's world: at any point both interpolations must give just that."""
    source = Geometry(shape=(30, 30, 30), spacing=(2, 2, 2), affine=oblique(1).affine * 0 + _scaled(2.0, -29.0))
    ramp = (centres(source) @ [3, -2, 1] + 500).astype(np.float32)
    small = oblique(2, (4, 5, 6))
    grid = Geometry(shape=small.shape, spacing=small.spacing, affine=_centred(small))
    matrix = rotation_about_z(15, (2, -1, 3))
    there = centres(grid) @ matrix[:3, :3].T + matrix[:3, 3]
    found = resample(ramp, source, grid, matrix, interpolation=interpolation)  # type: ignore[arg-type]
    np.testing.assert_allclose(found, there @ [3, -2, 1] + 500, atol=0.2 if interpolation == "cubic" else 1e-2)


def test_cubic_interpolation_does_not_leave_the_range_of_the_scan() -> None:
    geometry = Geometry(shape=(20, 20, 20), spacing=(1, 1, 1), affine=_scaled(1.0, 0.0))
    step = np.zeros((20, 20, 20), np.float32)
    step[:, :, 10:] = 100
    shifted = rotation_about_z(0, (0.4, 0, 0))
    found = resample(step, geometry, geometry, shifted, interpolation="cubic")
    assert found.min() >= 0
    assert found.max() <= 100


def test_a_mask_moved_by_whole_voxels_is_exact_and_labels_keep_their_value() -> None:
    geometry = Geometry(shape=(8, 8, 8), spacing=(2, 2, 2), affine=_scaled(2.0, 0.0))
    mask = np.zeros((8, 8, 8), bool)
    mask[2:4, 3:5, 4:7] = True
    to_the_right = rotation_about_z(0, (2, 0, 0))  # grid voxel w looks at w + 1
    np.testing.assert_array_equal(resample_mask(mask, geometry, geometry, to_the_right), np.roll(mask, -1, axis=2))
    label = np.where(mask, 1, 0).astype(np.int16)
    label[6, 6, 6] = 3
    np.testing.assert_array_equal(resample_label(label, geometry, geometry, np.eye(4)), label)


def test_a_missing_package_is_one_line_with_the_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> object:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(InputError, match=r'pip install "strokenet\[mri\]"'):
        sitk()


def _scaled(mm: float, low: float) -> NDArray[np.float64]:
    """D, H, W along z, y, x; the first voxel at (low, low, low)."""
    affine = np.eye(4)[[2, 1, 0, 3]] @ np.diag([mm, mm, mm, 1.0])
    affine[:3, 3] = low
    return affine


def _centred(geometry: Geometry) -> NDArray[np.float64]:
    affine = geometry.affine.copy()
    affine[:3, 3] -= (affine @ [*(n / 2 for n in geometry.shape), 1])[:3]
    return affine
