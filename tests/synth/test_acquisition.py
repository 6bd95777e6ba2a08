"""Grids, resampling, noise and bias, against formulas that do not know the code."""

from __future__ import annotations

import numpy as np
import pytest

from strokenet.data.geometry import Geometry
from strokenet.synth.acquisition import GridStyle, acquire, bias_field, grid_around, resample, rician
from strokenet.synth.anatomy import Anatomy, Tissue

SPACING_MM = 1.5


RADIUS_MM, CENTRE_MM = 24.0, np.array([9.0, -6.0, -8.0])


def ball() -> Anatomy:
    """A brain that is a ball, not about the world's origin."""
    n = 47
    at = SPACING_MM * (np.arange(n) - n // 2)
    z, y, x = np.meshgrid(at, at, at, indexing="ij")
    right, front, up = CENTRE_MM
    depth = (RADIUS_MM - np.sqrt((x - right) ** 2 + (y - front) ** 2 + (z - up) ** 2)).astype(np.float32)
    affine = np.eye(4)[[2, 1, 0, 3]] @ np.diag([SPACING_MM, SPACING_MM, SPACING_MM, 1])
    affine[:3, 3] = at[0]
    return Anatomy(
        tissue=np.zeros((len(Tissue), n, n, n), np.float32),
        brain=depth > 0,
        depth_mm=depth,
        ventricle_mm=np.full_like(depth, 9),
        spacing_mm=SPACING_MM,
        affine=affine,
    )


def world(grid: Geometry) -> np.ndarray:
    """(D, H, W, 3) mm."""
    voxels = np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), -1)
    return np.asarray(voxels @ grid.affine[:3, :3].T + grid.affine[:3, 3])


STYLES = [
    GridStyle(spacing=(2.0, 2.0, 2.0), axes="SAR"),
    GridStyle(spacing=(4.0, 1.2, 1.2), axes="SPL", tilt_degrees=10),
    GridStyle(spacing=(1.0, 2.0, 3.0), axes="RSA", tilt_degrees=25),
    GridStyle(spacing=(2.0, 2.0, 2.0), axes="LIP"),
]


@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.axes)
def test_grid_holds_the_brain_with_a_margin_and_has_the_style(style: GridStyle) -> None:
    grid = grid_around(np.random.default_rng(0), ball(), style)
    assert grid.spacing == style.spacing
    np.testing.assert_allclose(np.linalg.norm(grid.affine[:3, :3], axis=0), style.spacing)
    directions = grid.affine[:3, :3] / style.spacing
    np.testing.assert_allclose(directions.T @ directions, np.eye(3), atol=1e-12)
    at = world(grid)
    inside = np.linalg.norm(at - CENTRE_MM, axis=-1) < RADIUS_MM
    assert not any(inside.take(face, axis).any() for axis in range(3) for face in (0, -1))
    assert inside.sum() * grid.voxel_volume_mm3 == pytest.approx(4 / 3 * np.pi * RADIUS_MM**3, rel=0.05)  # all of it
    assert np.array(grid.shape) * grid.spacing == pytest.approx(2 * RADIUS_MM + 12, abs=8)
    letters = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}
    for column, letter in zip(directions.T, style.axes, strict=True):
        axis, sign = letters[letter]
        assert np.abs(column).argmax() == axis
        assert np.sign(column[axis]) == sign
    tilted = np.degrees(np.arccos(np.abs(directions).max(0).clip(0, 1)))
    assert (tilted > 1).all() == (style.tilt_degrees > 0)


def test_axes_that_are_no_orientation_are_refused() -> None:
    with pytest.raises(ValueError, match="'SSR'; one letter each"):
        grid_around(np.random.default_rng(0), ball(), GridStyle(spacing=(2.0, 2.0, 2.0), axes="SSR"))


@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.axes)
def test_resample_keeps_a_linear_volume_at_its_place_in_the_world(style: GridStyle) -> None:
    """The mean of a linear function over a box is its value at the middle of the box."""
    anatomy = ball()
    grid = grid_around(np.random.default_rng(0), anatomy, style)
    fine = Geometry(shape=anatomy.shape, spacing=(SPACING_MM,) * 3, affine=anatomy.affine)
    slope = np.array([1.0, -2.0, 0.5])
    out = resample((world(fine) @ slope).astype(np.float32), anatomy, grid)
    at = world(grid)
    inside = np.abs(at).max(-1) < 28
    np.testing.assert_allclose(out[inside], (at @ slope)[inside], atol=1e-3)


def test_thick_slices_average_what_lies_in_them() -> None:
    """A sheet of 1.5 mm in a slice of 6 mm leaves a quarter of its signal, summed over slices as a whole."""
    anatomy = ball()
    sheet = np.zeros(anatomy.shape, np.float32)
    sheet[23] = 1.0
    grid = grid_around(np.random.default_rng(0), anatomy, GridStyle(spacing=(6.0, 2.0, 2.0), axes="SAR"))
    profile = resample(sheet, anatomy, grid)[:, grid.shape[1] // 2, grid.shape[2] // 2]
    assert profile.sum() == pytest.approx(0.25, abs=0.03)
    assert profile.max() <= 0.26


def test_rician_noise_has_the_moments_of_the_rice_distribution() -> None:
    """E[m^2] = s^2 + 2 sigma^2; without signal the mean is sigma sqrt(pi / 2)."""
    rng = np.random.default_rng(0)
    dark = rician(rng, np.zeros((60, 60, 60), np.float32), 0.1)
    bright = rician(rng, np.ones((60, 60, 60), np.float32), 0.1)
    assert dark.mean() == pytest.approx(0.1 * np.sqrt(np.pi / 2), rel=0.01)
    assert (bright**2).mean() == pytest.approx(1 + 2 * 0.1**2, rel=0.005)
    assert bright.dtype == np.float32


def test_bias_is_smooth_positive_and_near_one() -> None:
    field = bias_field(np.random.default_rng(0), np.ones((60, 70, 60), dtype=bool), (2.0, 2.0, 2.0))
    assert field.min() > 0.5
    assert field.max() < 1.6
    assert field.std() > 0.01
    assert max(np.abs(np.diff(field, axis=axis)).max() for axis in range(3)) < 0.03


def test_acquired_scan_is_zero_outside_and_whole_positive_numbers_inside() -> None:
    brain = np.zeros((20, 20, 20), dtype=bool)
    brain[4:16, 4:16, 4:16] = True
    scan = acquire(np.random.default_rng(0), np.zeros(brain.shape, np.float32), brain, (2.0, 2.0, 2.0))
    assert scan.dtype == np.float32
    assert (scan[~brain] == 0).all()
    assert (scan[brain] >= 1).all()
    np.testing.assert_array_equal(scan, np.rint(scan))
