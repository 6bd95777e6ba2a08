"""The simplest rival of a network: one intensity threshold, the best that any channel and direction can give.

Comes in: training cases with their lesions. Goes out: a Threshold and masks made with it. A score means little until it
is seen beside what no learning at all reaches on the same cases; the demo prints both.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LEVELS = np.linspace(-5.0, 5.0, 401)  # in standard deviations of the head's own intensities


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """Lesion where a standardised channel lies above (or below) a value. dice: mean over the cases of the fit."""

    channel: int
    above: bool
    value: float
    dice: float


def standardise(channel: NDArray[np.float32]) -> NDArray[np.float32]:
    """Mean 0 and deviation 1 over the voxels that are not zero; the others become NaN. (D, H, W) -> (D, H, W)."""
    head = channel != 0
    values = channel[head].astype(np.float64)
    scaled = np.full(channel.shape, np.nan, np.float32)
    if len(values):
        scaled[head] = (values - values.mean()) / max(float(values.std()), 1e-8)
    return scaled


def fit_threshold(cases: Iterable[tuple[NDArray[np.float32], NDArray[np.bool_]]]) -> Threshold:
    """The channel, direction and level with the best mean Dice over the cases.

    Args:
        cases: (image (C, D, H, W) float32, lesion (D, H, W) bool) of each; zero is outside the head.
    """
    tables = [np.stack([_dice_table(channel, lesion) for channel in image]) for image, lesion in cases]  # (C, 2, L)
    mean = np.mean(tables, axis=0)
    channel, direction, level = np.unravel_index(int(np.argmax(mean)), mean.shape)
    return Threshold(
        channel=int(channel),
        above=bool(direction == 0),
        value=float(LEVELS[level]),
        dice=float(mean[channel, direction, level]),
    )


def apply_threshold(image: NDArray[np.float32], threshold: Threshold) -> NDArray[np.uint8]:
    """The mask of a case: (C, D, H, W) float32 -> (D, H, W) uint8. Outside the head is no lesion."""
    scaled = standardise(image[threshold.channel])
    return (scaled > threshold.value if threshold.above else scaled <= threshold.value).astype(np.uint8)


def _dice_table(channel: NDArray[np.float32], lesion: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Dice of every level: row 0 above it, row 1 at or below it. (2, len(LEVELS))"""
    scaled = standardise(channel)
    head = ~np.isnan(scaled)
    bins = np.searchsorted(LEVELS, scaled[head], side="left")  # level b is the first that is not below the voxel
    every = np.bincount(bins, minlength=len(LEVELS) + 1)
    true = np.bincount(bins[lesion[head]], minlength=len(LEVELS) + 1)
    below, true_below = np.cumsum(every)[:-1], np.cumsum(true)[:-1]
    above, true_above = every.sum() - below, true.sum() - true_below
    size = int(np.count_nonzero(lesion))
    return np.stack(
        [2 * hit / np.maximum(found + size, 1) for hit, found in ((true_above, above), (true_below, below))]
    )
