"""The batchgenerators path: same shapes and meaning as the device's, and the same result where parameters agree."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from planner.plan import Triple
from strokenet.train.augment import PUBLISHED, Draw, Table, augment
from strokenet.train.published import augment_published
from strokenet.train.spatial import SpatialDraw, initial_patch, is_flat

NEVER = Table(**{field.name: replace(getattr(PUBLISHED, field.name), p=0.0) for field in fields(Table)})
NEVER = replace(NEVER, mirror=PUBLISHED.mirror)


def sample(patch: Triple, channels: int = 2) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    raw = initial_patch(patch)
    grid = np.indices(raw).astype(np.float32)
    image = np.stack([np.sin(grid.sum(0) / (5 + c)) + grid[0] / 20 for c in range(channels)]).astype(np.float32)
    label = (rng.random(raw) > 0.7).astype(np.int16)
    label[:, :3] = -1
    return image, label


@pytest.mark.parametrize("patch", [(12, 14, 16), (4, 20, 18)])
def test_without_operations_both_paths_cut_the_same(patch: Triple) -> None:
    image, label = sample(patch)
    theirs, their_mask = augment_published(
        image.copy(), label.copy(), 1, patch=patch, mirror_axes=(), mask_channels=(False, False), table=NEVER
    )
    nothing = Draw(
        spatial=None, noise=None, blur=(None,) * 2, brightness=(None,) * 2, contrast=(None,) * 2,
        low_resolution=(None,) * 2, gamma_inverted=(None,) * 2, gamma=(None,) * 2, mirror=(),
    )  # fmt: skip
    ours, our_mask = augment(
        torch.from_numpy(image)[None], torch.from_numpy(label)[None], [nothing], patch=patch, heads=2,
        mask_channels=(False, False),
    )  # fmt: skip
    assert np.array_equal(theirs, ours[0].numpy())
    assert np.array_equal(their_mask, our_mask[0].numpy())
    assert theirs.dtype == np.float32
    assert their_mask.dtype == np.int16


def test_brightness_of_a_known_factor_gives_both_paths_the_same_image() -> None:
    patch = (12, 14, 16)
    image, label = sample(patch)
    fixed = replace(NEVER, brightness=replace(PUBLISHED.brightness, p=1.0, low=1.2, high=1.2))
    theirs, _ = augment_published(
        image.copy(), label.copy(), 3, patch=patch, mirror_axes=(), mask_channels=(False, False), table=fixed
    )
    plain, _ = augment_published(
        image.copy(), label.copy(), 3, patch=patch, mirror_axes=(), mask_channels=(False, False), table=NEVER
    )
    assert np.abs(theirs - 1.2 * plain).max() < 1e-6


def test_a_known_scale_gives_both_paths_the_same_label_and_nearly_the_same_image() -> None:
    """The package interpolates by cubic splines, the device linearly: on a smooth image that is a small difference."""
    patch = (12, 14, 16)
    image, label = sample(patch)
    label = (image[0] > 0.5).astype(np.int16)
    fixed = replace(NEVER, scaling=replace(PUBLISHED.scaling, p=1.0, low=1.25, high=1.25))
    theirs, their_mask = augment_published(
        image.copy(), label.copy(), 4, patch=patch, mirror_axes=(), mask_channels=(False, False), table=fixed
    )
    zoomed = SpatialDraw(angles=(0.0, 0.0, 0.0), scale=1.25)
    d = Draw(
        spatial=zoomed, noise=None, blur=(None,) * 2, brightness=(None,) * 2, contrast=(None,) * 2,
        low_resolution=(None,) * 2, gamma_inverted=(None,) * 2, gamma=(None,) * 2, mirror=(),
    )  # fmt: skip
    ours, our_mask = augment(
        torch.from_numpy(image)[None], torch.from_numpy(label)[None], [d], patch=patch, heads=2,
        mask_channels=(False, False),
    )  # fmt: skip
    assert np.abs(theirs - ours[0].numpy()).max() < 0.05
    assert np.mean(their_mask == our_mask[0].numpy()) > 0.995


def test_a_seed_repeats_a_sample_and_another_does_not() -> None:
    patch = (12, 14, 16)
    image, label = sample(patch)
    always = Table(**{f.name: replace(getattr(PUBLISHED, f.name), p=1.0) for f in fields(Table) if f.name != "mirror"})
    runs = [
        augment_published(
            image.copy(), label.copy(), seed, patch=patch, mirror_axes=(2,), mask_channels=(False, False), table=always
        )
        for seed in (7, 7, 8)
    ]
    assert np.array_equal(runs[0][0], runs[1][0])
    assert np.array_equal(runs[0][1], runs[1][1])
    assert not np.array_equal(runs[0][0], runs[2][0])


@pytest.mark.parametrize("patch", [(12, 14, 16), (4, 20, 18)])
def test_everything_at_once_stays_finite_and_masks_the_outside(patch: Triple) -> None:
    image, label = sample(patch)
    label[:, : label.shape[1] // 2] = -1
    always = Table(**{f.name: replace(getattr(PUBLISHED, f.name), p=1.0) for f in fields(Table) if f.name != "mirror"})
    out, mask = augment_published(
        image, label, 9, patch=patch, mirror_axes=(0, 1, 2), mask_channels=(True, False), table=always
    )
    assert out.shape == (2, *patch)
    assert mask.shape == patch
    assert np.isfinite(out).all()
    assert set(np.unique(mask)) <= {0, 1}
    assert 0.2 < (out[0] == 0).mean() < 0.8  # the half outside the head
    assert is_flat(patch) == (patch[0] == 4)
