"""Threshold, 26-connected components, volume filter: ours in one labelling, and the usual ways to write it."""

from __future__ import annotations

import cc3d
import numpy as np
from scipy import ndimage

from bench.measure import Measurement, in_turn
from kernels.components import lesion_mask

SHAPE = (182, 218, 182)
SMALLEST = 5  # voxels of 1 mm3: more than 4 mm3


def run() -> list[Measurement]:
    """A probability map of a brain's size with some hundred blobs and specks; the answers are compared first."""
    rng = np.random.default_rng(0)
    noise = ndimage.gaussian_filter(rng.normal(size=SHAPE).astype(np.float32), 1.5)
    probability = np.clip(0.5 + (noise - 0.2) * 2, 0, 1).astype(np.float32)

    def ours() -> np.ndarray:
        return lesion_mask(probability, threshold=0.2, voxel_volume_mm3=1.0, min_volume_mm3=4.0)

    def dust() -> np.ndarray:
        above = probability > np.float32(0.2)
        return np.asarray(cc3d.dust(above, threshold=SMALLEST, connectivity=26)).astype(np.uint8)

    def scipy() -> np.ndarray:
        labels, count = ndimage.label(probability > np.float32(0.2), np.ones((3, 3, 3)))
        sizes = ndimage.sum_labels(np.ones_like(labels), labels, range(1, count + 1))
        return np.isin(labels, 1 + np.flatnonzero(sizes >= SMALLEST)).astype(np.uint8)

    assert np.array_equal(ours(), dust())
    assert np.array_equal(ours(), scipy())
    what = f"{SHAPE}, {len(np.unique(cc3d.connected_components(ours()))) - 1} lesions left"
    return [in_turn("components", what, {"strokenet": ours, "cc3d.dust": dust, "scipy.ndimage": scipy})]
