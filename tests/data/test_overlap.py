"""Overlap of two masks, by hand."""

from __future__ import annotations

import numpy as np

from strokenet.data.overlap import dice, dice_of_counts, overlap

ONE = np.array([1, 1, 1, 0, 0], bool).reshape(5, 1, 1)
OTHER = np.array([0, 1, 1, 1, 1], bool).reshape(5, 1, 1)


def test_voxels_are_counted_and_dice_is_twice_the_common_share() -> None:
    assert overlap(ONE, OTHER) == (2, 3, 4)
    assert dice(ONE, OTHER) == 4 / 7


def test_two_empty_masks_agree_and_one_empty_mask_does_not() -> None:
    nothing = np.zeros_like(ONE)
    assert (dice(nothing, nothing), dice(nothing, ONE)) == (1.0, 0.0)


def test_counts_may_be_arrays() -> None:
    assert dice_of_counts(np.array([0, 1, 2]), np.array([0, 1, 3]), 0).tolist() == [1.0, 2.0, 4 / 3]
