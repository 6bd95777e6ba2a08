"""Preprocess, step 2: intensities onto a common scale, before resampling (Isensee 2021, Methods: "normalisation").

A plan imported from nnU-Net v1 normalises after resampling instead, and there sets the voxels outside to 0. Tensors on
any device.

    zscore          (x - mean) / max(std, 1e-8); with use_mask_for_norm of the voxels inside, the others stay
    ct              clip to the dataset's 0.5 and 99.5 percentile, minus its mean, divided by max(its std, 1e-8)
    none            as it is
    rescale_to_0_1  (x - min) / max(max - min, 1e-8)
    rgb_to_0_1      x / 255
Standard deviations are of the population. MRI takes zscore, each channel of each case by itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from planner.plan import IntensityStats, Normalisation, Plan
from strokenet.data.errors import InputError

SMALLEST_SCALE = 1e-8


def normalise(image: Tensor, inside: Tensor, plan: Plan) -> Tensor:
    """Every channel normalised by its scheme in the plan.

    Args:
        image: (C, D, H, W) float32, cropped.
        inside: (D, H, W) bool on the image's grid, the voxels that zscore measures where use_mask_for_norm says so.

    Returns:
        a new image, (C, D, H, W) float32.

    Raises:
        InputError: values outside 0 .. 255 under rgb_to_0_1.
    """
    normalised = torch.empty(image.shape, dtype=torch.float32, device=image.device)
    for c, name in enumerate(plan.channels):
        mask = inside if plan.use_mask_for_norm[c] else None
        normalised[c] = _normalise_channel(image[c], mask, plan.normalisation[c], plan.intensity[c], name)
        if mask is not None and plan.normalise == "after-resampling" and plan.normalisation[c] in ("zscore", "ct"):
            normalised[c].masked_fill_(~mask, 0)
    return normalised


def blank_channels(plan: Plan) -> tuple[str, ...]:
    """The channels whose scan may be absent: an array of zeros in its place is 0 everywhere after normalisation.

    True of zscore (mean 0, and 0 / 1e-8), none, rescale_to_0_1 and rgb_to_0_1; not of ct, which subtracts the
    dataset's mean (unless 0 is that mean). One voxel shows it: of constants no scheme looks at the number of voxels.
    """
    zeros = torch.zeros(len(plan.channels), 1, 1, 1)
    done = normalise(zeros, torch.ones(1, 1, 1, dtype=torch.bool), plan)
    return tuple(name for name, voxel in zip(plan.channels, done.flatten().tolist(), strict=True) if voxel == 0)


def _normalise_channel(
    x: Tensor, mask: Tensor | None, scheme: Normalisation, stats: IntensityStats | None, name: str
) -> Tensor:
    """One channel (D, H, W); zscore measures where the mask is, everywhere without one."""
    if scheme == "zscore":
        return _zscore(x, mask)
    if scheme == "ct":
        assert stats is not None  # Plan sees to it
        clipped = x.clamp(stats.percentile_00_5, stats.percentile_99_5)
        return (clipped - stats.mean) / max(stats.std, SMALLEST_SCALE)
    if scheme == "rescale_to_0_1":
        shifted = x - x.min()
        return shifted / shifted.max().clamp(min=SMALLEST_SCALE)
    if scheme == "rgb_to_0_1":
        low, high = float(x.min()), float(x.max())
        if low < 0 or high > 255:
            raise InputError(f"channel {name} has values {low:g} .. {high:g}; rgb_to_0_1 needs 0 .. 255, use zscore")
        return x / 255
    return x


def _zscore(x: Tensor, mask: Tensor | None) -> Tensor:
    """Differs: sums run in float64, nnU-Net's in float32; on real scans the result moves by 1e-7 of its range.

    Nothing is waited for on a GPU. A mask of no voxel has no mean, and nobody asks for it.
    """
    count = x.numel() if mask is None else mask.count_nonzero()

    def mean(values: Tensor) -> Tensor:
        counted = values if mask is None else torch.where(mask, values, 0)
        return counted.double().sum() / count  # torch's sum(dtype=float64) takes 6 times as long on a CPU

    centred = x - mean(x).float()
    scaled = centred / mean(centred.square()).sqrt().clamp(min=SMALLEST_SCALE).float()
    return scaled if mask is None else torch.where(mask, scaled, x)
