"""Cases in one process and in several: order, failures with names and tracebacks, killed workers.

The functions are of the standard library, so that a fresh process finds them: sqrt fails below zero, raise_signal(9)
is what the system does to a process that takes too much memory, and raise_signal(0) does nothing.
"""

from __future__ import annotations

import logging
import math
import operator
import signal
from collections.abc import Iterable, Iterator

import pytest

from strokenet.data.errors import InputError
from strokenet.data.track import Item
from strokenet.preprocess import jobs as J
from strokenet.preprocess import workers as W


def test_results_come_in_the_order_of_the_cases() -> None:
    assert list(J.for_each_case(math.sqrt, {"b": 4, "a": 9}, jobs=1, what="roots").items()) == [("b", 2), ("a", 3)]


def test_one_job_starts_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(J, "in_processes", None)
    assert J.for_each_case(math.sqrt, {"a": 4, "b": 9}, jobs=1, what="roots") == {"a": 2, "b": 3}
    assert J.for_each_case(math.sqrt, {"a": 4}, jobs=8, what="roots") == {"a": 2}  # nor does a single case


def test_progress_is_told_case_by_case() -> None:
    seen = []

    def track(items: Iterable[Item], *, total: int, what: str) -> Iterator[Item]:
        for item in items:
            seen.append((total, what))
            yield item

    J.for_each_case(math.sqrt, {"a": 4, "b": 9}, jobs=1, what="roots", track=track)
    assert seen == [(2, "roots")] * 2


def test_a_failing_case_is_named_with_its_traceback_and_the_others_finish(caplog: pytest.LogCaptureFixture) -> None:
    done = []

    def root(x: float) -> None:
        done.append(math.sqrt(x))

    with pytest.raises(J.CasesFailed) as caught:
        J.for_each_case(root, {"bad": -1, "good": 4, "worse": -2}, jobs=1, what="roots")
    assert done == [2]
    assert [case for case, _ in caught.value.failures] == ["bad", "worse"]
    assert caught.value.total == 3
    assert caught.value.exit_code == 3
    assert str(caught.value).startswith("2 of 3 cases failed: bad: ValueError: ")
    assert "done.append(math.sqrt(x))" in caplog.text


def test_wrong_input_is_one_line_that_names_the_case_once(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(_: int) -> None:
        raise InputError("sub-1: no label; add it")

    with pytest.raises(J.CasesFailed) as caught:
        J.for_each_case(refuse, {"sub-1": 0}, jobs=1, what="x")
    assert caught.value.failures == (("sub-1", "no label; add it"),)
    assert caught.value.exit_code == 4
    assert "Traceback" not in caplog.text


def test_a_worker_process_returns_results_and_tracebacks() -> None:
    outcomes = dict(W.in_processes(math.sqrt, {"a": 4.0, "bad": -1.0, "b": 9.0}, 1))
    assert isinstance(outcomes["a"], W.Done)
    assert isinstance(outcomes["b"], W.Done)
    assert (outcomes["a"].value, outcomes["b"].value) == (2, 3)
    bad = outcomes["bad"]
    assert isinstance(bad, W.CaseFailure)
    assert bad.message.startswith("ValueError: ")
    assert "in _attempt" in bad.traceback


def test_a_killed_worker_is_named_with_its_case_and_the_others_finish(caplog: pytest.LogCaptureFixture) -> None:
    items = {"fine": 0, "huge": int(signal.SIGKILL), "after": 0}
    with caplog.at_level(logging.WARNING, "strokenet"):
        outcomes = dict(W.in_processes(signal.raise_signal, items, 1))
    assert list(outcomes) == ["fine", "after", "huge"]  # the killed one is tried again at the end
    assert isinstance(outcomes["after"], W.Done)
    assert "huge: its worker was killed (exit -9), most likely for lack of memory" in caplog.text
    huge = outcomes["huge"]
    assert isinstance(huge, W.CaseFailure)
    assert "lack of memory" in huge.message
    assert "GB free" in huge.message or "unknown" in huge.message


def test_log_records_of_a_worker_reach_the_parent(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "strokenet"):
        dict(W.in_processes(operator.methodcaller("warning", "zeroed 3 voxels"), {"a": W._log}, 1))
    assert ("strokenet", logging.WARNING, "zeroed 3 voxels") in caplog.record_tuples


def test_where_workers_cannot_start_the_cases_run_in_this_process(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(W, "_serve", math.sqrt)  # the process ends at once, before it says that it is ready
    outcomes = dict(W.in_processes(math.sqrt, {"a": 4.0, "b": 9.0}, 1))
    assert [o.value for o in outcomes.values() if isinstance(o, W.Done)] == [2, 3]
    assert "could not start" in caplog.text


@pytest.mark.parametrize(
    ("jobs", "free", "expected"),
    [(3, None, 3), (None, None, 4), (99, None, 10), (8, 10**10, 5), (8, 1, 1), (1, 10**12, 1)],
)
def test_workers_are_as_many_as_asked_for_as_cases_and_as_fit(
    monkeypatch: pytest.MonkeyPatch, jobs: int | None, free: int | None, expected: int
) -> None:
    monkeypatch.setattr(J, "available_bytes", lambda: free)
    monkeypatch.setattr(J, "_cpus", lambda: 4)
    assert J.worker_count(jobs, cases=10, bytes_per_case=16 * 10**8 - J.PROCESS_BYTES) == expected


def test_no_job_at_all_is_refused() -> None:
    with pytest.raises(InputError, match="jobs is 0"):
        J.worker_count(0, cases=3, bytes_per_case=1)
