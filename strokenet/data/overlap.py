"""Overlap: how many voxels two masks share, and their Dice, for every station that compares masks.

Comes in: two masks (D, H, W) of one grid, or the numbers of their voxels. Goes out: numbers. Two empty masks agree:
their Dice is 1 (ISLES'22, Hernandez Petzsche 2022), never NaN.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def overlap(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> tuple[int, int, int]:
    """Voxels in both masks, in the one, in the other."""
    common = int(np.count_nonzero(one & other))
    return common, int(np.count_nonzero(one)), int(np.count_nonzero(other))


def dice(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    """Dice 2|A and B| / (|A| + |B|) of two masks (D, H, W) bool; 1 where both are empty."""
    return float(dice_of_counts(*overlap(one, other)))


def dice_of_counts(common: Any, one: Any, other: Any) -> NDArray[np.float64]:
    """The same of numbers of voxels, or of arrays of them that broadcast."""
    both = np.asarray(one) + np.asarray(other)
    return np.where(both > 0, 2 * np.asarray(common) / np.maximum(both, 1), 1.0)
