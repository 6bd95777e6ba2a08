"""Evaluate, step 1: voxel metrics of two masks, with their units.

Comes in: the predicted and the reference mask of one case and label on one grid, and the spacing. Goes out: one
VoxelScores. No value is ever NaN or infinite: an empty mask has a rule (ISLES'22, Hernandez Petzsche 2022), so that
no mean can drop the case and a model cannot gain by finding less.

    both masks empty     every overlap 1, HD95 0 mm
    exactly one empty    every overlap 0, HD95 the diagonal of the volume
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion
from scipy.spatial import KDTree

from strokenet.data.geometry import Spacing
from strokenet.preprocess.crop import bounding_box

PERCENTILE = 95.0
_MM3_PER_ML = 1000.0


@dataclass(frozen=True, kw_only=True)
class VoxelScores:
    """Agreement of one predicted with one reference mask.

    dice, iou, sensitivity, precision: 0 .. 1. hd95_mm: mm, see hd95_mm. Volumes: ml. volume_difference_ml: prediction
    minus reference; absolute_volume_difference_ml is the AVD of ISLES'22.
    """

    dice: float
    iou: float
    sensitivity: float
    precision: float
    hd95_mm: float
    reference_volume_ml: float
    prediction_volume_ml: float
    volume_difference_ml: float
    absolute_volume_difference_ml: float


def voxel_scores(prediction: NDArray[np.bool_], reference: NDArray[np.bool_], spacing: Spacing) -> VoxelScores:
    """All voxel metrics of two masks.

    Dice 2|P and R| / (|P| + |R|), IoU |P and R| / |P or R|, sensitivity |P and R| / |R|, precision |P and R| / |P|.
    ISLES'22 defines the empty cases of Dice; `Differs:` sensitivity and precision with a zero denominator follow the
    same table here (1 when both masks are empty, else 0), where others leave them out.

    Args:
        prediction, reference: (D, H, W) bool. spacing: mm (D, H, W).
    """
    common = int(np.count_nonzero(prediction & reference))
    predicted, true = int(np.count_nonzero(prediction)), int(np.count_nonzero(reference))
    ml = float(np.prod(np.asarray(spacing, dtype=np.float64))) / _MM3_PER_ML
    nothing = 0.0 if predicted or true else 1.0  # the value of 0 / 0
    return VoxelScores(
        dice=2 * common / (predicted + true) if predicted + true else nothing,
        iou=common / (predicted + true - common) if predicted + true else nothing,
        sensitivity=common / true if true else nothing,
        precision=common / predicted if predicted else nothing,
        hd95_mm=hd95_mm(prediction, reference, spacing),
        reference_volume_ml=true * ml,
        prediction_volume_ml=predicted * ml,
        volume_difference_ml=(predicted - true) * ml,
        absolute_volume_difference_ml=abs(predicted - true) * ml,
    )


def hd95_mm(prediction: NDArray[np.bool_], reference: NDArray[np.bool_], spacing: Spacing) -> float:
    """Robust Hausdorff distance in mm.

        max( P95 of d(p, border of R) over border voxels p of P,  P95 of d(r, border of P) over border voxels r of R )

    the larger of the two directed 95th percentiles (Metrics Reloaded, Maier-Hein 2024; linear interpolation), not the
    percentile of both pooled. A border voxel is a voxel of the mask with one of its 6 neighbours outside the mask;
    beyond the volume counts as outside. Distances are Euclidean, between voxel centres. Tools differ by far more than
    models do here: compare only numbers of one definition.

    Both masks empty: 0. One empty: the diagonal of the volume in mm, longer than any distance in it. `Differs:` others
    give NaN and drop the case from the mean, which rewards missing a lesion.

    Args:
        prediction, reference: (D, H, W) bool. spacing: mm (D, H, W).
    """
    predicted, true = prediction.any(), reference.any()
    if not (predicted and true):
        return diagonal_mm(prediction.shape, spacing) if predicted or true else 0.0
    box = bounding_box(prediction | reference)  # both borders lie in it, so nothing is lost
    a = _border_mm(prediction[box.slices], spacing)
    b = _border_mm(reference[box.slices], spacing)
    return float(max(np.percentile(_nearest(a, b), PERCENTILE), np.percentile(_nearest(b, a), PERCENTILE)))


def diagonal_mm(shape: tuple[int, ...], spacing: Spacing) -> float:
    """Diagonal of a volume of shape (D, H, W), outer edge to outer edge, in mm."""
    return float(np.linalg.norm(np.multiply(shape, spacing)))


def _border_mm(mask: NDArray[np.bool_], spacing: Spacing) -> NDArray[np.float64]:
    """Positions of the border voxels, (n, 3) mm."""
    inner = binary_erosion(mask)  # scipy's default element is the 6-neighbourhood; outside the array counts as False
    return np.argwhere(mask & ~inner) * np.asarray(spacing, dtype=np.float64)


def _nearest(points: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    """Distance from each point to the nearest of the others, (n,) mm.

    Exact, as by a distance transform, and 2 to 20 times as fast: work grows with the surfaces, not with the volume.
    The tree is left unbalanced: grid points share coordinates, and medians of those are slow to find and split badly.
    """
    tree = KDTree(others, balanced_tree=False, compact_nodes=False)
    distance, _ = tree.query(points)
    return np.asarray(distance, dtype=np.float64)
