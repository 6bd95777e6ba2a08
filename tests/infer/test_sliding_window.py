"""The sliding window: the peer's grid and weights, and averages that leave constants alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from strokenet.infer.sliding_window import (
    EMPTY_LOGIT,
    importance_map,
    mirrored_logits,
    predict_logits,
    tile_grid,
    tile_starts,
)
from strokenet.model.network import build_network
from tests.plans import tiny_plan


def test_tiles_are_the_published_example() -> None:
    assert [tile_starts(n, 128) for n in (155, 180, 147)] == [(0, 27), (0, 52), (0, 19)]
    assert len(tile_grid((197, 233, 189), (128, 128, 128))) == 18


@pytest.mark.parametrize("size", [16, 17, 23, 24, 25, 40, 41, 100])
def test_tiles_cover_every_voxel(size: int) -> None:
    covered = np.zeros(size, int)
    for start in tile_starts(size, 16):
        assert 0 <= start <= size - 16
        covered[start : start + 16] += 1
    assert covered.min() >= 1


def test_importance_map_is_a_gaussian_without_zeros() -> None:
    weights = importance_map((32, 16, 64))
    assert float(weights.max()) == 10
    assert float(weights[16, 8, 32]) == 10
    assert float(weights[16 + 4, 8, 32]) == pytest.approx(10 * math.exp(-0.5), rel=1e-3)
    assert float(weights.min()) == pytest.approx(5.96e-8, rel=1e-2)


class Centre(nn.Module):
    """A stand-in whose logits are its input: averages of it are known."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Module()
        self.decoder.seg_layers = nn.ModuleList([nn.Conv3d(1, 2, 1)])

    def forward(self, image: Tensor) -> Tensor:
        return torch.cat([image, -image], 1)


@pytest.mark.parametrize("shape", [(16, 16, 16), (11, 20, 37), (5, 5, 5)])
def test_windows_of_the_identity_give_the_image_back(shape: tuple[int, int, int]) -> None:
    image = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    logits = predict_logits([Centre()], image, patch=(16, 16, 16), mirror_axes=(0, 2))  # type: ignore[list-item]
    assert torch.allclose(logits, torch.cat([image, -image]), atol=1e-5)


def test_empty_tiles_are_background_and_not_computed() -> None:
    image = torch.zeros(1, 16, 16, 64)
    image[..., :8] = 1
    logits = predict_logits([Centre()], image, patch=(16, 16, 16))  # type: ignore[list-item]
    assert torch.equal(logits[:, 8, 8, 40], torch.tensor([EMPTY_LOGIT, 0.0]))
    assert torch.allclose(logits[:, 8, 8, 2], torch.tensor([1.0, -1.0]))


def test_mirroring_makes_the_answer_symmetric() -> None:
    torch.manual_seed(0)
    network = build_network(tiny_plan()).eval()
    tile = torch.randn(1, 2, 16, 16, 16)
    with torch.inference_mode():
        one = mirrored_logits(network, tile, (2,))
        other = mirrored_logits(network, tile.flip(4), (2,)).flip(4)
        plain = mirrored_logits(network, tile, ())
    assert torch.allclose(one, other, atol=1e-5)
    assert not torch.allclose(one, plain, atol=1e-3)


def test_folds_are_averaged_as_logits() -> None:
    torch.manual_seed(0)
    networks = [build_network(tiny_plan()).eval() for _ in range(2)]
    image = torch.randn(2, 16, 16, 16)
    both = predict_logits(networks, image, patch=(16, 16, 16))
    each = [predict_logits([network], image, patch=(16, 16, 16)) for network in networks]
    assert torch.allclose(both, (each[0] + each[1]) / 2, atol=1e-5)
