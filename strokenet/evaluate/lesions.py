"""Evaluate, step 2b: lesions found, missed and invented (ISLES'22, Hernandez Petzsche 2022).

A lesion is a 26-connected component. A lesion of the reference is found when at least one of its voxels is predicted;
a predicted lesion is false when none of its voxels lies in the reference. One predicted blob can therefore find many
lesions, and two blobs in one lesion are one find: this is a detection score, and Dice stands beside it for the extent.
A stricter rule is beside it, in anima.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from strokenet.evaluate.contingency import Contingency, Verdict


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


def overlap_verdict(table: Contingency) -> Verdict:
    """The rule of ISLES'22: one shared voxel is enough, on both sides."""
    found, confirmed = np.zeros(len(table.row_sizes), bool), np.zeros(len(table.column_sizes), bool)
    found[table.row] = True
    confirmed[table.column] = True
    return Verdict(found=found, missed=~found, confirmed=confirmed, false=~confirmed)


def lesion_scores(verdict: Verdict) -> LesionScores:
    """The counts of overlap_verdict. F1 is 1 when both masks are empty, 0 when exactly one is."""
    n_true, n_predicted = len(verdict.found), len(verdict.confirmed)
    found, missed, false = (int(np.count_nonzero(x)) for x in (verdict.found, verdict.missed, verdict.false))
    return LesionScores(
        reference_lesions=n_true,
        prediction_lesions=n_predicted,
        lesion_count_difference=abs(n_true - n_predicted),
        lesions_found=found,
        lesions_missed=missed,
        lesions_false=false,
        lesion_f1=found / (found + (false + missed) / 2) if n_true or n_predicted else 1.0,
    )
