"""Preprocess, step 3: onto the plan's voxel size (Isensee 2021, Methods: "resampling").

Images by cubic splines, labels by the most likely label of a linear interpolation. Where a grid has one axis more than
three times coarser than the finest, that axis is not interpolated across its slices: each slice is resampled in its
plane, then the axis takes the nearest slice ("separate z"). infer/restore.py goes the way back with the same functions.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.resample import Order, nearest_index, resample, resize_labels
from strokenet.data.errors import InputError

Triple = tuple[int, int, int]
Spacing = tuple[float, float, float]

ANISOTROPY = 3.0  # coarsest / finest spacing strictly above it: separate z
MAX_VOXELS = 2**31 - 1


def new_shape(shape: Triple, spacing: Spacing, target: Spacing) -> Triple:
    """Voxels an axis after resampling: spacing / target * shape, rounded half to even.

    Differs: at least 1; nnU-Net ends with an empty array where an axis is thinner than half a target voxel.

    Raises:
        InputError: more voxels than an array of ours may have, which only a wrong spacing makes.
    """
    d, h, w = (max(1, round(s / t * n)) for n, s, t in zip(shape, spacing, target, strict=True))
    if d * h * w > MAX_VOXELS:
        raise InputError(
            f"shape {shape} at {spacing} mm becomes {(d, h, w)} at the plan's {target} mm; check the file's spacing"
        )
    return (d, h, w)


def separate_axis(current: Spacing, new: Spacing) -> int | None:
    """The axis that is resampled by nearest slice, or None. The current grid decides before the new one does."""
    for spacing in (current, new):
        coarsest = max(spacing)
        if coarsest / min(spacing) > ANISOTROPY:
            axes = [axis for axis in range(3) if coarsest / spacing[axis] == 1]
            return axes[0] if len(axes) == 1 else None
    return None


def resample_image(
    image: Tensor, shape: Triple, current: Spacing, new: Spacing, *, order: Order = 3, exact: bool = False
) -> Tensor:
    """The image on a grid of `shape`; untouched where the shape does not change, whatever the spacings say.

    Args:
        image: (C, D, H, W), float32 or float16, on any device. shape: of the result.
        current, new: spacing in mm before and after; they only decide about separate z.
        order: 3 for images, 1 for network output. exact: to the last bit of scipy's own sums, slower.

    Returns:
        (C, *shape), type and device of the image.
    """
    if tuple(image.shape[1:]) == shape:
        return image
    axis = separate_axis(current, new)
    if axis is None:
        return resample(image, shape, order=order, exact=exact)
    in_plane = _with(shape, axis, image.shape[1 + axis])
    resized = resample(image, in_plane, order=order, slice_axis=axis, exact=exact)
    nearest = torch.from_numpy(nearest_index(in_plane[axis], shape[axis]))
    return resized.index_select(1 + axis, nearest.to(image.device))


def resample_label(label: NDArray[np.int16], shape: Triple, current: Spacing, new: Spacing) -> NDArray[np.int16]:
    """The label map (D, H, W) on a grid of `shape`, by the same rule; -1 (outside) is a label like the others."""
    if label.shape == shape:
        return label
    axis = separate_axis(current, new)
    if axis is None:
        return resize_labels(label, shape)
    in_plane = _with(shape, axis, label.shape[axis])
    return resize_labels(label, in_plane).take(nearest_index(in_plane[axis], shape[axis]), axis)


def _with(shape: Triple, axis: int, edge: int) -> Triple:
    d, h, w = (edge if a == axis else n for a, n in enumerate(shape))
    return (d, h, w)
