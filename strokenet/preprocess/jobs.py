"""One function for every case, in this process or in several, with errors that name the case.

A case that fails does not stop the others. What a worker process raises comes back with its traceback; a worker that
the system kills is named with the case it held, and that case is tried once more, alone, when the others are done.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import TypeVar

from strokenet.data.errors import InputError
from strokenet.data.track import Track, silent
from strokenet.memory import available_bytes
from strokenet.preprocess.workers import CaseFailure, in_process, in_processes

Item = TypeVar("Item")
Result = TypeVar("Result")

PROCESS_BYTES = 350 * 2**20  # a fresh worker: Python, numpy, scipy, torch
SHOWN = 3  # failures told in the message; each was logged when it happened
USABLE = 0.8  # share of the free memory that the workers may plan with
_log = logging.getLogger("strokenet")


class CasesFailed(InputError):
    """Some cases failed; raised when all others are done.

    failures: (case id, one line) of each. total: how many cases there were. exit_code: 3 where some succeeded, else 4.
    """

    def __init__(self, failures: tuple[tuple[str, str], ...], total: int) -> None:
        self.failures = failures
        self.total = total
        self.exit_code = 4 if len(failures) == total else 3
        reasons = "; ".join(f"{c}: {m}" for c, m in failures[:SHOWN])
        more = f"; and {len(failures) - SHOWN} more" if len(failures) > SHOWN else ""
        super().__init__(f"{len(failures)} of {total} cases failed: {reasons}{more}")


def for_each_case(
    function: Callable[[Item], Result], items: Mapping[str, Item], *, jobs: int, what: str, track: Track = silent
) -> dict[str, Result]:
    """function(item) of every case.

    Args:
        function: picklable where jobs > 1 (of a module, or a partial of one).
        items: case id -> item.
        jobs: worker processes; 1 starts none.
        what: one or two words for the progress bar.

    Returns:
        case id -> result, in the order of the items.

    Raises:
        CasesFailed: after all cases were tried.
    """
    workers = min(jobs, len(items))
    outcomes = in_processes(function, items, workers) if workers > 1 else in_process(function, items)
    done: dict[str, Result] = {}
    failed: dict[str, CaseFailure] = {}
    with closing(outcomes):
        for case_id, outcome in track(outcomes, total=len(items), what=what):
            if isinstance(outcome, CaseFailure):
                failed[case_id] = outcome
                _report(case_id, outcome)
            else:
                done[case_id] = outcome.value
    if failed:
        raise CasesFailed(tuple((c, failed[c].message) for c in items if c in failed), len(items))
    return {case_id: done[case_id] for case_id in items}


def worker_count(jobs: int | None, cases: int, bytes_per_case: int) -> int:
    """How many workers to start.

    Args:
        jobs: what the user asked for; None: one a CPU.
        bytes_per_case: memory that one case takes beside the process itself.

    Returns:
        at least 1; never more than there are cases, nor than fit into the free memory (the log says when that is less).

    Raises:
        InputError: jobs below 1.
    """
    if jobs is not None and jobs < 1:
        raise InputError(f"jobs is {jobs}; 1 or more is needed")
    wanted = max(1, min(_cpus() if jobs is None else jobs, cases))
    free = available_bytes()
    if free is None:
        return wanted
    each = PROCESS_BYTES + bytes_per_case
    fitting = max(1, int(USABLE * free) // each)
    if fitting < wanted:
        _log.info(
            "%d instead of %d workers: %.1f GB of memory free, a case takes about %.1f GB",
            fitting,
            wanted,
            free / 1e9,
            each / 1e9,
        )
    return min(wanted, fitting)


def _cpus() -> int:
    """CPUs that this process may use, which in a container or a job are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _report(case_id: str, failure: CaseFailure) -> None:
    if failure.traceback:
        _log.error("%s: failed\n%s", case_id, failure.traceback.rstrip())
    else:
        _log.warning("%s: %s", case_id, failure.message)
