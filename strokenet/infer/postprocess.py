"""Postprocess: from logits on the scan's grid to a mask (Meddahi 2024, IV.D; Isensee 2021 for several labels).

Differs: the published script (LongiSeg4MS) keeps p >= threshold and volume >= minimum, with 10 mm3 in the study; the
paper's text says 0.2 and "greater than 4 mm3", and that is what runs here, both strictly. It also filters before
resampling to the scan's grid; we filter after, because that is where a volume in mm3 is one of the scan's.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from kernels.components import label_components, lesion_mask, volume_filter
from kernels.holes import fill_holes
from planner.plan import PostprocessRule
from strokenet.preprocess.crop import nonzero_mask


def postprocess(
    probability: Tensor, rule: PostprocessRule, voxel_volume_mm3: float, field: Tensor | None = None
) -> Tensor:
    """The mask of a probability map, computed where the map is.

    Args:
        probability: (K, D, H, W) float32, background first; K = 2 with a threshold.
        voxel_volume_mm3: product of the spacing.
        field: (D, H, W) bool, of field_of_view; needed by a rule that looks at the scans.

    Returns:
        (D, H, W) uint8. Without a threshold the most probable label wins, the lower one on a tie.

    Raises:
        ValueError: the rule looks at the scans and no field is given.
    """
    if rule.threshold is None:
        return _most_probable(probability, rule, voxel_volume_mm3)
    lesion = probability[1]
    if rule.looks_at_scans:
        if field is None:
            raise ValueError("the rule keeps lesions in the field of view; give the field")
        lesion = torch.where(field, lesion, 0)
    if rule.min_peak or rule.trim_below:
        lesion = _of_certain_lesions(lesion, rule, voxel_volume_mm3)
    return lesion_mask(
        lesion,
        threshold=rule.threshold,
        voxel_volume_mm3=voxel_volume_mm3,
        min_volume_mm3=rule.min_volume_mm3,
        connectivity=rule.connectivity,
    )


def field_of_view(image: Tensor, rule: PostprocessRule) -> Tensor | None:
    """Where the rule lets a lesion be; None: anywhere. (C, D, H, W), the channels that were given -> (D, H, W) bool."""
    if rule.common_field:
        return common_field(image)
    return nonzero_mask(image) if rule.scanned_only else None


def common_field(image: Tensor) -> Tensor:
    """Where every channel was scanned: non-zero, holes filled, in all of them. (C, D, H, W) -> (D, H, W) bool."""
    return torch.stack([fill_holes(channel != 0) for channel in image]).all(0)


def _most_probable(probability: Tensor, rule: PostprocessRule, voxel_volume_mm3: float) -> Tensor:
    mask = _argmax(probability)
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


def _argmax(probability: Tensor) -> Tensor:
    """The first label of the largest value, (K, D, H, W) -> (D, H, W) uint8. torch's argmax takes 6 times as long."""
    best, mask = probability[0], torch.zeros_like(probability[0], dtype=torch.uint8)
    for value in range(1, len(probability)):
        better = probability[value] > best
        mask.masked_fill_(better, value)
        best = torch.where(better, probability[value], best)
    return mask


def _of_certain_lesions(given: Tensor, rule: PostprocessRule, voxel_volume_mm3: float) -> Tensor:
    """The map with 0 where min_peak or trim_below removes; sorted on the CPU. (D, H, W) -> (D, H, W).

    Differs: LongiSeg4MS looks at volumes before it trims, so that what it leaves of a lesion may be smaller than the
    minimum; here volumes are looked at last.
    """
    assert rule.threshold is not None
    lesion = given.cpu().numpy()
    labels, sizes = label_components(lesion > np.float32(rule.threshold), rule.connectivity)
    if len(sizes) == 1:
        return given
    places = np.flatnonzero(labels)
    values, own = lesion.ravel()[places], labels.ravel()[places].astype(np.int64) - 1
    falling = values[np.lexsort((-values, own))]  # component by component, the brightest voxel first
    first = np.cumsum(sizes[1:]) - sizes[1:]
    least = np.minimum(math.ceil(rule.min_volume_mm3 / voxel_volume_mm3), sizes[1:] - 1)
    limit = np.minimum(np.float32(rule.trim_below), falling[first + least])
    doubtful = falling[first] < np.float32(rule.min_peak)
    kept = lesion.copy()
    kept.ravel()[places[(values < limit[own]) | doubtful[own]]] = 0
    return torch.from_numpy(kept).to(given.device)
