"""The checkpoint writer: a thread that brings a run's checkpoints to disk while the run goes on.

Comes in: the run as it stands. Goes out: the files of its fold folder, by record.py and in its order. Training waits
for the snapshot alone: weights, momentum and counters are copied to the CPU's memory, into tensors that every snapshot
uses again. From a GPU they are copied by its own queue of work, before the next step can change them, to pinned memory;
the thread waits for the copy, the loop does not. Serialising, hashing, flushing and renaming are the thread's.

One checkpoint is in flight at most, which bounds the memory to one snapshot. The next one waits for it and does not
take its place: best.safetensors is made of its own epoch's weights, so no epoch's checkpoint may be left out.

Files are written without Python's lock, so that the loop can go on launching work; a picture cannot be drawn without
it. So the curve is drawn as often as a small share of the time allows, and at the end.
"""

from __future__ import annotations

import concurrent.futures
import logging
import math
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from strokenet.data.errors import InputError
from strokenet.train import record
from strokenet.train.run import Run
from strokenet.train.state import State

_log = logging.getLogger("strokenet")

CURVE_SHARE = 0.005  # of the time may go to drawing the curve


class CheckpointWriter:
    """Writes the checkpoints of one run. Use it in a with block: its end waits for the one in flight.

    A checkpoint that could not be written raises its InputError in the next call, once. Of several ranks the first one
    writes; on the others nothing is ever due or written.
    """

    def __init__(self, run: Run):
        self._run = run
        self._copies: dict[tuple[str, ...], Tensor] = {}  # by their place in the state
        self._writing: Future[None] | None = None
        self._before = time.monotonic()  # when the snapshot before was taken
        self._curve_due, self._curve_is_old = -math.inf, False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            self.wait()
            if self._curve_is_old and error is None:
                record.draw(self._run.folder, record.state_of(self._run))
        except InputError as unwritten:
            if error is None:
                raise
            _log.error("%s", unwritten)  # what ends the run already is the reason to tell
        finally:
            self._thread.shutdown()

    def due(self) -> bool:
        """Whether the minutes between two checkpoints are over. Never while one is written: that one is young enough.

        Raises:
            InputError: the last one could not be written.
        """
        if not self._run.ranks.first or (self._writing is not None and not self._writing.done()):
            return False
        self.wait()
        return time.monotonic() - self._before >= 60 * self._run.config.checkpoint_minutes

    def save(self) -> None:
        """Hands the resumable state alone to the thread, as the run stands now. Raises as `due` does."""
        self._hand_over(derived=False)

    def checkpoint(self) -> None:
        """Hands over the state and all that is derived from it. Raises as `due` does."""
        self._hand_over(derived=True)

    def wait(self) -> None:
        """Returns when nothing is left to be written. Raises as `due` does."""
        if self._writing is None:
            return
        concurrent.futures.wait([self._writing])  # a signal may end it: what is in flight is not forgotten then
        done, self._writing = self._writing, None
        done.result()

    def _hand_over(self, *, derived: bool) -> None:
        if not self._run.ranks.first:
            return
        began = time.monotonic()
        self.wait()
        state, copied = self._snapshot()
        now = time.monotonic()
        waited, since = now - began, now - self._before
        self._before = now
        self._writing = self._thread.submit(self._write, state, copied, derived, waited, since)

    @torch.inference_mode(mode=False)  # within a validation too: its tensors could not be written to after it
    @torch.no_grad()
    def _snapshot(self) -> tuple[State, torch.cuda.Event | None]:
        """A copy of the run's state, and what happens on a GPU when it is complete."""
        live = record.state_of(self._run)
        state = replace(
            live,
            progress=replace(live.progress),
            network=self._copy(live.network, "network"),
            optimizer=self._copy(live.optimizer, "optimizer"),
            scaler=self._copy(live.scaler, "scaler"),
            history=[*live.history],  # a row is not changed any more
            settings={**live.settings},
        )
        if self._run.device.type != "cuda":
            return state, None
        copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # the thread sleeps until then
        copied.record(torch.cuda.current_stream(self._run.device))
        return state, copied

    def _copy(self, value: Any, *place: str) -> Any:
        """`value` with its tensors copied to the CPU's memory; numbers and text are themselves."""
        if isinstance(value, dict):
            return {name: self._copy(inner, *place, str(name)) for name, inner in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._copy(inner, *place, str(n)) for n, inner in enumerate(value))
        if not isinstance(value, Tensor):
            return value
        copy = self._copies.get(place)
        if copy is None or (copy.shape, copy.dtype) != (value.shape, value.dtype):
            copy = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
            self._copies[place] = copy
        return copy.copy_(value, non_blocking=value.is_cuda)

    def _write(self, state: State, copied: torch.cuda.Event | None, derived: bool, waited: float, since: float) -> None:
        """On the thread."""
        began = time.monotonic()
        if copied is not None:
            copied.synchronize()
        record.save(self._run.folder, state)
        if derived:
            record.derive(self._run.folder, state)
            self._draw(state)
        _log.debug(
            "checkpoint of epoch %d, step %d: training waited %.0f ms, %.2f %% of the %.1f s since the last one; "
            "written in %.2f s",
            *(state.progress.epoch + 1, state.progress.step, 1000 * waited, 100 * waited / max(since, 1e-9), since),
            time.monotonic() - began,
        )

    def _draw(self, state: State) -> None:
        """The curve, unless it was drawn a short while ago."""
        self._curve_is_old = time.monotonic() < self._curve_due
        if not self._curve_is_old:
            began = time.thread_time()
            record.draw(self._run.folder, state)
            self._curve_due = time.monotonic() + (time.thread_time() - began) / CURVE_SHARE
