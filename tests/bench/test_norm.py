"""The norm suite: it compares before it times, and times only the fast form."""

from __future__ import annotations

import pytest
import torch

from bench import norm
from bench.ceilings import Ceilings

CPU = torch.device("cpu")
SHAPE = (1, 8, 4, 5, 6)


@pytest.mark.parametrize("dtype", norm.TOLERANCES)
def test_ours_comes_first_and_every_layout_of_torch_beside_it(dtype: torch.dtype) -> None:
    with torch.inference_mode():
        measured = norm.one(SHAPE, dtype, CPU)
    assert list(measured.times_ms)[:2] == ["strokenet, in place", "strokenet"]
    assert {"torch, contiguous", "torch, channels last", norm.GROUP_NORM} <= set(measured.times_ms)
    assert measured.answers.startswith("operator; largest errors: strokenet")
    assert measured.what == f"{SHAPE} {str(dtype).removeprefix('torch.')}"


@pytest.mark.parametrize("dtype", norm.TOLERANCES)
def test_the_step_of_training_is_measured_beside_every_layout_of_torch(dtype: torch.dtype) -> None:
    measured = norm.one_with_gradients(SHAPE, dtype, CPU)
    assert list(measured.times_ms)[:2] == ["strokenet, in place", "strokenet"]
    assert {"torch, contiguous", "torch, channels last", norm.GROUP_NORM} <= set(measured.times_ms)
    assert measured.answers.startswith("operator; errors of dx in its norm: strokenet")
    whats = [comparison.what for comparison in norm.comparisons(quick=True)]
    assert len(set(whats)) == len(whats) == 8
    assert measured.what.endswith(norm.WITH_GRADIENTS)


def test_a_wrong_gradient_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        norm, "instance_norm_act", lambda x, *given, **_: x * given[0][:, None, None, None] + given[1].sum()
    )
    monkeypatch.setattr(norm, "in_turn", None)
    with pytest.raises(AssertionError, match="error"):
        norm.one_with_gradients(SHAPE, torch.float32, CPU)


def test_a_map_that_a_cache_may_hold_has_no_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm, "ceilings", lambda *_: Ceilings(flops=1.0, bytes=1e6))
    assert norm.one(SHAPE, torch.float32, CPU).floor_ms is None
    monkeypatch.setattr(norm, "OUT_OF_CACHE", 0)
    assert norm.one(SHAPE, torch.float32, CPU).floor_ms == 1000 * 2 * 4 * 960 / 1e6


def test_a_wrong_answer_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm, "instance_norm_act", lambda x, *_, **__: x)
    monkeypatch.setattr(norm, "in_turn", None)
    with torch.inference_mode(), pytest.raises(AssertionError, match="largest error"):
        norm.one(SHAPE, torch.float32, CPU)


def test_the_reference_is_not_timed_as_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STROKENET_KERNELS", "reference")
    with torch.inference_mode(), pytest.raises(AssertionError, match="STROKENET_KERNELS"):
        norm.one(SHAPE, torch.float32, CPU)
