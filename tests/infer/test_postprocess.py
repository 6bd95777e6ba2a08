"""The paper's rule (IV.D): strictly above 0.2, 26-connected, strictly above 4 mm3; and what several labels do."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage

from planner.plan import PlanError, PostprocessRule
from strokenet.data.case import case_from_images
from strokenet.infer.postprocess import common_field, field_of_view, postprocess
from tests.infer.models import oblique

PAPER = PostprocessRule(threshold=0.2, min_volume_mm3=4.0, connectivity=26)


def mask_of(
    probability: np.ndarray, rule: PostprocessRule, voxel_volume_mm3: float, field: np.ndarray | None = None
) -> np.ndarray:
    given = None if field is None else torch.from_numpy(field)
    return postprocess(torch.from_numpy(probability), rule, voxel_volume_mm3, given).numpy()


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
    mask = mask_of(two(lesion), PAPER, 1.0)
    assert mask.dtype == np.uint8
    assert mask.sum(axis=(1, 2)).tolist() == [0, 0, 0, 0, 5, 0, 6, 0]
    assert (mask[4:] == (lesion[4:] > 0)).all()


@pytest.mark.parametrize(("voxel_volume", "kept"), [(0.5, [9, 10]), (0.8, [6, 9, 10]), (4.0, [2, 6, 9, 10])])
def test_the_limit_is_a_volume_and_not_a_count(voxel_volume: float, kept: list[int]) -> None:
    mask = mask_of(two(runs(1, 2, 5, 6, 8, 9, 10)), PAPER, voxel_volume)
    sizes = [int(n) for n in mask.sum(axis=(1, 2)) if n]
    assert [n for n in sizes if n in (2, 6, 9, 10)] == kept
    assert all(n * voxel_volume > 4 for n in sizes)


@pytest.mark.parametrize("degrees", range(3, 90, 7))
def test_an_oblique_float32_grid_of_1_mm_decides_as_an_upright_one(degrees: int) -> None:
    affine = oblique(degrees=degrees).astype(np.float32)
    case = case_from_images("head", {"T1": (np.ones((4, 4, 4), np.float32), affine)})
    mask = mask_of(two(runs(4, 5)), PAPER, case.geometry.voxel_volume_mm3)
    assert mask.sum(axis=(1, 2)).tolist() == [0, 0, 5, 0]


def test_the_determinant_would_have_decided_by_luck() -> None:
    volumes = {abs(np.linalg.det(oblique(degrees=d).astype(np.float32)[:3, :3].astype(float))) for d in range(3, 90, 7)}
    assert any(4 * volume > 4 for volume in volumes)
    assert any(4 * volume <= 4 for volume in volumes)


def test_rounded_spacings_do_not_lift_four_voxels_over_the_limit() -> None:
    product = float(np.float32(0.8)) * float(np.float32(1.25)) * 1.0  # 0.8 * 1.25 = 1, rounded up: 1.00000001
    assert 4 * product > 4
    assert mask_of(two(runs(4, 5)), PAPER, product).sum() == 5


@pytest.mark.parametrize(("connectivity", "kept"), [(6, 0), (18, 0), (26, 6)])
def test_voxels_that_touch_at_corners_are_one_lesion_by_26(connectivity: int, kept: int) -> None:
    lesion = np.zeros((8, 8, 8), np.float32)
    lesion[[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]] = 1
    rule = PostprocessRule(threshold=0.2, min_volume_mm3=4.0, connectivity=connectivity)  # type: ignore[arg-type]
    assert mask_of(two(lesion), rule, 1.0).sum() == kept


def test_edges_are_neighbours_by_18_and_not_by_6() -> None:
    lesion = np.zeros((8, 8, 3), np.float32)
    lesion[[1, 2, 3, 4, 5], [1, 2, 3, 4, 5], 1] = 1
    kept = [
        mask_of(two(lesion), PostprocessRule(threshold=0.2, min_volume_mm3=4.0, connectivity=c), 1.0).sum()
        for c in (6, 18, 26)
    ]
    assert kept == [0, 5, 5]


def test_a_probability_of_exactly_the_threshold_is_no_lesion() -> None:
    at = np.float32(0.2)
    values = np.array([np.nextafter(at, np.float32(0)), at, np.nextafter(at, np.float32(1))], np.float32)
    lesion = np.repeat(values, 8).reshape(3, 2, 2, 2)
    for value, expected in zip(lesion, (0, 0, 8), strict=True):
        assert mask_of(two(value), PAPER, 1.0).sum() == expected


def test_a_lesion_is_filtered_by_what_is_above_the_threshold() -> None:
    lesion = runs(7)
    lesion[0, 1, 4] = 0.1  # cuts it into 3 and 3
    assert mask_of(two(lesion), PAPER, 1.0).sum() == 0


def test_an_empty_map_is_an_empty_mask() -> None:
    assert not mask_of(two(np.zeros((3, 4, 5))), PAPER, 1.0).any()


def test_several_labels_are_filtered_each_on_its_own() -> None:
    label = np.zeros((5, 5, 9), int)
    label[1, 1, 1:5] = 1  # 4 of label 1 beside ...
    label[1, 2, 1:7] = 2  # ... 6 of label 2
    label[3, 1:4, 7] = 1
    label[3, 3, 3:7] = 1  # 7 of label 1, around a corner
    probability = np.eye(3, dtype=np.float32)[label].transpose(3, 0, 1, 2)
    kept = mask_of(probability, PostprocessRule(min_volume_mm3=4.0), 1.0)
    expected = label.copy()
    expected[1, 1, 1:5] = 0
    np.testing.assert_array_equal(kept, expected)
    np.testing.assert_array_equal(mask_of(probability, PostprocessRule(), 1.0), label)


def test_a_tie_goes_to_the_lower_label() -> None:
    probability = np.full((3, 1, 1, 2), 0.25, np.float32)
    probability[1:, 0, 0, 1] = 0.375
    assert mask_of(probability, PostprocessRule(), 1.0).ravel().tolist() == [0, 1]


@pytest.mark.parametrize("labels", [2, 3, 5])
def test_the_first_of_the_largest_wins_as_in_numpy(labels: int) -> None:
    probability = np.random.default_rng(labels).integers(0, 3, (labels, 5, 6, 7)).astype(np.float32)
    np.testing.assert_array_equal(mask_of(probability, PostprocessRule(), 1.0), probability.argmax(0))


def plainly(lesion: np.ndarray, rule: PostprocessRule, voxel_mm3: float, field: np.ndarray | None) -> np.ndarray:
    """LongiSeg4MS's rules in plain words, component by component; volumes last."""
    assert rule.threshold is not None
    neighbours = ndimage.generate_binary_structure(3, {6: 1, 18: 2, 26: 3}[rule.connectivity])
    kept = np.where(field, lesion, 0) if field is not None else lesion.copy()
    labels, count = ndimage.label(kept > np.float32(rule.threshold), neighbours)
    for number in range(1, count + 1):
        voxels = sorted(zip(*np.nonzero(labels == number), strict=True), key=lambda at: -kept[at])
        safe = voxels[: math.ceil(rule.min_volume_mm3 / voxel_mm3) + 1]
        if kept[voxels[0]] < np.float32(rule.min_peak):
            safe = []
        for at in voxels:
            doubtful = kept[at] < np.float32(rule.trim_below) or not safe
            if doubtful and not any(kept[at] >= kept[other] for other in safe):
                kept[at] = 0
    labels, count = ndimage.label(kept > np.float32(rule.threshold), neighbours)
    large = [n for n in range(1, count + 1) if (labels == n).sum() * voxel_mm3 > rule.min_volume_mm3]
    return np.isin(labels, large).astype(np.uint8)


@pytest.mark.parametrize("seed", range(60))
def test_uncertain_lesions_go_as_the_rules_say_in_plain_words(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lesion = ndimage.gaussian_filter(rng.random((9, 10, 11)), rng.uniform(0.4, 1.0))
    lesion = ((lesion - lesion.min()) / np.ptp(lesion)).astype(np.float32)
    if seed % 3 == 0:
        lesion = np.round(lesion, 1)  # ties
    rule = PostprocessRule(
        threshold=float(rng.uniform(0.4, 0.7)),
        min_volume_mm3=float(rng.choice([0, 2.5, 6])),
        connectivity=int(rng.choice([6, 18, 26])),  # type: ignore[arg-type]
        min_peak=float(rng.choice([0, 0.7, 0.9])),
        trim_below=float(rng.choice([0, 0.65, 0.8])),
        common_field=bool(seed % 2),
    )
    field = rng.random(lesion.shape) < 0.8 if rule.common_field else None
    mask = mask_of(two(lesion), rule, 0.8, field)
    assert (mask == plainly(lesion, rule, 0.8, field)).all()


def test_a_lesion_that_grows_from_a_certain_voxel_stays_whole() -> None:
    lesion = np.zeros((5, 3, 12), np.float32)
    lesion[1, 1, 1:9], lesion[1, 1, 4] = 0.3, 0.8
    lesion[3, 1, 1:9] = 0.4
    rule = replace(PAPER, min_peak=0.5)
    assert mask_of(two(lesion), rule, 1.0).sum(axis=(1, 2)).tolist() == [0, 8, 0, 0, 0]


def test_trimming_leaves_the_brightest_of_the_minimum_volume() -> None:
    lesion = np.zeros((3, 3, 12), np.float32)
    lesion[1, 1, 1:11] = np.linspace(0.3, 0.7, 10)
    rule = replace(PAPER, trim_below=0.9)
    assert mask_of(two(lesion), rule, 1.0)[1, 1].nonzero()[0].tolist() == [6, 7, 8, 9, 10]  # 4 mm3 and one more
    rule = replace(PAPER, trim_below=0.4)
    assert mask_of(two(lesion), rule, 1.0)[1, 1].nonzero()[0].tolist() == [4, 5, 6, 7, 8, 9, 10]


def test_what_one_time_did_not_scan_is_no_new_lesion() -> None:
    image = np.ones((2, 6, 6, 6), np.float32)
    image[1, 4:] = 0  # the second time ends here
    image[0, 1, 2, 2] = 0  # a hole is no outside
    rule = replace(PAPER, common_field=True)
    field = common_field(torch.from_numpy(image)).numpy()
    assert field[:4].all()
    assert not field[4:].any()
    mask = mask_of(two(np.full((6, 6, 6), 0.9)), rule, 1.0, field)
    assert mask[:4].all()
    assert not mask[4:].any()
    with pytest.raises(ValueError, match="give the field"):
        mask_of(two(np.ones((2, 2, 2))), rule, 1.0)


def test_no_lesion_lies_in_the_zeros_around_a_stripped_brain() -> None:
    image = np.zeros((2, 6, 6, 6), np.float32)
    image[0, 1:4], image[1, 2:5] = 1, -1  # what either has scanned
    image[:, 3, 2, 2] = 0  # a hole is no outside
    rule = replace(PAPER, scanned_only=True)
    field = field_of_view(torch.from_numpy(image), rule)
    assert field is not None
    mask = mask_of(two(np.full((6, 6, 6), 0.9)), rule, 1.0, field.numpy())
    assert mask[1:5].all()
    assert not mask[[0, 5]].any()
    assert field_of_view(torch.from_numpy(image), PAPER) is None
    both = field_of_view(torch.from_numpy(image), replace(rule, common_field=True))
    assert both is not None
    assert both.numpy().any(axis=(1, 2)).tolist() == [False, False, True, True, False, False]
    with pytest.raises(ValueError, match="give the field"):
        mask_of(two(np.ones((2, 2, 2))), rule, 1.0)


@pytest.mark.parametrize(
    "rule", [{"min_peak": 0.5}, {"trim_below": 0.5}, {"scanned_only": True}, {"common_field": True}]
)
def test_rules_about_a_probability_need_a_threshold(rule: dict[str, float]) -> None:
    with pytest.raises(PlanError, match="need a threshold"):
        PostprocessRule(**rule)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_a_probability_lies_between_0_and_1(value: float) -> None:
    with pytest.raises(PlanError, match="min_peak is"):
        PostprocessRule(threshold=0.2, min_peak=value)
