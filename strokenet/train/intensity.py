"""Intensity augmentations: noise, blur, brightness, contrast, low resolution, gamma (Isensee 2021, Supplement 4).

Comes in: a row (D, H, W), one channel of one sample that was drawn for the operation, contiguous float32, and its
parameter. Goes out: the same row, changed in place, because fresh memory is dear on a CPU. Every operation is
deterministic given its parameter; train/augment.py draws them. None reads a number back, so that nobody waits for a
GPU. Where a CPU needs other steps to the same answer, `is_cpu` shows it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from strokenet.train.axes import interpolate, select

EPS = 1e-7
BLUR_RADIUS = 3  # sigma is at most 1, the kernel at most 7 voxels
_SLAB = 2**19  # voxels that a CPU blurs at a time, so that they stay in its cache


def noise(image: Tensor, std: float, seed: int) -> Tensor:
    """x + N(0, std), independent at every voxel: (C, D, H, W) of one sample.

    std: in the units of the image. seed: of the draw.
    """
    generator = torch.Generator(image.device).manual_seed(seed)
    return image.add_(torch.randn(image.shape, generator=generator, device=image.device), alpha=std)


def blur(row: Tensor, sigmas: tuple[float, float, float]) -> Tensor:
    """Gaussian blur, a sigma (voxels) an axis; the border is mirrored.

    The kernel's length is 6 sigma + 0.5 rounded to the nearest odd number (batchgeneratorsv2 0.3.6).
    """
    for axis, sigma in enumerate(sigmas):
        weights, across = _kernel(sigma), 1 if axis == 0 else 0
        slab = row.shape[across] if not row.is_cpu else max(1, _SLAB * row.shape[across] // row.numel())
        for part in torch.split(row, slab, across):
            _blur_axis(part, axis, weights)
    return row


def brightness(row: Tensor, factor: float) -> Tensor:
    """x f."""
    return row.mul_(factor)


def contrast(row: Tensor, factor: float) -> Tensor:
    """(x - mean) f + mean, clipped to the row's old range."""
    low, high = row.aminmax()
    offset = row.mean() * (1 - factor)
    return row.mul_(factor).add_(offset).clamp_min_(low).clamp_max_(high)


def low_resolution(row: Tensor, factor: float, *, keep_axis_0: bool) -> Tensor:
    """Shrunk by nearest voxels, then enlarged linearly: a scan of thicker voxels on a fine grid.

    factor: new size / old size, one for all axes. keep_axis_0: axis D is left alone (flat patches).
    """
    size = row.shape
    small = [max(1, round(edge * factor)) for edge in size]
    if keep_axis_0:
        small[0] = size[0]
    if not row.is_cpu:
        coarse = F.interpolate(row[None, None], small, mode="nearest-exact")
        return row.copy_(F.interpolate(coarse, size, mode="trilinear", align_corners=False)[0, 0])
    taken = [_taken(edge, few) for edge, few in zip(size, small, strict=True)]
    coarse = select(select(select(row, 0, taken[0]), 1, taken[1]), 2, taken[2])
    for axis in (2, 1, 0):  # the one whose voxels lie farthest apart last, when there are most
        coarse = interpolate(coarse, axis, *_between(small[axis], size[axis]))
    return row.copy_(coarse)


def gamma(row: Tensor, exponent: float, *, inverted: bool) -> Tensor:
    """((x - min) / range)^g range + min, then moved and scaled to the row's old mean and standard deviation.

    inverted: done on -x, so that the bright side is the one that is stretched.
    """
    mean = row.mean()
    old_norm = torch.linalg.vector_norm(row.sub_(mean))  # standard deviation sqrt(n - 1)
    low, high = row.aminmax()
    span = high - low
    start, sign = (high, -1.0) if inverted else (low, 1.0)
    row.sub_(start).mul_(sign / span.clamp_min(EPS))  # 0 .. 1
    row = row.pow_(exponent) if not row.is_cpu else row.log2_().mul_(exponent).exp2_()  # pow is slow on a CPU
    row.sub_(row.mean())
    norm = span * torch.linalg.vector_norm(row)
    return row.mul_(sign * span * old_norm / norm.clamp_min(EPS * math.sqrt(row.numel() - 1))).add_(mean)


def _blur_axis(part: Tensor, axis: int, weights: list[float]) -> None:
    """part: (d, h, w), whole along `axis`. weights: of the middle and of the voxels 1, 2 .. beside it, both ways."""
    length = part.shape[axis]
    reach = min(len(weights), length) - 1  # a mirrored border needs that many voxels
    before, behind = part.narrow(axis, 1, reach).flip(axis), part.narrow(axis, length - 1 - reach, reach).flip(axis)
    padded = torch.cat([before, part, behind], axis)
    part.mul_(weights[0])
    for k in range(1, reach + 1):
        pair = padded.narrow(axis, reach - k, length) + padded.narrow(axis, reach + k, length)
        part.add_(pair, alpha=weights[k])


def _kernel(sigma: float) -> list[float]:
    """Weights at 0, 1, 2 .. voxels to either side of the middle; all together are 1."""
    reach = _nearest_odd(6 * sigma + 0.5) // 2
    weights = [math.exp(-0.5 * (k / sigma) ** 2) for k in range(reach + 1)]
    total = weights[0] + 2 * sum(weights[1:])
    return [weight / total for weight in weights]


def _nearest_odd(x: float) -> int:
    """2.9 -> 3, 3.5 -> 3, 4.4 -> 5: an even rounding moves on to the side on which x lies."""
    n = round(x)
    if n % 2 == 1:
        return n
    return n + 1 if x >= n else n - 1


def _taken(size: int, small: int) -> Tensor:
    """Which voxels of an axis torch's nearest-exact takes: (small,) int64."""
    return F.interpolate(torch.arange(size, dtype=torch.float32)[None, None], small, mode="nearest-exact")[0, 0].long()


def _between(small: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Between which two coarse voxels each fine one of an axis lies, and how far on the way: (size,) each."""
    places = ((torch.arange(size, dtype=torch.float32) + 0.5) * (small / size) - 0.5).clamp_min(0)
    near = places.long()
    return near, (near + 1).clamp_max(small - 1), places - near
