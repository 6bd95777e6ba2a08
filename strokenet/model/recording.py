"""Recording: what a computation launches on an NVIDIA GPU, written down once and then started as one (CUDA graphs).

For what is computed again and again on tensors of one shape: the host's part of it, a thousand calls, is done once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Replay = Callable[..., Tensor]


def record(compute: Callable[..., Tensor], *inputs: Tensor, stream: torch.cuda.Stream | None = None) -> Replay:
    """Records `compute` on inputs of these shapes; nothing is computed. -> a call with any inputs of these shapes.

    Other threads may use the GPU meanwhile, on streams of their own, and are not recorded. By CUDA's default a request
    for memory of theirs would fail, and the recording with it.

    Args:
        compute: must have run before, on `stream` and in this thread: what it compiles or searches cannot be recorded.
        stream: to record on; None: torch's own for that.

    Raises:
        RuntimeError: something in it cannot be recorded, such as a number read by the host, or memory ran out.
    """
    held = tuple(tensor.clone() for tensor in inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        result = compute(*held)

    def replay(*inputs: Tensor) -> Tensor:
        for kept, given in zip(held, inputs, strict=True):
            kept.copy_(given)
        graph.replay()
        return result.clone()  # the next replay writes over it

    return replay
