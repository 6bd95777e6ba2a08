"""Evaluate, step 4: what all cases say together.

Comes in: rows. Goes out: mean, median, quartiles and a bootstrap interval of every metric, the paired difference of
two predictions, and the names of the empty cases. The unit is the case: its labels are averaged first, so that the
bootstrap resamples patients. No case leaves a mean: a metric without a value has a rule (metrics.py), never NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from strokenet.evaluate.records import FLAGS, METRICS, CaseScore, Difference, Summaries, Summary

RESAMPLES = 10_000
_BLOCK = 2**22  # draws held at a time: 32 MB of counts


def summarise(rows: Sequence[CaseScore]) -> Summaries:
    """The summaries of rows; a case with several labels counts once, as the mean of its labels."""
    return Summaries(all_cases=_summary(rows), ref_nonempty=_summary([row for row in rows if row.ref_nonempty]))


def paired_difference(rows: Sequence[CaseScore], other: Sequence[CaseScore]) -> dict[str, Difference]:
    """rows minus other by metric, over the cases that both have; {} where there is none.

    Paired: the cases are resampled, each with both its scores.
    """
    first, second = _by_case(rows), _by_case(other)
    shared = [case for case in first if case in second]
    if not shared:
        return {}
    paired = np.array([first[case] - second[case] for case in shared])
    means, medians, intervals = paired.mean(axis=0).tolist(), np.median(paired, axis=0).tolist(), _intervals(paired)
    return {
        name: Difference(n=len(shared), mean=means[m], median=medians[m], ci95=intervals[m])
        for m, name in enumerate(METRICS)
    }


def empty_cases(rows: Sequence[CaseScore], *, several: bool) -> dict[str, tuple[str, ...]]:
    """Flag -> the cases that carry it; with the label where there are several and the flag belongs to one."""
    return {flag: _flagged(rows, flag, several=several) for flag in FLAGS}


def bootstrap_ci95(values: NDArray[np.float64], seed: int = 0) -> NDArray[np.float64]:
    """Percentile bootstrap of the mean (Efron 1979): 10,000 resamples of the cases, the same for every metric.

    Args:
        values: (n, m), n cases and m metrics.

    Returns:
        (2, m): the 2.5th and 97.5th percentile of the resampled means.
    """
    n = len(values)
    rng = np.random.default_rng(seed)
    means = np.empty((RESAMPLES, values.shape[1]))
    step = max(1, _BLOCK // n)
    for start in range(0, RESAMPLES, step):
        drawn = rng.integers(0, n, (min(step, RESAMPLES - start), n))
        drawn += n * np.arange(len(drawn))[:, None]
        counts = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape)  # how often each case is drawn
        means[start : start + step] = counts @ values / n
    return np.percentile(means, [2.5, 97.5], axis=0)


def _by_case(rows: Sequence[CaseScore]) -> dict[str, NDArray[np.float64]]:
    """Case -> the mean over its labels of every metric, (metrics,)."""
    groups: dict[str, list[list[float]]] = {}
    for row in rows:
        groups.setdefault(row.case, []).append([float(getattr(row, name)) for name in METRICS])
    return {case: np.mean(values, axis=0) for case, values in groups.items()}


def _summary(rows: Sequence[CaseScore]) -> dict[str, Summary]:
    if not rows:
        return {}
    values = np.array(list(_by_case(rows).values()))  # (cases, metrics)
    minimum, q1, median, q3, maximum = np.percentile(values, [0, 25, 50, 75, 100], axis=0).tolist()
    means, intervals = values.mean(axis=0).tolist(), _intervals(values)
    return {
        name: Summary(
            n=len(values),
            mean=means[m],
            median=median[m],
            q1=q1[m],
            q3=q3[m],
            min=minimum[m],
            max=maximum[m],
            ci95=intervals[m],
        )
        for m, name in enumerate(METRICS)
    }


def _intervals(values: NDArray[np.float64]) -> list[tuple[float, float] | None]:
    if len(values) < 2:
        return [None] * values.shape[1]
    return [(low, high) for low, high in bootstrap_ci95(values).T.tolist()]


def _flagged(rows: Sequence[CaseScore], flag: str, *, several: bool) -> tuple[str, ...]:
    named = [
        f"{row.case} ({row.label})" if several and flag != "missing_prediction" else row.case
        for row in rows
        if getattr(row, flag)
    ]
    return tuple(dict.fromkeys(named))
