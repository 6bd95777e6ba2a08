"""A brain to measure on where no scan of its size is at hand: seeded, stripped, 197 x 233 x 189 voxels of 1 mm.

The size is that of the ATLAS brains in MNI space. The head is an ellipsoid of smooth tissue with noise, dark ventricles
and a bright lesion; outside it is 0, as after brain extraction. No claim is made about patients.
"""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

SHAPE = (197, 233, 189)  # (i, j, k)
HALF_AXES_MM = (75.0, 95.0, 72.0)
LESION_AT_MM, LESION_RADIUS_MM = (32.0, 10.0, 14.0), 11.0


def stripped_head(shape: tuple[int, int, int] = SHAPE, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Image and lesion, (i, j, k) float32 and uint8; a smaller shape holds a smaller head."""
    random = np.random.default_rng(seed)
    scale = min(n / full for n, full in zip(shape, SHAPE, strict=True))
    grid = np.meshgrid(*(np.arange(n, dtype=np.float32) - n / 2 for n in shape), indexing="ij", sparse=True)

    def ball(centre: tuple[float, float, float], half_axes: tuple[float, float, float]) -> NDArray[np.bool_]:
        away = sum(((x - scale * c) / (scale * r)) ** 2 for x, c, r in zip(grid, centre, half_axes, strict=True))
        return np.asarray(away < 1)

    tissue = 100 + 60 * gaussian_filter(random.normal(size=shape).astype(np.float32), 3 * scale) * (3 * scale) ** 1.5
    for side in (-1.0, 1.0):
        tissue[ball((side * 12, 5, 8), (7, 24, 10))] = 35
    radius = LESION_RADIUS_MM
    lesion = ball(LESION_AT_MM, (radius, radius, radius))
    tissue[lesion] = 190
    brain = ball((0, 0, 0), HALF_AXES_MM)
    image = np.where(brain, np.maximum(tissue + random.normal(scale=6, size=shape), 1), 0)
    return image.astype(np.float32), (lesion & brain).astype(np.uint8)


def in_slices(image: NDArray[np.float32], voxels: int) -> NDArray[np.float32]:
    """The same head in slices `voxels` mm thick, each the mean of what it holds. (i, j, k) -> (i, j, k // voxels)."""
    i, j, k = image.shape
    count = k // voxels
    return np.asarray(image[:, :, : count * voxels].reshape(i, j, count, voxels).mean(3), dtype=np.float32)


def write_volume(
    path: Path, voxels: NDArray[np.float32] | NDArray[np.uint8], spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
) -> Path:
    """A NIfTI file, its folder made. spacing: mm (i, j, k)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(voxels, np.diag([*spacing, 1.0])), path)
    return path
