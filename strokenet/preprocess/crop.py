"""Preprocess, step 1: the box around everything that is not zero (Isensee 2021, Methods: "cropping").

Comes in: an image (C, D, H, W), turned, on any device. Goes out: the box, and the mask of what counts as inside the
head: voxels that are non-zero in any channel, with their holes filled, because a ventricle of value 0 is no outside.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.holes import fill_holes

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


def bounding_box(mask: NDArray[np.bool_] | Tensor) -> Box:
    """The tight box of a mask (D, H, W) bool; the whole volume where the mask is empty."""
    voxels = mask if isinstance(mask, Tensor) else torch.from_numpy(np.ascontiguousarray(mask))
    voxels = voxels.view(torch.uint8)  # of bytes torch's maximum is fast, of booleans its `any` is not
    plane = voxels.amax(0)
    profiles = torch.cat([voxels.amax(2).amax(1), plane.amax(1), plane.amax(0)]).cpu().numpy()  # one wait for a GPU
    ends = []
    for axis, profile in enumerate(np.split(profiles, np.cumsum(mask.shape)[:2])):
        used = np.flatnonzero(profile)
        ends.append((int(used[0]), int(used[-1]) + 1) if len(used) else (0, mask.shape[axis]))
    (d0, d1), (h0, h1), (w0, w1) = ends
    return Box(start=(d0, h0, w0), stop=(d1, h1, w1))


def nonzero_mask(image: Tensor) -> Tensor:
    """Voxels that are non-zero in any channel, holes filled. (C, D, H, W) -> (D, H, W) bool."""
    return fill_holes(_nonzero(image))


def nonzero_box(image: Tensor) -> tuple[Box, Tensor]:
    """The box of the nonzero mask, and the mask inside it.

    A hole lies within the box of what surrounds it, so that the filling only sees the box.

    Args:
        image: (C, D, H, W) float32.

    Returns:
        box; inside (d, h, w) bool, of the box's shape, on the image's device.
    """
    mask = _nonzero(image)
    box = bounding_box(mask)
    return box, fill_holes(mask[box.slices])


def _nonzero(image: Tensor) -> Tensor:
    mask = image[0] != 0
    for channel in image[1:]:
        mask |= channel != 0
    return mask
