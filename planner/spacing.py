"""Target spacing: the grid that every case is brought to (Isensee 2021, Methods, "target spacing")."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from planner.plan import Spacing, Triple

ANISOTROPY = 3.0  # an axis is coarse when its spacing is over three times the others'
COARSE_PERCENTILE = 10


def target_spacing(spacings: Sequence[Spacing], shapes: Sequence[Triple]) -> Spacing:
    """Median spacing of the cases; a coarse axis takes the 10th percentile, but never below the other axes.

    Args:
        spacings: mm (D, H, W), one a case. shapes: voxels after cropping, one a case.

    Returns:
        mm (D, H, W), before any transposition.
    """
    target = np.percentile(np.array(spacings), 50, axis=0)
    size = np.percentile(np.array(shapes), 50, axis=0)
    worst = int(np.argmax(target))
    others = [axis for axis in range(3) if axis != worst]
    coarse = target[worst] > ANISOTROPY * max(target[others])
    flat = size[worst] * ANISOTROPY < min(size[others])
    if coarse and flat:
        finer, in_plane = np.percentile(np.array(spacings)[:, worst], COARSE_PERCENTILE), max(target[others])
        # Not below the in-plane spacing: a hair above it, so that the axis stays the coarsest.
        target[worst] = finer if finer >= in_plane else in_plane + 1e-5
    return (float(target[0]), float(target[1]), float(target[2]))


def transpose_for(target: Spacing) -> Triple:
    """Order of axes for the network: the coarsest first, the others as they are."""
    worst = int(np.argmax(target))
    a, b = (axis for axis in range(3) if axis != worst)
    return (worst, a, b)


def resampled_shape(shape: Triple, spacing: Spacing, target: Spacing) -> Triple:
    """Voxels of a case at the target spacing, rounded half to even an axis.

    Differs: at least 1, as preprocessing makes it; the peer plans with 0 for an axis thinner than half a voxel.
    """
    d, h, w = (max(1, round(s / t * n)) for s, t, n in zip(spacing, target, shape, strict=True))
    return (d, h, w)
