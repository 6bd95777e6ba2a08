"""A recording beside other threads, with a stand-in for CUDA's graphs; on a GPU: tests/gpu/test_step.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from strokenet.model.recording import record


class Graph:
    """Computes anew in each replay, into the tensor that the recorded computation answered with."""

    def __init__(self) -> None:
        self.how: dict[str, object] = {}
        self.again = lambda: None

    def replay(self) -> None:
        self.again()


@contextmanager
def capturing(graph: Graph, **how: object) -> Iterator[None]:
    graph.how = how
    yield


def test_a_replay_answers_new_inputs_and_other_threads_may_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = Graph()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", capturing)

    def total(one: Tensor, other: Tensor) -> Tensor:
        result = one + other
        graph.again = lambda: torch.add(one, other, out=result)  # type: ignore[assignment,return-value]
        return result

    ones = torch.ones(2)
    replay = record(total, ones, ones)
    first, second = replay(ones, 2 * ones), replay(3 * ones, ones)
    assert graph.how == {"stream": None, "capture_error_mode": "thread_local"}
    assert first.tolist() == [3.0, 3.0]  # the second replay has not written over it
    assert second.tolist() == [4.0, 4.0]
    assert ones.tolist() == [1.0, 1.0]
