"""The clock of a step: its borders are the call of backward, and a step without one has no phases."""

from __future__ import annotations

import time

import pytest
import torch

from bench.phases import Phases, timed_steps

CPU = torch.device("cpu")


def test_what_lies_before_in_and_after_backward_is_told_apart() -> None:
    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(context: object, x: torch.Tensor) -> torch.Tensor:
            time.sleep(0.02)
            return x.clone()

        @staticmethod
        def backward(context: object, gradient: torch.Tensor) -> torch.Tensor:
            time.sleep(0.06)
            return gradient

    x = torch.ones(1, requires_grad=True)

    def step() -> None:
        Slow.apply(x).sum().backward()
        time.sleep(0.1)

    turn = timed_steps(step, CPU)(2)
    assert list(turn.parts_ms) == ["forward", "backward", "optimiser"]
    forward, backward, optimiser = turn.parts_ms.values()
    assert 20 <= forward < backward < optimiser
    assert backward >= 60
    assert turn.ms == pytest.approx(forward + backward + optimiser, abs=5)
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full((1,), 2.0))


def test_a_step_that_calls_no_backward_has_no_phases() -> None:
    assert timed_steps(lambda: None, CPU)(3).parts_ms == {}


def test_after_a_step_backward_is_torchs_own_again() -> None:
    before = torch.Tensor.backward
    with pytest.raises(ZeroDivisionError), Phases(CPU).step():
        raise ZeroDivisionError
    assert torch.Tensor.backward is before
