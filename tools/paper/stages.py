"""Stages: a long work in named parts, each done once. What is done leaves a mark, and the next run skips it.

Comes in: stages in order and a folder for the marks. Goes out: the facts of every stage, as JSON values, from its mark
when it stands. Killed at any moment, or out of time, the work goes on with the stage that has none.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from strokenet.data.files import read_json, write_json
from strokenet.data.track import Track

Item = TypeVar("Item")
Facts = dict[str, Any]

TIME_IS_UP = 75  # exit status; sysexits.h calls it EX_TEMPFAIL: nothing is wrong, run it again
_log = logging.getLogger("strokenet")


class Stopped(Exception):
    """The work ended before its end. exit_code: TIME_IS_UP, or 128 and the number of the signal."""

    def __init__(self, exit_code: int) -> None:
        self.exit_code = exit_code
        super().__init__("the time is up" if exit_code == TIME_IS_UP else f"signal {exit_code - 128}")


@dataclass(frozen=True)
class Clock:
    """deadline: on time.monotonic(); infinite for none."""

    deadline: float = math.inf

    @classmethod
    def of(cls, minutes: float | None) -> Clock:
        """From now on so many minutes; None: no end."""
        return cls() if minutes is None else cls(time.monotonic() + 60 * minutes)

    @property
    def minutes_left(self) -> float | None:
        """None where there is no end; never below 0."""
        return None if math.isinf(self.deadline) else max(0.0, self.deadline - time.monotonic()) / 60

    def check(self) -> None:
        """Raises Stopped where the time is up."""
        if time.monotonic() >= self.deadline:
            raise Stopped(TIME_IS_UP)

    def between_items(self, track: Track) -> Track:
        """The track, which looks at the clock after every item: one at least is done, however little time there is."""

        def checked(items: Iterable[Item], *, total: int, what: str) -> Iterator[Item]:
            for item in track(items, total=total, what=what):
                yield item
                self.check()

        return checked


@dataclass(frozen=True, kw_only=True)
class Stage:
    """name: of its mark. title: what it does, for the log. run: the work; its facts are JSON values."""

    name: str
    title: str
    run: Callable[[Clock], Facts]


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """facts: what the stage returned. seconds: that it took, in all runs together that were not killed."""

    facts: Facts
    seconds: float


def run_stages(stages: Sequence[Stage], marks: Path, clock: Clock) -> dict[str, StageResult]:
    """Every stage that has no mark yet, in order.

    Raises:
        Stopped: the time is up; what is done is kept. And whatever a stage raises.
    """
    results: dict[str, StageResult] = {}
    for number, stage in enumerate(stages, start=1):
        path = marks / f"{stage.name}.json"
        mark: dict[str, Any] = read_json(path) if path.is_file() else {"done": False, "seconds": 0.0}
        if not mark["done"]:
            clock.check()
            _log.info("stage %d of %d: %s", number, len(stages), stage.title)
            mark = _run(stage, path, clock, mark["seconds"])
        results[stage.name] = StageResult(facts=mark["facts"], seconds=mark["seconds"])
    return results


def _run(stage: Stage, path: Path, clock: Clock, seconds: float) -> dict[str, Any]:
    """The stage's mark, written when its work is done; before that only the seconds that a stopped run took."""
    began = time.monotonic()
    try:
        facts = stage.run(clock)
    except Stopped:
        write_json(path, {"done": False, "seconds": seconds + time.monotonic() - began})
        raise
    mark = {"done": True, "seconds": seconds + time.monotonic() - began, "facts": facts}
    write_json(path, mark)
    _log.info("%s: %.0f s", stage.name, mark["seconds"])
    return mark
