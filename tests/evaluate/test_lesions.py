"""Lesion-wise scores against a plain reading of the ISLES'22 rules with scipy's labelling."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.ndimage import label

from strokenet.evaluate.contingency import contingency
from strokenet.evaluate.lesions import LesionScores, lesion_scores, overlap_verdict

Mask = NDArray[np.bool_]


def scored(prediction: Mask, reference: Mask) -> LesionScores:
    return lesion_scores(overlap_verdict(contingency(prediction, reference)))


def isles(prediction: Mask, reference: Mask) -> dict[str, float]:
    """tp, fn: lesions of the reference with and without a predicted voxel; fp: predicted ones off the reference."""
    corners = np.ones((3, 3, 3))
    true, n_true = label(reference, corners)
    found, n_found = label(prediction, corners)
    tp = sum(bool(prediction[true == i].any()) for i in range(1, n_true + 1))
    fp = sum(not reference[found == i].any() for i in range(1, n_found + 1))
    fn = n_true - tp
    f1 = 1.0 if n_true == n_found == 0 else tp / (tp + (fp + fn) / 2)
    return {"tp": tp, "fn": fn, "fp": fp, "f1": f1, "count": abs(n_true - n_found), "true": n_true, "found": n_found}


@pytest.mark.parametrize("density", [0.0, 0.02, 0.1, 0.3])
def test_lesion_scores_follow_the_isles_rules(density: float) -> None:
    rng = np.random.default_rng(0)
    for _ in range(40):
        shape = tuple(rng.integers(3, 12, 3))
        a, b = rng.random(shape) < rng.choice([0.0, 0.03, 0.1]), rng.random(shape) < density
        scores, expected = scored(a, b), isles(a, b)
        assert scores.lesions_found == expected["tp"]
        assert scores.lesions_missed == expected["fn"]
        assert scores.lesions_false == expected["fp"]
        assert scores.lesion_f1 == pytest.approx(expected["f1"])
        assert scores.lesion_count_difference == expected["count"]
        assert (scores.reference_lesions, scores.prediction_lesions) == (expected["true"], expected["found"])


def test_voxels_that_touch_at_a_corner_are_one_lesion() -> None:
    mask = np.zeros((4, 4, 4), bool)
    mask[1, 1, 1] = mask[2, 2, 2] = True
    assert scored(mask, mask).reference_lesions == 1


def test_one_blob_finds_every_lesion_it_touches() -> None:
    reference = np.zeros((3, 3, 9), bool)
    reference[1, 1, [0, 3, 6]] = True
    prediction = np.zeros_like(reference)
    prediction[1, 1, :5] = True
    scores = scored(prediction, reference)
    assert (scores.lesions_found, scores.lesions_missed, scores.lesions_false) == (2, 1, 0)
    assert scores.lesion_f1 == pytest.approx(2 / 2.5)


def test_two_blobs_in_one_lesion_are_one_find_and_none_is_false() -> None:
    reference = np.ones((1, 1, 9), bool)
    prediction = np.zeros_like(reference)
    prediction[0, 0, [1, 7]] = True
    scores = scored(prediction, reference)
    assert (scores.lesions_found, scores.lesions_false, scores.lesion_f1) == (1, 0, 1.0)
    assert scores.lesion_count_difference == 1


@pytest.mark.parametrize(("predicted", "true", "f1"), [(0, 0, 1.0), (1, 0, 0.0), (0, 1, 0.0), (1, 1, 1.0)])
def test_f1_of_empty_masks(predicted: int, true: int, f1: float) -> None:
    a, b = np.zeros((3, 3, 3), bool), np.zeros((3, 3, 3), bool)
    a[1, 1, 1], b[1, 1, 1] = bool(predicted), bool(true)
    assert scored(a, b).lesion_f1 == f1
