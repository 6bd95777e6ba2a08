"""Preprocess, step 1: the box around everything that is not zero (Isensee 2021, Methods: "cropping").

Comes in: an image (C, D, H, W), turned. Goes out: the box, and the mask of what counts as inside the head: voxels that
are non-zero in any channel, with their holes filled, because a ventricle of value 0 is no outside.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kernels.components import label_components

Triple = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Box:
    """A half-open box of voxels, start <= voxel < stop an axis (D, H, W)."""

    start: Triple
    stop: Triple

    def __post_init__(self) -> None:
        if not all(0 <= a < b for a, b in zip(self.start, self.stop, strict=True)):
            raise ValueError(f"box {self.start} to {self.stop}; 0 <= start < stop is needed on every axis")

    @property
    def shape(self) -> Triple:
        """Voxels an axis."""
        d, h, w = (b - a for a, b in zip(self.start, self.stop, strict=True))
        return (d, h, w)

    @property
    def slices(self) -> tuple[slice, slice, slice]:
        """Index of the last three axes: array[..., *box.slices]."""
        d, h, w = (slice(a, b) for a, b in zip(self.start, self.stop, strict=True))
        return (d, h, w)


def bounding_box(mask: NDArray[np.bool_]) -> Box:
    """The tight box of a mask (D, H, W); the whole volume where the mask is empty."""
    ends = []
    for axis in range(3):
        others = tuple(a for a in range(3) if a != axis)
        used = np.flatnonzero(mask.any(axis=others))
        ends.append((int(used[0]), int(used[-1]) + 1) if len(used) else (0, mask.shape[axis]))
    (d0, d1), (h0, h1), (w0, w1) = ends
    return Box(start=(d0, h0, w0), stop=(d1, h1, w1))


def fill_holes(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The mask with its holes: background components (6-connected) that touch no face of the volume.

    (D, H, W) bool -> (D, H, W) bool.
    Equal to scipy.ndimage.binary_fill_holes, by one labelling instead of a dilation that grows from the border.
    """
    labels, sizes = label_components(~mask, connectivity=6)
    hole = np.ones(len(sizes), dtype=bool)
    hole[0] = False  # label 0 is the mask itself
    for axis in range(3):
        for face in (0, -1):
            hole[np.unique(labels.take(face, axis))] = False
    return np.asarray(mask | hole[labels])


def nonzero_mask(image: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Voxels that are non-zero in any channel, holes filled. (C, D, H, W) -> (D, H, W)."""
    return fill_holes(_nonzero(image))


def nonzero_box(image: NDArray[np.float32]) -> tuple[Box, NDArray[np.bool_]]:
    """The box of the nonzero mask, and the mask inside it.

    A hole lies within the box of what surrounds it, so that the filling only sees the box.

    Args:
        image: (C, D, H, W) float32.

    Returns:
        box; inside (d, h, w) bool, of the box's shape.
    """
    mask = _nonzero(image)
    box = bounding_box(mask)
    return box, fill_holes(mask[box.slices])


def _nonzero(image: NDArray[np.float32]) -> NDArray[np.bool_]:
    mask = image[0] != 0
    for channel in image[1:]:
        mask |= channel != 0
    return np.asarray(mask)
