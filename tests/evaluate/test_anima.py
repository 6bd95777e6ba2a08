"""Anima's detection rule: every branch by hand on strips of voxels, and a reading of the rule in plain loops."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation, label

from strokenet.data.errors import InputError
from strokenet.evaluate.anima import AnimaScores, DetectionRule, anima_scores, anima_verdict, min_voxels
from strokenet.evaluate.contingency import contingency
from strokenet.evaluate.lesions import overlap_verdict

Mask = NDArray[np.bool_]
DEFAULT = DetectionRule()


def scored(
    prediction: Mask, reference: Mask, rule: DetectionRule = DEFAULT, voxel_volume_mm3: float = 1.0
) -> AnimaScores:
    return anima_scores(anima_verdict(contingency(prediction, reference), rule, voxel_volume_mm3))


def strip(*runs: tuple[int, int]) -> Mask:
    """Lesions start .. stop on a line of 80 voxels."""
    mask = np.zeros((1, 1, 80), bool)
    for start, stop in runs:
        mask[0, 0, start:stop] = True
    return mask


def outcome(prediction: Mask, reference: Mask, rule: DetectionRule = DEFAULT) -> tuple[int, int, int]:
    scores = scored(prediction, reference, rule)
    return scores.anima_found, scores.anima_missed, scores.anima_false


def test_an_overlap_of_exactly_alpha_is_not_detected() -> None:
    assert outcome(strip((0, 1)), strip((0, 10)))[:2] == (0, 1)  # 1 of 10
    assert outcome(strip((0, 1)), strip((0, 9)))[:2] == (1, 0)  # 1 of 9
    assert outcome(strip((0, 2), (8, 10)), strip((0, 40)))[:2] == (0, 1)  # two blobs count together: 4 of 40 ...
    assert outcome(strip((0, 2), (7, 10)), strip((0, 40)))[:2] == (1, 0)  # ... and 5 of 40


def test_exactly_beta_outside_passes_and_more_fails() -> None:
    assert outcome(strip((0, 10)), strip((0, 3)))[:2] == (1, 0)  # 7 of 10 outside
    assert outcome(strip((0, 11)), strip((0, 3)))[:2] == (0, 1)  # 8 of 11


def test_the_same_limits_hold_for_predictions_in_the_other_direction() -> None:
    assert outcome(strip((0, 3)), strip((0, 10)))[2] == 0
    assert outcome(strip((0, 3)), strip((0, 11)))[2] == 1
    assert outcome(strip((0, 10)), strip((0, 1)))[2] == 1
    assert outcome(strip((0, 9)), strip((0, 1)))[2] == 0


def test_a_bad_blob_after_gamma_is_not_looked_at() -> None:
    reference = strip((20, 40))
    assert outcome(strip((20, 28), (29, 35), (39, 50)), reference)[:2] == (1, 0)  # 8, 6 of 15 before the bad one
    assert outcome(strip((20, 26), (28, 32), (35, 53)), reference)[:2] == (0, 1)  # 6 of 15, then the bad one's 5
    assert outcome(strip((20, 28), (33, 57)), reference)[:2] == (0, 1)  # 8 of 15 before it: too few


def test_the_walk_goes_on_at_exactly_gamma() -> None:
    assert outcome(strip((0, 13), (14, 41)), strip((0, 21)))[:2] == (0, 1)  # 13 of 20, then 20 of 27 outside
    assert outcome(strip((0, 14), (15, 42)), strip((0, 22)))[:2] == (1, 0)  # 14 of 21


def test_the_largest_overlap_is_judged_first() -> None:
    reference = strip((20, 40))
    assert outcome(strip((20, 24), (26, 76)), reference)[:2] == (0, 1)  # the bad one overlaps most, and is 14 of 18


def test_equal_overlaps_are_judged_in_one_order_however_lesions_are_numbered() -> None:
    rule = DetectionRule(gamma=0.4)  # either blob alone is enough
    reference, prediction = strip((30, 40)), strip((30, 34), (36, 60))
    mirrored = (prediction[..., ::-1], reference[..., ::-1])
    assert outcome(prediction, reference, rule)[:2] == outcome(*mirrored, rule)[:2] == (1, 0)


def test_a_lesion_predicted_in_two_pieces_is_one_find_and_no_piece_is_false() -> None:
    scores = scored(strip((0, 5), (7, 12)), strip((0, 12)))
    assert (scores.anima_found, scores.anima_missed, scores.anima_false) == (1, 0, 0)
    assert (scores.anima_sensitivity, scores.anima_ppv, scores.anima_f1) == (1, 1, 1)


def test_a_blob_over_two_lesions_finds_both_while_it_is_not_much_larger_than_they() -> None:
    assert outcome(strip((0, 20)), strip((0, 3), (17, 20))) == (2, 0, 0)  # 14 of 20 outside
    scores = scored(strip((0, 21)), strip((0, 3), (18, 21)))  # 15 of 21; but the blob itself has 6 of 21 in lesions
    assert (scores.anima_found, scores.anima_missed, scores.anima_false) == (0, 2, 0)
    assert (scores.anima_sensitivity, scores.anima_ppv, scores.anima_f1) == (0, 1, 0)


def test_f1_is_the_harmonic_mean() -> None:
    scores = scored(strip((0, 4), (20, 24), (30, 34)), strip((0, 4), (10, 14)))
    assert (scores.anima_sensitivity, scores.anima_ppv) == (1 / 2, 1 / 3)
    assert scores.anima_f1 == pytest.approx(2 / (2 + 3))


def test_one_voxel_of_overlap_is_enough_for_isles_and_not_here() -> None:
    prediction, reference = strip((19, 40)), strip((0, 20))
    assert overlap_verdict(contingency(prediction, reference)).found.tolist() == [True]
    assert outcome(prediction, reference) == (0, 1, 1)


@pytest.mark.parametrize(
    ("minimum", "voxel", "voxels"), [(0, 1, 1), (3, 1, 4), (3.9, 1, 4), (4, 1.0000001, 5), (3, 0.1, 31), (4, 1.47, 3)]
)
def test_the_smallest_lesion_is_above_the_minimum(minimum: float, voxel: float, voxels: int) -> None:
    assert min_voxels(DetectionRule(min_volume_mm3=minimum), voxel) == voxels


def test_lesions_up_to_the_minimum_are_background_on_both_sides() -> None:
    rule = DetectionRule(min_volume_mm3=3)
    prediction, reference = strip((0, 3), (10, 14), (20, 24)), strip((0, 3), (10, 13), (20, 24), (40, 43))
    assert outcome(prediction, reference) == (3, 1, 0)
    assert outcome(prediction, reference, rule) == (1, 0, 1)  # the second blob now lies on nothing
    # half of the overlap was in a small lesion: 3 of 14 outside become 11 of 14
    assert outcome(strip((0, 15)), strip((0, 4), (5, 8), (9, 12)))[2] == 0
    assert outcome(strip((0, 15)), strip((0, 4), (5, 8), (9, 12)), rule) == (0, 1, 0)


@pytest.mark.parametrize(("predicted", "true", "share"), [(0, 0, 1), (1, 0, 0), (0, 1, 0), (1, 1, 1)])
def test_empty_masks_follow_the_table_of_the_other_scores(predicted: int, true: int, share: int) -> None:
    a, b = strip((0, 4 * predicted)), strip((0, 4 * true))
    scores = scored(a, b)
    assert (scores.anima_sensitivity, scores.anima_ppv, scores.anima_f1) == (share, share, share)
    assert (scores.anima_missed, scores.anima_false) == (true * (1 - predicted), predicted * (1 - true))


def test_masks_with_lesions_below_the_minimum_alone_are_empty() -> None:
    scores = scored(strip((0, 2)), strip((8, 10)), DetectionRule(min_volume_mm3=2))
    assert (scores.anima_found, scores.anima_missed, scores.anima_false, scores.anima_f1) == (0, 0, 0, 1)


@pytest.mark.parametrize(
    "limits",
    [{"alpha": -0.1}, {"beta": 1.1}, {"gamma": float("nan")}, {"min_volume_mm3": -1}, {"min_volume_mm3": np.inf}],
)
def test_limits_that_are_no_shares_are_refused(limits: dict[str, float]) -> None:
    with pytest.raises(InputError, match="detection rule"):
        DetectionRule(**limits)


class Naive:
    """The rule in plain loops and exact fractions. branches: how often each end of the walk was met."""

    def __init__(self) -> None:
        self.branches: Counter[str] = Counter()

    def lesions(self, mask: Mask, smallest: int) -> list[set[int]]:
        numbers, count = label(mask, np.ones((3, 3, 3)))
        found = [set(np.flatnonzero(numbers == k).tolist()) for k in range(1, count + 1)]
        return [lesion for lesion in found if len(lesion) >= smallest]

    def is_detected(self, lesion: set[int], own: list[set[int]], other: list[set[int]], rule: DetectionRule) -> bool:
        everything = set().union(*own)
        overlap = sum(len(lesion & blob) for blob in other)
        if not Fraction(overlap, len(lesion)) > Fraction(str(rule.alpha)):
            self.branches["alpha"] += 1
            return False
        walk = sorted(
            (-len(lesion & blob), Fraction(len(blob - everything), len(blob))) for blob in other if lesion & blob
        )
        share = Fraction(0)
        for step, (voxels, outside) in enumerate(walk, start=1):
            if outside > Fraction(str(rule.beta)):
                self.branches["beta"] += 1
                return False
            share += Fraction(-voxels, overlap)
            if share > Fraction(str(rule.gamma)) and step < len(walk):
                self.branches["gamma"] += 1
                return True
        self.branches["end"] += 1
        return True

    def scores(self, prediction: Mask, reference: Mask, rule: DetectionRule, mm3: float) -> dict[str, float]:
        smallest = int(Fraction(str(rule.min_volume_mm3)) // Fraction(str(mm3))) + 1
        true, predicted = self.lesions(reference, smallest), self.lesions(prediction, smallest)
        found = sum(self.is_detected(lesion, true, predicted, rule) for lesion in true)
        confirmed = sum(self.is_detected(lesion, predicted, true, rule) for lesion in predicted)
        empty = float(not true and not predicted)
        sensitivity = found / len(true) if true else empty
        ppv = confirmed / len(predicted) if predicted else empty
        return {
            "anima_found": found,
            "anima_missed": len(true) - found,
            "anima_false": len(predicted) - confirmed,
            "anima_sensitivity": sensitivity,
            "anima_ppv": ppv,
            "anima_f1": 2 / (1 / sensitivity + 1 / ppv) if sensitivity and ppv else 0.0,
        }


def random_pair(rng: np.random.Generator) -> tuple[Mask, Mask]:
    """Runs on a line, dust, or boxes; the prediction is made apart, or from the reference: grown, shifted, cut."""
    shape = [(1, 1, int(rng.integers(5, 60))), tuple(rng.integers(2, 9, 3)), (2, 9, 20)][rng.integers(3)]

    def draw() -> Mask:
        mask = np.zeros(shape, bool)
        if rng.random() < 0.2:
            return np.asarray(rng.random(shape) < rng.choice([0.02, 0.1, 0.3]))
        for _ in range(rng.integers(0, 7)):
            start = [int(rng.integers(0, n)) for n in shape]
            mask[tuple(slice(s, s + int(rng.integers(1, 2 + n // 2))) for s, n in zip(start, shape, strict=True))] = 1
        return mask

    reference = draw()
    prediction = [
        draw,
        lambda: binary_dilation(reference, np.ones((3, 3, 3)), iterations=int(rng.integers(1, 3))),
        lambda: np.roll(reference, rng.integers(-3, 4, 3).tolist(), (0, 1, 2)),
        lambda: reference & (rng.random(shape) < 0.8) | draw(),
    ][rng.integers(4)]()
    return (prediction, reference) if rng.random() < 0.5 else (reference, prediction)


def random_rule(rng: np.random.Generator) -> DetectionRule:
    """Half of them the default; else limits that small lesions meet exactly."""
    if rng.random() < 0.5:
        return DetectionRule(min_volume_mm3=float(rng.choice([0, 0, 3, 4.5])))
    alpha, beta, gamma = (float(share) for share in rng.choice([0, 0.1, 0.25, 0.5, 0.6, 0.7, 0.75, 1], 3))
    return DetectionRule(alpha=alpha, beta=beta, gamma=gamma, min_volume_mm3=float(rng.choice([0, 3])))


def test_scores_equal_the_rule_in_plain_loops_over_random_masks() -> None:
    rng, naive = np.random.default_rng(0), Naive()
    for _ in range(600):
        (prediction, reference), rule, mm3 = random_pair(rng), random_rule(rng), float(rng.choice([0.5, 1, 1.5]))
        scores, expected = (
            vars(scored(prediction, reference, rule, mm3)),
            naive.scores(prediction, reference, rule, mm3),
        )
        assert scores == pytest.approx(expected), (prediction.astype(int), reference.astype(int), rule)
    assert min(naive.branches[branch] for branch in ("alpha", "beta", "gamma", "end")) > 50, naive.branches


def test_swapped_masks_swap_sensitivity_and_ppv() -> None:
    rng = np.random.default_rng(1)
    for _ in range(100):
        a, b = random_pair(rng)
        there, back = scored(a, b), scored(b, a)
        assert (there.anima_sensitivity, there.anima_ppv) == (back.anima_ppv, back.anima_sensitivity)
        assert (there.anima_f1, there.anima_missed) == (back.anima_f1, back.anima_false)


def test_the_scores_do_not_hang_on_the_direction_of_the_axes() -> None:
    rng = np.random.default_rng(2)
    for _ in range(100):
        (a, b), rule = random_pair(rng), random_rule(rng)
        assert scored(a, b, rule) == scored(a[::-1, ::-1, ::-1], b[::-1, ::-1, ::-1], rule)
