"""Intensity augmentations: noise, blur, brightness, contrast, low resolution, gamma (Isensee 2021, Supplement 4).

Comes in: rows (M, D, H, W), each one channel of one sample that was drawn for the operation, with a parameter a row.
Goes out: the rows changed. Every operation is deterministic given its parameters; train/augment.py draws them. All run
on the rows' device, float32, several rows at once where one formula serves them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-7
BLUR_RADIUS = 3  # sigma is at most 1, the kernel at most 7 voxels


def noise(image: Tensor, std: float, seed: int) -> Tensor:
    """x + N(0, std), independent at every voxel: (C, D, H, W) of one sample -> the same shape, on its device.

    std: in the units of the image. seed: of the draw.
    """
    generator = torch.Generator(image.device).manual_seed(seed)
    return image + std * torch.randn(image.shape, generator=generator, device=image.device)


def blur(rows: Tensor, sigmas: Sequence[tuple[float, float, float]]) -> Tensor:
    """Gaussian blur, a sigma (voxels) a row and axis; the border is mirrored. (M, D, H, W) -> (M, D, H, W).

    The kernel's length is 6 sigma + 0.5 rounded to the nearest odd number (batchgeneratorsv2 0.3.6).
    """
    for axis in range(3):
        weights = torch.stack([_kernel(sigma[axis]) for sigma in sigmas]).to(rows)  # (M, 7)
        length = rows.shape[1 + axis]
        reach = min(BLUR_RADIUS, length - 1)  # a mirrored border needs that many voxels
        padded = F.pad(rows[:, None], _pads(axis, reach), mode="reflect")[:, 0]
        out = torch.zeros_like(rows)
        for k in range(-reach, reach + 1):
            weight = weights[:, BLUR_RADIUS + k].view(-1, 1, 1, 1)
            out.addcmul_(weight, padded.narrow(1 + axis, reach + k, length))
        rows = out
    return rows


def brightness(rows: Tensor, factors: Sequence[float]) -> Tensor:
    """x f, a factor a row. (M, D, H, W) -> (M, D, H, W)."""
    return rows * _column(factors, rows)


def contrast(rows: Tensor, factors: Sequence[float]) -> Tensor:
    """(x - mean) f + mean, clipped to the row's old range; a factor a row. (M, D, H, W) -> (M, D, H, W)."""
    mean = rows.mean((1, 2, 3), keepdim=True)
    low, high = rows.amin((1, 2, 3), keepdim=True), rows.amax((1, 2, 3), keepdim=True)
    return torch.clamp((rows - mean) * _column(factors, rows) + mean, low, high)


def low_resolution(rows: Tensor, factors: Sequence[float], *, keep_axis_0: bool) -> Tensor:
    """Shrunk by nearest voxels, then enlarged linearly: a scan of thicker voxels on a fine grid.

    Args:
        rows: (M, D, H, W). factors: new size / old size, one a row for all its axes.
        keep_axis_0: axis D is left alone (flat patches).

    Returns:
        (M, D, H, W).
    """
    size = list(rows.shape[1:])
    out = []
    for row, factor in zip(rows, factors, strict=True):
        small = [max(1, round(edge * factor)) for edge in size]
        if keep_axis_0:
            small[0] = size[0]
        coarse = F.interpolate(row[None, None], small, mode="nearest-exact")
        out.append(F.interpolate(coarse, size, mode="trilinear", align_corners=False)[0, 0])
    return torch.stack(out)


def gamma(rows: Tensor, exponents: Sequence[float], *, inverted: bool) -> Tensor:
    """((x - min) / range)^g range + min, then moved and scaled to the row's old mean and standard deviation.

    (M, D, H, W) -> (M, D, H, W), an exponent g a row.
    inverted: done on -x, so that the bright side is the one that is stretched.
    """
    x = -rows if inverted else rows
    mean, std = x.mean((1, 2, 3), keepdim=True), x.std((1, 2, 3), keepdim=True)
    low = x.amin((1, 2, 3), keepdim=True)
    span = x.amax((1, 2, 3), keepdim=True) - low
    y = ((x - low) / span.clamp_min(EPS)).pow(_column(exponents, rows)) * span + low
    y = (y - y.mean((1, 2, 3), keepdim=True)) * (std / y.std((1, 2, 3), keepdim=True).clamp_min(EPS)) + mean
    return -y if inverted else y


def _column(values: Sequence[float], rows: Tensor) -> Tensor:
    return torch.tensor(values, dtype=rows.dtype).to(rows.device).view(-1, 1, 1, 1)


def _kernel(sigma: float) -> Tensor:
    """Weights at -3 .. 3 voxels, sum 1, zero beyond the kernel's length. (7,)"""
    places = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1)
    weights = torch.exp(-0.5 * (places / sigma) ** 2)
    weights[places.abs() > _nearest_odd(6 * sigma + 0.5) // 2] = 0
    return weights / weights.sum()


def _nearest_odd(x: float) -> int:
    """2.9 -> 3, 3.5 -> 3, 4.4 -> 5: an even rounding moves on to the side on which x lies."""
    n = round(x)
    if n % 2 == 1:
        return n
    return n + 1 if x >= n else n - 1


def _pads(axis: int, reach: int) -> list[int]:
    pads = [0] * 6
    pads[2 * (2 - axis)] = pads[2 * (2 - axis) + 1] = reach  # torch pads the last axis first
    return pads
