"""The table by the batchgenerators package: the published reference path of `--augment batchgenerators`.

Comes in: one raw sample as numpy arrays, and a seed. Goes out: the sample augmented. Runs in worker processes: the
package draws from the global generators of numpy and random, which are seeded for every sample and belong to no one
else there.

Differs from the path on the device (augment.py), as nnU-Net v1 and batchgenerators do: images are turned by cubic
splines and shrunk images enlarged by them, the blur's kernel reaches 4 sigma, scales above and below 1 are equally
likely. Brightness, contrast, gamma and mirroring give the same numbers for the same parameters.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from batchgenerators.transforms.abstract_transforms import AbstractTransform, Compose
from batchgenerators.transforms.color_transforms import (
    BrightnessMultiplicativeTransform,
    ContrastAugmentationTransform,
    GammaTransform,
)
from batchgenerators.transforms.noise_transforms import GaussianBlurTransform, GaussianNoiseTransform
from batchgenerators.transforms.resample_transforms import SimulateLowResolutionTransform
from batchgenerators.transforms.spatial_transforms import MirrorTransform, SpatialTransform
from numpy.typing import NDArray

from planner.plan import Triple
from strokenet.train.augment import PUBLISHED, Row, Table
from strokenet.train.patches import OUTSIDE_LABEL
from strokenet.train.spatial import FLAT_ROTATION_DEGREES, is_flat


def augment_published(
    image: NDArray[np.float32],
    label: NDArray[np.int16],
    seed: int,
    *,
    patch: Triple,
    mirror_axes: Sequence[int],
    mask_channels: Sequence[bool],
    table: Table = PUBLISHED,
) -> tuple[NDArray[np.float32], NDArray[np.int16]]:
    """One sample augmented.

    Args:
        image: (C, D', H', W'), raw. label: (D', H', W'), -1 outside. seed: of everything that is drawn, below 2^32.
        patch, mirror_axes, mask_channels: as in augment.draw and augment.augment.

    Returns:
        image (C, D, H, W) float32; label (D, H, W) int16, -1 turned to 0.
    """
    np.random.seed(seed)
    random.seed(seed)
    data, seg = _turn(image, label, patch, table)
    steps = [*_intensity(table, flat=is_flat(patch)), *_mirror(table, mirror_axes)]
    done: dict[str, Any] = Compose(steps)(data=data, seg=seg)
    out, mask = done["data"][0].astype(np.float32), np.rint(done["seg"][0, 0]).astype(np.int16)
    for channel, masked in enumerate(mask_channels):
        if masked:
            out[channel][mask == OUTSIDE_LABEL] = 0
    return out, np.maximum(mask, 0)


def _turn(
    image: NDArray[np.float32], label: NDArray[np.int16], patch: Triple, table: Table
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Rotation, scaling and the cut. (C, D', H', W'), (D', H', W') -> (1, C, D, H, W), (1, 1, D, H, W)."""
    if not is_flat(patch):
        done = _spatial(table, patch, table.rotation.high)(data=image[None], seg=label[None, None].astype(np.float32))
        return done["data"], done["seg"]
    # Flat: the slices become channels of a 2D image, so that all are turned alike and none is mixed with another.
    c, d = image.shape[:2]
    data = image.reshape(1, c * d, *image.shape[2:])  # (C, D, H', W') -> (1, C D, H', W')
    done = _spatial(table, patch[1:], FLAT_ROTATION_DEGREES)(data=data, seg=label[None].astype(np.float32))
    return done["data"].reshape(1, c, d, *patch[1:]), done["seg"][:, None]


def _spatial(table: Table, patch: Sequence[int], degrees: float) -> AbstractTransform:
    angle = (-math.radians(degrees), math.radians(degrees))
    return SpatialTransform(
        tuple(patch),
        do_elastic_deform=False,
        angle_x=angle,
        angle_y=angle,
        angle_z=angle,
        scale=(table.scaling.low, table.scaling.high),
        border_mode_data="constant",
        order_data=3,
        border_cval_seg=OUTSIDE_LABEL,
        order_seg=1,
        random_crop=False,
        p_rot_per_sample=table.rotation.p,
        p_scale_per_sample=table.scaling.p,
    )


def _intensity(table: Table, *, flat: bool) -> list[AbstractTransform]:
    return [
        GaussianNoiseTransform(noise_variance=_range(table.noise), p_per_sample=table.noise.p),
        GaussianBlurTransform(
            _range(table.blur),
            different_sigma_per_axis=True,
            p_per_channel=table.blur.p_channel,
            p_per_sample=table.blur.p,
        ),
        BrightnessMultiplicativeTransform(_range(table.brightness), p_per_sample=table.brightness.p),
        ContrastAugmentationTransform(_range(table.contrast), p_per_sample=table.contrast.p),
        SimulateLowResolutionTransform(
            _range(table.low_resolution),
            per_channel=True,
            p_per_channel=table.low_resolution.p_channel,
            order_downsample=0,
            order_upsample=3,
            p_per_sample=table.low_resolution.p,
            ignore_axes=(0,) if flat else None,
        ),
        GammaTransform(
            _range(table.gamma_inverted), True, per_channel=True, retain_stats=True, p_per_sample=table.gamma_inverted.p
        ),
        GammaTransform(_range(table.gamma), False, per_channel=True, retain_stats=True, p_per_sample=table.gamma.p),
    ]


def _mirror(table: Table, axes: Sequence[int]) -> list[AbstractTransform]:
    """The package mirrors every axis it is given with probability 0.5; without axes it is left out."""
    assert table.mirror.p == 0.5
    return [MirrorTransform(tuple(axes))] if axes else []


def _range(row: Row) -> tuple[float, float]:
    return (row.low, row.high)
