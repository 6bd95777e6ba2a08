"""Connected components: from a probability map to a lesion mask (Meddahi 2024, IV.D).

    mask = probability > threshold
    a component of n voxels stays when  n * voxel volume > min_volume * (1 + 1e-6)

Bytes: one read of the map, one labelling (cc3d: 4 bytes a voxel written), one gather, one uint8 write. Nothing is
labelled twice: sizes come from a bincount of the labels, the mask from a boolean look-up table.
"""

from __future__ import annotations

from typing import Literal

import cc3d
import numpy as np
from numpy.typing import NDArray

Connectivity = Literal[6, 18, 26]

# A component of exactly the limit must fall on one side on every machine: 4 voxels of 1 mm3 are not above 4 mm3, even
# when the product of three float32 spacings is 1.0000001.
VOLUME_MARGIN = 1e-6


def label_components(
    mask: NDArray[np.bool_] | NDArray[np.integer], connectivity: Connectivity = 26
) -> tuple[NDArray[np.integer], NDArray[np.int64]]:
    """Numbers the components of a mask.

    Args:
        mask: (D, H, W), non-zero is foreground.
        connectivity: 6 (faces), 18 (edges) or 26 (corners).

    Returns:
        labels (D, H, W), 0 is background, components 1 .. n; sizes (n + 1,) in voxels, sizes[0] is the background.
    """
    binary = np.ascontiguousarray(mask != 0)
    labels, count = cc3d.connected_components(binary.view(np.uint8), connectivity=connectivity, return_N=True)
    return labels, np.bincount(labels.ravel(), minlength=count + 1).astype(np.int64)


def volume_filter(
    mask: NDArray[np.bool_], *, voxel_volume_mm3: float, min_volume_mm3: float, connectivity: Connectivity = 26
) -> NDArray[np.bool_]:
    """The mask without the components whose volume is not above min_volume_mm3; 0 keeps all. (D, H, W) -> (D, H, W)."""
    if min_volume_mm3 <= 0 or not mask.any():
        return mask
    labels, sizes = label_components(mask, connectivity)
    keep = sizes * voxel_volume_mm3 > min_volume_mm3 * (1 + VOLUME_MARGIN)
    keep[0] = False
    return np.asarray(keep[labels])


def lesion_mask(
    probability: NDArray[np.floating],
    *,
    threshold: float,
    voxel_volume_mm3: float,
    min_volume_mm3: float,
    connectivity: Connectivity = 26,
) -> NDArray[np.uint8]:
    """Threshold, label, filter: the binary lesion mask of a probability map.

    Args:
        probability: (D, H, W), 0 .. 1. threshold: strict, lesion is above it.
        voxel_volume_mm3: product of the spacing. min_volume_mm3: strict. connectivity: 6, 18 or 26.

    Returns:
        mask (D, H, W) uint8, 0 or 1.
    """
    above = probability > np.float32(threshold)
    kept = volume_filter(
        above, voxel_volume_mm3=voxel_volume_mm3, min_volume_mm3=min_volume_mm3, connectivity=connectivity
    )
    return kept.astype(np.uint8)
