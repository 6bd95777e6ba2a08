"""The phases of a training step: forward with loss, backward, optimiser; the same clock for ours and the peers.

Every side calls Tensor.backward once a step: before it come the forward pass and the loss, after it clipping, scaler
and optimiser. On a GPU its own events mark the borders, so that nothing waits for the clock. A step that makes no such
call (a CUDA graph) has no phases.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.remote import Turn

NAMES = ("forward", "backward", "optimiser")


class Phases:
    """Marks of the steps of one turn."""

    def __init__(self, device: torch.device):
        self._gpu = device.type == "cuda"
        self._steps: list[list[Any]] = []

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around one step."""
        backward, marks = Tensor.backward, [self._now()]

        def marked(tensor: Tensor, *given: Any, **named: Any) -> None:
            marks.append(self._now())
            backward(tensor, *given, **named)  # type: ignore[no-untyped-call]
            marks.append(self._now())

        with mock.patch.object(Tensor, "backward", marked):
            yield
        marks.append(self._now())
        self._steps.append(marks)

    def means_ms(self) -> dict[str, float]:
        """A phase's mean over the steps; nothing where a step had none. On a GPU all must be computed."""
        if any(len(marks) != len(NAMES) + 1 for marks in self._steps):
            return {}
        spans = [[self._between(*pair) for pair in itertools.pairwise(marks)] for marks in self._steps]
        return {name: sum(of) / len(of) for name, of in zip(NAMES, zip(*spans, strict=True), strict=True)}

    def _now(self) -> Any:
        if not self._gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _between(self, first: Any, second: Any) -> float:
        return float(first.elapsed_time(second)) if self._gpu else 1000 * (second - first)


def timed_steps(step: Callable[[], object], device: torch.device) -> Callable[[int], Turn]:
    """A turn of so many steps back to back, the GPU waited for at both ends."""

    def turn(count: int) -> Turn:
        phases = Phases(device)
        wait_for(device)
        began = time.perf_counter()
        for _ in range(count):
            with phases.step():
                step()
        wait_for(device)
        return Turn(ms=1000 * (time.perf_counter() - began) / count, parts_ms=phases.means_ms())

    return turn


def wait_for(device: torch.device) -> None:
    """Until a GPU has computed what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
