"""Every normalisation scheme against numbers worked out by hand."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch

from planner.plan import IntensityStats, Normalisation, NormaliseWhen, Plan
from strokenet.data.errors import InputError
from strokenet.preprocess.normalise import normalise
from tests.plans import tiny_plan

STATS = IntensityStats(mean=10, std=4, min=0, max=50, median=9, percentile_00_5=2, percentile_99_5=20)
X = np.array([0, 2, 4, 6, 8, 40], np.float32).reshape(1, 1, 2, 3)
INSIDE = np.array([0, 1, 1, 1, 1, 0], bool).reshape(1, 2, 3)


def normalised(x: np.ndarray, inside: np.ndarray, plan: Plan) -> np.ndarray:
    return normalise(torch.from_numpy(x), torch.from_numpy(inside), plan).numpy()


def _run(scheme: Normalisation, *, x: np.ndarray = X, inside: np.ndarray = INSIDE, mask: bool = False) -> np.ndarray:
    plan = tiny_plan(channels=("T1",), normalisation=(scheme,), use_mask_for_norm=(mask,), intensity=(STATS,))
    before = x.copy()
    y = normalised(x, inside, plan)
    np.testing.assert_array_equal(x, before)  # the given image is left alone
    assert y.dtype == np.float32
    assert y.shape == x.shape
    return y


def test_zscore_takes_the_population_std_of_the_whole_crop() -> None:
    expected = (X - 10) / np.sqrt((100 + 64 + 36 + 16 + 4 + 900) / 6)
    np.testing.assert_allclose(_run("zscore"), expected, rtol=1e-6)


def test_masked_zscore_measures_inside_and_leaves_the_outside() -> None:
    expected = [0, *((np.array([2, 4, 6, 8]) - 5) / np.sqrt(5)), 40]
    np.testing.assert_allclose(_run("zscore", mask=True).ravel(), expected, rtol=1e-6)


def test_zscore_of_a_constant_is_zero() -> None:
    assert not _run("zscore", x=np.full_like(X, 7)).any()


def test_masked_zscore_of_an_empty_mask_changes_nothing() -> None:
    np.testing.assert_array_equal(_run("zscore", inside=np.zeros_like(INSIDE), mask=True), X)


def test_zscore_of_a_large_offset_keeps_its_digits() -> None:
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(1, 40, 40, 40)) + 1e4).astype(np.float32)
    y = _run("zscore", x=x, inside=np.ones(x.shape[1:], bool))
    exact = (x.astype(float) - x.mean(dtype=float)) / x.std(dtype=float)
    assert np.abs(y - exact).max() < 1e-3  # float32 holds 1e4 to 5e-4


def test_ct_clips_and_scales_by_the_dataset() -> None:
    np.testing.assert_allclose(_run("ct").ravel(), [-2, -2, -1.5, -1, -0.5, 2.5])


def test_none_changes_nothing() -> None:
    np.testing.assert_array_equal(_run("none"), X)


def test_rescale_goes_from_0_to_1() -> None:
    np.testing.assert_allclose(_run("rescale_to_0_1", x=X - 5).ravel(), np.array([0, 2, 4, 6, 8, 40]) / 40)
    assert not _run("rescale_to_0_1", x=np.full_like(X, 3)).any()


def test_rgb_divides_by_255_and_refuses_what_is_no_rgb() -> None:
    np.testing.assert_allclose(_run("rgb_to_0_1"), X / 255)
    with pytest.raises(InputError, match=r"channel T1 has values 0 \.\. 400"):
        _run("rgb_to_0_1", x=X * 10)


@pytest.mark.parametrize("scheme", ["zscore", "ct"])
def test_after_resampling_a_masked_scheme_is_zero_outside(scheme: Normalisation) -> None:
    """nnU-Net v1 normalises last and empties the outside, which cubic resampling has filled with ripples."""
    v2 = _run(scheme, mask=True)
    plan = tiny_plan(
        channels=("T1",),
        normalisation=(scheme,),
        use_mask_for_norm=(True,),
        intensity=(STATS,),
        normalise="after-resampling",
    )
    y = normalised(X, INSIDE, plan)
    assert not y[:, ~INSIDE].any()
    np.testing.assert_array_equal(y[:, INSIDE], v2[:, INSIDE])


def test_without_a_mask_the_order_changes_nothing_outside() -> None:
    plan = tiny_plan(
        channels=("T1",),
        normalisation=("zscore",),
        use_mask_for_norm=(False,),
        intensity=(None,),
        normalise="after-resampling",
    )
    np.testing.assert_array_equal(normalised(X, INSIDE, plan), _run("zscore"))


def test_a_channel_that_is_not_normalised_keeps_its_outside_in_either_order() -> None:
    for when in get_args(NormaliseWhen):
        plan = tiny_plan(
            channels=("T1",), normalisation=("none",), use_mask_for_norm=(True,), intensity=(None,), normalise=when
        )
        np.testing.assert_array_equal(normalised(X, INSIDE, plan), X)
