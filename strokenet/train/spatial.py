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
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from planner.plan import Triple

ROTATION_DEGREES = 30.0  # each axis, both ways
FLAT_ROTATION_DEGREES = 180.0  # about axis D, where the patch is flat
FLAT = 3.0  # longest edge / thickness strictly above it
MARGIN = 0.85  # the raw patch leaves room for this scale, not for the smallest: the peer's compromise
OUTSIDE_LABEL = -1
_TIE = 1e-4  # head start of the nearest label: decides ties, far below any real difference of scores


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
    raw = image.shape[2:]
    starts = [size // 2 - edge // 2 for size, edge in zip(raw, patch, strict=True)]
    box = tuple(slice(start, start + edge) for start, edge in zip(starts, patch, strict=True))
    moved = [(index, draw) for index, draw in enumerate(draws) if draw is not None]
    cut_image = image[(slice(None), slice(None), *box)].clone()  # (N, C, D', H', W') -> (N, C, D, H, W)
    cut_label = label[(slice(None), *box)].clone()
    if moved:
        rows = [index for index, _ in moved]
        grid = sampling_grid([draw for _, draw in moved], patch, (raw[0], raw[1], raw[2])).to(image.device)
        cut_image[rows] = F.grid_sample(image[rows], grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        cut_label[rows] = sample_labels(label[rows], grid, heads)
    return cut_image, cut_label


def sampling_grid(draws: Sequence[SpatialDraw], patch: Triple, raw: Triple) -> Tensor:
    """Where each voxel of the patch looks in the raw patch: (M, D, H, W, 3) float32, torch's -1 .. 1 as (w, h, d)."""
    axes = [torch.arange(edge, dtype=torch.float32) - (edge - 1) / 2 for edge in patch]
    matrices = np.stack([_matrix(draw, flat=is_flat(patch)) for draw in draws])  # (M, 3, 3)
    to_torch = 2 / np.array(raw, dtype=np.float64)  # voxels from the centre -> -1 .. 1 at the outer edges
    columns = torch.from_numpy(to_torch[None, :, None] * matrices).float().flip(1)  # rows now w, h, d
    grid = torch.zeros(len(draws), *patch, 3)
    for axis, (values, shape) in enumerate(zip(axes, ((-1, 1, 1, 1), (1, -1, 1, 1), (1, 1, -1, 1)), strict=True)):
        grid += values.view(shape) * columns[:, None, None, None, :, axis]
    return grid


def sample_labels(label: Tensor, grid: Tensor, heads: int) -> Tensor:
    """The likeliest label at every place of the grid: each label's indicator is interpolated, the largest wins.

    A tie goes to the nearest voxel's label where that is among the tied, else to the smallest. Beyond the raw patch
    lies label -1.

    Args:
        label: (M, D', H', W'), -1 .. heads - 1. grid: (M, D, H, W, 3).

    Returns:
        (M, D, H, W), type of the label.
    """
    values = torch.arange(heads, device=label.device).view(1, -1, 1, 1, 1)
    indicators = (label[:, None] == values).float()  # (M, K, D', H', W')
    inside = F.grid_sample(indicators, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    scores = torch.cat([1 - inside.sum(1, keepdim=True), inside], 1)  # (M, 1 + K, D, H, W): -1 first
    shifted = (label[:, None] - OUTSIDE_LABEL).float()  # so that what grid_sample pads with is -1
    nearest = F.grid_sample(shifted, grid, mode="nearest", padding_mode="zeros", align_corners=False)
    scores.scatter_add_(1, nearest.long(), torch.full_like(nearest, _TIE))
    return (scores.argmax(1) + OUTSIDE_LABEL).to(label.dtype)


def _matrix(draw: SpatialDraw, *, flat: bool) -> NDArray[np.float64]:
    """Patch voxel -> raw voxel, both measured from their centres. (3, 3), column vectors (d, h, w)."""
    turn = _rotation(2, draw.angles[2]) @ _rotation(1, draw.angles[1]) @ _rotation(0, draw.angles[0])
    scale = np.diag([1.0 if flat else draw.scale, draw.scale, draw.scale])
    return np.asarray(turn @ scale)


def _rotation(axis: int, angle: float) -> NDArray[np.float64]:
    """Right-handed rotation about one axis of (d, h, w), (3, 3)."""
    c, s = math.cos(angle), math.sin(angle)
    a, b = ((1, 2), (2, 0), (0, 1))[axis]
    matrix = np.eye(3)
    matrix[a, a], matrix[a, b], matrix[b, a], matrix[b, b] = c, -s, s, c
    return matrix
