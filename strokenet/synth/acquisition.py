"""Acquisition: the fine volume as a scanner and a brain extraction hand it over.

Comes in: a volume on the anatomy's grid. Goes out: the same head on an acquisition grid, with bias field and Rician
noise, in whole numbers and zero outside the brain. Most grids are near 2.5 mm isotropic, on which two CPU cores train
in minutes. Thick slices, tilted slabs and stored orders other than RAS are among them, because a method that only works
without them is not finished.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from strokenet.data.geometry import Geometry, Spacing
from strokenet.synth.anatomy import Anatomy, Floats
from strokenet.synth.field import smooth_field

Triple = tuple[int, int, int]
MARGIN_MM = 6.0  # around the brain, of which every second voxel is looked at
NOISE = (0.02, 0.045)  # standard deviation of both signal parts, healthy white matter 1
BIAS, BIAS_LENGTH_MM = (0.03, 0.10), 35.0  # standard deviation of its logarithm; what N4 leaves and a little more
GAIN = (250.0, 900.0)  # healthy white matter in stored numbers: a scanner's units mean nothing


@dataclass(frozen=True, kw_only=True)
class GridStyle:
    """A way to scan.

    spacing: mm (D, H, W). axes: where D, H and W run, one letter of R L A P S I each. tilt_degrees: each of the three
    rotations of the slab is drawn between half of this and all of it.
    """

    spacing: Spacing
    axes: str
    tilt_degrees: float = 0.0


GRIDS = (  # in turn, so that a dozen cases hold all of them; D, H, W = "SAR" is RAS to everyone else
    GridStyle(spacing=(2.5, 2.5, 2.5), axes="SAR"),
    GridStyle(spacing=(2.5, 2.5, 2.5), axes="SAL"),
    GridStyle(spacing=(2.5, 2.4, 2.4), axes="SAR", tilt_degrees=12.0),
    GridStyle(spacing=(2.5, 2.5, 2.5), axes="SPL"),
    GridStyle(spacing=(4.0, 1.8, 1.8), axes="SAL", tilt_degrees=6.0),
    GridStyle(spacing=(2.6, 2.5, 2.5), axes="RSP"),
)
_DIRECTIONS = {"R": (1, 0, 0), "L": (-1, 0, 0), "A": (0, 1, 0), "P": (0, -1, 0), "S": (0, 0, 1), "I": (0, 0, -1)}


def grid_around(rng: np.random.Generator, anatomy: Anatomy, style: GridStyle) -> Geometry:
    """The smallest grid of this style that holds the brain with a margin.

    Raises:
        ValueError: the style's axes are not one letter each of R or L, A or P, S or I.
    """
    axes = np.array([_DIRECTIONS[letter] for letter in style.axes], dtype=np.float64).T  # columns: D, H, W
    if abs(np.linalg.det(axes)) != 1:
        raise ValueError(f"axes {style.axes!r}; one letter each of R or L, A or P, S or I is needed")
    axes = _rotation(rng, style.tilt_degrees) @ axes
    points = 2 * np.argwhere(anatomy.brain[::2, ::2, ::2]) @ anatomy.affine[:3, :3].T + anatomy.affine[:3, 3]
    along = points @ axes  # (N, 3) mm along D, H, W
    low, high = along.min(0) - MARGIN_MM, along.max(0) + MARGIN_MM
    d, h, w = (int(np.ceil(n)) for n in (high - low) / style.spacing)
    affine = np.eye(4)
    affine[:3, :3] = axes * style.spacing
    affine[:3, 3] = axes @ low
    return Geometry(shape=(d, h, w), spacing=style.spacing, affine=affine)


def resample(volume: Floats, anatomy: Anatomy, grid: Geometry) -> NDArray[np.float32]:
    """The volume on the grid: each voxel is the mean of the fine volume over its own box.

    A box wider than the fine grid is sampled several times along that axis, so that thick slices show partial volume.

    Args:
        volume: float32, of anatomy.shape; 0 is taken outside.

    Returns:
        float32, of grid.shape.
    """
    d, h, w = (max(1, round(s / anatomy.spacing_mm)) for s in grid.spacing)
    samples = np.array([d, h, w])
    to_grid = np.eye(4)  # sample -> voxel: sample n of a voxel lies at (n + 0.5) / samples - 0.5
    to_grid[:3, :3] = np.diag(1 / samples)
    to_grid[:3, 3] = 0.5 / samples - 0.5
    to_fine = np.linalg.inv(anatomy.affine) @ grid.affine @ to_grid
    shape = tuple(np.array(grid.shape) * samples)
    fine = ndimage.affine_transform(volume, to_fine[:3, :3], to_fine[:3, 3], output_shape=shape, order=1)
    a, b, c = grid.shape
    return np.asarray(fine.reshape(a, d, b, h, c, w).mean((1, 3, 5), dtype=np.float32))


def acquire(
    rng: np.random.Generator, signal: Floats, brain: NDArray[np.bool_], spacing: Spacing
) -> NDArray[np.float32]:
    """Bias field, Rician noise, an arbitrary gain, whole numbers; 0 outside the brain and at least 1 in it.

    Args:
        signal: (D, H, W) float32, healthy white matter near 1. brain: the same shape. spacing: mm (D, H, W).

    Returns:
        (D, H, W) float32, whole numbers.
    """
    biased = signal * bias_field(rng, brain, spacing)
    noisy = rician(rng, biased, float(rng.uniform(*NOISE)))
    stored = np.maximum(1, np.rint(noisy * np.float32(rng.uniform(*GAIN))))
    return np.where(brain, stored, np.float32(0)).astype(np.float32)


def bias_field(rng: np.random.Generator, brain: NDArray[np.bool_], spacing: Spacing) -> NDArray[np.float32]:
    """A smooth factor near 1, as a receive coil's uneven sensitivity leaves it. spacing: mm.

    (D, H, W) bool -> (D, H, W) float32.
    """
    d, h, w = brain.shape
    field = smooth_field(rng, (d, h, w), BIAS_LENGTH_MM / float(np.mean(spacing)))
    return np.asarray(np.exp(np.float32(rng.uniform(*BIAS)) * field), dtype=np.float32)


def rician(rng: np.random.Generator, signal: Floats, sigma: float) -> NDArray[np.float32]:
    """The magnitude of a signal with Gaussian noise in its real and imaginary part (Gudbjartsson 1995).

    signal: any shape, float32; sigma: in its units. Goes out: the same shape, float32.
    """
    noise = np.float32(sigma) * rng.standard_normal((2, *signal.shape), dtype=np.float32)
    return np.asarray(np.hypot(signal + noise[0], noise[1]), dtype=np.float32)


def _rotation(rng: np.random.Generator, tilt_degrees: float) -> NDArray[np.float64]:
    """Rotations about x, y and z, each by half to all of the tilt, either way."""
    rotation = np.eye(3)
    for axis in range(3):
        angle = np.deg2rad(tilt_degrees) * rng.uniform(0.5, 1) * (1 if rng.random() < 0.5 else -1)
        a, b = (axis + 1) % 3, (axis + 2) % 3
        step = np.eye(3)
        step[a, a] = step[b, b] = np.cos(angle)
        step[a, b], step[b, a] = -np.sin(angle), np.sin(angle)
        rotation = step @ rotation
    return rotation
