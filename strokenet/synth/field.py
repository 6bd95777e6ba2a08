"""Smooth random fields: the one source of irregular shape in a drawn head (folds, lesion edges, texture, bias).

Comes in: a Generator and a shape. Goes out: float32 of mean 0 and standard deviation 1. A long correlation length is
drawn on a coarse grid and interpolated, so that a field of 25 mm costs no more than one of 3 mm.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Triple = tuple[int, int, int]
COARSE = 1.5  # smoothing, in coarse voxels, from which linear interpolation leaves no visible facets


def smooth_field(rng: np.random.Generator, shape: Triple, sigma: float) -> NDArray[np.float32]:
    """White noise smoothed by a Gaussian.

    Args:
        shape: (D, H, W). sigma: of the Gaussian, in voxels; 0 is white noise.

    Returns:
        (D, H, W) float32, mean 0, standard deviation 1 over the volume.
    """
    step = max(1.0, sigma / COARSE)
    coarse = tuple(int(np.ceil(n / step)) + 1 for n in shape)
    noise = rng.standard_normal(coarse, dtype=np.float32)
    field = ndimage.gaussian_filter(noise, sigma / step, mode="wrap", truncate=3)
    for axis in range(3):
        field = stretched(field, axis, shape[axis], step)
    field -= field.mean()
    spread = float(field.std())
    return np.asarray(field / spread if spread > 0 else field, dtype=np.float32)


def stretched(field: NDArray[np.float32], axis: int, length: int, step: float) -> NDArray[np.float32]:
    """One axis interpolated linearly to this length; `step` new voxels are one old one."""
    if step == 1:
        return field.take(range(length), axis)
    at = np.arange(length) / step
    low = at.astype(np.intp)
    share = (at - low).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(3)])
    below = field.take(low, axis)
    return np.asarray(below + share * (field.take(low + 1, axis) - below))
