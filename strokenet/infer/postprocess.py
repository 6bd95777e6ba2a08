"""Postprocess: from logits on the scan's grid to a mask (Meddahi 2024, IV.D; Isensee 2021 for several labels).

Differs: the published script (LongiSeg4MS) keeps p >= threshold and volume >= minimum, with 10 mm3 in the study; the
paper's text says 0.2 and "greater than 4 mm3", and that is what runs here, both strictly. It also filters before
resampling to the scan's grid; we filter after, because that is where a volume in mm3 is one of the scan's.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from kernels.components import label_components, lesion_mask, volume_filter
from planner.plan import PostprocessRule
from strokenet.preprocess.crop import fill_holes, nonzero_mask


def lesion_probability(difference: NDArray[np.float32]) -> NDArray[np.float32]:
    """Softmax of a two-label network, the lesion's part. difference: the lesion's logit minus the background's.

    1 / (1 + exp(-difference)), written so that nothing overflows. (D, H, W) float32 -> (D, H, W) float32.
    """
    return np.asarray(0.5 * (1 + np.tanh(0.5 * difference)), dtype=np.float32)


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Probabilities over the labels, (K, D, H, W) -> (K, D, H, W)."""
    raised = np.exp(logits - logits.max(0, keepdims=True))
    return np.asarray(raised / raised.sum(0, keepdims=True))


def postprocess(
    probability: NDArray[np.float32],
    rule: PostprocessRule,
    voxel_volume_mm3: float,
    field: NDArray[np.bool_] | None = None,
) -> NDArray[np.uint8]:
    """The mask of a probability map.

    Args:
        probability: (K, D, H, W), background first; K = 2 with a threshold. voxel_volume_mm3: product of the spacing.
        field: (D, H, W), of field_of_view; needed by a rule that looks at the scans.

    Returns:
        (D, H, W) uint8. Without a threshold the most probable label wins, the lower one on a tie.

    Raises:
        ValueError: the rule looks at the scans and no field is given.
    """
    if rule.threshold is None:
        return _most_probable(probability, rule, voxel_volume_mm3)
    lesion: NDArray[np.float32] = probability[1]
    if rule.looks_at_scans:
        if field is None:
            raise ValueError("the rule keeps lesions in the field of view; give the field")
        lesion = np.where(field, lesion, np.float32(0))
    if rule.min_peak or rule.trim_below:
        lesion = _of_certain_lesions(lesion, rule, voxel_volume_mm3)
    return lesion_mask(
        lesion,
        threshold=rule.threshold,
        voxel_volume_mm3=voxel_volume_mm3,
        min_volume_mm3=rule.min_volume_mm3,
        connectivity=rule.connectivity,
    )


def field_of_view(image: NDArray[np.float32], rule: PostprocessRule) -> NDArray[np.bool_] | None:
    """Where the rule lets a lesion be; None: anywhere. (C, D, H, W), the channels that were given -> (D, H, W)."""
    if rule.common_field:
        return common_field(image)
    return nonzero_mask(image) if rule.scanned_only else None


def common_field(image: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Where every channel was scanned: non-zero, holes filled, in all of them. (C, D, H, W) -> (D, H, W)."""
    return np.asarray(np.logical_and.reduce([fill_holes(channel != 0) for channel in image]))


def _most_probable(
    probability: NDArray[np.float32], rule: PostprocessRule, voxel_volume_mm3: float
) -> NDArray[np.uint8]:
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


def _of_certain_lesions(
    lesion: NDArray[np.float32], rule: PostprocessRule, voxel_volume_mm3: float
) -> NDArray[np.float32]:
    """The map with 0 where min_peak or trim_below removes. (D, H, W) -> (D, H, W).

    Differs: LongiSeg4MS looks at volumes before it trims, so that what it leaves of a lesion may be smaller than the
    minimum; here volumes are looked at last.
    """
    assert rule.threshold is not None
    labels, sizes = label_components(lesion > np.float32(rule.threshold), rule.connectivity)
    if len(sizes) == 1:
        return lesion
    places = np.flatnonzero(labels)
    values, own = lesion.ravel()[places], labels.ravel()[places].astype(np.int64) - 1
    falling = values[np.lexsort((-values, own))]  # component by component, the brightest voxel first
    first = np.cumsum(sizes[1:]) - sizes[1:]
    least = np.minimum(math.ceil(rule.min_volume_mm3 / voxel_volume_mm3), sizes[1:] - 1)
    limit = np.minimum(np.float32(rule.trim_below), falling[first + least])
    doubtful = falling[first] < np.float32(rule.min_peak)
    kept = lesion.copy()
    kept.ravel()[places[(values < limit[own]) | doubtful[own]]] = 0
    return kept
