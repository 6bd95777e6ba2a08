"""Restore: from the network's grid back to the scan's, the exact inverse of preprocess (Isensee 2021, Methods).

Comes in: logits on the plan's spacing, and the Origin that preprocess recorded. Goes out: logits on the crop's own
grid, then anything on it placed back into the full scan in the scan's own axis order. All where the logits are.
"""

from __future__ import annotations

from torch import Tensor

from planner.plan import Plan
from strokenet.preprocess.preprocess import Origin
from strokenet.preprocess.resample import resample_image


def resample_logits(logits: Tensor, plan: Plan, origin: Origin, *, exact: bool = False) -> Tensor:
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


def place_back(cropped: Tensor, origin: Origin) -> Tensor:
    """Zeros outside the crop box, then the scan's own axes. (..., *box) -> (..., D, H, W), dtype kept."""
    return _placed(cropped, _empty(cropped, origin), origin)


def place_back_probability(cropped: Tensor, origin: Origin) -> Tensor:
    """`place_back`, and outside the box all is background. (K, *box) -> (K, D, H, W) float32, background first."""
    full = _empty(cropped, origin)
    full[0] = 1
    return _placed(cropped, full, origin)


def _empty(cropped: Tensor, origin: Origin) -> Tensor:
    """Zeros of the whole scan in network axes."""
    return cropped.new_zeros((*cropped.shape[:-3], *(origin.geometry.shape[axis] for axis in origin.turn.order)))


def _placed(cropped: Tensor, full: Tensor, origin: Origin) -> Tensor:
    full[..., *origin.box.slices] = cropped
    lead, turn = full.ndim - 3, origin.turn
    unflipped = full.flip([lead + axis for axis in range(3) if turn.flip[axis]])
    back = (lead + turn.order.index(axis) for axis in range(3))
    return unflipped.permute(*range(lead), *back).contiguous()
