"""Intensity operations: against scipy, scikit-image's rules, the batchgenerators package, and their own definitions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from batchgenerators.augmentations.color_augmentations import augment_contrast, augment_gamma
from scipy import ndimage
from torch import Tensor

from strokenet.train import intensity


def rows(count: int = 3, shape: tuple[int, int, int] = (9, 11, 10)) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))


def changed(operation: Callable[..., Tensor], image: Tensor, parameters: Iterable[Any], **options: Any) -> Tensor:
    """Each row of a copy changed in place by its own parameter."""
    copy = image.clone()
    for row, parameter in zip(copy, parameters, strict=True):
        assert operation(row, parameter, **options).data_ptr() == row.data_ptr()
    return copy


def test_noise_has_the_given_deviation_and_is_repeated_by_its_seed() -> None:
    first, second = (intensity.noise(torch.zeros(2, 40, 40, 40), 0.08, seed) for seed in (5, 6))
    assert float(first.std()) == pytest.approx(0.08, rel=0.02)
    assert torch.equal(first, intensity.noise(torch.zeros_like(first), 0.08, 5))
    assert not torch.equal(first, second)
    assert abs(float(torch.corrcoef(first.flatten(1))[0, 1])) < 0.02  # channels are independent


def test_blur_is_a_truncated_gaussian_with_mirrored_borders() -> None:
    sigmas = [(0.5, 0.8, 1.0), (0.55, 0.75, 0.95), (1.0, 0.5, 0.6)]
    lengths = {0.5: 3, 0.55: 3, 0.6: 5, 0.75: 5, 0.8: 5, 0.95: 7, 1.0: 7}  # nearest odd to 6 sigma + 0.5
    image = rows()
    ours = changed(intensity.blur, image, sigmas)
    for row, sigma, blurred in zip(image, sigmas, ours, strict=True):
        expected = row.numpy().astype(np.float64)
        for axis in range(3):
            reach = lengths[sigma[axis]] // 2
            kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma[axis]) ** 2)
            expected = ndimage.correlate1d(expected, kernel / kernel.sum(), axis=axis, mode="mirror")
        assert np.abs(blurred.numpy() - expected).max() < 1e-5


def test_blur_survives_an_axis_shorter_than_its_kernel() -> None:
    image = rows(1, (1, 2, 8))
    blurred = changed(intensity.blur, image, [(1.0, 1.0, 1.0)])
    assert blurred.shape == image.shape
    assert bool(torch.isfinite(blurred).all())


def test_brightness_multiplies_each_row_by_its_own_factor() -> None:
    image = rows()
    ours = changed(intensity.brightness, image, [0.8, 1.0, 1.2])
    assert torch.allclose(ours, torch.stack([image[0] * 0.8, image[1], image[2] * 1.2]))


@pytest.mark.parametrize("factor", [0.75, 0.9, 1.1, 1.25])
def test_contrast_equals_batchgenerators(factor: float) -> None:
    image = rows()
    expected = augment_contrast(image.numpy().copy(), contrast_range=lambda: factor)
    assert np.abs(changed(intensity.contrast, image, [factor] * 3).numpy() - expected).max() < 1e-5


@pytest.mark.parametrize("exponent", [1.0, 1.2, 1.5])
@pytest.mark.parametrize("inverted", [False, True])
def test_gamma_equals_batchgenerators(exponent: float, inverted: bool) -> None:
    image = rows()
    draws = iter([0.9] * 3)  # the package asks "below one?" first: no
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np.random, "random", lambda: next(draws))
        expected = augment_gamma(
            image.numpy().copy(), gamma_range=(exponent, exponent), invert_image=inverted, per_channel=True,
            retain_stats=True,
        )  # fmt: skip
    ours = changed(intensity.gamma, image, [exponent] * 3, inverted=inverted).numpy()
    assert np.abs(ours - expected).max() < 1e-4


def test_gamma_below_one_lifts_the_dark_side_and_keeps_mean_and_deviation() -> None:
    image = rows()
    ours = changed(intensity.gamma, image, [0.7, 0.8, 0.9], inverted=False)
    assert torch.allclose(ours.mean((1, 2, 3)), image.mean((1, 2, 3)), atol=1e-5)
    assert torch.allclose(ours.std((1, 2, 3)), image.std((1, 2, 3)), rtol=1e-4)
    assert bool((ours.median() > image.median()).all())


def test_gamma_of_a_constant_row_is_that_row() -> None:
    flat = torch.full((1, 4, 4, 4), 2.5)
    assert torch.allclose(changed(intensity.gamma, flat, [0.7], inverted=False), flat)


def test_low_resolution_takes_nearest_voxels_and_enlarges_them_linearly() -> None:
    image = rows(1, (10, 10, 10))
    ours = changed(intensity.low_resolution, image, [0.5], keep_axis_0=False)[0].numpy()
    small = image[0].numpy()[1::2, 1::2, 1::2]  # half-pixel centres at 0.5, 2.5 ..: the upper neighbour is taken
    expected = ndimage.zoom(small.astype(np.float64), 2, order=1, mode="nearest", grid_mode=True)
    assert np.abs(ours - expected).max() < 1e-5


def test_low_resolution_leaves_the_slices_of_flat_patches_alone() -> None:
    image = rows(1, (3, 12, 12))
    image[0, 1] = 0
    ours = changed(intensity.low_resolution, image, [0.5], keep_axis_0=True)
    assert bool((ours[0, 1] == 0).all())
    assert bool((ours[0, 0] != image[0, 0]).any())
