"""Flags by hand-computed scores."""

from __future__ import annotations

import pytest

from strokenet.prepare.quality import CaseQuality, flag_outliers, robust_z


def test_the_robust_z_by_hand() -> None:
    values = [1.0, 2, 3, 4, 5, 6, 7, 100]  # median 4.5, distances 3.5 2.5 1.5 .5 .5 1.5 2.5 95.5: median 2
    assert robust_z(values)[-1] == pytest.approx(0.6745 * 95.5 / 2)
    assert robust_z(values[:7]) == [0.0] * 7


def test_limits_hold_for_a_single_case() -> None:
    case = CaseQuality(case_id="a", brain_ml=400, metric=-0.1, displacement_mm=55, agreement=0.5)
    flags = flag_outliers([case])["a"]
    assert [line.split()[0] for line in flags] == ["brain", "registration", "brain"]
    assert flag_outliers([CaseQuality(case_id="b", brain_ml=1400)]) == {"b": ()}


def test_a_case_unlike_its_cohort_is_told() -> None:
    metrics = [-0.60, -0.62, -0.64, -0.66, -0.61, -0.65, -0.63, -0.20]
    cases = [CaseQuality(case_id=str(n), brain_ml=1400, metric=metric) for n, metric in enumerate(metrics)]
    flags = flag_outliers(cases)
    assert [case_id for case_id, lines in flags.items() if lines] == ["7"]
    assert "metric -0.2" in flags["7"][0]


def test_a_cohort_without_spread_is_not_flagged_for_rounding() -> None:
    cases = [CaseQuality(case_id=str(n), brain_ml=1400 + 1e-6 * n**4) for n in range(10)]
    assert not any(flag_outliers(cases).values())
