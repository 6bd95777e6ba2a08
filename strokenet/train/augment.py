"""Augmentation: the published table, a draw of it for one sample, and its application to a batch on its device.

Comes in: a raw batch (patches.py) and one Draw a sample. Goes out: the batch the network trains on. Drawing and doing
are apart: the draw is a few numbers on the CPU from the sample's own Generator, the doing is tensor arithmetic that
handles all samples that need an operation at once and never touches the others.
The order and every number of the table are nnU-Net's (Isensee 2021, Supplement 4; nnunetv2 2.8.1); the paper names
rotation, scaling and mirroring of them (Meddahi 2024, IV.C) and mirrors left-right alone: that is plan.mirror_axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from torch import Tensor

from planner.plan import Triple
from strokenet.train import intensity
from strokenet.train.patches import OUTSIDE_LABEL
from strokenet.train.spatial import (
    FLAT_ROTATION_DEGREES,
    ROTATION_DEGREES,
    SpatialDraw,
    is_flat,
    transform,
)

Parameter = TypeVar("Parameter")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One augmentation. p: probability a sample. p_channel: then, a channel. low, high: range of its parameter."""

    p: float
    p_channel: float = 1.0
    low: float = 0.0
    high: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Table:
    """Every augmentation, in the order in which they run.

    rotation: degrees about each axis (180 about axis D alone where the patch is flat). scaling: > 1 zooms out, one
    value for all axes. noise: standard deviation, one value for all channels (the peer calls it a variance).
    blur: sigma in voxels, a value a channel and axis. brightness: factor. contrast: factor about the mean.
    low_resolution: new size / old size. gamma_inverted, gamma: exponent, mean and deviation kept. Factors and
    exponents lie below 1 and above it equally often. mirror: a probability a mirrored axis.
    """

    rotation: Row = Row(p=0.2, low=-ROTATION_DEGREES, high=ROTATION_DEGREES)
    scaling: Row = Row(p=0.2, low=0.7, high=1.4)
    noise: Row = Row(p=0.1, low=0.0, high=0.1)
    blur: Row = Row(p=0.2, p_channel=0.5, low=0.5, high=1.0)
    brightness: Row = Row(p=0.15, low=0.75, high=1.25)
    contrast: Row = Row(p=0.15, low=0.75, high=1.25)
    low_resolution: Row = Row(p=0.25, p_channel=0.5, low=0.5, high=1.0)
    gamma_inverted: Row = Row(p=0.1, low=0.7, high=1.5)
    gamma: Row = Row(p=0.3, low=0.7, high=1.5)
    mirror: Row = Row(p=0.5)


PUBLISHED = Table()


@dataclass(frozen=True, kw_only=True)
class Draw:
    """What happens to one sample. A tuple has an entry a channel, None where the channel is left alone.

    noise: standard deviation and the seed of its numbers. mirror: spatial axes to reverse.
    """

    spatial: SpatialDraw | None
    noise: tuple[float, int] | None
    blur: tuple[tuple[float, float, float] | None, ...]
    brightness: tuple[float | None, ...]
    contrast: tuple[float | None, ...]
    low_resolution: tuple[float | None, ...]
    gamma_inverted: tuple[float | None, ...]
    gamma: tuple[float | None, ...]
    mirror: tuple[int, ...]


def draw(
    rng: np.random.Generator,
    *,
    channels: int,
    patch: Triple,
    mirror_axes: Sequence[int],
    table: Table = PUBLISHED,
) -> Draw:
    """One sample's draw. Every call takes its numbers from rng in the order of the table."""

    def per_channel(row: Row, value: Callable[[], Parameter]) -> tuple[Parameter | None, ...]:
        happens = rng.random() < row.p
        return tuple(value() if happens and rng.random() < row.p_channel else None for _ in range(channels))

    def about_one(row: Row) -> tuple[float | None, ...]:
        return per_channel(row, lambda: factor(rng, row.low, row.high))

    def sigmas() -> tuple[float, float, float]:
        d, h, w = rng.uniform(table.blur.low, table.blur.high, 3)
        return (float(d), float(h), float(w))

    return Draw(
        spatial=_draw_spatial(rng, table, flat=is_flat(patch)),
        noise=_draw_noise(rng, table.noise),
        blur=per_channel(table.blur, sigmas),
        brightness=about_one(table.brightness),
        contrast=about_one(table.contrast),
        low_resolution=per_channel(
            table.low_resolution, lambda: float(rng.uniform(table.low_resolution.low, table.low_resolution.high))
        ),
        gamma_inverted=about_one(table.gamma_inverted),
        gamma=about_one(table.gamma),
        mirror=tuple(axis for axis in mirror_axes if rng.random() < table.mirror.p),
    )


def factor(rng: np.random.Generator, low: float, high: float) -> float:
    """A factor below 1 in half of the draws and above 1 in the others, uniform on either side."""
    return float(rng.uniform(low, 1) if rng.random() < 0.5 else rng.uniform(1, high))


def augment(
    image: Tensor,
    label: Tensor,
    draws: Sequence[Draw],
    *,
    patch: Triple,
    heads: int,
    mask_channels: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """The batch augmented.

    Args:
        image: (N, C, D', H', W') float32, raw. label: (N, D', H', W') integers, -1 outside.
        draws: one a sample. patch: (D, H, W) of the result. heads: number of labels.
        mask_channels: per channel, whether it was normalised within the head and is zero outside (use_mask_for_norm).

    Returns:
        image (N, C, D, H, W) float32, label (N, D, H, W) with -1 turned to 0. New tensors, on the image's device.
    """
    image, label = transform(image, label, [draw.spatial for draw in draws], patch=patch, heads=heads)
    return intensities(image, label, draws, patch=patch, mask_channels=mask_channels)


def intensities(
    image: Tensor, label: Tensor, draws: Sequence[Draw], *, patch: Triple, mask_channels: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """What follows the turn: noise to gamma, the mirror, and zeros outside the head. Arguments as in `augment`.

    Args:
        image: (N, C, D, H, W) float32, at the network's patch; changed in place. label: (N, D, H, W), -1 outside;
            mirrored in place.

    Returns:
        the image, and the label with -1 turned to 0.
    """
    flat = is_flat(patch)
    for sample, d in zip(image, draws, strict=True):
        if d.noise is not None:
            intensity.noise(sample, *d.noise)
    _on_channels(image, [d.blur for d in draws], intensity.blur)
    _on_channels(image, [d.brightness for d in draws], intensity.brightness)
    _on_channels(image, [d.contrast for d in draws], intensity.contrast)
    _on_channels(
        image,
        [d.low_resolution for d in draws],
        lambda row, factor: intensity.low_resolution(row, factor, keep_axis_0=flat),
    )
    _on_channels(image, [d.gamma_inverted for d in draws], lambda row, g: intensity.gamma(row, g, inverted=True))
    _on_channels(image, [d.gamma for d in draws], lambda row, g: intensity.gamma(row, g, inverted=False))
    for n, d in enumerate(draws):
        if d.mirror:
            image[n] = image[n].flip([axis - 3 for axis in d.mirror])
            label[n] = label[n].flip([axis - 3 for axis in d.mirror])
    for channel, masked in enumerate(mask_channels):
        if masked:
            image[:, channel].masked_fill_(label == OUTSIDE_LABEL, 0.0)
    return image, label.clamp_min(0)


def _draw_spatial(rng: np.random.Generator, table: Table, *, flat: bool) -> SpatialDraw | None:
    turns, scales = rng.random() < table.rotation.p, rng.random() < table.scaling.p
    if not (turns or scales):
        return None
    a, b, c = (math.radians(float(angle)) for angle in rng.uniform(table.rotation.low, table.rotation.high, 3))
    angles = (a * FLAT_ROTATION_DEGREES / ROTATION_DEGREES, 0.0, 0.0) if flat else (a, b, c)
    scale = float(rng.uniform(table.scaling.low, table.scaling.high))
    return SpatialDraw(angles=angles if turns else (0.0, 0.0, 0.0), scale=scale if scales else 1.0)


def _draw_noise(rng: np.random.Generator, row: Row) -> tuple[float, int] | None:
    if rng.random() >= row.p:
        return None
    return float(rng.uniform(row.low, row.high)), int(rng.integers(2**63))


def _on_channels(
    image: Tensor,
    parameters: Sequence[tuple[Parameter | None, ...]],
    operation: Callable[[Tensor, Parameter], Tensor],
) -> None:
    """Changes the channels that have a parameter. image: (N, C, D, H, W), changed in place."""
    for sample, values in zip(image, parameters, strict=True):
        for row, value in zip(sample, values, strict=True):
            if value is not None:
                operation(row, value)
