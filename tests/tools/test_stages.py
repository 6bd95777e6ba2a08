"""Stages are done once, in order; what was stopped goes on with the same numbers."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest

from strokenet.data.track import silent
from tools.paper.stages import TIME_IS_UP, Clock, Facts, Stage, Stopped, run_stages

PAST = Clock(deadline=-math.inf)


class Work:
    """Four stages, each of which goes on from what the one before wrote; `stop` ends the run before a stage."""

    def __init__(self, folder: Path, stop: dict[int, BaseException] | None = None) -> None:
        self.folder, self.stop = folder, stop or {}
        self.done: list[int] = []

    def stage(self, number: int) -> Stage:
        def run(clock: Clock) -> Facts:
            if number in self.stop:
                raise self.stop[number]
            before = self.folder / f"{number - 1}"
            value = 3 * int(before.read_text()) + number if number else 7
            self.folder.mkdir(exist_ok=True)
            (self.folder / f"{number}").write_text(str(value))
            self.done.append(number)
            return {"value": value}

        return Stage(name=f"stage_{number}", title=f"number {number}", run=run)

    def run(self, clock: Clock | None = None) -> list[int]:
        """The values of all stages."""
        stages = [self.stage(number) for number in range(4)]
        results = run_stages(stages, self.folder / "marks", clock or Clock())
        return [result.facts["value"] for result in results.values()]


@pytest.mark.parametrize("end", [Stopped(TIME_IS_UP), Stopped(143), KeyboardInterrupt(), OSError("disk full")])
def test_a_run_that_ended_after_stage_2_continues_and_gives_the_numbers_of_an_unbroken_one(
    tmp_path: Path, end: BaseException
) -> None:
    assert Work(tmp_path / "whole").run() == [7, 22, 68, 207]  # 7, 3*7+1, 3*22+2, 3*68+3
    broken = Work(tmp_path / "broken", stop={2: end})
    with pytest.raises(type(end)):
        broken.run()
    assert broken.done == [0, 1]
    again = Work(tmp_path / "broken")
    assert again.run() == [7, 22, 68, 207]
    assert again.done == [2, 3]


def test_a_finished_run_does_nothing_again_and_knows_its_numbers(tmp_path: Path) -> None:
    Work(tmp_path).run()
    again = Work(tmp_path)
    assert again.run(PAST) == [7, 22, 68, 207]
    assert again.done == []


def test_no_stage_begins_when_the_time_is_up(tmp_path: Path) -> None:
    work = Work(tmp_path)
    with pytest.raises(Stopped) as stopped:
        work.run(PAST)
    assert stopped.value.exit_code == 75
    assert work.done == []


def test_the_seconds_of_a_stopped_stage_are_added(tmp_path: Path) -> None:
    attempts = iter((Stopped(TIME_IS_UP), None))

    def run(clock: Clock) -> Facts:
        time.sleep(0.05)
        if (error := next(attempts)) is not None:
            raise error
        return {}

    stage = Stage(name="a", title="a", run=run)
    with pytest.raises(Stopped):
        run_stages([stage], tmp_path, Clock())
    first = json.loads((tmp_path / "a.json").read_text())
    assert not first["done"]
    assert run_stages([stage], tmp_path, Clock())["a"].seconds >= first["seconds"] + 0.05


def test_a_loop_does_one_item_at_least_and_stops_after_it() -> None:
    items = PAST.between_items(silent)("abc", total=3, what="x")
    assert next(items) == "a"
    with pytest.raises(Stopped):
        next(items)
    assert list(Clock().between_items(silent)("abc", total=3, what="x")) == ["a", "b", "c"]


def test_the_minutes_left_are_none_without_an_end_and_never_negative() -> None:
    assert Clock.of(None).minutes_left is None
    assert Clock(deadline=time.monotonic() - 60).minutes_left == 0
    left = Clock.of(2).minutes_left
    assert left is not None
    assert 1.9 < left <= 2
