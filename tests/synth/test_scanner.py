"""The simulated scanners, by closed forms and by scipy's own interpolation."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from strokenet.data.geometry import Geometry
from strokenet.synth.scanner import (
    ATLAS_SITES,
    FIELD_MM,
    FWHM,
    Site,
    at_points,
    blurred,
    draw_bias,
    ghosted,
    on_grid,
    scan,
)

SHAPE = (30, 40, 36)
IJK_RAS = np.eye(4)[[2, 1, 0, 3]]


def grid(spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> Geometry:
    return Geometry(shape=SHAPE, spacing=spacing, affine=IJK_RAS @ np.diag([*spacing, 1.0]))


def ball() -> NDArray[np.float32]:
    d, h, w = np.indices(SHAPE)
    inside = (d - 14) ** 2 + (h - 20) ** 2 + (w - 17) ** 2 < 90
    return np.asarray(inside, dtype=np.float32)


def test_there_are_at_least_nine_sites_and_no_two_alike() -> None:
    assert len({site.name for site in ATLAS_SITES}) == len(ATLAS_SITES) >= 9
    assert len({(s.noise, s.bias, s.gamma, s.gain, s.resolution_mm) for s in ATLAS_SITES}) == len(ATLAS_SITES)


def test_the_saved_bias_is_the_factor_that_was_applied() -> None:
    site = Site(name="s", noise=0.0, bias=0.2, motion=0.0, gain=10000.0)
    signal = np.ones(SHAPE, np.float32)
    done = scan(np.random.default_rng(0), signal, grid(), site)
    d, h, w = np.meshgrid(*(np.arange(n) / FIELD_MM for n in SHAPE), indexing="ij")
    expected = ndimage.map_coordinates(done.bias, [d, h, w], order=1)
    np.testing.assert_allclose(done.image / 10000, expected, atol=2e-4)
    assert 0.1 < np.log(done.bias).std() < 0.3
    first = done.bias_geometry.affine @ [1, 2, 3, 1]
    np.testing.assert_allclose(first, grid().affine @ [FIELD_MM, 2 * FIELD_MM, 3 * FIELD_MM, 1])


def test_bias_is_smooth_in_mm_on_a_grid_of_thick_slices() -> None:
    """Neighbours 3 mm apart across slices differ as much as voxels 3 mm apart in the slice."""
    thick = Geometry(shape=(40, 240, 240), spacing=(3.0, 0.75, 0.75), affine=IJK_RAS @ np.diag([3, 0.75, 0.75, 1]))
    field, _ = draw_bias(np.random.default_rng(1), thick, Site(name="s", bias=0.2, bias_mm=25.0))
    fine = on_grid(field, thick)
    across = np.abs(fine[1:] - fine[:-1]).mean()
    within = np.abs(fine[:, 4:] - fine[:, :-4]).mean()
    assert across == pytest.approx(within, rel=0.35)


def test_noise_outside_the_head_is_rayleigh() -> None:
    site = Site(name="s", noise=0.05, bias=0.0, motion=0.0, gain=1e5)
    image = scan(np.random.default_rng(2), np.zeros(SHAPE, np.float32), grid(), site).image
    assert image.mean() / 1e5 == pytest.approx(0.05 * np.sqrt(np.pi / 2), rel=0.02)


def test_a_point_is_spread_by_the_resolution() -> None:
    point = np.zeros(SHAPE, np.float32)
    point[15, 20, 18] = 1
    spread = blurred(point, (2.0, 1.0, 1.6), (1.0, 1.0, 1.0))
    assert spread.sum() == pytest.approx(1, abs=1e-3)
    for axis, (resolution, at) in enumerate(zip((2.0, 1.0, 1.6), (15, 20, 18), strict=True)):
        others = tuple(a for a in range(3) if a != axis)
        variance = (spread.sum(others) * (np.arange(SHAPE[axis]) - at) ** 2).sum()
        assert variance == pytest.approx((resolution**2 - 1) / FWHM**2, rel=0.1, abs=1e-6)


def test_motion_smears_along_h_keeps_the_energy_and_is_nothing_without_amplitude() -> None:
    image = ball() + 1  # positive: the magnitude loses nothing where ghosts are small
    np.testing.assert_allclose(ghosted(np.random.default_rng(3), image, 0.0), image, atol=1e-5)
    moved = ghosted(np.random.default_rng(3), image, 2.0)
    assert np.abs(moved - image).max() > 0.05
    assert (moved**2).sum() == pytest.approx((image**2).sum(), rel=1e-3)  # Parseval: phases change no energy
    outside = np.ones(SHAPE, bool)
    d, _h, w = np.nonzero(ball())
    outside[d, :, w] = False  # every row along H that meets the ball
    np.testing.assert_allclose(moved[outside], 1, atol=1e-5)


def test_whole_voxel_shifts_are_pasted_and_turned_grids_interpolated() -> None:
    volume = ball() * np.random.default_rng(4).random(SHAPE, dtype=np.float32)
    shifted = Geometry(shape=(25, 50, 36), spacing=(1.0, 1.0, 1.0), affine=IJK_RAS @ np.eye(4))
    shifted.affine[:3, 3] = IJK_RAS[:3, :3] @ [5, -4, 2]
    there = at_points(volume, IJK_RAS, shifted, np.eye(4))
    np.testing.assert_array_equal(there[:, 4:44, :34], volume[5:30, :, 2:])
    assert (there[:, :4] == 0).all()
    angle = np.deg2rad(8)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    turn[:3, 3] = [3.3, -2.1, 1.7]
    turned = at_points(volume, IJK_RAS, grid(), turn)
    points = np.stack(np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij"), -1) @ IJK_RAS[:3, :3].T
    voxels = (points @ turn[:3, :3].T + turn[:3, 3]) @ np.linalg.inv(IJK_RAS[:3, :3]).T
    expected = ndimage.map_coordinates(volume, voxels.transpose(3, 0, 1, 2), order=1)
    np.testing.assert_allclose(turned, expected, atol=1e-4)
