"""The loss against its definition written out in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from strokenet.train.loss import deep_supervision_loss, dice_ce, downsample_label, level_weights


def definition(logits: np.ndarray, label: np.ndarray, batch_dice: bool) -> float:
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    cross_entropy = -np.mean(np.log(np.take_along_axis(p, label[:, None], 1)))
    ratios = []
    groups = [range(len(p))] if batch_dice else [[n] for n in range(len(p))]
    for group in groups:
        for k in range(1, p.shape[1]):
            g = label[list(group)] == k
            q = p[list(group), k]
            ratios.append((2 * (q * g).sum() + 1e-5) / max(q.sum() + g.sum() + 1e-5, 1e-8))
    return float(cross_entropy - np.mean(ratios))


@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("heads", [2, 4])
def test_loss_equals_its_definition(batch_dice: bool, heads: int) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, heads, 4, 5, 6)) * 3
    label = rng.integers(0, heads, (3, 4, 5, 6))
    ours = dice_ce(torch.from_numpy(logits), torch.from_numpy(label), batch_dice=batch_dice)
    assert float(ours) == pytest.approx(definition(logits, label, batch_dice), abs=1e-6)


def test_empty_label_has_a_finite_loss_and_gradient() -> None:
    logits = torch.randn(2, 2, 4, 4, 4, requires_grad=True)
    loss = dice_ce(logits, torch.zeros(2, 4, 4, 4, dtype=torch.int64), batch_dice=False)
    loss.backward()
    assert torch.isfinite(loss)
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_a_perfect_prediction_reaches_minus_one() -> None:
    label = (torch.rand(1, 4, 4, 4, generator=torch.Generator().manual_seed(0)) > 0.5).long()
    logits = torch.stack([1 - label, label], 1) * 100.0
    assert float(dice_ce(logits, label, batch_dice=True)) == pytest.approx(-1, abs=1e-5)


def test_level_weights_are_the_published_ones() -> None:
    assert level_weights(5) == pytest.approx((8 / 15, 4 / 15, 2 / 15, 1 / 15, 0))
    assert level_weights(1) == (1.0,)


def test_the_coarsest_level_gets_no_gradient() -> None:
    levels = [torch.randn(1, 2, n, n, n, requires_grad=True) for n in (8, 4, 2)]
    label = torch.randint(0, 2, (1, 8, 8, 8))
    deep_supervision_loss(levels, label, batch_dice=False).backward()
    assert levels[0].grad is not None
    assert levels[1].grad is not None
    assert levels[2].grad is None


def test_coarse_labels_are_those_of_the_nearest_voxel() -> None:
    label = torch.arange(8).reshape(1, 1, 1, 8)
    assert downsample_label(label, (1, 1, 4)).flatten().tolist() == [1, 3, 5, 7]
