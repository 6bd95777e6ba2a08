"""The suites, in the order of the method. A new suite is added here, and runs in the tests and in the printed table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tests.peers import (
    augment,
    evaluation,
    fingerprint,
    imports,
    inference,
    loss,
    network,
    patches,
    plans,
    preprocess,
    steps,
    training,
    v1,
)
from tests.peers.row import Row

Rows = Callable[[bool], Iterator[Row]]


@dataclass(frozen=True, kw_only=True)
class Suite:
    """One station. rows: of synthetic data; real_rows: of the real scans. long: not among the tests, run by hand."""

    name: str
    rows: Rows | None = None
    real_rows: Rows | None = None
    long: bool = False


SUITES = (
    Suite(name="fingerprint", rows=fingerprint.rows, real_rows=fingerprint.real_rows),
    Suite(name="plans", rows=plans.rows),
    Suite(name="preprocess", rows=preprocess.rows, real_rows=preprocess.real_rows),
    Suite(name="network", rows=network.rows),
    Suite(name="loss", rows=loss.rows),
    Suite(name="steps", rows=steps.rows),
    Suite(name="patches", rows=patches.rows),
    Suite(name="augment", rows=augment.rows),
    Suite(name="inference", rows=inference.rows, real_rows=inference.real_rows),
    Suite(name="import", rows=imports.rows),
    Suite(name="v1", rows=v1.rows, real_rows=v1.real_rows),
    Suite(name="evaluation", rows=evaluation.rows),
    Suite(name="training", real_rows=training.real_rows, long=training.LONG),
)
