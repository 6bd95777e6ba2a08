"""Restore: from the network's grid back to the scan's, the exact inverse of preprocess (Isensee 2021, Methods).

Comes in: logits on the plan's spacing, and the Origin that preprocess recorded. Goes out: logits on the crop's own
grid, then anything on it placed back into the full scan in the scan's own axis order.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from planner.plan import Plan
from strokenet.preprocess.preprocess import Origin
from strokenet.preprocess.resample import resample_image

Scalar = TypeVar("Scalar", bound=np.generic)
Float = TypeVar("Float", bound=np.floating)


def resample_logits(logits: NDArray[Float], plan: Plan, origin: Origin, *, exact: bool = False) -> NDArray[Float]:
    """Logits at the plan's spacing -> at the scan's spacing, on the crop box. (K, *network) -> (K, *box).

    Linear, or in plane and nearest across the slices where the plan or else the case is anisotropic (the peer's rule).
    nnU-Net v1, whose models average probabilities, asks the case first.

    Differs: where the plan alone is coarse, v1 looks for the coarse axis in the plan's order on an array that it has
    turned back to the scan's, and takes nearest slices along a wrong one. Here it is the right one in `exact` too.
    exact: float16 logits are rounded once, as the peer's are.
    """
    spacings = (plan.spacing, origin.turn.permute(origin.geometry.spacing))
    first, then = reversed(spacings) if plan.average == "probabilities" else spacings
    return resample_image(logits, origin.box.shape, first, then, order=1, exact=exact)


def place_back(cropped: NDArray[Scalar], origin: Origin) -> NDArray[Scalar]:
    """Zeros outside the crop box, then the scan's own axes. (..., *box) -> (..., D, H, W), dtype kept."""
    full = np.zeros((*cropped.shape[:-3], *_turned_shape(origin)), dtype=cropped.dtype)
    full[..., *origin.box.slices] = cropped
    return np.ascontiguousarray(origin.turn.invert(full))


def place_back_probability(cropped: NDArray[np.float32], origin: Origin) -> NDArray[np.float32]:
    """`place_back`, and outside the box all is background. (K, *box) -> (K, D, H, W) float32, background first."""
    full = np.zeros((len(cropped), *_turned_shape(origin)), dtype=np.float32)
    full[0] = 1
    full[..., *origin.box.slices] = cropped
    return np.ascontiguousarray(origin.turn.invert(full))


def _turned_shape(origin: Origin) -> tuple[int, int, int]:
    d, h, w = (origin.geometry.shape[axis] for axis in origin.turn.order)
    return (d, h, w)
