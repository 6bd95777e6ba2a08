"""Topology: strides, kernels and stages that fit a patch (Isensee 2021, Methods, "network topology")."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from planner.plan import Spacing, Triple

MIN_EDGE = 4  # voxels an axis keeps at the bottleneck
BASE_FEATURES = 32
MAX_FEATURES = 320


@dataclass(frozen=True, kw_only=True)
class Topology:
    """strides[l] on entering level l, kernels[l] of level l, and the patch rounded up to what the strides divide."""

    strides: tuple[Triple, ...]
    kernels: tuple[Triple, ...]
    patch: Triple

    @property
    def stages(self) -> int:
        """Number of resolutions."""
        return len(self.strides)

    @property
    def divisor(self) -> Triple:
        """Product of the strides an axis."""
        d, h, w = (math.prod(stride[axis] for stride in self.strides) for axis in range(3))
        return (d, h, w)

    @property
    def features(self) -> tuple[int, ...]:
        """Doubled each level, 320 at most."""
        return tuple(min(MAX_FEATURES, BASE_FEATURES * 2**level) for level in range(self.stages))


def topology(spacing: Spacing, patch: Sequence[float]) -> Topology:
    """Halves every axis that is fine enough and large enough, until none is.

    An axis is halved with the finest one while its spacing is below twice that one's; its kernel grows from 1 to 3
    once it is that close, and stays. A single remaining axis must still have 12 voxels.

    Args:
        spacing: mm, network order. patch: voxels, may be fractional (a median of even count).
    """
    current, size, kernel = list(spacing), list(patch), [1, 1, 1]
    strides: list[Triple] = [(1, 1, 1)]
    kernels: list[Triple] = []
    while True:
        large = [axis for axis in range(3) if size[axis] >= 2 * MIN_EDGE]
        if not large:
            break
        finest = min(current[axis] for axis in large)
        halved = [axis for axis in large if current[axis] / finest < 2]
        if not halved or (len(halved) == 1 and size[halved[0]] < 3 * MIN_EDGE):
            break
        kernel = [3 if k == 3 or s / min(current) < 2 else 1 for k, s in zip(kernel, current, strict=True)]
        stride = [2 if axis in halved else 1 for axis in range(3)]
        for axis in halved:
            current[axis] *= 2
            size[axis] = math.ceil(size[axis] / 2)
        strides.append((stride[0], stride[1], stride[2]))
        kernels.append((kernel[0], kernel[1], kernel[2]))
    kernels.append((3, 3, 3))
    divisor = [math.prod(stride[axis] for stride in strides) for axis in range(3)]
    d, h, w = (math.ceil(p / n) * n for p, n in zip(patch, divisor, strict=True))
    return Topology(strides=tuple(strides), kernels=tuple(kernels), patch=(int(d), int(h), int(w)))
