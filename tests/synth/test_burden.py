"""Table I of the paper: what a cohort's strokes add up to."""

from __future__ import annotations

import numpy as np
import pytest

from strokenet.synth.burden import (
    LARGEST_ML,
    MEAN_ML,
    MEDIAN_ML,
    SMALLEST_ML,
    Burden,
    Side,
    achieved,
    draw_burden,
    volume_at,
)


def test_thousands_of_cases_have_table_one() -> None:
    burdens = [draw_burden(3, index) for index in range(8000)]
    volumes = np.array([burden.total_ml for burden in burdens])
    assert np.median(volumes) == pytest.approx(4.0, rel=0.02)
    assert volumes.mean() == pytest.approx(28.607, rel=0.03)
    for side, share in (("left", 0.45), ("right", 0.44), ("other", 0.11)):
        assert np.mean([burden.side == side for burden in burdens]) == pytest.approx(share, abs=0.01)
    for side, share in (("left", 0.14), ("right", 0.15), ("other", 0.09)):
        assert np.mean([burden.second_side == side for burden in burdens]) == pytest.approx(share, abs=0.01)


def test_the_clipped_distribution_has_the_mean_and_median_whatever_closed_form_was_used() -> None:
    shares = (np.arange(40000) + 0.5) / 40000
    volumes = np.array([volume_at(share) for share in shares])
    assert volumes.mean() == pytest.approx(MEAN_ML, rel=0.003)
    assert np.median(volumes) == pytest.approx(MEDIAN_ML, rel=0.001)
    assert (volumes.min(), volumes.max()) == (SMALLEST_ML, LARGEST_ML)
    assert (np.diff(volumes) >= 0).all()


def test_a_small_cohort_is_near_the_table_too() -> None:
    """Independent draws of 40 would miss the mean by a quarter and more in most cohorts: its tail is long."""
    off_mean, off_median = [], []
    for seed in range(20):
        volumes = [draw_burden(seed, index).total_ml for index in range(40)]
        off_mean.append(abs(np.mean(volumes) / MEAN_ML - 1))
        off_median.append(abs(np.median(volumes) / MEDIAN_ML - 1))
    assert np.median(off_mean) < 0.12
    assert np.median(off_median) < 0.12


def test_a_burden_depends_on_seed_and_case_only() -> None:
    assert draw_burden(5, 7) == draw_burden(5, 7)
    assert draw_burden(5, 7) != draw_burden(6, 7)
    assert draw_burden(5, 7) != draw_burden(5, 8)


def test_a_second_stroke_takes_part_of_the_volume_and_none_from_a_small_one() -> None:
    burdens = [draw_burden(0, index) for index in range(400)]
    assert all(b.second_ml == 0 for b in burdens if b.second_side is None)
    seconds = [b for b in burdens if b.second_side is not None]
    assert all(0.05 <= b.second_ml / b.total_ml <= 0.3 and b.total_ml >= 0.5 for b in seconds)
    assert len(seconds) > 50


def test_achieved_is_plain_statistics() -> None:
    seconds: tuple[Side | None, ...] = (None, "other", "other", "left")
    sides: tuple[Side, ...] = ("left", "left", "right", "other")
    burdens = [Burden(side=a, volume_ml=9.0, second_side=b) for a, b in zip(sides, seconds, strict=True)]
    of = achieved([1.0, 2.0, 6.0, 11.0], burdens)
    assert (of.cases, of.median_ml, of.mean_ml, of.smallest_ml, of.largest_ml) == (4, 4.0, 5.0, 1.0, 11.0)
    assert (of.left, of.right, of.other) == (0.5, 0.25, 0.25)
    assert (of.second_left, of.second_right, of.second_other) == (0.25, 0.0, 0.5)
