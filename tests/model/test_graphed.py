"""Recordings of a network: when they are made, when they answer, and what happens where none can be made."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from strokenet.model.graphed import Graphed
from strokenet.model.inference import InferenceNetwork
from strokenet.model.network import build_network
from strokenet.model.recording import Replay
from tests.plans import tiny_plan

PATCH = tiny_plan().patch


@pytest.fixture
def network() -> InferenceNetwork:
    torch.manual_seed(0)
    return InferenceNetwork(build_network(tiny_plan()), torch.float32, torch.device("cpu"))


def tiles(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 2, *PATCH, generator=torch.Generator().manual_seed(seed))


class Recorder:
    """Stands for a GPU: what it records answers with twice the network's logits, so that a replay shows."""

    def __init__(self, error: Exception | None = None):
        self.shapes: list[int] = []
        self.error = error

    def __call__(self, network: InferenceNetwork, x: Tensor) -> Replay:
        self.shapes.append(len(x))
        if self.error:
            raise self.error
        return lambda x: 2 * network(x)


@torch.inference_mode()
def test_the_second_batch_of_a_shape_is_recorded_and_all_after_it_replayed(network: InferenceNetwork) -> None:
    recorder = Recorder()
    graphed = Graphed(network, recorder)
    expected = network(tiles(2))
    assert torch.equal(graphed(tiles(2)), expected)
    assert recorder.shapes == []
    for _ in range(3):
        assert torch.equal(graphed(tiles(2)), 2 * expected)
    assert torch.equal(graphed(tiles(1)), network(tiles(1)))  # another shape begins anew
    assert recorder.shapes == [2]
    graphed(tiles(1))
    assert recorder.shapes == [2, 1]


@torch.inference_mode()
def test_what_is_forgotten_is_recorded_again(network: InferenceNetwork) -> None:
    recorder = Recorder()
    graphed = Graphed(network, recorder)
    for _ in range(3):
        graphed(tiles(1))
    graphed.forget()
    assert torch.equal(graphed(tiles(1)), network(tiles(1)))
    graphed(tiles(1))
    assert recorder.shapes == [1, 1]


@torch.inference_mode()
def test_where_none_can_be_made_the_network_runs_and_it_is_said_once(
    network: InferenceNetwork, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder(RuntimeError("operation not permitted when stream is capturing\nmore"))
    graphed = Graphed(network, recorder)
    with caplog.at_level(logging.WARNING, "strokenet"):
        answers = [graphed(tiles(count)) for count in (1, 1, 1, 2, 2)]
    assert torch.equal(answers[-1], network(tiles(2)))
    assert recorder.shapes == [1]
    assert [message.endswith("when stream is capturing") for message in caplog.messages] == [True]


@torch.inference_mode()
def test_memory_that_runs_out_is_the_engines_matter(network: InferenceNetwork) -> None:
    graphed = Graphed(network, Recorder(torch.OutOfMemoryError("CUDA out of memory")))
    graphed(tiles(1))
    with pytest.raises(torch.OutOfMemoryError):
        graphed(tiles(1))
