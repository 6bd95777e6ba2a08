"""Graphed: a network's launches recorded once for a shape of tiles, and replayed (CUDA graphs).

A forward is a hundred kernels and more, and the patch never changes: a recording starts them all at once, and Python
and the driver are no longer waited for. The first batch of a shape runs as ever (cuDNN looks for its convolutions then,
Triton compiles), the second one is recorded; a case of a single batch never pays for it. What is recorded keeps its
memory until `forget`, so that an engine that runs out of memory lets go of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from strokenet.model.device import is_out_of_memory
from strokenet.model.inference import InferenceNetwork
from strokenet.model.recording import Replay, record

_log = logging.getLogger("strokenet")


class Graphed:
    """A network by its recordings: (N, C, D, H, W) -> logits (N, K, D, H, W), the network's own."""

    def __init__(self, network: InferenceNetwork, recorder: Callable[..., Replay] = record):
        self.network, self.heads = network, network.heads
        self._recorder = recorder
        self._replays: dict[tuple[torch.Size, torch.dtype], Replay] = {}
        self._seen: set[tuple[torch.Size, torch.dtype]] = set()
        self._refused = False

    def __call__(self, x: Tensor) -> Tensor:
        """Replayed from the second batch of a shape on.

        Raises:
            RuntimeError: memory ran out. Where something else hinders the recording, it is said and done without.
        """
        key = (x.shape, x.dtype)
        if key in self._seen and key not in self._replays and not self._refused:
            self._record(key, x)
        self._seen.add(key)
        return self._replays.get(key, self.network)(x)

    def forget(self) -> None:
        """Gives the memory of the recordings back; they are made anew when they are needed."""
        self._replays.clear()
        self._seen.clear()

    def _record(self, key: tuple[torch.Size, torch.dtype], x: Tensor) -> None:
        try:
            self._replays[key] = self._recorder(self.network, x)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            self._refused = True
            reason = str(error).split("\n")[0]
            _log.warning("the network cannot be recorded as a CUDA graph and runs without: %s", reason)
