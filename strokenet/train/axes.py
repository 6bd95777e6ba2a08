"""A volume along one axis after the other, on a CPU: planes selected, and linear interpolation between them.

Where an operation is separable, three passes over one axis each cost far less than one pass that looks at eight
corners. Comes in: a volume of three axes, which may be (D, H, W), or the rows of several channels (C, H, W).
"""

from __future__ import annotations

from torch import Tensor


def select(volume: Tensor, axis: int, index: Tensor) -> Tensor:
    """Some planes of an axis, in this order. volume: 3-D, contiguous. index: (n,) int64."""
    if axis < 2:
        return volume.index_select(axis, index)
    return volume.flatten(0, 1).index_select(1, index).view(*volume.shape[:2], -1)  # torch is faster on a matrix


def interpolate(volume: Tensor, axis: int, near: Tensor, far: Tensor, part: Tensor) -> Tensor:
    """On the way from the planes `near` to the planes `far`: (n,) int64 each. part: (n,) float32, 0 .. 1."""
    way = part.view(-1, *[1] * (2 - axis))
    return select(volume, axis, near).lerp_(select(volume, axis, far), way)
