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
from scipy.ndimage import binary_erosion, distance_transform_edt
from scipy.spatial import KDTree

from strokenet.data.geometry import Spacing
from strokenet.data.overlap import dice_of_counts, overlap
from strokenet.preprocess.crop import bounding_box

PERCENTILE = 95.0
_MM3_PER_ML = 1000.0
_TREE_COST = 64  # a query at its worst, in voxels of a distance transform (30 us and 0.2 us, halved for the usual case)


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
    common, predicted, true = overlap(prediction, reference)
    ml = float(np.prod(np.asarray(spacing, dtype=np.float64))) / _MM3_PER_ML
    nothing = 0.0 if predicted or true else 1.0  # the value of 0 / 0
    return VoxelScores(
        dice=float(dice_of_counts(common, predicted, true)),
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
    a, b = _border(prediction[box.slices]), _border(reference[box.slices])
    there, back = _distances_mm(a, b, spacing), _distances_mm(b, a, spacing)
    return float(max(np.percentile(there, PERCENTILE), np.percentile(back, PERCENTILE)))


def diagonal_mm(shape: tuple[int, ...], spacing: Spacing) -> float:
    """Diagonal of a volume of shape (D, H, W), outer edge to outer edge, in mm."""
    return float(np.linalg.norm(np.multiply(shape, spacing)))


def _border(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The border voxels of a mask. (D, H, W) -> (D, H, W)."""
    inner = binary_erosion(mask)  # scipy's default element is the 6-neighbourhood; outside the array counts as False
    return np.asarray(mask & ~inner)


def _distances_mm(border: NDArray[np.bool_], other: NDArray[np.bool_], spacing: Spacing) -> NDArray[np.float64]:
    """Distance from every voxel of a border to the nearest of the other, (n,) mm.

    Exact both ways. A search tree takes 2 to 20 times less than a distance transform, because its work grows with the
    surfaces and not with the volume; on noise (an untrained network) every second voxel is surface and it takes
    minutes, so that the transform does these. The tree is left unbalanced: grid points share coordinates, and medians
    of those are slow to find and split badly.
    """
    points = np.argwhere(border)
    if len(points) * _TREE_COST > border.size:
        return np.asarray(distance_transform_edt(~other, sampling=spacing)[border], dtype=np.float64)
    mm = np.asarray(spacing, dtype=np.float64)
    tree = KDTree(np.argwhere(other) * mm, balanced_tree=False, compact_nodes=False)
    distance, _ = tree.query(points * mm)
    return np.asarray(distance, dtype=np.float64)
