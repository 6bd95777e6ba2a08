"""Which shape, which axis apart, and the two ways of resampling."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from batchgenerators.augmentations.utils import resize_segmentation
from skimage.transform import resize

from strokenet.data.errors import InputError
from strokenet.preprocess.resample import new_shape, resample_image, resample_label, separate_axis

ISOTROPIC, THICK = (1.0, 1.0, 1.0), (5.0, 1.0, 1.0)


def test_a_new_shape_is_rounded_half_to_even() -> None:
    assert new_shape((5, 7, 10), (1.0, 1.0, 0.9), (2.0, 2.0, 1.0)) == (2, 4, 9)


def test_a_thin_volume_keeps_one_voxel() -> None:
    assert new_shape((1, 1, 4), (0.4, 1.0, 1.0), (1.0, 3.0, 1.0)) == (1, 1, 4)


def test_an_absurd_size_is_refused_with_the_numbers() -> None:
    with pytest.raises(InputError, match=r"shape \(512, 512, 512\) at \(900.0, 1.0, 1.0\) mm becomes \(921600"):
        new_shape((512, 512, 512), (900.0, 1.0, 1.0), (0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    ("current", "new", "axis"),
    [
        ((3.0, 1.0, 1.0), ISOTROPIC, None),  # exactly 3 is not above it
        ((3.01, 1.0, 1.0), ISOTROPIC, 0),
        ((1.0, 1.0, 5.0), ISOTROPIC, 2),
        (ISOTROPIC, (1.0, 5.0, 1.0), 1),
        ((1.0, 5.0, 1.0), (5.0, 1.0, 1.0), 1),  # the current grid decides first
        ((0.24, 1.25, 1.25), (5.0, 1.0, 1.0), None),  # two coarsest axes: none, whatever the new grid says
        (ISOTROPIC, ISOTROPIC, None),
    ],
)
def test_the_axis_that_is_resampled_apart(
    current: tuple[float, float, float], new: tuple[float, float, float], axis: int | None
) -> None:
    assert separate_axis(current, new) == axis


def test_an_unchanged_shape_is_returned_as_it_is_whatever_the_spacings() -> None:
    image, label = torch.ones(1, 3, 4, 5), np.ones((3, 4, 5), np.int16)
    assert resample_image(image, (3, 4, 5), THICK, ISOTROPIC) is image
    assert resample_label(label, (3, 4, 5), THICK, ISOTROPIC) is label


def test_without_anisotropy_the_volume_is_interpolated_as_a_whole() -> None:
    image = np.random.default_rng(0).normal(size=(1, 6, 7, 8)).astype(np.float32)
    expected = resize(image[0].astype(float), (9, 5, 8), 3, mode="edge", anti_aliasing=False)
    resampled = resample_image(torch.from_numpy(image), (9, 5, 8), ISOTROPIC, (0.7, 1.4, 1.0))
    np.testing.assert_allclose(resampled[0], expected, atol=1e-6)


@pytest.mark.parametrize(("axis", "edge"), [(0, 11), (1, 3), (2, 8)])
def test_an_anisotropic_axis_takes_the_nearest_slice_of_in_plane_images(axis: int, edge: int) -> None:
    rng = np.random.default_rng(axis)
    image = rng.normal(size=(1, 6, 7, 8)).astype(np.float32)
    label = rng.integers(-1, 3, (6, 7, 8)).astype(np.int16)
    shape, current = [10, 10, 10], [1.0, 1.0, 1.0]
    shape[axis], current[axis] = edge, 4.0
    in_plane = tuple(n for a, n in enumerate(shape) if a != axis)
    old_edge = label.shape[axis]
    slices = [
        resize(s.astype(float), in_plane, 3, mode="edge", anti_aliasing=False) for s in np.moveaxis(image[0], axis, 0)
    ]
    parts = [resize_segmentation(s, in_plane, 1) for s in np.moveaxis(label, axis, 0)]
    source = np.clip(np.floor(old_edge / edge * (np.arange(edge) + 0.5)), 0, old_edge - 1).astype(int)
    whole = (shape[0], shape[1], shape[2])
    spacing = (current[0], current[1], current[2])
    resampled = resample_image(torch.from_numpy(image), whole, spacing, ISOTROPIC)
    np.testing.assert_allclose(resampled[0], np.stack(slices, axis).take(source, axis), atol=1e-6)
    np.testing.assert_array_equal(
        resample_label(label, whole, spacing, ISOTROPIC), np.stack(parts, axis).take(source, axis)
    )
