"""How steps are started: read at once on the CPU; recorded after a few, by a stand-in for the GPU."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from strokenet.train.feed import Batch
from strokenet.train.launch import EAGER_STEPS, Outcome, Recorded, StepsAtOnce
from strokenet.train.step import Compute, set_rate


def loss_of(image: Tensor, label: Tensor) -> Tensor:
    return torch.stack([image.sum(), torch.tensor(1.0)])


def images(size: int = 2) -> tuple[Tensor, Tensor]:
    return torch.ones(size), torch.zeros(size)


def sgd() -> torch.optim.SGD:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.01)


class Recorder:
    """Stands for a GPU: a replay answers -1, so that it shows."""

    def __init__(self, error: Exception | None = None):
        self.count, self.error = 0, error

    def __call__(
        self, compute: Compute, image: Tensor, label: Tensor, stream: object
    ) -> Callable[[Tensor, Tensor], Tensor]:
        self.count += 1
        if self.error:
            raise self.error
        return lambda image, label: torch.tensor([-1.0, 1.0])


def test_a_step_on_the_cpu_is_read_when_its_call_ends() -> None:
    steps = StepsAtOnce(loss_of, sgd())
    batch = Batch(image=torch.ones(3), label=torch.zeros(3), cases=("a",))
    assert steps(batch, 7) == [Outcome(number=7, cases=("a",), loss=3.0, good=True)]
    assert steps.rest() == []


def test_the_first_steps_are_computed_and_all_others_replayed() -> None:
    recorder = Recorder()
    recorded = Recorded(loss_of, sgd(), recorder)
    losses = [float(recorded(*images())[0]) for _ in range(EAGER_STEPS + 3)]
    assert losses == [2.0] * EAGER_STEPS + [-1.0] * 3
    assert recorder.count == 1


def test_what_is_forgotten_is_recorded_anew_after_one_step_more() -> None:
    recorder = Recorder()
    recorded = Recorded(loss_of, sgd(), recorder)
    for _ in range(EAGER_STEPS + 1):
        recorded(*images())
    recorded.forget()
    assert [float(recorded(*images())[0]) for _ in range(3)] == [2.0, -1.0, -1.0]
    assert recorder.count == 2


def test_a_batch_of_another_shape_is_computed() -> None:
    recorded = Recorded(loss_of, sgd(), Recorder())
    for _ in range(EAGER_STEPS + 1):
        recorded(*images())
    assert float(recorded(*images(5))[0]) == 5.0
    assert float(recorded(*images())[0]) == -1.0


def test_what_hinders_a_recording_is_said_once_and_done_without(caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder(RuntimeError("operation not permitted when stream is capturing\nmore"))
    recorded = Recorded(loss_of, sgd(), recorder)
    with caplog.at_level(logging.WARNING, "strokenet"):
        losses = [float(recorded(*images())[0]) for _ in range(EAGER_STEPS + 3)]
    assert losses == [2.0] * (EAGER_STEPS + 3)
    assert recorder.count == 1
    assert caplog.messages == [
        "a step cannot be recorded as a CUDA graph and runs without: operation not permitted when stream is capturing"
    ]


def test_a_recording_reads_the_learning_rate_that_is_set_later() -> None:
    optimizer = sgd()
    Recorded(loss_of, optimizer, Recorder())
    (group,) = optimizer.param_groups
    held = group["lr"]
    set_rate(optimizer, 0.005)
    assert group["lr"] is held
    assert float(held) == pytest.approx(0.005)
