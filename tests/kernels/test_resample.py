"""Resampling against scikit-image, scipy and batchgenerators, whose interpolation it must reproduce."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from batchgenerators.augmentations.utils import resize_segmentation
from skimage.transform import resize

from kernels import resample as R
from kernels.dispatch import choose_resample

SHAPES = [
    ((9, 13, 7), (18, 13, 5)),
    ((150, 6, 5), (201, 5, 9)),  # several blocks of rows along the first axis
    ((6, 5, 201), (3, 7, 150)),
    ((5, 131, 4), (5, 90, 4)),
    ((1, 7, 2), (3, 1, 5)),
]


def _image(shape: tuple[int, int, int], channels: int = 2) -> np.ndarray:
    rng = np.random.default_rng(sum(shape))
    return (rng.normal(size=(channels, *shape)) * [[[[1.0]]], [[[300.0]]]][:channels]).astype(np.float32)


def _skimage(image: np.ndarray, shape: tuple[int, ...], order: int) -> np.ndarray:
    return np.stack([resize(c.astype(float), shape, order, mode="edge", anti_aliasing=False) for c in image])


@pytest.fixture
def coarse_products() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("order", [0, 1, 3])
@pytest.mark.parametrize(("old", "new"), SHAPES)
def test_images_equal_scikit_image(old: tuple[int, int, int], new: tuple[int, int, int], order: R.Order) -> None:
    image = _image(old)
    resized = R.resample(torch.from_numpy(image), new, order=order).numpy()
    assert resized.dtype == np.float32
    expected = _skimage(image, new, order)
    spread = np.ptp(image, axis=(1, 2, 3), keepdims=True)
    assert (np.abs(resized - expected) / spread).max() < 1e-7


@pytest.mark.usefixtures("coarse_products")
def test_the_precision_switches_of_training_do_not_reach_it() -> None:
    image = _image((40, 33, 21), channels=1)
    resized = R.resample(torch.from_numpy(image), (50, 20, 30), order=3).numpy()
    assert np.abs(resized - _skimage(image, (50, 20, 30), 3)).max() < 1e-6


def test_linear_weights_lie_on_the_half_pixel_grid() -> None:
    expected = [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]]
    np.testing.assert_allclose(R.axis_matrix(2, 4, 1), expected, atol=1e-15)


@pytest.mark.parametrize("order", [0, 1, 3])
def test_a_constant_stays_constant(order: R.Order) -> None:
    np.testing.assert_allclose(R.axis_matrix(11, 29, order).sum(1), 1, atol=1e-12)


def test_nothing_overshoots_the_range_of_its_channel() -> None:
    step = np.zeros((1, 8, 8, 8), np.float32)
    step[:, 4:] = 1000
    resized = R.resample(torch.from_numpy(step), (19, 19, 19), order=3).numpy()
    assert (resized.min(), resized.max()) == (0, 1000)
    assert R.axis_matrix(8, 19, 3).min() < 0  # it would have overshot


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slices_are_images_of_their_own(axis: int) -> None:
    image = _image((6, 7, 8))
    shape = [11, 12, 13]
    shape[axis] = image.shape[1 + axis]
    resized = R.resample(torch.from_numpy(image), (shape[0], shape[1], shape[2]), order=3, slice_axis=axis).numpy()
    in_plane = tuple(n for a, n in enumerate(shape) if a != axis)
    for i in range(shape[axis]):
        expected = _skimage(image.take(i, 1 + axis), in_plane, 3)
        np.testing.assert_allclose(resized.take(i, 1 + axis), expected, rtol=1e-6, atol=1e-4)


def test_a_slice_axis_cannot_change_its_size() -> None:
    with pytest.raises(ValueError, match="slices along axis 0"):
        R.resample(torch.from_numpy(_image((6, 7, 8))), (7, 7, 9), order=3, slice_axis=0)


@pytest.mark.parametrize("slice_axis", [None, 1])
def test_the_reference_is_chosen_by_the_environment(monkeypatch: pytest.MonkeyPatch, slice_axis: int | None) -> None:
    image = torch.from_numpy(_image((9, 8, 7)))
    fast = R.resample(image, (12, 8, 10), order=3, slice_axis=slice_axis)
    monkeypatch.setenv("STROKENET_KERNELS", "reference")
    monkeypatch.setattr(R, "resample_operator", None)  # proves that it does not run
    assert choose_resample().implementation == "reference"
    plain = R.resample(image, (12, 8, 10), order=3, slice_axis=slice_axis)
    torch.testing.assert_close(fast, plain, rtol=1e-6, atol=1e-4)


def test_type_is_kept_and_an_unchanged_shape_returns_the_image_itself() -> None:
    image = torch.rand(1, 5, 6, 7, dtype=torch.float16)
    assert R.resample(image, (5, 6, 7), order=3) is image
    assert R.resample(image, (6, 6, 7), order=1).dtype == torch.float16


def _random_label(rng: np.random.Generator) -> tuple[np.ndarray, tuple[int, int, int]]:
    """A label map of 1 to 9 voxels an axis and a new shape: integer factors half of the time, for ties."""
    shape = rng.integers(1, 10, 3)
    label = rng.integers(-1, rng.integers(1, 5), shape).astype(np.int16)
    if rng.random() < 0.5:
        factors = rng.choice([2, 3, 1.5, 0.5, 1 / 3, 2 / 3, 1, 4], 3)
        new = np.maximum(1, np.round(shape * factors)).astype(int)
    else:
        new = rng.integers(1, 16, 3)
    return label, (int(new[0]), int(new[1]), int(new[2]))


def test_labels_equal_batchgenerators_ties_included() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        label, shape = _random_label(rng)
        np.testing.assert_array_equal(R.resize_labels(label, shape), resize_segmentation(label, shape, 1))


def test_labels_equal_their_definition() -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        label, shape = _random_label(rng)
        np.testing.assert_array_equal(R.resize_labels(label, shape), R.resize_labels_reference(label, shape))


def test_a_tie_without_the_nearest_label_goes_to_the_smallest() -> None:
    block = np.array([3, 1, 1, 1, 2, 2, 2, 3], np.int16).reshape(2, 2, 2)  # 1 and 2 score 3/8, 3 scores 2/8
    assert R.resize_labels(block, (1, 1, 1)).item() == 1


def test_a_tie_with_the_nearest_label_goes_to_it() -> None:
    label = np.array([2, 1], np.int16).reshape(1, 1, 2)
    assert R.resize_labels(label, (1, 1, 1)).item() == 1  # nearest is the later voxel
    assert R.resize_labels(label[..., ::-1], (1, 1, 1)).item() == 2


def test_order_0_takes_the_nearest_voxel() -> None:
    label = np.arange(24, dtype=np.int16).reshape(4, 3, 2)
    expected = resize(label.astype(float), (3, 5, 4), 0, mode="edge", anti_aliasing=False)
    np.testing.assert_array_equal(R.resize_labels(label, (3, 5, 4), order=0), expected)


def test_labels_keep_type_and_an_unchanged_shape() -> None:
    label = np.array([[[-1, 0, 1]]], np.int16)
    assert R.resize_labels(label, (1, 1, 3)) is label
    assert R.resize_labels(label, (1, 1, 6)).dtype == np.int16
    assert R.resize_labels(label, (1, 1, 6)).ravel().tolist() == [-1, -1, 0, 0, 1, 1]
