"""Rotation, scaling and the cut to the final patch, for a whole batch on its device (Isensee 2021, Methods).

Comes in: a raw batch whose patches are larger than the network's, so that a rotated corner finds image. Goes out: the
batch at the network's patch. Samples that are neither turned nor scaled are cut without interpolation.

    source voxel = centre + s R (voxel - centre),   R = R_W R_H R_D, s > 1 shows more of the head (zooms out)

A patch that is more than three times longer than it is thick (thick slices) is only turned and scaled in its plane, by
any angle ("dummy 2D"): axis D then stays as it is, and interpolation never mixes slices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from planner.plan import Triple
from strokenet.train.patches import middle
from strokenet.train.sampling import sample_by_grid, shape_of
from strokenet.train.sampling_cpu import sample_on_cpu

ROTATION_DEGREES = 30.0  # each axis, both ways
FLAT_ROTATION_DEGREES = 180.0  # about axis D, where the patch is flat
FLAT = 3.0  # longest edge / thickness strictly above it
MARGIN = 0.85  # the raw patch leaves room for this scale, not for the smallest: the peer's compromise


@dataclass(frozen=True, kw_only=True)
class SpatialDraw:
    """One sample's turn. angles: radians about D, H, W. scale: of the in-plane axes where the patch is flat."""

    angles: tuple[float, float, float]
    scale: float


def is_flat(patch: Triple) -> bool:
    """Whether patches of this shape are turned in their plane alone."""
    return max(patch) / patch[0] > FLAT


def initial_patch(patch: Triple) -> Triple:
    """Size to cut so that a turned and zoomed-out patch rarely leaves it: 128^3 -> 205^3.

    The corner of the patch is turned by the largest angle about each axis in turn; the largest extent of the four
    counts, divided by 0.85. Angles beyond 90 degrees count as 90.
    """
    flat = is_flat(patch)
    angle = math.radians(min(90.0, FLAT_ROTATION_DEGREES if flat else ROTATION_DEGREES))
    corner = np.array(patch, dtype=np.float64)
    turned = [corner, *(np.abs(corner @ _rotation(axis, angle)) for axis in range(3))]
    d, h, w = (int(edge) for edge in np.max(turned, axis=0) / MARGIN)
    return (patch[0], h, w) if flat else (d, h, w)


def transform(
    image: Tensor, label: Tensor, draws: Sequence[SpatialDraw | None], *, patch: Triple, heads: int
) -> tuple[Tensor, Tensor]:
    """Turns, scales and cuts every sample.

    Args:
        image: (N, C, D', H', W') float32. label: (N, D', H', W') integers, -1 outside .. heads - 1.
        draws: one a sample, None for a plain cut. patch: (D, H, W) of the result. heads: number of labels.

    Returns:
        image (N, C, D, H, W), linear, 0 beyond the raw patch; label (N, D, H, W), -1 beyond it. New tensors.
    """
    out, out_label = image.new_empty(*image.shape[:2], *patch), label.new_empty(len(label), *patch)
    for raw_image, raw_label, draw, *target in zip(image, label, draws, out, out_label, strict=True):
        transform_sample(raw_image, raw_label, draw, heads, *target)
    return out, out_label


def transform_sample(
    image: Tensor, label: Tensor, draw: SpatialDraw | None, heads: int, out: Tensor, out_label: Tensor
) -> None:
    """One sample of `transform`: image (C, D', H', W') and label (D', H', W') into (C, D, H, W) and (D, H, W).

    Image and label may be cut to the box that `seen_box` tells, in their middle: nothing else is looked at.
    """
    patch, raw = shape_of(out_label), shape_of(label)
    box = seen_box(draw, patch, raw)
    seen = tuple(slice(start, start + edge) for start, edge in zip(middle(raw, box), box, strict=True))
    image, label = image[(slice(None), *seen)], label[seen]
    if draw is None:
        out.copy_(image)
        out_label.copy_(label)
        return
    sample = sample_on_cpu if image.device.type == "cpu" and min(box) > 1 else sample_by_grid
    sample(image, label, matrix_of(draw, patch), heads, out, out_label)


def seen_box(draw: SpatialDraw | None, patch: Triple, raw: Triple) -> Triple:
    """Edges of the box in the middle of a raw patch in which a sample looks: the patch, where it is not moved.

    Else an even number of voxels is left out on either side: the centre stays, and a place halfway between two voxels
    is still rounded to the same one (to an even one, as grid_sample does).
    """
    if draw is None:
        return patch
    extents = np.abs(matrix_of(draw, patch)) @ (np.array(patch) - 1)  # from the first place to the last
    edges = (math.ceil(extent) + 3 for extent in extents)  # with the voxels before and behind
    d, h, w = (min(size, edge + (size - edge) % 4) for size, edge in zip(raw, edges, strict=True))
    return (d, h, w)


def matrix_of(draw: SpatialDraw, patch: Triple) -> NDArray[np.float64]:
    """Patch voxel -> raw voxel, both measured from their centres. (3, 3), column vectors (d, h, w)."""
    turn = _rotation(2, draw.angles[2]) @ _rotation(1, draw.angles[1]) @ _rotation(0, draw.angles[0])
    scale = np.diag([1.0 if is_flat(patch) else draw.scale, draw.scale, draw.scale])
    return np.asarray(turn @ scale)


def _rotation(axis: int, angle: float) -> NDArray[np.float64]:
    """Right-handed rotation about one axis of (d, h, w), (3, 3)."""
    c, s = math.cos(angle), math.sin(angle)
    a, b = ((1, 2), (2, 0), (0, 1))[axis]
    matrix = np.eye(3)
    matrix[a, a], matrix[a, b], matrix[b, a], matrix[b, b] = c, -s, s, c
    return matrix
