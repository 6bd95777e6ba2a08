"""The table drawn and applied: its probabilities, its order, and that a sample does not depend on its neighbours."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from planner.plan import Triple
from strokenet.train.augment import PUBLISHED, Draw, Row, Table, augment, draw, factor
from strokenet.train.spatial import initial_patch

PATCH: Triple = (12, 14, 16)
RAW = initial_patch(PATCH)
NOTHING = Draw(
    spatial=None,
    noise=None,
    blur=(None, None),
    brightness=(None, None),
    contrast=(None, None),
    low_resolution=(None, None),
    gamma_inverted=(None, None),
    gamma=(None, None),
    mirror=(),
)


def batch(n: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(n, 2, *RAW, generator=generator)
    return image, torch.randint(-1, 2, (n, *RAW), generator=generator).to(torch.int16)


def apply(image: Tensor, label: Tensor, draws: list[Draw], masked: tuple[bool, bool] = (False, False)):
    return augment(image, label, draws, patch=PATCH, heads=2, mask_channels=masked)


def test_the_table_is_the_published_one() -> None:
    """Probability, probability a channel and range, as nnunetv2 2.8.1 prints them (Isensee 2021, Supplement 4)."""
    assert {field.name: getattr(PUBLISHED, field.name) for field in fields(Table)} == {
        "rotation": Row(p=0.2, low=-30, high=30),
        "scaling": Row(p=0.2, low=0.7, high=1.4),
        "noise": Row(p=0.1, low=0, high=0.1),
        "blur": Row(p=0.2, p_channel=0.5, low=0.5, high=1),
        "brightness": Row(p=0.15, low=0.75, high=1.25),
        "contrast": Row(p=0.15, low=0.75, high=1.25),
        "low_resolution": Row(p=0.25, p_channel=0.5, low=0.5, high=1),
        "gamma_inverted": Row(p=0.1, low=0.7, high=1.5),
        "gamma": Row(p=0.3, low=0.7, high=1.5),
        "mirror": Row(p=0.5),
    }


def test_draws_happen_as_often_as_the_table_says() -> None:
    n = 6000
    draws = [draw(np.random.default_rng((1, i)), channels=2, patch=PATCH, mirror_axes=(2,)) for i in range(n)]
    seen = {
        "spatial": sum(d.spatial is not None for d in draws) / n,
        "noise": sum(d.noise is not None for d in draws) / n,
        "mirror": sum(d.mirror == (2,) for d in draws) / n,
        **{
            name: sum(value is not None for d in draws for value in getattr(d, name)) / (2 * n)
            for name in ("blur", "brightness", "contrast", "low_resolution", "gamma_inverted", "gamma")
        },
    }
    expected = {
        "spatial": 1 - 0.8 * 0.8,
        "noise": 0.1,
        "mirror": 0.5,
        "blur": 0.1,
        "brightness": 0.15,
        "contrast": 0.15,
        "low_resolution": 0.125,
        "gamma_inverted": 0.1,
        "gamma": 0.3,
    }
    for name, probability in expected.items():
        assert seen[name] == pytest.approx(probability, abs=4 * (probability / n) ** 0.5), name


def test_parameters_stay_in_their_ranges_and_fill_them() -> None:
    always = Table(**{f.name: replace(getattr(PUBLISHED, f.name), p=1.0, p_channel=1.0) for f in fields(Table)})
    draws = [
        draw(np.random.default_rng((2, i)), channels=1, patch=PATCH, mirror_axes=(), table=always) for i in range(800)
    ]
    angles = np.degrees([d.spatial.angles for d in draws if d.spatial])
    scales = np.array([d.spatial.scale for d in draws if d.spatial])
    gammas = np.array([d.gamma[0] for d in draws], dtype=float)
    assert len(angles) == 800
    assert -30 <= angles.min() < -28 < 28 < angles.max() <= 30
    assert 0.7 <= scales.min() < 0.72 < 1.38 < scales.max() <= 1.4
    assert 0.7 <= gammas.min() < 0.72 < 1.45 < gammas.max() <= 1.5
    assert np.mean(gammas < 1) == pytest.approx(0.5, abs=0.07)  # half on either side of one, whatever their widths
    assert all(0 <= d.noise[0] <= 0.1 for d in draws if d.noise)


def test_a_flat_patch_turns_about_its_thin_axis_alone_by_any_angle() -> None:
    always = replace(PUBLISHED, rotation=replace(PUBLISHED.rotation, p=1.0))
    draws = [
        draw(np.random.default_rng((3, i)), channels=1, patch=(8, 40, 40), mirror_axes=(), table=always)
        for i in range(300)
    ]
    angles = np.degrees([d.spatial.angles for d in draws if d.spatial])
    assert (angles[:, 1:] == 0).all()
    assert angles[:, 0].min() < -170 < 170 < angles[:, 0].max()


def test_a_factor_lies_below_one_as_often_as_above() -> None:
    rng = np.random.default_rng(0)
    values = np.array([factor(rng, 0.75, 1.5) for _ in range(4000)])
    assert np.mean(values < 1) == pytest.approx(0.5, abs=0.03)
    assert values.min() >= 0.75
    assert values.max() <= 1.5


def test_without_a_draw_only_the_cut_and_the_outside_label_change() -> None:
    image, label = batch()
    out, mask = apply(image, label, [NOTHING] * 3)
    starts = [r // 2 - p // 2 for r, p in zip(RAW, PATCH, strict=True)]
    box = tuple(slice(s, s + p) for s, p in zip(starts, PATCH, strict=True))
    assert torch.equal(out, image[(slice(None), slice(None), *box)])
    assert torch.equal(mask, label[(slice(None), *box)].clamp_min(0))


def test_an_operation_changes_its_own_sample_and_channel_alone() -> None:
    image, label = batch()
    plain, _ = apply(image, label, [NOTHING] * 3)
    for name, value in (
        ("blur", (1.0, 1.0, 1.0)),
        ("brightness", 1.2),
        ("contrast", 0.8),
        ("low_resolution", 0.5),
        ("gamma_inverted", 1.4),
        ("gamma", 0.7),
    ):
        out, _ = apply(image, label, [NOTHING, replace(NOTHING, **{name: (None, value)}), NOTHING])
        changed = [[bool((out[n, c] != plain[n, c]).any()) for c in range(2)] for n in range(3)]
        assert changed == [[False, False], [False, True], [False, False]], name


def test_mirroring_reverses_image_and_label_alike() -> None:
    image, label = batch(1)
    plain, mask = apply(image, label, [NOTHING])
    out, flipped = apply(image, label, [replace(NOTHING, mirror=(0, 2))])
    assert torch.equal(out, plain.flip(2, 4))
    assert torch.equal(flipped, mask.flip(1, 3))


def test_channels_normalised_within_the_head_are_zero_outside_it_afterwards() -> None:
    image, label = batch()
    out, _ = apply(image, label, [replace(NOTHING, brightness=(1.1, 1.1))] * 3, masked=(True, False))
    starts = [r // 2 - p // 2 for r, p in zip(RAW, PATCH, strict=True)]
    outside = label[(slice(None), *(slice(s, s + p) for s, p in zip(starts, PATCH, strict=True)))] == -1
    assert bool((out[:, 0][outside] == 0).all())
    assert bool((out[:, 0][~outside] != 0).all())
    assert bool((out[:, 1][outside] != 0).all())


def test_a_sample_is_the_same_whatever_batch_it_is_in() -> None:
    image, label = batch(4)
    always = Table(**{f.name: replace(getattr(PUBLISHED, f.name), p=0.8) for f in fields(Table)})
    draws = [
        draw(np.random.default_rng((4, i)), channels=2, patch=PATCH, mirror_axes=(0, 1, 2), table=always)
        for i in range(4)
    ]
    together = apply(image, label, draws)
    for n in range(4):
        alone = apply(image[n : n + 1], label[n : n + 1], draws[n : n + 1])
        assert torch.allclose(alone[0][0], together[0][n], atol=1e-6)
        assert torch.equal(alone[1][0], together[1][n])


def test_every_value_is_finite_and_the_raw_batch_is_not_changed() -> None:
    image, label = batch(2)
    kept = image.clone(), label.clone()
    always = Table(**{f.name: replace(getattr(PUBLISHED, f.name), p=1.0, p_channel=1.0) for f in fields(Table)})
    draws = [
        draw(np.random.default_rng((5, i)), channels=2, patch=PATCH, mirror_axes=(2,), table=always) for i in range(2)
    ]
    out, mask = apply(image, label, draws)
    assert bool(torch.isfinite(out).all())
    assert set(mask.unique().tolist()) <= {0, 1}
    assert torch.equal(image, kept[0])
    assert torch.equal(label, kept[1])
