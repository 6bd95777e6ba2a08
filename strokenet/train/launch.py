"""How steps are started: at once on the CPU; on a GPU queued, recorded once and replayed (CUDA graphs).

A step is some thousand launches, and the patch never changes: a recording starts them all at once, and Python and the
driver are no longer waited for. The first steps run as ever (cuDNN chooses its convolutions, Triton compiles), the next
one is recorded. Comes in: a step's arithmetic (step.py). Goes out: steps that say what became of them.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from strokenet.model.recording import Replay, record
from strokenet.train.feed import Batch
from strokenet.train.run import Run
from strokenet.train.step import Compute, Speedups, make_step, set_rate

_log = logging.getLogger("strokenet")

AHEAD = 2  # steps in the queue of the GPU while the host goes on
EAGER_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one step. number: of the step in its epoch, 0 first. good: loss and gradient were finite."""

    number: int
    cases: tuple[str, ...]
    loss: float
    good: bool


class Steps(Protocol):
    """The steps of one run. A call computes one, and says what became of those that are known by now, in order."""

    def begin(self, lr: float) -> None:
        """Before the first step of an epoch: its learning rate."""
        ...

    def __call__(self, batch: Batch, number: int) -> list[Outcome]: ...

    def rest(self) -> list[Outcome]:
        """Waits for the steps that are not known yet."""
        ...


def make_steps(run: Run, speedups: Speedups) -> Steps:
    """The steps of a run whose state is restored, as its device takes them; see make_step."""
    compute = make_step(run, speedups)
    if run.device.type != "cuda":
        return StepsAtOnce(compute, run.optimizer)
    plain = not run.scaler.is_enabled() and run.ranks.alone  # nothing but the network and its update
    recordable = speedups.graph and speedups.fused_update and plain
    return QueuedSteps(run, Recorded(compute, run.optimizer) if recordable else compute)


class StepsAtOnce:
    """Steps that are done, and read, when their call ends."""

    def __init__(self, compute: Compute, optimizer: torch.optim.SGD):
        self._compute, self._optimizer = compute, optimizer

    def begin(self, lr: float) -> None:
        """The learning rate of an epoch."""
        set_rate(self._optimizer, lr)

    def __call__(self, batch: Batch, number: int) -> list[Outcome]:
        loss, good = self._compute(batch.image, batch.label).tolist()
        return [Outcome(number=number, cases=batch.cases, loss=loss, good=bool(good))]

    def rest(self) -> list[Outcome]:
        return []


class QueuedSteps:
    """Steps that the GPU computes while the host goes on, AHEAD of them at most; each is read when it is done anyway.

    The bound keeps the host's clock honest: what it waits for the data, the GPU is about to wait for too.
    """

    def __init__(self, run: Run, compute: Compute):
        self._run, self._compute = run, compute
        self._queue: deque[tuple[torch.cuda.Event, Tensor, Batch, int]] = deque()

    def begin(self, lr: float) -> None:
        """The learning rate of an epoch; and which maps the norms keep, which a recording holds."""
        set_rate(self._run.optimizer, lr)
        if self._run.network.choose_kept_maps() and isinstance(self._compute, Recorded):
            self._compute.forget()

    def __call__(self, batch: Batch, number: int) -> list[Outcome]:
        result = self._compute(batch.image, batch.label)
        read = torch.empty(result.shape, dtype=result.dtype, pin_memory=True)
        read.copy_(result, non_blocking=True)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
        self._queue.append((done, read, batch, number))
        return self._read(leave=AHEAD)

    def rest(self) -> list[Outcome]:
        return self._read(leave=0)

    def _read(self, *, leave: int) -> list[Outcome]:
        outcomes = []
        while len(self._queue) > leave:
            done, read, batch, number = self._queue.popleft()
            done.synchronize()
            loss, good = read.tolist()
            outcomes.append(Outcome(number=number, cases=batch.cases, loss=loss, good=bool(good)))
        return outcomes


class Recorded:
    """A step by its recording, from step EAGER_STEPS + 1 on; a batch of another shape is computed as ever.

    The learning rate becomes a tensor, which the recording reads anew in each replay.
    """

    def __init__(
        self,
        compute: Compute,
        optimizer: torch.optim.SGD,
        recorder: Callable[..., Replay] = record,
    ):
        self._compute, self._recorder = compute, recorder
        self._steps = 0
        self._stream: torch.cuda.Stream | None = None
        self._replay: Replay | None = None
        self._shapes: tuple[torch.Size, torch.Size] | None = None
        self._refused = False
        for group in optimizer.param_groups:
            device = group["params"][0].device
            group["lr"] = torch.tensor(float(group["lr"]), dtype=torch.float32, device=device)

    def __call__(self, image: Tensor, label: Tensor) -> Tensor:
        if self._steps >= EAGER_STEPS and self._replay is None and not self._refused:
            self._record(image, label)
        self._steps += 1
        if self._replay is not None and self._shapes == (image.shape, label.shape):
            return self._replay(image, label)
        return self._beside(image, label)

    def forget(self) -> None:
        """What is recorded is not what is wanted any more: after one step more as ever it is recorded anew."""
        self._replay, self._shapes = None, None
        self._steps = min(self._steps, EAGER_STEPS - 1)

    def _beside(self, image: Tensor, label: Tensor) -> Tensor:
        """Computed on the stream that will be recorded, as torch asks for what comes before a recording."""
        if image.is_cpu:
            return self._compute(image, label)
        if self._stream is None:
            self._stream = torch.cuda.Stream(image.device)  # type: ignore[no-untyped-call]
        held = image.clone(), label.clone()  # the batch's own memory is not that stream's
        self._stream.wait_stream(torch.cuda.current_stream(image.device))
        with torch.cuda.stream(self._stream):
            result = self._compute(*held)
        torch.cuda.current_stream(image.device).wait_stream(self._stream)
        for tensor in held:
            tensor.record_stream(self._stream)
        return result

    def _record(self, image: Tensor, label: Tensor) -> None:
        try:
            self._replay = self._recorder(self._compute, image, label, stream=self._stream)
            self._shapes = (image.shape, label.shape)
        except RuntimeError as error:
            self._refused = True
            reason = str(error).split("\n")[0]
            _log.warning("a step cannot be recorded as a CUDA graph and runs without: %s", reason)
