"""Patch sampling: which samples are forced, where patches may lie, and the cut."""

from __future__ import annotations

import numpy as np
import pytest

from strokenet.train.patches import cut, is_forced, place, sample_rng


@pytest.mark.parametrize(("batch", "forced"), [(1, 0), (2, 1), (3, 1), (4, 1), (5, 2), (8, 3), (10, 3), (12, 4)])
def test_a_third_of_each_batch_is_forced(batch: int, forced: int) -> None:
    assert [is_forced(i, batch) for i in range(batch)] == [False] * (batch - forced) + [True] * forced


def test_places_cover_the_whole_allowed_range() -> None:
    rng = np.random.default_rng(0)
    starts = np.array([place(rng, (20, 10, 30), (16, 16, 16), (12, 12, 12), ()) for _ in range(2000)])
    assert starts.min(0).tolist() == [-2, -3, -2]
    assert starts.max(0).tolist() == [20 + 2 - 16, 10 + 3 - 16, 30 + 2 - 16]


def test_a_forced_patch_has_a_lesion_voxel_in_its_centre() -> None:
    rng = np.random.default_rng(0)
    voxels = np.array([[19, 9, 29], [10, 5, 15]])
    for _ in range(20):
        start = place(rng, (20, 10, 30), (16, 16, 16), (16, 16, 16), (np.empty((0, 3), int), voxels))
        assert tuple(np.add(start, 8)) in {(19, 9, 29), (10, 5, 15)}  # no clamp at the upper border


def test_cut_pads_with_the_fill_value() -> None:
    array = np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4)
    out = cut(array, (-1, 1, 2), (2, 3, 4), -7)
    assert out.shape == (1, 2, 3, 4)
    assert (out[:, 0] == -7).all()
    assert np.array_equal(out[0, 1, :2, :2], array[0, 0, 1:, 2:])
    assert (out[0, 1, 2:] == -7).all()
    assert (out[0, 1, :, 2:] == -7).all()


def test_a_cut_beside_the_image_is_all_fill() -> None:
    assert (cut(np.ones((2, 2, 2)), (5, 0, 0), (2, 2, 2), 0) == 0).all()


def test_samples_differ_by_every_part_of_their_key() -> None:
    keys = [(0, "train", 0, 0, 0), (1, "train", 0, 0, 0), (0, "val", 0, 0, 0), (0, "train", 1, 0, 0)]
    keys += [(0, "train", 0, 1, 0), (0, "train", 0, 0, 1)]
    draws = [float(sample_rng(*key).random()) for key in keys]  # type: ignore[arg-type]
    assert len(set(draws)) == len(draws)
    assert draws[0] == float(sample_rng(0, "train", 0, 0, 0).random())
