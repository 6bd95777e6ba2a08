"""strokenet and the live peer do the same: every row of the printed table holds (tools/compare_nnunet.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.peers import peer

if TYPE_CHECKING:
    from tests.peers.suites import Rows, Suite

if (reason := peer.missing()) is not None:
    pytest.skip(reason, allow_module_level=True)
with peer.quiet():  # the peers warn and print where they are imported
    from tests.peers.suites import SUITES

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # the peers' warnings


def _named(kind: str) -> list[object]:
    """The suites that have rows of this kind. A long one is named too, and skips with its command."""
    command = ".venv-peers/bin/python tools/compare_nnunet.py"
    return [
        pytest.param(
            suite,
            id=suite.name,
            marks=[pytest.mark.skip(reason=f"long; run {command} {suite.name}")] if suite.long else [],
        )
        for suite in SUITES
        if getattr(suite, kind) is not None
    ]


@pytest.mark.parametrize("suite", _named("rows"))
def test_every_row_of_synthetic_data_holds(suite: Suite) -> None:
    assert suite.rows is not None
    _assert_rows_hold(suite.rows)


@pytest.mark.real
@pytest.mark.parametrize("suite", _named("real_rows"))
def test_every_row_of_real_scans_holds(suite: Suite, real_data: object) -> None:
    assert suite.real_rows is not None
    _assert_rows_hold(suite.real_rows)


def _assert_rows_hold(make: Rows) -> None:
    rows = list(make(False))
    assert rows
    assert all(row.passed for row in rows), "\n".join(str(row) for row in rows if not row.passed)
