"""Patch sampling: which samples are forced, where patches may lie, and the cut."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from planner.plan import Triple
from strokenet.preprocess.store import StoredCase
from strokenet.train.patches import cut, draw_batch, is_forced, place, sample_rng
from strokenet.train.spatial import initial_patch


def stored(case_id: str, shape: Triple, lesion: Triple | None, seed: int = 0) -> StoredCase:
    """Noise without zeros; a lesion of 2^3 voxels that begins at `lesion`."""
    rng = np.random.default_rng(seed)
    label = np.zeros(shape, np.int16)
    if lesion is not None:
        d, h, w = lesion
        label[d : d + 2, h : h + 2, w : w + 2] = 1
    return StoredCase(
        case_id=case_id,
        image=rng.uniform(1, 2, (2, *shape)).astype(np.float32),
        label=label,
        foreground={1: np.argwhere(label == 1).astype(np.int32)},
    )


def rngs(count: int, step: int = 0) -> list[np.random.Generator]:
    return [sample_rng(0, "train", 0, step, index) for index in range(count)]


@pytest.mark.parametrize(
    ("batch", "forced"), [(1, 0), (2, 1), (3, 1), (4, 1), (5, 2), (6, 2), (8, 3), (9, 3), (10, 3), (12, 4)]
)
def test_a_third_of_each_batch_is_forced(batch: int, forced: int) -> None:
    assert [is_forced(i, batch) for i in range(batch)] == [False] * (batch - forced) + [True] * forced


def allowed(size: int, patch: int, final: int) -> tuple[int, int]:
    """First and last start along one axis, in the words of the peer's loader."""
    need = patch - final
    if need + size < patch:
        need = patch - size
    return math.floor(-need / 2), size + need // 2 + need % 2 - patch


@pytest.mark.parametrize(
    ("shape", "patch", "final"),
    [
        ((20, 10, 30), (16, 16, 16), (12, 12, 12)),
        ((33, 17, 8), (16, 16, 16), (16, 16, 16)),
        ((7, 9, 40), (15, 14, 13), (10, 11, 12)),
        ((64, 64, 64), (33, 20, 21), (20, 20, 20)),
    ],
)
def test_places_cover_exactly_the_peers_range(shape: Triple, patch: Triple, final: Triple) -> None:
    rng = np.random.default_rng(0)
    starts = np.array([place(rng, shape, patch, final, ()) for _ in range(3000)])
    bounds = [allowed(*axis) for axis in zip(shape, patch, final, strict=True)]
    for axis, (low, high) in enumerate(bounds):
        assert set(starts[:, axis]) == set(range(low, high + 1))


def test_places_are_uniform() -> None:
    rng = np.random.default_rng(0)
    starts = np.array([place(rng, (19, 16, 16), (16, 16, 16), (16, 16, 16), ())[0] for _ in range(4000)])
    counts = np.bincount(starts, minlength=4)
    assert ((counts - 1000) ** 2 / 1000).sum() < 16.3  # chi-squared of 3 degrees of freedom, p = 0.001


def test_a_forced_patch_has_a_lesion_voxel_in_its_centre() -> None:
    rng = np.random.default_rng(0)
    voxels = np.array([[19, 9, 29], [10, 5, 15]])
    seen = set()
    for _ in range(20):
        start = place(rng, (20, 10, 30), (16, 16, 16), (16, 16, 16), (np.empty((0, 3), int), voxels))
        seen.add(tuple(int(first) + 8 for first in start))
    assert seen == {(19, 9, 29), (10, 5, 15)}  # no clamp at the upper border


def test_a_forced_patch_is_held_at_the_lower_bound() -> None:
    start = place(np.random.default_rng(0), (40, 40, 40), (21, 21, 21), (16, 16, 16), (np.array([[1, 2, 30]]),))
    assert start == (-3, -3, 20)


def test_every_label_is_as_likely_as_another_whatever_its_size() -> None:
    rng = np.random.default_rng(0)
    large, small = np.full((500, 3), 10), np.full((1, 3), 20)
    starts = [place(rng, (32, 32, 32), (8, 8, 8), (8, 8, 8), (large, small))[0] for _ in range(1000)]
    assert 430 < starts.count(20 - 4) < 570


@pytest.mark.parametrize("lesion", [(0, 0, 0), (22, 28, 18), (10, 3, 9), None])
def test_forced_samples_contain_foreground_in_the_final_patch(lesion: Triple | None) -> None:
    final = (16, 16, 16)
    patch = initial_patch(final)
    case = stored("a", (24, 30, 20), lesion)
    start = [edge // 2 - size // 2 for edge, size in zip(patch, final, strict=True)]
    centre = tuple(slice(first, first + edge) for first, edge in zip(start, final, strict=True))
    for step in range(20):
        raw = draw_batch([case], rngs(5, step), patch=patch, final_patch=final)
        for index in (3, 4):
            assert bool((raw.label[index][centre] == 1).any()) == (lesion is not None)


def test_cut_pads_with_the_fill_value() -> None:
    array = np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4)
    out = np.full((1, 2, 3, 4), np.nan, np.float32)
    cut(array, (-1, 1, 2), out, -7)
    assert (out[:, 0] == -7).all()
    assert np.array_equal(out[0, 1, :2, :2], array[0, 0, 1:, 2:])
    assert (out[0, 1, 2:] == -7).all()
    assert (out[0, 1, :, 2:] == -7).all()


@pytest.mark.parametrize("seed", range(5))
def test_cut_equals_a_cut_from_a_padded_array(seed: int) -> None:
    rng = np.random.default_rng(seed)
    array = rng.normal(size=(2, 5, 6, 7))
    size = tuple(int(n) for n in rng.integers(1, 9, 3))
    padded = np.pad(array, [(0, 0), *[(20, 20)] * 3], constant_values=3)
    for _ in range(50):
        d, h, w = (int(n) for n in rng.integers(-11, 11, 3))
        out = np.full((2, *size), np.nan)
        cut(array, (d, h, w), out, 3)
        box = tuple(slice(20 + first, 20 + first + edge) for first, edge in zip((d, h, w), size, strict=True))
        np.testing.assert_array_equal(out, padded[(slice(None), *box)])


def test_a_batch_is_zero_and_minus_one_beyond_the_image() -> None:
    case = stored("a", (8, 8, 8), None)
    raw = draw_batch([case], rngs(2), patch=(12, 12, 12), final_patch=(12, 12, 12))
    assert (raw.image.dtype, raw.label.dtype) == (torch.float32, torch.int16)
    outside = raw.label == -1
    assert torch.equal((raw.image == 0).all(1), outside)  # the image itself has no zero
    assert outside.sum() == 2 * (12**3 - 8**3)


def test_cases_are_drawn_with_replacement_and_equally_often() -> None:
    cases = [stored(name, (4, 4, 4), None) for name in "abc"]
    names = [
        n for step in range(300) for n in draw_batch(cases, rngs(2, step), patch=(4, 4, 4), final_patch=(4, 4, 4)).cases
    ]
    assert all(150 < names.count(name) < 250 for name in "abc")


def test_a_sample_does_not_depend_on_its_neighbours_in_the_batch() -> None:
    cases = [stored(name, (20, 20, 20), (5, 6, 7), seed) for seed, name in enumerate("abc")]
    small = draw_batch(cases, rngs(3), patch=(8, 8, 8), final_patch=(8, 8, 8))
    large = draw_batch(cases, rngs(9), patch=(8, 8, 8), final_patch=(8, 8, 8))
    assert torch.equal(small.image[:2], large.image[:2])  # the third is forced in the small batch alone


def test_samples_differ_by_every_part_of_their_key() -> None:
    keys = [(0, "train", 0, 0, 0), (1, "train", 0, 0, 0), (0, "val", 0, 0, 0), (0, "train", 1, 0, 0)]
    keys += [(0, "train", 0, 1, 0), (0, "train", 0, 0, 1)]
    draws = [float(sample_rng(*key).random()) for key in keys]  # type: ignore[arg-type]
    assert len(set(draws)) == len(draws)
    assert draws[0] == float(sample_rng(0, "train", 0, 0, 0).random())
