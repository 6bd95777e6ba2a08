"""The sliding window: the peer's grid and weights, and averages that leave constants alone."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor, nn

from strokenet.infer.sliding_window import (
    EMPTY_LOGIT,
    WindowRules,
    importance_map,
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
        self.heads = 2

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
    tile = torch.randn(2, 16, 16, 16)
    one = predict_logits([network], tile, patch=(16, 16, 16), mirror_axes=(2,))
    other = predict_logits([network], tile.flip(3), patch=(16, 16, 16), mirror_axes=(2,)).flip(3)
    plain = predict_logits([network], tile, patch=(16, 16, 16))
    assert torch.allclose(one, other, atol=1e-5)
    assert not torch.allclose(one, plain, atol=1e-3)


@pytest.mark.parametrize("rules", [WindowRules(), WindowRules(exact=True), WindowRules(average="probabilities")])
def test_tiles_and_mirrors_in_batches_give_one_answer(rules: WindowRules) -> None:
    torch.manual_seed(0)
    networks = [build_network(tiny_plan()).eval() for _ in range(2)]
    image = torch.randn(2, 16, 26, 40)
    image[..., 24:] = 0  # the last tiles are empty
    one, *others = (
        predict_logits(networks, image, patch=(16, 16, 16), mirror_axes=(0, 2), rules=rules, batch=batch)
        for batch in (1, 2, 3, 4, 100)
    )
    limit = 0.51 if rules.exact else 1e-5  # a float16 step at the corners
    for other in others:
        assert (other.float() - one.float()).abs().max() <= limit
        assert (other.argmax(0) != one.argmax(0)).float().mean() < 1e-3


def test_a_batch_is_what_was_asked_for() -> None:
    sizes = []

    class Counting(Centre):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            sizes.append(len(image))
            return super().forward(image)

    image = torch.ones(1, 16, 16, 40)
    predict_logits([Counting()], image, patch=(16, 16, 16), mirror_axes=(0, 1), batch=6)
    assert sizes == [6, 6, 4]


def test_folds_are_averaged_as_logits() -> None:
    torch.manual_seed(0)
    networks = [build_network(tiny_plan()).eval() for _ in range(2)]
    image = torch.randn(2, 16, 16, 16)
    both = predict_logits(networks, image, patch=(16, 16, 16))
    each = [predict_logits([network], image, patch=(16, 16, 16)) for network in networks]
    assert torch.allclose(both, (each[0] + each[1]) / 2, atol=1e-5)


def naive(networks: list[nn.Module], image: np.ndarray, patch: tuple[int, ...], axes: tuple[int, ...]) -> np.ndarray:
    """The peer's window from its description, in loops and float64: (C, D, H, W) -> (K, D, H, W)."""
    networks = [copy.deepcopy(network).double() for network in networks]
    before = [max(p - n, 0) // 2 for n, p in zip(image.shape[1:], patch, strict=True)]
    size = [max(n, p) for n, p in zip(image.shape[1:], patch, strict=True)]
    grown = np.zeros((len(image), *size))
    inside = tuple(slice(b, b + n) for b, n in zip(before, image.shape[1:], strict=True))
    grown[(slice(None), *inside)] = image
    delta = np.zeros(patch)
    delta[tuple(p // 2 for p in patch)] = 1
    bell = ndimage.gaussian_filter(delta, [p / 8 for p in patch], mode="constant")
    bell = (bell / (bell.max() / 10)).astype(np.float16)
    bell[bell == 0] = bell[bell > 0].min()
    total, norm = np.zeros((2, *size)), np.zeros(size)
    starts = []
    for n, p in zip(size, patch, strict=True):
        steps = math.ceil((n - p) / (p / 2)) + 1
        starts.append([int(np.round((n - p) / max(steps - 1, 1) * i)) for i in range(steps)])
    for d, h, w in itertools.product(*starts):
        box = (slice(d, d + patch[0]), slice(h, h + patch[1]), slice(w, w + patch[2]))
        tile = grown[(slice(None), *box)]
        if (tile == 0).all():
            continue
        answers = []
        for network in networks:
            for mirrored in itertools.product(*([False, True] if axis in axes else [False] for axis in range(3))):
                flip = [axis + 1 for axis in range(3) if mirrored[axis]]
                with torch.no_grad():
                    answer = network(torch.from_numpy(np.flip(tile, flip).copy())[None])[0].numpy()
                answers.append(np.flip(answer, flip))
        total[(slice(None), *box)] += np.mean(answers, 0) * bell.astype(np.float64)
        norm[box] += bell
    logits = np.divide(total, norm, out=np.zeros_like(total), where=norm > 0)
    logits[0][norm == 0] = EMPTY_LOGIT
    return logits[(slice(None), *inside)]


@pytest.mark.parametrize(
    ("shape", "patch", "axes", "folds"),
    [
        ((16, 16, 16), (16, 16, 16), (), 1),
        ((21, 30, 17), (16, 16, 16), (2,), 1),
        ((9, 8, 20), (8, 8, 16), (0, 1, 2), 1),
        ((5, 3, 7), (8, 16, 8), (0, 2), 2),
        ((12, 18, 60), (12, 16, 16), (1,), 1),
    ],
)
def test_the_window_equals_loops_in_float64(
    shape: tuple[int, int, int], patch: tuple[int, int, int], axes: tuple[int, ...], folds: int
) -> None:
    torch.manual_seed(1)
    networks = [build_network(tiny_plan()).eval() for _ in range(folds)]
    image = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    image[:, :, :, shape[2] // 2 :] = 0  # so that tiles are empty where the image is long enough
    logits = predict_logits(networks, torch.from_numpy(image), patch=patch, mirror_axes=axes)
    assert logits.dtype == torch.float32
    np.testing.assert_allclose(logits.numpy(), naive(networks, image, patch, axes), atol=2e-4)  # type: ignore[arg-type]


def test_sums_run_in_float32_where_float16_would_round_to_integers() -> None:
    image = torch.full((1, 16, 16, 16), 0.3)  # a corner's weight is 6e-8, the smallest step of float16
    logits = predict_logits([Centre()], image, patch=(16, 16, 16))  # type: ignore[list-item]
    assert float(logits[0, 0, 0, 0]) == pytest.approx(0.3, rel=1e-5)


def test_a_tile_with_one_voxel_in_one_channel_is_computed() -> None:
    class Counting(Centre):
        tiles = 0

        def forward(self, image: Tensor) -> Tensor:
            self.tiles += 1
            return super().forward(image[:, :1])

    image = torch.zeros(2, 16, 16, 64)
    network = Counting()
    predict_logits([network], image, patch=(16, 16, 16))  # type: ignore[list-item]
    assert network.tiles == 0
    image[1, 3, 3, 60] = 1e-6
    predict_logits([network], image, patch=(16, 16, 16))  # type: ignore[list-item]
    assert network.tiles == 1
    predict_logits([network, network], image, patch=(16, 16, 16), mirror_axes=(0, 1, 2))  # type: ignore[list-item]
    assert network.tiles == 1 + 2 * 8


def test_an_empty_image_is_background() -> None:
    network = build_network(tiny_plan()).eval()
    logits = predict_logits([network], torch.zeros(2, 10, 20, 30), patch=(16, 16, 16))
    assert logits.shape == (2, 10, 20, 30)
    assert (logits[0] == EMPTY_LOGIT).all()
    assert (logits[1] == 0).all()


EXACT = WindowRules(exact=True)
V1 = WindowRules(average="probabilities", tile_weights="peak-1-float32")


def naive_exact(networks: list[nn.Module], image: Tensor, patch: tuple[int, int, int]) -> np.ndarray:
    """The peer's sums in numpy's float16: one tile after the other, each fold to its end, then the folds' mean."""
    weights = importance_map(patch).numpy().astype(np.float16)
    answers = []
    for network in networks:
        total, norm = np.zeros((2, *image.shape[1:]), np.float16), np.zeros(image.shape[1:], np.float16)
        for d, h, w in tile_grid(tuple(image.shape[1:]), patch):  # type: ignore[arg-type]
            box = (slice(None), slice(d, d + patch[0]), slice(h, h + patch[1]), slice(w, w + patch[2]))
            with torch.no_grad():
                answer = network(image[box][None])[0].numpy()
            total[box] = (total[box].astype(np.float32) + answer * weights.astype(np.float32)).astype(np.float16)
            norm[box[1:]] = (norm[box[1:]].astype(np.float32) + weights.astype(np.float32)).astype(np.float16)
        answers.append((total.astype(np.float32) / norm.astype(np.float32)).astype(np.float16))
    if len(answers) == 1:
        return answers[0]
    summed = (answers[0].astype(np.float32) + answers[1].astype(np.float32)).astype(np.float16)
    return (summed.astype(np.float32) / 2).astype(np.float16)


@pytest.mark.parametrize("folds", [1, 2])
def test_the_exact_form_rounds_as_the_peer_does(folds: int) -> None:
    torch.manual_seed(3)
    networks = [build_network(tiny_plan()).eval() for _ in range(folds)]
    image = torch.randn(2, 20, 16, 33)
    logits = predict_logits(networks, image, patch=(16, 16, 16), rules=EXACT)
    assert logits.dtype == torch.float16
    np.testing.assert_array_equal(logits.numpy(), naive_exact(list(networks), image, (16, 16, 16)))


def test_the_exact_form_shows_the_peers_integers_in_the_corners() -> None:
    image = torch.full((1, 16, 16, 16), 0.7)
    logits = predict_logits([Centre()], image, patch=(16, 16, 16), rules=EXACT)  # type: ignore[list-item]
    assert (float(logits[0, 0, 0, 0]), float(logits[0, 8, 8, 8])) == (1.0, pytest.approx(0.7, abs=1e-3))


def test_the_exact_form_computes_empty_tiles() -> None:
    network = build_network(tiny_plan()).eval()
    logits = predict_logits([network], torch.zeros(2, 16, 16, 16), patch=(16, 16, 16), rules=EXACT)
    with torch.no_grad():
        assert float((logits.float() - network(torch.zeros(1, 2, 16, 16, 16))[0])[:, 8, 8, 8].abs().max()) < 2e-3


def test_models_of_v1_average_probabilities_over_mirrors_tiles_and_folds() -> None:
    torch.manual_seed(4)
    networks = [build_network(tiny_plan()).eval() for _ in range(2)]
    image = torch.randn(2, 16, 16, 24)
    answer = predict_logits(networks, image, patch=(16, 16, 16), mirror_axes=(0,), rules=V1)
    delta = np.zeros((16, 16, 16))
    delta[8, 8, 8] = 1
    bell = ndimage.gaussian_filter(delta, 2.0, mode="constant")
    bell = np.maximum(bell / bell.max(), (bell / bell.max())[bell > 0].min())
    total, norm = np.zeros((2, 16, 16, 24)), np.zeros(24)
    for start in (0, 8):
        tile = image[..., start : start + 16][None]
        with torch.no_grad():
            pairs = [(n(tile).softmax(1), n(tile.flip(2)).softmax(1).flip(2)) for n in networks]
        mean = torch.stack([p for pair in pairs for p in pair]).mean(0)[0].double().numpy()
        total[..., start : start + 16] += mean * bell
        norm = np.broadcast_to(norm, (16, 16, 24)).copy()
        norm[..., start : start + 16] += bell
    np.testing.assert_allclose(answer.numpy(), total / norm, atol=1e-5)
    np.testing.assert_allclose(answer.sum(0).numpy(), 1, atol=1e-5)


def test_one_tile_of_v1_is_not_weighted() -> None:
    network = build_network(tiny_plan()).eval()
    image = torch.randn(2, 16, 16, 16, generator=torch.Generator().manual_seed(5))
    answer = predict_logits([network], image, patch=(16, 16, 16), rules=V1)
    with torch.no_grad():
        assert torch.equal(answer, network(image[None]).softmax(1)[0])


def test_empty_tiles_of_v1_are_background() -> None:
    network = build_network(tiny_plan()).eval()
    answer = predict_logits([network], torch.zeros(2, 16, 16, 40), patch=(16, 16, 16), rules=V1)
    assert (answer[0] == 1).all()
    assert (answer[1] == 0).all()
