"""Postprocess: from logits on the scan's grid to a mask (Meddahi 2024, IV.D; Isensee 2021 for several labels).

Differs: the published script (LongiSeg4MS) keeps p >= threshold and volume >= minimum, with 10 mm3 in the study; the
paper's text says 0.2 and "greater than 4 mm3", and that is what runs here, both strictly. It also filters before
resampling to the scan's grid; we filter after, because that is where a volume in mm3 is one of the scan's.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kernels.components import lesion_mask, volume_filter
from planner.plan import PostprocessRule


def lesion_probability(difference: NDArray[np.float32]) -> NDArray[np.float32]:
    """Softmax of a two-label network, the lesion's part. difference: the lesion's logit minus the background's.

    1 / (1 + exp(-difference)), written so that nothing overflows. (D, H, W) float32 -> (D, H, W) float32.
    """
    return np.asarray(0.5 * (1 + np.tanh(0.5 * difference)), dtype=np.float32)


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Probabilities over the labels, (K, D, H, W) -> (K, D, H, W)."""
    raised = np.exp(logits - logits.max(0, keepdims=True))
    return np.asarray(raised / raised.sum(0, keepdims=True))


def postprocess(probability: NDArray[np.float32], rule: PostprocessRule, voxel_volume_mm3: float) -> NDArray[np.uint8]:
    """The mask of a probability map.

    Args:
        probability: (K, D, H, W), background first; K = 2 with a threshold. voxel_volume_mm3: product of the spacing.

    Returns:
        (D, H, W) uint8. Without a threshold the most probable label wins, the lower one on a tie.
    """
    if rule.threshold is not None:
        return lesion_mask(
            probability[1],
            threshold=rule.threshold,
            voxel_volume_mm3=voxel_volume_mm3,
            min_volume_mm3=rule.min_volume_mm3,
            connectivity=rule.connectivity,
        )
    mask: NDArray[np.uint8] = probability.argmax(0).astype(np.uint8)
    for value in range(1, len(probability)) if rule.min_volume_mm3 > 0 else ():
        own = mask == value
        kept = volume_filter(
            own,
            voxel_volume_mm3=voxel_volume_mm3,
            min_volume_mm3=rule.min_volume_mm3,
            connectivity=rule.connectivity,
        )
        mask[own & ~kept] = 0
    return mask
