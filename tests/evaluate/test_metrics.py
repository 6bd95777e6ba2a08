"""Voxel metrics against brute force: sets of voxels for the overlaps, all pairs of points for the distance."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from numpy.typing import NDArray

from strokenet.data.overlap import dice
from strokenet.evaluate.metrics import hd95_mm, voxel_scores

Mask = NDArray[np.bool_]
SPACING = (3.0, 0.7, 1.1)


def pairs(count: int, seed: int = 0) -> list[tuple[Mask, Mask]]:
    """Random masks of random density and shape, neither of them empty."""
    rng = np.random.default_rng(seed)
    found = []
    while len(found) < count:
        shape = tuple(rng.integers(2, 8, 3))
        a, b = (rng.random(shape) < rng.choice([0.02, 0.1, 0.5, 0.95]) for _ in range(2))
        if a.any() and b.any():
            found.append((a, b))
    return found


def border(mask: Mask) -> list[tuple[int, int, int]]:
    """Voxels with a neighbour across a face that is outside the mask or the volume."""
    voxels = {tuple(v) for v in np.argwhere(mask).tolist()}
    steps = [(1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1)]
    return [v for v in voxels if any((v[0] + x, v[1] + y, v[2] + z) not in voxels for x, y, z in steps)]


def distances(of: Mask, to: Mask, spacing: tuple[float, float, float]) -> list[float]:
    """From every border voxel to the nearest of the other, in mm, over all pairs."""

    def mm(voxel: tuple[int, int, int]) -> list[float]:
        return [index * step for index, step in zip(voxel, spacing, strict=True)]

    return [min(math.dist(mm(a), mm(b)) for b in border(to)) for a in border(of)]


def percentile95(values: list[float]) -> float:
    """Linear interpolation between the ranks around 0.95 (n - 1)."""
    ordered = sorted(values)
    rank = 0.95 * (len(ordered) - 1)
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (rank - low) * (ordered[high] - ordered[low])


def test_overlaps_equal_those_of_sets_of_voxels() -> None:
    for a, b in pairs(60):
        predicted, true = ({tuple(v) for v in np.argwhere(mask).tolist()} for mask in (a, b))
        common = len(predicted & true)
        scores = voxel_scores(a, b, SPACING)
        assert scores.dice == pytest.approx(2 * common / (len(predicted) + len(true)))
        assert scores.iou == pytest.approx(common / len(predicted | true))
        assert scores.sensitivity == pytest.approx(common / len(true))
        assert scores.precision == pytest.approx(common / len(predicted))
        assert dice(a, b) == scores.dice


def test_volumes_are_millilitres_and_the_difference_is_signed() -> None:
    a, b = np.zeros((4, 5, 6), bool), np.zeros((4, 5, 6), bool)
    a[0, 0, :2], b[0, 0, :5] = True, True
    scores = voxel_scores(a, b, (5.0, 2.0, 2.0))  # 20 mm3 a voxel
    assert scores.prediction_volume_ml == pytest.approx(0.04)
    assert scores.reference_volume_ml == pytest.approx(0.1)
    assert scores.volume_difference_ml == pytest.approx(-0.06)
    assert scores.absolute_volume_difference_ml == pytest.approx(0.06)


def test_hd95_equals_all_pairs_of_border_voxels() -> None:
    for a, b in pairs(30, seed=1):
        brute = max(percentile95(distances(a, b, SPACING)), percentile95(distances(b, a, SPACING)))
        assert hd95_mm(a, b, SPACING) == pytest.approx(brute, abs=1e-9)


@pytest.mark.parametrize("tree_cost", [0, 10**9])
def test_search_tree_and_distance_transform_give_one_hd95(monkeypatch: pytest.MonkeyPatch, tree_cost: int) -> None:
    monkeypatch.setattr("strokenet.evaluate.metrics._TREE_COST", tree_cost)  # 0: always the tree
    for a, b in pairs(20, seed=2):
        brute = max(percentile95(distances(a, b, SPACING)), percentile95(distances(b, a, SPACING)))
        assert hd95_mm(a, b, SPACING) == pytest.approx(brute, abs=1e-9)


def test_hd95_is_the_larger_direction_and_not_the_pooled_percentile() -> None:
    a, b = np.zeros((1, 1, 60), bool), np.zeros((1, 1, 60), bool)
    a[0, 0, :40] = True
    b[0, 0, :39] = b[0, 0, 59] = True  # one voxel in forty lies 20 mm off: within the 5 % that are not looked at
    assert hd95_mm(a, b, (1, 1, 1)) < 2
    b[0, 0, 55:] = True  # five in forty-four: they count
    assert hd95_mm(a, b, (1, 1, 1)) > 15
    assert hd95_mm(a, b, (1, 1, 1)) == hd95_mm(b, a, (1, 1, 1))


def test_hd95_follows_the_spacing_of_each_axis() -> None:
    a = np.zeros((6, 6, 6), bool)
    a[1, 1, 1] = True
    for axis, mm in enumerate(SPACING):
        assert hd95_mm(a, np.roll(a, 3, axis), SPACING) == pytest.approx(3 * mm)


@pytest.mark.parametrize(("predicted", "true"), list(itertools.product([False, True], repeat=2)))
def test_empty_masks_follow_the_table(predicted: bool, true: bool) -> None:
    a, b = np.zeros((3, 4, 5), bool), np.zeros((3, 4, 5), bool)
    a[1, 1, 1], b[1, 1, 1] = predicted, true
    scores = voxel_scores(a, b, (1.0, 2.0, 3.0))
    overlap = 1.0 if predicted == true else 0.0
    assert (scores.dice, scores.iou, scores.sensitivity, scores.precision) == (overlap,) * 4
    diagonal = math.sqrt(3**2 + 8**2 + 15**2)  # of the whole volume, edge to edge
    assert scores.hd95_mm == (0.0 if predicted == true else pytest.approx(diagonal))


def test_a_missed_lesion_is_worse_than_any_lesion_found_far_away() -> None:
    a, b = np.zeros((4, 4, 4), bool), np.zeros((4, 4, 4), bool)
    a[0, 0, 0] = b[3, 3, 3] = True
    assert hd95_mm(a, b, SPACING) < hd95_mm(a & False, b, SPACING)
