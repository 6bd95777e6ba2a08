"""What all cases say together: the mean of cases, its interval, and the paired difference."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from strokenet.evaluate.evaluate import score_case
from strokenet.evaluate.records import CaseScore
from strokenet.evaluate.summary import bootstrap_ci95, empty_cases, paired_difference, summarise


def row(case: str, predicted: int, true: int, common: int, label: str = "1") -> CaseScore:
    """A case of so many voxels of 1 ml (10 mm cubes), from masks made to measure."""
    a, b = np.zeros((1, 1, 40), bool), np.zeros((1, 1, 40), bool)
    a[0, 0, :predicted] = True
    b[0, 0, predicted - common : predicted - common + true] = True
    return score_case(case, label, a, b, (10.0, 10.0, 10.0))


ROWS = [row("a", 4, 4, 2), row("b", 0, 3, 0), row("c", 5, 0, 0), row("d", 0, 0, 0), row("e", 6, 10, 4)]
DICE = [0.5, 0.0, 0.0, 1.0, 0.5]


def naive_bootstrap(values: NDArray[np.float64], draws: int = 4000) -> tuple[float, float]:
    rng = np.random.default_rng(99)
    means = sorted(float(np.mean([values[rng.integers(len(values))] for _ in values])) for _ in range(draws))
    return means[int(0.025 * draws)], means[int(0.975 * draws)]


def test_mean_median_and_quartiles_are_those_of_the_cases() -> None:
    dice = summarise(ROWS).all_cases["dice"]
    assert [r.dice for r in ROWS] == DICE
    assert (dice.n, dice.mean, dice.median, dice.min, dice.max) == (5, pytest.approx(0.4), 0.5, 0.0, 1.0)
    assert (dice.q1, dice.q3) == (0.0, 0.5)


def test_the_second_convention_drops_cases_without_a_lesion_in_the_reference() -> None:
    summaries = summarise(ROWS)
    assert summaries.ref_nonempty["dice"].n == 3
    assert summaries.ref_nonempty["dice"].mean == pytest.approx(1 / 3)


def test_a_missed_lesion_stays_in_both_means() -> None:
    found, missed = row("a", 4, 4, 4), row("b", 0, 3, 0)
    for summary in (summarise([found, missed]).all_cases, summarise([found, missed]).ref_nonempty):
        assert summary["dice"].mean == 0.5
        assert summary["hd95_mm"].max == pytest.approx(np.sqrt(400**2 + 10**2 + 10**2))


def test_a_case_with_two_labels_counts_once() -> None:
    rows = [row("a", 4, 4, 4, "core"), row("a", 4, 4, 0, "rim"), row("b", 4, 4, 4, "core"), row("b", 4, 4, 4, "rim")]
    dice = summarise(rows).all_cases["dice"]
    assert (dice.n, dice.mean, dice.min) == (2, 0.75, 0.5)


def test_bootstrap_interval_equals_that_of_a_plain_loop() -> None:
    rng = np.random.default_rng(0)
    for n in (3, 12):
        values = rng.beta(3, 1, n)
        low, high = bootstrap_ci95(values[:, None])[:, 0]
        expected = naive_bootstrap(values)
        tolerance = 0.06 * values.std()  # of two random intervals of 10,000 and 4,000 draws
        assert (low, high) == (pytest.approx(expected[0], abs=tolerance), pytest.approx(expected[1], abs=tolerance))


def test_bootstrap_is_the_same_in_blocks_and_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(1).random((7, 3))
    whole = bootstrap_ci95(values)
    monkeypatch.setattr("strokenet.evaluate.summary._BLOCK", 7 * 100)
    np.testing.assert_allclose(bootstrap_ci95(values), whole)


def test_the_interval_shrinks_with_the_root_of_the_number_of_cases() -> None:
    values = np.random.default_rng(2).normal(size=(400, 1))
    few, many = (np.ptp(bootstrap_ci95(values[:n])[:, 0]) for n in (25, 400))
    assert few / many == pytest.approx(4, rel=0.3)


def test_one_case_has_no_interval() -> None:
    assert summarise(ROWS[:1]).all_cases["dice"].ci95 is None
    assert summarise([]).all_cases == {}


def test_the_paired_difference_is_first_minus_second() -> None:
    better = [row(case, 4, 4, 4) for case in "abc"]
    worse = [row(case, 4, 4, 2) for case in "cba"]  # the order of the rows does not matter
    difference = paired_difference(better, worse)["dice"]
    assert (difference.n, difference.mean, difference.median) == (3, 0.5, 0.5)
    assert difference.ci95 == (0.5, 0.5)  # every case gained the same: no doubt is left
    assert paired_difference(worse, better)["dice"].mean == -0.5


def test_the_paired_interval_resamples_differences_and_not_two_groups() -> None:
    rng = np.random.default_rng(3)
    base = rng.integers(2, 12, 20)
    first = [row(f"c{i}", 12, 12, int(n)) for i, n in enumerate(base)]
    second = [row(f"c{i}", 12, 12, int(n) - 1 - i % 2) for i, n in enumerate(base)]
    paired = paired_difference(first, second)["dice"].ci95
    gains = np.array([(1 + i % 2) / 12 for i in range(20)])
    expected = naive_bootstrap(gains)
    assert paired is not None
    assert paired == (pytest.approx(expected[0], abs=0.006), pytest.approx(expected[1], abs=0.006))


def test_cases_that_only_one_prediction_has_are_left_out_of_the_difference() -> None:
    first, second = [row("a", 4, 4, 4), row("b", 4, 4, 0)], [row("b", 4, 4, 4), row("c", 4, 4, 4)]
    difference = paired_difference(first, second)["dice"]
    assert (difference.n, difference.mean, difference.ci95) == (1, -1.0, None)
    assert paired_difference(first, second[1:]) == {}


def test_empty_cases_are_named_by_flag() -> None:
    empty = empty_cases(ROWS, several=False)
    assert empty == {"both_empty": ("d",), "ref_empty": ("c",), "missed": ("b",), "missing_prediction": ()}
    assert empty_cases([row("b", 0, 3, 0, "rim")], several=True)["missed"] == ("b (rim)",)
