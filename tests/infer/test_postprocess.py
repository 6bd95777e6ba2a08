"""The paper's rule (IV.D): strictly above 0.2, 26-connected, strictly above 4 mm3; and what several labels do."""

from __future__ import annotations

import numpy as np
import pytest

from planner.plan import PostprocessRule
from strokenet.data.case import case_from_images
from strokenet.infer.postprocess import lesion_probability, postprocess, softmax
from tests.infer.models import oblique

PAPER = PostprocessRule(threshold=0.2, min_volume_mm3=4.0, connectivity=26)


def two(lesion: np.ndarray) -> np.ndarray:
    lesion = lesion.astype(np.float32)
    return np.stack([1 - lesion, lesion])


def runs(*lengths: int) -> np.ndarray:
    """Lesions of so many voxels in a row, apart from each other."""
    lesion = np.zeros((2 * len(lengths), 3, max(lengths) + 2), np.float32)
    for index, length in enumerate(lengths):
        lesion[2 * index, 1, 1 : 1 + length] = 0.9
    return lesion


def test_four_cubic_millimetres_go_and_five_stay() -> None:
    lesion = runs(3, 4, 5, 6)
    mask = postprocess(two(lesion), PAPER, 1.0)
    assert mask.dtype == np.uint8
    assert mask.sum(axis=(1, 2)).tolist() == [0, 0, 0, 0, 5, 0, 6, 0]
    assert (mask[4:] == (lesion[4:] > 0)).all()


@pytest.mark.parametrize(("voxel_volume", "kept"), [(0.5, [9, 10]), (0.8, [6, 9, 10]), (4.0, [2, 6, 9, 10])])
def test_the_limit_is_a_volume_and_not_a_count(voxel_volume: float, kept: list[int]) -> None:
    mask = postprocess(two(runs(1, 2, 5, 6, 8, 9, 10)), PAPER, voxel_volume)
    sizes = [int(n) for n in mask.sum(axis=(1, 2)) if n]
    assert [n for n in sizes if n in (2, 6, 9, 10)] == kept
    assert all(n * voxel_volume > 4 for n in sizes)


@pytest.mark.parametrize("degrees", range(3, 90, 7))
def test_an_oblique_float32_grid_of_1_mm_decides_as_an_upright_one(degrees: int) -> None:
    affine = oblique(degrees=degrees).astype(np.float32)
    case = case_from_images("head", {"T1": (np.ones((4, 4, 4), np.float32), affine)})
    mask = postprocess(two(runs(4, 5)), PAPER, case.geometry.voxel_volume_mm3)
    assert mask.sum(axis=(1, 2)).tolist() == [0, 0, 5, 0]


def test_the_determinant_would_have_decided_by_luck() -> None:
    volumes = {abs(np.linalg.det(oblique(degrees=d).astype(np.float32)[:3, :3].astype(float))) for d in range(3, 90, 7)}
    assert any(4 * volume > 4 for volume in volumes)
    assert any(4 * volume <= 4 for volume in volumes)


def test_rounded_spacings_do_not_lift_four_voxels_over_the_limit() -> None:
    product = float(np.float32(0.8)) * float(np.float32(1.25)) * 1.0  # 0.8 * 1.25 = 1, rounded up: 1.00000001
    assert 4 * product > 4
    assert postprocess(two(runs(4, 5)), PAPER, product).sum() == 5


@pytest.mark.parametrize(("connectivity", "kept"), [(6, 0), (18, 0), (26, 6)])
def test_voxels_that_touch_at_corners_are_one_lesion_by_26(connectivity: int, kept: int) -> None:
    lesion = np.zeros((8, 8, 8), np.float32)
    lesion[[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]] = 1
    rule = PostprocessRule(threshold=0.2, min_volume_mm3=4.0, connectivity=connectivity)  # type: ignore[arg-type]
    assert postprocess(two(lesion), rule, 1.0).sum() == kept


def test_edges_are_neighbours_by_18_and_not_by_6() -> None:
    lesion = np.zeros((8, 8, 3), np.float32)
    lesion[[1, 2, 3, 4, 5], [1, 2, 3, 4, 5], 1] = 1
    kept = [
        postprocess(two(lesion), PostprocessRule(threshold=0.2, min_volume_mm3=4.0, connectivity=c), 1.0).sum()
        for c in (6, 18, 26)
    ]
    assert kept == [0, 5, 5]


def test_a_probability_of_exactly_the_threshold_is_no_lesion() -> None:
    at = np.float32(0.2)
    values = np.array([np.nextafter(at, np.float32(0)), at, np.nextafter(at, np.float32(1))], np.float32)
    lesion = np.repeat(values, 8).reshape(3, 2, 2, 2)
    for value, expected in zip(lesion, (0, 0, 8), strict=True):
        assert postprocess(two(value), PAPER, 1.0).sum() == expected


def test_a_lesion_is_filtered_by_what_is_above_the_threshold() -> None:
    lesion = runs(7)
    lesion[0, 1, 4] = 0.1  # cuts it into 3 and 3
    assert postprocess(two(lesion), PAPER, 1.0).sum() == 0


def test_an_empty_map_is_an_empty_mask() -> None:
    assert not postprocess(two(np.zeros((3, 4, 5))), PAPER, 1.0).any()


def test_several_labels_are_filtered_each_on_its_own() -> None:
    label = np.zeros((5, 5, 9), int)
    label[1, 1, 1:5] = 1  # 4 of label 1 beside ...
    label[1, 2, 1:7] = 2  # ... 6 of label 2
    label[3, 1:4, 7] = 1
    label[3, 3, 3:7] = 1  # 7 of label 1, around a corner
    probability = np.eye(3, dtype=np.float32)[label].transpose(3, 0, 1, 2)
    kept = postprocess(probability, PostprocessRule(min_volume_mm3=4.0), 1.0)
    expected = label.copy()
    expected[1, 1, 1:5] = 0
    np.testing.assert_array_equal(kept, expected)
    np.testing.assert_array_equal(postprocess(probability, PostprocessRule(), 1.0), label)


def test_a_tie_goes_to_the_lower_label() -> None:
    probability = np.full((3, 1, 1, 2), 0.25, np.float32)
    probability[1:, 0, 0, 1] = 0.375
    assert postprocess(probability, PostprocessRule(), 1.0).ravel().tolist() == [0, 1]


def test_probabilities_are_the_softmax_and_never_overflow() -> None:
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(3, 4, 5, 6)) * 10).astype(np.float32)
    exact = np.exp(logits.astype(np.float64))
    np.testing.assert_allclose(softmax(logits), exact / exact.sum(0), rtol=1e-5, atol=1e-9)
    difference = np.array([-1e4, -3.0, 0.0, 2.0, 1e4], np.float32)
    expected = [0, 1 / (1 + np.exp(3)), 0.5, 1 / (1 + np.exp(-2)), 1]
    np.testing.assert_allclose(lesion_probability(difference), expected, rtol=1e-6, atol=1e-7)
    assert softmax(np.array([1e4, -1e4], np.float32).reshape(2, 1, 1, 1)).ravel().tolist() == [1, 0]
