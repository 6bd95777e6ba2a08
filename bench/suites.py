"""Suites: what can be measured, and the run of one: comparison after comparison, each kept as soon as it is measured.

A suite that has much to measure is run in parts: a call ends by its budget, and the next one goes on where it ended.
"""

from __future__ import annotations

import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from bench import conv, data, epoch, infer, io, norm, post, resample, step
from bench.measure import CPU_FLOAT32, GPU, Comparison, Measurement, Suite
from bench.table import RESULTS, kept, report, save

WITHOUT_NETWORK = (CPU_FLOAT32, GPU)  # kinds of machines where what computes no network differs

SUITES = {
    "infer": Suite(infer.comparisons, whole=True),
    "epoch": Suite(epoch.comparisons, whole=True),
    "step": Suite(step.comparisons, whole=True),
    "data": Suite(data.comparisons, WITHOUT_NETWORK, whole=True),
    "post": Suite(post.comparisons, WITHOUT_NETWORK),
    "resample": Suite(resample.comparisons, WITHOUT_NETWORK),
    "norm": Suite(norm.comparisons),
    "conv": Suite(conv.comparisons),
    "io": Suite(io.comparisons, (CPU_FLOAT32,)),
}


@dataclass(frozen=True, kw_only=True)
class Runs:
    """How suites are run. keep: on disk, in `folder`. again: also what is kept. budget: seconds of a suite."""

    quick: bool = False
    keep: bool = False
    again: bool = False
    budget: float = 480.0
    folder: Path = RESULTS


def run_suite(name: str, suite: Suite, how: Runs) -> bool:
    """Measures what is not kept yet, until the next comparison would end after the budget, by the longest so far.

    The first one is measured whatever the budget: every call gets further. One that fails is shown, the others go on.

    Returns:
        whether none failed.
    """
    comparisons = suite.comparisons(how.quick)
    done = {m.what: m for m in kept(name, how.folder)} if how.keep and not how.again else {}
    waiting = [comparison for comparison in comparisons if comparison.what not in done]
    if len(waiting) < len(comparisons):
        print(f"{name}: {len(comparisons) - len(waiting)} of {len(comparisons)} comparisons are kept already")
    began, longest, failed = time.monotonic(), 0.0, 0
    for number, comparison in enumerate(waiting):
        started = time.monotonic()
        if number and started - began + longest > how.budget:
            print(_rest(name, len(waiting) - number, len(comparisons), how))
            break
        measured = _one(name, comparison)
        longest = max(longest, time.monotonic() - started)
        failed += measured is None
        if measured is None:
            continue
        report([measured])
        done[measured.what] = measured
        if how.keep:
            save(name, [done[c.what] for c in comparisons if c.what in done], how.folder)
    return not failed


def _one(name: str, comparison: Comparison) -> Measurement | None:
    """None: it failed, and its traceback is shown."""
    try:
        measured = comparison.run()
    except Exception as error:
        traceback.print_exc()
        print(f"\n{name}: {comparison.what} failed: {error}")
        return None
    assert measured.what == comparison.what, (measured.what, comparison.what)
    return measured


def _rest(name: str, left: int, of: int, how: Runs) -> str:
    """What to do about the comparisons that the budget leaves."""
    said = f"\n{name}: {left} of {of} comparisons left after {how.budget:.0f} s; "
    if how.keep:
        return said + f"run `python -m bench {name} --save` again, it goes on from here"
    return said + "nothing was kept: with --save a second call goes on where the first one ended"
