"""Burden: how much stroke a case has and where, drawn so that a cohort has the paper's Table I whatever its size.

Comes in: the cohort's seed and a case's number. Goes out: a Burden. Volumes are log-normal with the table's median
and mean (4 ml, 28.607 ml), clipped to what a hemisphere can hold; the spread is the one that gives this mean after it.
Cases run through both distributions evenly (a shifted radical inverse, van der Corput 1935) instead of independently:
the mean of so long a tail would otherwise be anything in a cohort of 40. Case 7 is the same in every cohort of a seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import exp, log
from statistics import NormalDist
from typing import Literal

import numpy as np

Side = Literal["left", "right", "other"]

MEDIAN_ML, MEAN_ML = 4.0, 28.607  # Meddahi 2024, Table I
SMALLEST_ML, LARGEST_ML = 0.03, 300.0
PRIMARY: dict[Side, float] = {"left": 0.45, "right": 0.44, "other": 0.11}  # Meddahi 2024, Table I
SECONDARY: dict[Side, float] = {"left": 0.14, "right": 0.15, "other": 0.09}  # the same; the rest has none
SECOND_PART = (0.05, 0.3)  # of the volume that a second stroke takes
SECOND_FROM_ML = 0.5  # a smaller burden is one stroke; the others have so many more that the shares are the table's
DIRECTION: dict[Side, int] = {"left": -1, "right": 1, "other": 0}


@dataclass(frozen=True, kw_only=True)
class Burden:
    """side, volume_ml: of the main stroke. second_side, second_ml: of a second one, None and 0 where there is none."""

    side: Side
    volume_ml: float
    second_side: Side | None = None
    second_ml: float = 0.0

    @property
    def total_ml(self) -> float:
        """Of both strokes."""
        return self.volume_ml + self.second_ml


@dataclass(frozen=True, kw_only=True)
class Achieved:
    """What a cohort has in the end, beside Table I. Volumes in ml of the label as written; shares of all cases, by the
    side of the main stroke and, second_..., of a second one.
    """

    cases: int
    median_ml: float
    mean_ml: float
    smallest_ml: float
    largest_ml: float
    left: float
    right: float
    other: float
    second_left: float
    second_right: float
    second_other: float


def draw_burden(seed: int, index: int) -> Burden:
    """The burden of case `index` of a cohort."""
    shift = np.random.default_rng([seed, 1793]).random(3)
    total = volume_at((_inverse(index, 2) + shift[0]) % 1)
    side = _side_at((_inverse(index, 3) + shift[1]) % 1, PRIMARY)
    second = _side_at((_inverse(index, 5) + shift[2]) % 1 * _share_from(SECOND_FROM_ML), SECONDARY)
    if side is None:  # rounding of the shares
        side = "other"
    if second is None or total < SECOND_FROM_ML:
        return Burden(side=side, volume_ml=total)
    part = float(np.random.default_rng([seed, 1794, index]).uniform(*SECOND_PART))
    return Burden(side=side, volume_ml=(1 - part) * total, second_side=second, second_ml=part * total)


def volume_at(share: float) -> float:
    """The volume in ml that this share of all cases, between 0 and 1, does not exceed."""
    share = min(max(share, 1e-9), 1 - 1e-9)
    volume = exp(log(MEDIAN_ML) + _spread() * NormalDist().inv_cdf(share))
    return min(max(volume, SMALLEST_ML), LARGEST_ML)


def achieved(volumes_ml: Sequence[float], burdens: Sequence[Burden]) -> Achieved:
    """Median, mean and range of the volumes as written, and hemispheres, of a cohort of one case at least."""
    sides, seconds = ([of.side for of in burdens], [of.second_side for of in burdens])
    return Achieved(
        cases=len(volumes_ml),
        median_ml=float(np.median(volumes_ml)),
        mean_ml=float(np.mean(volumes_ml)),
        smallest_ml=min(volumes_ml),
        largest_ml=max(volumes_ml),
        left=sides.count("left") / len(sides),
        right=sides.count("right") / len(sides),
        other=sides.count("other") / len(sides),
        second_left=seconds.count("left") / len(sides),
        second_right=seconds.count("right") / len(sides),
        second_other=seconds.count("other") / len(sides),
    )


def _share_from(volume_ml: float) -> float:
    """Share of the cases whose burden is at least this."""
    return 1 - NormalDist().cdf(log(volume_ml / MEDIAN_ML) / _spread())


@lru_cache(maxsize=1)
def _spread() -> float:
    """Standard deviation of the logarithm for which the clipped distribution has MEAN_ML, by bisection."""
    low, high = 0.5, 5.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _clipped_mean(middle) < MEAN_ML else (low, middle)
    return low


def _clipped_mean(spread: float) -> float:
    """Mean of a log-normal clipped at both ends, in closed form."""
    below = NormalDist().cdf
    low, high = ((log(end) - log(MEDIAN_ML)) / spread for end in (SMALLEST_ML, LARGEST_ML))
    inside = MEDIAN_ML * exp(spread**2 / 2) * (below(high - spread) - below(low - spread))
    return SMALLEST_ML * below(low) + inside + LARGEST_ML * (1 - below(high))


def _inverse(index: int, base: int) -> float:
    """The digits of the index behind the point: 0, 1/2, 1/4, 3/4, 1/8 ... in base 2."""
    value, weight = 0.0, 1.0
    while index:
        index, digit = divmod(index, base)
        weight /= base
        value += digit * weight
    return value


def _side_at(share: float, shares: dict[Side, float]) -> Side | None:
    for side, width in shares.items():
        if share < width:
            return side
        share -= width
    return None
