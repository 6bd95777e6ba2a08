"""Strides, kernels and stages, against examples followed by hand through the rule."""

from __future__ import annotations

import itertools

import pytest

from planner.plan import Triple
from planner.topology import topology


def _levels(text: str) -> tuple[Triple, ...]:
    """The levels of a text: 111 122 -> ((1, 1, 1), (1, 2, 2))."""
    return tuple((int(d), int(h), int(w)) for d, h, w in text.split())


def test_an_isotropic_patch_is_halved_until_four_voxels_are_left() -> None:
    shape = topology((1.0, 1.0, 1.0), (128, 128, 128))
    assert shape.strides == _levels("111 222 222 222 222 222")
    assert shape.kernels == _levels("333 333 333 333 333 333")
    assert shape.features == (32, 64, 128, 256, 320, 320)
    assert shape.divisor == (32, 32, 32)
    assert shape.stages == 6


def test_a_coarse_axis_waits_until_the_others_have_caught_up() -> None:
    shape = topology((4.2, 0.45, 0.45), (24, 256, 256))  # 0.45 -> 0.9 -> 1.8 -> 3.6: then 4.2 is under twice as coarse
    assert shape.strides == _levels("111 122 122 122 222 222 122")
    assert shape.kernels == _levels("133 133 133 333 333 333 333")
    assert shape.divisor == (4, 64, 64)


def test_exactly_twice_as_coarse_still_waits() -> None:
    assert topology((2.0, 1.0, 1.0), (32, 32, 32)).strides[1] == (1, 2, 2)
    assert topology((1.99, 1.0, 1.0), (32, 32, 32)).strides[1] == (2, 2, 2)


def test_a_kernel_that_has_grown_does_not_shrink_again() -> None:
    shape = topology((1.9, 1.0, 1.0), (8, 256, 256))  # axis 0 stops at 8 voxels; the others then outgrow it
    assert shape.strides == _levels("111 222 122 122 122 122 122")
    assert set(shape.kernels) == {(3, 3, 3)}


@pytest.mark.parametrize(("edge", "stages"), [(8, 1), (11, 1), (12, 2), (32, 3), (48, 4)])
def test_a_single_axis_needs_twelve_voxels(edge: int, stages: int) -> None:
    assert topology((1.0, 1.0, 1.0), (4, 4, edge)).stages == stages


def test_two_axes_need_eight_voxels() -> None:
    assert topology((1.0, 1.0, 1.0), (4, 8, 8)).strides == _levels("111 122")
    assert topology((1.0, 1.0, 1.0), (7, 7, 7)).stages == 1


def test_a_fractional_patch_is_rounded_up_to_what_the_strides_divide() -> None:
    shape = topology((1.0, 1.0, 1.0), (36, 50.5, 35))
    assert shape.divisor == (8, 8, 8)
    assert shape.patch == (40, 56, 40)


def test_every_patch_is_a_multiple_of_its_strides_and_keeps_four_voxels() -> None:
    spacings = itertools.product((0.5, 1.0, 3.0), repeat=3)
    for spacing, patch in itertools.product(spacings, itertools.product((5, 17, 60), repeat=3)):
        shape = topology(spacing, patch)
        for edge, wanted, divisor in zip(shape.patch, patch, shape.divisor, strict=True):
            assert edge % divisor == 0
            assert wanted <= edge < wanted + divisor
            assert edge // divisor >= min(wanted, 4)
        assert len(shape.kernels) == len(shape.strides)
