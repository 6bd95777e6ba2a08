"""The loss: Dice plus cross-entropy at every level of the decoder (Isensee 2021, Methods; Meddahi 2024, IV.E).

The paper prints, for a mask G and a prediction S (o: probability, y: label of voxel i):
    (1)  L_DICE = 2 |G and S| / (|G| + |S|)
    (2)  L_bce  = sum_i  y_i log o_i + (1 - y_i) log(1 - o_i)
    (3)  Loss   = L_DICE + L_bce
Taken literally, both would be maximised by a good prediction: (1) is the Dice coefficient, whose loss is 1 minus it,
and (2) lacks its minus sign. What nnU-Net computes, and so do we:
    Dice part           - mean over samples and lesion labels of (2 I + s) / max(P + G + s, 1e-8), s = 1e-5
                        I = sum p g, P = sum p, G = sum g over the voxels; p = softmax; background left out
    cross-entropy part  mean over all voxels of - log p(label)
    loss                their sum, so between -1 (perfect) and above; the constant 1 is left out, its gradient is zero
With batch_dice, I, P and G are summed over the batch before the division.
Where several processes hold a part of the batch each (distributed.py), the mean of their losses is the batch's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SMOOTH = 1e-5


def _alone(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True, kw_only=True)
class Part:
    """What of the batch the samples at hand are; by default all of it.

    weight: their number over the mean number of a process: 1 where all hold as many. total: sum of a tensor over the
    processes; its gradient, averaged over them as that of the weights is, is the gradient of the sum.
    """

    weight: float = 1.0
    total: Callable[[Tensor], Tensor] = _alone


WHOLE = Part()


def dice_ce(logits: Tensor, label: Tensor, *, batch_dice: bool, part: Part = WHOLE) -> Tensor:
    """Dice plus cross-entropy of one level.

    Args:
        logits: (N, K, D, H, W), any floating type; sums run in float32.
        label: (N, D, H, W) int64, 0 .. K-1.
        part: what of the batch these N samples are.

    Returns:
        scalar float32; of a part, what has the batch's loss as its mean over the parts.
    """
    logits = logits.float()
    log_p = F.log_softmax(logits, dim=1)
    cross_entropy = -log_p.gather(1, label[:, None]).mean()  # nll_loss is not reproducible on a GPU in 3-D
    p = log_p.exp()[:, 1:].flatten(2)  # (N, K, D, H, W) -> (N, K-1, V)
    g = F.one_hot(label, logits.shape[1]).movedim(-1, 1)[:, 1:].flatten(2)  # (N, D, H, W) -> (N, K-1, V)
    intersection, predicted, truth = (p * g).sum(-1), p.sum(-1), g.sum(-1).to(p.dtype)  # (N, K-1)
    if batch_dice:
        sums = torch.stack([intersection.sum(0), predicted.sum(0), truth.sum(0)])
        intersection, predicted, truth = part.total(sums)  # (3, K-1)
    dice = (2 * intersection + SMOOTH) / (predicted + truth + SMOOTH).clamp_min(1e-8)
    return part.weight * cross_entropy - (1.0 if batch_dice else part.weight) * dice.mean()


def level_weights(levels: int) -> tuple[float, ...]:
    """Weight of each decoder level, full resolution first: halved each time, the coarsest 0, sum 1.

    A network with a single decoder level has just weight 1.
    """
    raw = [2.0**-i for i in range(levels)]
    if levels > 1:
        raw[-1] = 0.0
    return tuple(w / sum(raw) for w in raw)


def deep_supervision_loss(levels: Sequence[Tensor], label: Tensor, *, batch_dice: bool, part: Part = WHOLE) -> Tensor:
    """Weighted sum of dice_ce over the decoder's levels. A level of weight 0 is not computed and gets no gradient.

    Args:
        levels: logits (N, K, D_l, H_l, W_l), full resolution first.
        label: (N, D, H, W) int64 at full resolution; coarser levels take the nearest voxel.
        part: what of the batch these N samples are.
    """
    total = torch.zeros((), device=label.device)
    for logits, weight in zip(levels, level_weights(len(levels)), strict=True):
        if weight > 0:
            target = downsample_label(label, tuple(logits.shape[2:]))
            total = total + weight * dice_ce(logits, target, batch_dice=batch_dice, part=part)
    return total


def downsample_label(label: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(N, D, H, W) -> (N, *shape): the label of the nearest voxel, centres aligned ("nearest-exact")."""
    if tuple(label.shape[1:]) == shape:
        return label
    small = F.interpolate(label[:, None].float(), size=shape, mode="nearest-exact")  # float32 holds labels exactly
    return small[:, 0].to(label.dtype)
