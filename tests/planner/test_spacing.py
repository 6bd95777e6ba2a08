"""Target spacing, axis order and resampled shape, against cases worked out by hand."""

from __future__ import annotations

import pytest

from planner.spacing import resampled_shape, target_spacing, transpose_for

FLAT = (20, 400, 400)


def test_the_target_is_the_median_of_each_axis() -> None:
    spacings = [(1.0, 0.5, 2.0), (3.0, 0.7, 1.0), (2.0, 0.6, 1.5), (2.0, 0.5, 1.0)]
    assert target_spacing(spacings, [(100, 100, 100)] * 4) == (2.0, 0.55, 1.25)


def test_thick_and_few_slices_take_the_tenth_percentile() -> None:
    spacings = [(6.0, 0.5, 0.5), (7.0, 0.5, 0.5), (3.0, 0.5, 0.5)]
    assert target_spacing(spacings, [FLAT] * 3) == pytest.approx((3.6, 0.5, 0.5))  # 10 %: a fifth of the way 3 -> 6
    turned = [(w, d, h) for d, h, w in spacings]
    assert target_spacing(turned, [(400, 20, 400)] * 3) == pytest.approx((0.5, 3.6, 0.5))


@pytest.mark.parametrize(
    ("thick", "shape"),
    [
        (1.5, FLAT),  # three times the plane is not over three times
        (6.0, (134, 400, 400)),  # three times 134 slices is not under 400
    ],
)
def test_the_median_stays_where_slices_are_not_thick_and_few(thick: float, shape: tuple[int, int, int]) -> None:
    spacings = [(thick, 0.5, 0.5), (thick, 0.5, 0.5), (thick / 2, 0.5, 0.5)]
    assert target_spacing(spacings, [shape] * 3) == (thick, 0.5, 0.5)


def test_the_tenth_percentile_never_falls_below_the_plane() -> None:
    spacings = [(4.0, 1.0, 0.9)] * 6 + [(0.5, 1.0, 0.9)] * 3
    assert target_spacing(spacings, [(30, 200, 180)] * 9) == (1.00001, 1.0, 0.9)


@pytest.mark.parametrize(
    ("spacing", "order"),
    [
        ((1.0, 1.0, 1.0), (0, 1, 2)),
        ((1.0, 2.0, 2.0), (1, 0, 2)),  # the first of two coarsest
        ((0.9, 0.8, 4.0), (2, 0, 1)),
        ((5.0, 0.5, 0.6), (0, 1, 2)),
    ],
)
def test_the_coarsest_axis_comes_first(spacing: tuple[float, float, float], order: tuple[int, int, int]) -> None:
    assert transpose_for(spacing) == order


def test_a_resampled_shape_is_rounded_half_to_even_and_never_empty() -> None:
    assert resampled_shape((5, 7, 10), (1.0, 1.0, 0.9), (2.0, 2.0, 1.0)) == (2, 4, 9)
    assert resampled_shape((1, 1, 4), (0.4, 1.0, 1.0), (1.0, 3.0, 1.0)) == (1, 1, 4)
