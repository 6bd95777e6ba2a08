"""Resampling of volumes and label maps onto another grid: the interpolation nnU-Net takes from scikit-image.

    image   y = clip(A_d A_h A_w x)      A: one (n_new, n_old) matrix an axis, clip: to the range of x
    label   y = argmax_c A_d A_h A_w [x = c]    at order 1; a tie goes to the nearest label, else to the smallest

Spline interpolation on the half-pixel grid (voxel i of n_new lies at (i + 1/2) n_old / n_new - 1/2), edges repeated,
is linear and separable. scipy answers for the numbers: column j of A is scipy.ndimage.zoom's response to a unit at j.
The entries decay as 0.27^distance (order 3), so A is applied in blocks of rows that read only the columns they need.

Cost of n voxels to n voxels, edge m: 2 n (64 + 56) flops an axis at order 3 instead of 2 n m, 16 n bytes read and
written an axis in float64. 181 x 217 x 181 at order 3 on two CPU cores: 0.2 s, scikit-image 4.3 s.
Float64 on purpose: it is not touched by the TF32 and bfloat16 switches that training sets for float32 products.
Label maps: away from borders every neighbour agrees and nothing is interpolated; scipy decides the few other voxels.
"""

from __future__ import annotations

import functools
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from kernels.dispatch import choose_resample

Order = Literal[0, 1, 3]
Triple = tuple[int, int, int]

ROW_BLOCK = 64
NEGLIGIBLE = 1e-13  # matrix entries below it are dropped: together far below one float32 rounding


def axis_matrix(n_old: int, n_new: int, order: Order) -> NDArray[np.float64]:
    """The interpolation along one axis as a matrix (n_new, n_old): scipy's response to every unit vector."""
    matrix, unit = np.empty((n_new, n_old)), np.zeros(n_old)
    for old in range(n_old):
        unit[old] = 1
        matrix[:, old] = _zoom(unit, (n_new,), order)
        unit[old] = 0
    return matrix


def nearest_index(n_old: int, n_new: int) -> NDArray[np.int64]:
    """For every new voxel of an axis the old voxel whose value order 0 takes, (n_new,)."""
    return _zoom(np.arange(n_old, dtype=np.float64), (n_new,), 0).astype(np.int64)


def resample_reference(image: Tensor, shape: Triple, order: Order, slice_axis: int | None = None) -> Tensor:
    """What `resample` computes, by scipy's 3D zoom, channel after channel (slice after slice) and clipped.

    (C, D, H, W) -> (C, D', H', W'), type and device of the image; computed in float64 on the CPU.
    """
    if slice_axis is not None:
        in_plane = [edge for axis, edge in enumerate(shape) if axis != slice_axis]
        slices = image.movedim(1 + slice_axis, 0)
        return torch.stack([_reference(s, tuple(in_plane), order) for s in slices]).movedim(0, 1 + slice_axis)
    return _reference(image, shape, order)


def _reference(image: Tensor, shape: tuple[int, ...], order: Order) -> Tensor:
    channels = []
    for channel in image.detach().cpu().double().numpy():
        channels.append(np.clip(_zoom(channel, shape, order), channel.min(), channel.max()))
    values = np.stack(channels)
    if image.dtype == torch.float16:
        values = values.astype(np.float16)  # torch goes by way of float32, and rounds twice
    return torch.from_numpy(values).to(image)


def resample_operator(image: Tensor, shape: Triple, order: Order, slice_axis: int | None = None) -> Tensor:
    """What `resample` computes, one matrix product an axis on the tensor's device.

    (C, D, H, W) -> (C, D', H', W'), type and device of the image; computed in float64 (float32 on mps).
    """
    exact = torch.float32 if image.device.type == "mps" else torch.float64  # mps has no float64
    out = image.to(exact)
    for axis in sorted(range(3), key=lambda a: shape[a] / image.shape[1 + a]):  # the shrinking axes first: less work
        if shape[axis] != image.shape[1 + axis]:
            out = _along(out, shape[axis], order, 1 + axis)
    if order > 1:  # orders 0 and 1 cannot leave the range
        others = [axis for axis in (1, 2, 3) if slice_axis is None or axis != 1 + slice_axis]
        out.clamp_(image.amin(others, keepdim=True).to(exact), image.amax(others, keepdim=True).to(exact))
    return out.to(image.dtype)


def resample(
    image: Tensor, shape: Triple, *, order: Order, slice_axis: int | None = None, exact: bool = False
) -> Tensor:
    """Resamples every channel on its own and clips it to its old range.

    One channel after the other: float64 of a whole image would fill twice its memory.

    Args:
        image: (C, D, H, W), any floating type and device.
        shape: (D', H', W').
        order: 0 nearest, 1 linear, 3 cubic spline.
        slice_axis: spatial axis whose slices are images of their own (2D interpolation, each clipped to its own
            range); its size must not change.
        exact: by scipy itself; the last bits of its sums decide where a value between two float16 numbers goes.

    Returns:
        (C, D', H', W'), type and device of the image.
    """
    if slice_axis is not None and shape[slice_axis] != image.shape[1 + slice_axis]:
        raise ValueError(f"slices along axis {slice_axis}: {image.shape[1 + slice_axis]} cannot become {shape}")
    if tuple(image.shape[1:]) == tuple(shape):
        return image
    plain = exact or choose_resample().implementation == "reference"
    run = resample_reference if plain else resample_operator
    resampled = image.new_empty((len(image), *shape))
    for channel, out in zip(image, resampled, strict=True):
        out.copy_(run(channel[None], shape, order, slice_axis)[0])
    return resampled


def resize_labels(label: NDArray[np.int16], shape: Triple, *, order: Literal[0, 1] = 1) -> NDArray[np.int16]:
    """Resamples a label map; every value (-1 too) is a label of its own.

    Order 1: each label's indicator is interpolated and the largest wins. An exact tie, which an even factor makes at
    every border, goes to the nearest-neighbour label where that is among the tied ones, otherwise to the smallest
    (the rule of batchgenerators 0.25.5). Ties are decided on scipy's own float64 numbers, so they fall as there.

    Args:
        label: (D, H, W) integer. shape: (D', H', W'). order: 0 nearest, 1 linear.

    Returns:
        (D', H', W'), type of the label.
    """
    if label.shape == tuple(shape):
        return label
    edges = list(zip(label.shape, shape, strict=True))
    resized = label[np.ix_(*(nearest_index(old, new) for old, new in edges))]
    if order == 0:
        return resized
    places = [(np.arange(new) + 0.5) * (old / new) - 0.5 for old, new in edges]
    low, high = _neighbour_range(label, places)
    mixed = np.nonzero(low != high)
    at = np.stack([place[voxels] for place, voxels in zip(places, mixed, strict=True)])  # (3, n)
    resized[mixed] = _most_likely(label, at, low[mixed], high[mixed], resized[mixed])
    return resized


def resize_labels_reference(label: NDArray[np.int16], shape: Triple) -> NDArray[np.int16]:
    """`resize_labels` at order 1, written as its definition: every indicator by scipy's 3D zoom.

    (D, H, W) -> (D', H', W'), type of the label.
    """
    values = np.unique(label)
    scores = np.stack([_zoom((label == value).astype(np.float64), shape, 1) for value in values])
    nearest = _zoom(label.astype(np.float64), shape, 0).astype(label.dtype)
    of_nearest = np.take_along_axis(scores, np.searchsorted(values, nearest)[None], 0)[0]
    return np.where(of_nearest == scores.max(0), nearest, values[scores.argmax(0)]).astype(label.dtype)


def _most_likely(
    label: NDArray[np.int16],
    at: NDArray[np.float64],
    low: NDArray[np.int16],
    high: NDArray[np.int16],
    nearest: NDArray[np.int16],
) -> NDArray[np.int16]:
    """The label that wins at the places `at` (3, n), in old voxels; its neighbours there lie in low .. high."""
    best, of_nearest, winner = np.zeros(len(nearest)), np.zeros(len(nearest)), nearest.copy()
    for value in np.unique(label):
        near = np.flatnonzero((low <= value) & (value <= high))
        indicator = (label == value).astype(np.float64)
        score = ndimage.map_coordinates(indicator, at[:, near], order=1, mode="nearest")
        better = score > best[near]
        best[near[better]], winner[near[better]] = score[better], value
        same = nearest[near] == value
        of_nearest[near[same]] = score[same]
    return np.where(of_nearest == best, nearest, winner)


def _neighbour_range(
    label: NDArray[np.int16], places: list[NDArray[np.float64]]
) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
    """Smallest and largest label among the 8 voxels that linear interpolation reads, each of the new shape."""
    low = high = label
    for axis, place in enumerate(places):
        before = np.clip(np.floor(place), 0, label.shape[axis] - 1).astype(np.int64)
        after = np.clip(np.floor(place) + 1, 0, label.shape[axis] - 1).astype(np.int64)
        low = np.minimum(low.take(before, axis), low.take(after, axis))
        high = np.maximum(high.take(before, axis), high.take(after, axis))
    return low, high


def _along(image: Tensor, n_new: int, order: Order, axis: int) -> Tensor:
    """The matrix of one axis of (C, D, H, W) applied, ROW_BLOCK rows at a time."""
    shape = list(image.shape)
    n_old, shape[axis] = shape[axis], n_new
    out = image.new_empty(shape)
    for start, first, weights in _bands(n_old, n_new, order, image.dtype, image.device):
        part = image.narrow(axis, first, weights.shape[1])
        if axis == 3:
            product = part @ weights.T
        elif axis == 2:
            product = weights @ part
        else:
            product = (weights @ part.flatten(2)).reshape(len(part), len(weights), *image.shape[2:])
        out.narrow(axis, start, len(weights)).copy_(product)
    return out


@functools.lru_cache(maxsize=64)  # the axes of a cohort's cases are few, and scipy takes 15 ms for the matrix of one
def _bands(
    n_old: int, n_new: int, order: Order, dtype: torch.dtype, device: torch.device
) -> tuple[tuple[int, int, Tensor], ...]:
    """Blocks of rows as (first row, first column, block), without the negligible columns at both ends."""
    matrix, blocks = axis_matrix(n_old, n_new, order), []
    for start in range(0, n_new, ROW_BLOCK):
        rows = matrix[start : start + ROW_BLOCK]
        used = np.flatnonzero((np.abs(rows) > NEGLIGIBLE).any(axis=0))
        block = torch.from_numpy(np.ascontiguousarray(rows[:, used[0] : used[-1] + 1]))
        blocks.append((start, int(used[0]), block.to(device, dtype)))
    return tuple(blocks)


def _zoom(values: NDArray[np.float64], shape: tuple[int, ...], order: int) -> NDArray[np.float64]:
    factors = [new / old for new, old in zip(shape, values.shape, strict=True)]
    zoomed = ndimage.zoom(values, factors, order=order, mode="nearest", grid_mode=True)
    assert zoomed.shape == tuple(shape)
    return np.asarray(zoomed)
