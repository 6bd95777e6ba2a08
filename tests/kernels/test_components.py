"""Connected components against scipy.ndimage.label, on random masks and on masks made to fool a labelling."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from kernels.components import Connectivity, label_components, lesion_mask, volume_filter

STRUCTURES = {6: 1, 18: 2, 26: 3}


def _spiral() -> np.ndarray:
    """One component that a raster scan meets as many pieces."""
    mask = np.zeros((3, 31, 31), bool)
    top, left, bottom, right = 0, 0, 30, 30
    while right - left > 2:
        mask[1, top, left : right + 1] = True
        mask[1, top : bottom + 1, right] = True
        mask[1, bottom, left + 2 : right + 1] = True
        mask[1, top + 4 : bottom + 1, left + 2] = True
        top, left, bottom, right = top + 4, left + 2, bottom - 2, right - 2
    return mask


def _checkerboard() -> np.ndarray:
    return np.indices((7, 8, 9)).sum(0) % 2 == 0


def _comb() -> np.ndarray:
    mask = np.zeros((9, 20, 5), bool)
    mask[::2] = True
    mask[:, -1, 2] = True
    return mask


MASKS = {
    **{
        f"random {share}": np.random.default_rng(7).random((23, 17, 30)) < share
        for share in (0.02, 0.1, 0.3, 0.6, 0.95)
    },
    "empty": np.zeros((4, 5, 6), bool),
    "full": np.ones((4, 5, 6), bool),
    "one voxel": np.ones((1, 1, 1), bool),
    "one line": np.random.default_rng(1).random((1, 1, 50)) < 0.5,
    "one slice": np.random.default_rng(2).random((1, 40, 40)) < 0.4,
    "checkerboard": _checkerboard(),
    "spiral": _spiral(),
    "comb": _comb(),
    "a view": (np.random.default_rng(3).random((20, 21, 22)) < 0.2).transpose(2, 0, 1)[::-1, :, ::2],
}


@pytest.mark.parametrize("connectivity", [6, 18, 26])
@pytest.mark.parametrize("name", MASKS)
def test_components_are_scipys(name: str, connectivity: Connectivity) -> None:
    mask = MASKS[name]
    expected, count = ndimage.label(mask, ndimage.generate_binary_structure(3, STRUCTURES[connectivity]))
    labels, sizes = label_components(mask, connectivity)
    pairs = np.unique(np.stack([expected.ravel(), np.asarray(labels).ravel().astype(int)]), axis=1)
    assert len(sizes) - 1 == count
    assert pairs.shape[1] == count + (0 if mask.all() else 1)  # a one-to-one renaming
    assert ((pairs[0] == 0) == (pairs[1] == 0)).all()
    np.testing.assert_array_equal(sizes[pairs[1]], np.bincount(expected.ravel(), minlength=count + 1)[pairs[0]])
    assert sizes.sum() == mask.size


@pytest.mark.parametrize("connectivity", [6, 18, 26])
@pytest.mark.parametrize("limit", [0.0, 1.0, 4.0, 60.0])
def test_the_filter_keeps_what_brute_force_keeps(connectivity: Connectivity, limit: float) -> None:
    mask = MASKS["random 0.1"]
    labels, count = ndimage.label(mask, ndimage.generate_binary_structure(3, STRUCTURES[connectivity]))
    expected = np.zeros_like(mask)
    for component in range(1, count + 1):
        own = labels == component
        expected |= own if own.sum() * 0.5 > limit else False
    kept = volume_filter(mask, voxel_volume_mm3=0.5, min_volume_mm3=limit, connectivity=connectivity)
    np.testing.assert_array_equal(kept, expected)


def test_the_mask_given_is_left_alone() -> None:
    mask = MASKS["random 0.1"].copy()
    volume_filter(mask, voxel_volume_mm3=1, min_volume_mm3=3)
    np.testing.assert_array_equal(mask, MASKS["random 0.1"])


def test_integers_are_a_mask_where_they_are_not_zero() -> None:
    mask = np.array([[[0, -1, 3, 0, 255]]], np.int16)
    assert label_components(mask)[1].tolist() == [2, 2, 1]


def test_a_lesion_mask_is_threshold_then_volume() -> None:
    probability = np.random.default_rng(0).random((12, 13, 14)).astype(np.float32) ** 3
    mask = lesion_mask(probability, threshold=0.4, voxel_volume_mm3=0.7, min_volume_mm3=4, connectivity=26)
    labels, count = ndimage.label(probability > np.float32(0.4), np.ones((3, 3, 3)))
    sizes = np.bincount(labels.ravel())
    expected = sum((labels == c for c in range(1, count + 1) if sizes[c] * 0.7 > 4), np.zeros(labels.shape, bool))
    np.testing.assert_array_equal(mask, expected)
    assert mask.dtype == np.uint8


@pytest.mark.parametrize("connectivity", [6, 18, 26])
def test_thin_volumes_are_labelled_too(connectivity: Connectivity) -> None:
    """cc3d 4.1.1 raises on many of these where it is told that the image is binary."""
    structure = ndimage.generate_binary_structure(3, {6: 1, 18: 2, 26: 3}[connectivity])
    for seed, shape in enumerate([(1, 1, 7), (1, 7, 7), (3, 3, 3), (7, 1, 7), (2, 1, 9), (5, 5, 1)] * 20):
        mask = np.random.default_rng(seed).random(shape) > 0.5
        labels, sizes = label_components(mask, connectivity)
        expected, count = ndimage.label(mask, structure)
        assert len(sizes) - 1 == count
        assert len(np.unique(np.stack([labels, expected]).reshape(2, -1), axis=1).T) == len(np.unique(expected))
