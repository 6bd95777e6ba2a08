"""Evaluate, step 2: lesions found, missed and invented (ISLES'22, Hernandez Petzsche 2022).

A lesion is a 26-connected component. A lesion of the reference is found when at least one of its voxels is predicted;
a predicted lesion is false when none of its voxels lies in the reference. One predicted blob can therefore find many
lesions, and two blobs in one lesion are one find: this is a detection score, and Dice stands beside it for the extent.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kernels.components import label_components
from strokenet.preprocess.crop import bounding_box


@dataclass(frozen=True, kw_only=True)
class LesionScores:
    """Lesion counts of one case and label.

    lesion_count_difference: |reference - prediction| (the ALD of ISLES'22). lesions_found, lesions_missed: lesions of
    the reference (tp, fn); lesions_false: of the prediction (fp). lesion_f1: tp / (tp + (fp + fn) / 2), 0 .. 1.
    """

    reference_lesions: int
    prediction_lesions: int
    lesion_count_difference: int
    lesions_found: int
    lesions_missed: int
    lesions_false: int
    lesion_f1: float


def lesion_scores(prediction: NDArray[np.bool_], reference: NDArray[np.bool_]) -> LesionScores:
    """Lesion-wise scores of two masks (D, H, W) bool. F1 is 1 when both are empty, 0 when exactly one is."""
    box = bounding_box(prediction | reference)
    predicted, true = prediction[box.slices], reference[box.slices]
    n_predicted, predicted_hit = _components(predicted, true)
    n_true, found = _components(true, predicted)
    missed, false = n_true - found, n_predicted - predicted_hit
    return LesionScores(
        reference_lesions=n_true,
        prediction_lesions=n_predicted,
        lesion_count_difference=abs(n_true - n_predicted),
        lesions_found=found,
        lesions_missed=missed,
        lesions_false=false,
        lesion_f1=found / (found + (false + missed) / 2) if n_true or n_predicted else 1.0,
    )


def _components(mask: NDArray[np.bool_], other: NDArray[np.bool_]) -> tuple[int, int]:
    """How many components a mask has, and how many of them share a voxel with the other mask."""
    # Framed: cc3d's table of labels is too short for isolated voxels in a box of one or three voxels' thickness.
    labels, sizes = label_components(np.pad(mask, 1), connectivity=26)
    return len(sizes) - 1, len(np.unique(labels[1:-1, 1:-1, 1:-1][mask & other]))
