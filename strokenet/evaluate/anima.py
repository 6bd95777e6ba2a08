"""Evaluate, step 2c: lesions found by the rule of animaSegPerfAnalyzer (Commowick 2018).

    lesion i is detected when
        overlap_i / size_i > alpha,   overlap_i its voxels in any lesion of the other mask, and
        walking the other's lesions j by falling T[i, j], none reached has  outside_j / size_j > beta;
        the walk ends when those before j make up more than gamma of overlap_i

outside_j: voxels of j in no lesion of this mask. One voxel of overlap, enough for ISLES'22, is not enough here, nor is
a blob that covers the lesion and much else. Sensitivity asks it of the reference's lesions, PPV of the predicted ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kernels.components import VOLUME_MARGIN
from strokenet.data.errors import InputError
from strokenet.evaluate.contingency import Contingency, Verdict


@dataclass(frozen=True, kw_only=True)
class DetectionRule:
    """Limits of the rule, Anima's defaults. Every limit is strict: a share of exactly the limit is not above it.

    alpha: least share of a lesion that must be overlapped. beta: largest share of an overlapping lesion that may lie
    outside. gamma: share of the overlap after which the walk ends. min_volume_mm3: lesions up to it are background.
    """

    alpha: float = 0.10
    beta: float = 0.70
    gamma: float = 0.65
    min_volume_mm3: float = 0.0

    def __post_init__(self) -> None:
        shares = {"alpha": self.alpha, "beta": self.beta, "gamma": self.gamma}
        if not all(0 <= share <= 1 for share in shares.values()):
            raise InputError(f"detection rule: {shares}; each is a share, 0 to 1")
        if not 0 <= self.min_volume_mm3 < math.inf:
            raise InputError(f"detection rule: min_volume_mm3 {self.min_volume_mm3}; 0 (keeps every lesion) or more")


@dataclass(frozen=True, kw_only=True)
class AnimaScores:
    """Lesion counts and shares of one case and label by the rule of Anima.

    anima_found, anima_missed: lesions of the reference that the rule detects, and the others. anima_false: predicted
    lesions that it does not detect in the reference. anima_sensitivity: found / lesions of the reference. anima_ppv:
    detected / predicted lesions. anima_f1: harmonic mean of the two. Shares are 0 .. 1.
    """

    anima_found: int
    anima_missed: int
    anima_false: int
    anima_sensitivity: float
    anima_ppv: float
    anima_f1: float


def min_voxels(rule: DetectionRule, voxel_volume_mm3: float) -> int:
    """Voxels of the smallest lesion that counts: floor(minimum / voxel) + 1, that is, a volume above the minimum.

    `Differs:` by one part in a million, as in kernels/components.py, so that rounding of the spacing decides nothing.
    """
    return math.floor(rule.min_volume_mm3 * (1 + VOLUME_MARGIN) / voxel_volume_mm3) + 1


def detected(table: Contingency, rule: DetectionRule) -> NDArray[np.bool_]:
    """Which rows of the table are detected, (n,) bool; for the other direction give table.transposed().

    Shares are single divisions of whole numbers, so that 1 voxel in 10 is exactly 0.10. Equal overlaps are walked by
    rising outside_j / size_j: the rule leaves it open, and so the answer does not hang on how lesions are numbered.
    """
    n, m = len(table.row_sizes), len(table.column_sizes)
    overlap = np.bincount(table.row, table.voxels, n)  # float64 holds these whole numbers exactly
    outside = _share(table.column_sizes - np.bincount(table.column, table.voxels, m), table.column_sizes)
    order = np.lexsort((outside[table.column], -table.voxels, table.row))
    row, column, voxels = table.row[order], table.column[order], table.voxels[order]
    before = np.cumsum(voxels) - voxels
    before -= before[np.searchsorted(row, row)]  # from the first entry of the same row on
    reached = before / overlap[row] <= rule.gamma
    found = _share(overlap, table.row_sizes) > rule.alpha
    found[row[reached & (outside[column] > rule.beta)]] = False
    return np.asarray(found)


def anima_verdict(table: Contingency, rule: DetectionRule, voxel_volume_mm3: float) -> Verdict:
    """The rule in both directions. Lesions up to the least volume are background in both masks, and no one's error."""
    kept = table.at_least(min_voxels(rule, voxel_volume_mm3))
    found, confirmed = detected(kept, rule), detected(kept.transposed(), rule)
    missed, false = ~found & (kept.row_sizes > 0), ~confirmed & (kept.column_sizes > 0)
    return Verdict(found=found, missed=missed, confirmed=confirmed, false=false)


def anima_scores(verdict: Verdict) -> AnimaScores:
    """The scores of anima_verdict.

    `Differs:` Anima gives 0 for all three shares as soon as one mask has no lesion. Here that holds where exactly one
    has none; where both have none they are 1, as every overlap in metrics.py, so that a model which rightly finds
    nothing in a lesion-free scan is not marked as the worst one.
    """
    found, missed, confirmed, false = (
        int(np.count_nonzero(x)) for x in (verdict.found, verdict.missed, verdict.confirmed, verdict.false)
    )
    nothing = 0.0 if found + missed or confirmed + false else 1.0  # the value of 0 / 0
    sensitivity = found / (found + missed) if found + missed else nothing
    ppv = confirmed / (confirmed + false) if confirmed + false else nothing
    return AnimaScores(
        anima_found=found,
        anima_missed=missed,
        anima_false=false,
        anima_sensitivity=sensitivity,
        anima_ppv=ppv,
        anima_f1=2 * sensitivity * ppv / (sensitivity + ppv) if sensitivity + ppv else 0.0,
    )


def _share(part: NDArray[np.number], whole: NDArray[np.number]) -> NDArray[np.float64]:
    """part / whole of each lesion, 0 where it was left out and has no size."""
    return np.asarray(part / np.maximum(whole, 1), dtype=np.float64)
