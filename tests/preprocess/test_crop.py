"""The nonzero mask, its holes and its box."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_fill_holes

from kernels.holes import fill_holes
from strokenet.preprocess.crop import Box, bounding_box, nonzero_box, nonzero_mask


@pytest.mark.parametrize("density", [0.05, 0.5, 0.7, 0.9, 1.0])
def test_holes_are_filled_as_by_scipy(density: float) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        mask = rng.random(rng.integers(1, 12, 3)) < density
        np.testing.assert_array_equal(fill_holes(mask), binary_fill_holes(mask))
        np.testing.assert_array_equal(fill_holes(torch.from_numpy(mask)), binary_fill_holes(mask))


def test_a_hole_that_is_open_only_at_a_corner_is_a_hole() -> None:
    mask = np.ones((4, 4, 4), bool)
    mask[1, 1, 1] = mask[0, 0, 0] = False  # diagonal neighbours; the second lies on the border
    filled = fill_holes(mask)
    assert filled[1, 1, 1]
    assert not filled[0, 0, 0]


def test_the_box_and_the_mask_in_it_equal_those_of_the_whole_volume() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        image = np.zeros((2, 12, 13, 14), np.float32)
        image[:, 2:11, 3:12, 1:9] = rng.random((2, 9, 9, 8)) < 0.4
        box, inside = nonzero_box(torch.from_numpy(image))
        full = nonzero_mask(torch.from_numpy(image))
        assert box == bounding_box(full) == bounding_box(full.numpy())
        np.testing.assert_array_equal(inside, full[box.slices])


def test_any_channel_and_any_sign_counts_as_nonzero() -> None:
    image = np.zeros((2, 5, 5, 5), np.float32)
    image[0, 1, 2, 3], image[1, 3, 2, 1] = -1e-30, 5
    box, inside = nonzero_box(torch.from_numpy(image))
    assert box == Box(start=(1, 2, 1), stop=(4, 3, 4))
    assert box.shape == (3, 1, 3)
    assert inside.sum() == 2


def test_an_empty_image_keeps_its_whole_volume() -> None:
    box, inside = nonzero_box(torch.zeros(1, 3, 4, 5))
    assert box == Box(start=(0, 0, 0), stop=(3, 4, 5))
    assert not inside.any()


@pytest.mark.parametrize("stop", [(0, 1, 1), (2, 1, 1)])
def test_a_box_without_voxels_is_refused(stop: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="start < stop"):
        Box(start=(2, 0, 0), stop=stop)
