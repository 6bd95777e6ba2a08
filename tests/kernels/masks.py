"""Masks that labellings are tested on: random ones, and some made to fool a labelling."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from bench.post import serpentine

REACH = {6: 1, 18: 2, 26: 3}  # in how many axes two neighbours may lie apart


def scipys(mask: np.ndarray, connectivity: int) -> tuple[np.ndarray, np.ndarray]:
    """What scipy makes of a mask: labels (D, H, W), and sizes by label with the background's first."""
    labels, count = ndimage.label(mask, ndimage.generate_binary_structure(3, REACH[connectivity]))
    return labels, np.bincount(labels.ravel(), minlength=count + 1)


def _spiral() -> np.ndarray:
    """One component that a raster scan meets as many pieces."""
    mask = np.zeros((3, 31, 31), bool)
    top, left, bottom, right = 0, 0, 30, 30
    while right - left > 2:
        mask[1, top, left : right + 1] = True
        mask[1, top : bottom + 1, right] = True
        mask[1, bottom, left + 2 : right + 1] = True
        mask[1, top + 4 : bottom + 1, left + 2] = True
        top, left, bottom, right = top + 4, left + 2, bottom - 2, right - 2
    return mask


def _checkerboard() -> np.ndarray:
    return np.indices((7, 8, 9)).sum(0) % 2 == 0


def _comb() -> np.ndarray:
    mask = np.zeros((9, 20, 5), bool)
    mask[::2] = True
    mask[:, -1, 2] = True
    return mask


MASKS = {
    **{
        f"random {share}": np.random.default_rng(7).random((23, 17, 30)) < share
        for share in (0.02, 0.1, 0.3, 0.6, 0.95)
    },
    "empty": np.zeros((4, 5, 6), bool),
    "full": np.ones((4, 5, 6), bool),
    "one voxel": np.ones((1, 1, 1), bool),
    "one line": np.random.default_rng(1).random((1, 1, 50)) < 0.5,
    "one slice": np.random.default_rng(2).random((1, 40, 40)) < 0.4,
    "checkerboard": _checkerboard(),
    "spiral": _spiral(),
    "comb": _comb(),
    "serpentine": serpentine((9, 15, 13)),
    "serpentine from the end": serpentine((9, 15, 13))[::-1, ::-1, ::-1],
    "a view": (np.random.default_rng(3).random((20, 21, 22)) < 0.2).transpose(2, 0, 1)[::-1, :, ::2],
}
