"""When a training stops before its end: a signal, or the time that is up; of several ranks, all after the same step.

Comes in: signals of the system and the clock. Goes out: the answer that the loop asks for after every step.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from strokenet.signals import heeded
from strokenet.train.distributed import Ranks

_log = logging.getLogger("strokenet")


@dataclass
class Stop:
    """Why to stop after the step at hand: a signal that came, or the time that is up, on any of the ranks.

    signal: what came to this process. agreed: what came to one of them and ends all after the same step.
    """

    deadline: float
    ranks: Ranks
    signal: int | None = None
    agreed: int | None = None

    def __call__(self) -> bool:
        number, late = self.ranks.most(self.signal or 0, time.monotonic() >= self.deadline)
        self.agreed = int(number) or None
        return bool(number or late)


@contextmanager
def listening(stop: Stop) -> Iterator[None]:
    """A signal asks to stop after the step at hand; a second one ends once the checkpoint in flight is on disk."""

    def note(number: int, frame: FrameType | None) -> None:
        if stop.signal is not None:
            raise SystemExit(128 + number)
        stop.signal = number
        _log.info("signal %d: finishing the step, then writing a checkpoint", number)

    try:
        before = {number: signal.signal(number, note) for number in heeded()}
    except ValueError:  # not in the main thread: the caller handles signals
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
