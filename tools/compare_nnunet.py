"""Runs strokenet and the live nnU-Net on the same work and prints what differs, station by station.

    .venv-peers/bin/python tools/compare_nnunet.py [SUITE ...] [--full] [--save FILE.json]

tools/peers.sh makes .venv-peers. The tests in tests/peers assert the same rows.
"""

from __future__ import annotations

import logging
import math
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.measure import machine
from strokenet.data.files import read_json, write_json
from tests.peers import peer
from tests.peers.row import Row
from tests.peers.table import amount

if TYPE_CHECKING:
    from tests.peers.suites import Suite

_WIDTH = 170  # columns where stdout is no terminal
_STYLES = {"equal": "green", "within": "green", "not met": "yellow", "FAILED": "bold red"}
_log = Console(stderr=True, highlight=False)


@dataclass(frozen=True, kw_only=True)
class Compared:
    """What a suite said."""

    suite: str
    rows: tuple[Row, ...]
    seconds: float


@click.command()
@click.argument("names", metavar="[SUITE ...]", nargs=-1)
@click.option("--full", is_flag=True, help="The longer runs too; without it what the tests run.")
@click.option("--save", type=click.Path(dir_okay=False, path_type=Path), help="Keep the rows as JSON.")
def main(names: tuple[str, ...], full: bool, save: Path | None) -> None:
    """Compares strokenet with the live nnU-Net by the SUITEs named; by all where none is. Exit code 1: a row failed."""
    logging.basicConfig(level=logging.INFO, format="  %(message)s")  # what a long suite says of its progress
    if (reason := peer.missing()) is not None:
        raise click.ClickException(reason)
    compared = [_run(suite, full) for suite in _chosen(names)]
    _show(compared)
    if save is not None:
        _save(save, compared, full)
    sys.exit(0 if all(row.passed for one in compared for row in one.rows) else 1)


def _chosen(names: Sequence[str]) -> list[Suite]:
    with peer.quiet():
        from tests.peers.suites import SUITES
    by_name = {suite.name: suite for suite in SUITES}
    if unknown := sorted(set(names) - set(by_name)):
        raise click.UsageError(f"no suite {', '.join(unknown)}; allowed: {', '.join(by_name)}")
    return [by_name[name] for name in names] or list(SUITES)


def _run(suite: Suite, full: bool) -> Compared:
    """A suite that breaks is a failed row, so that the others still run and are shown."""
    began = time.monotonic()
    rows = []
    _log.print(f"{suite.name} ...")
    try:
        for row in _rows(suite, full):
            _log.print(f"  {row.verdict:8} {row.check}: {row.on}", soft_wrap=True)
            rows.append(row)
    except Exception as error:
        traceback.print_exc()
        broken = Row(check=suite.name, on="broke off", difference=math.nan, tolerance=0, unit="", note=repr(error))
        rows.append(broken)
    return Compared(suite=suite.name, rows=tuple(rows), seconds=time.monotonic() - began)


def _rows(suite: Suite, full: bool) -> Iterator[Row]:
    if suite.rows is not None:
        yield from suite.rows(full)
    if suite.real_rows is None:
        return
    if peer.real_data() is None:
        _log.print("  left out: no real scans; set STROKENET_TEST_DATA to their folder")
        return
    yield from suite.real_rows(full)


def _show(compared: Sequence[Compared]) -> None:
    """The table, why a row is not met or failed, and the seconds."""
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else _WIDTH)
    table = Table("check", "on", "largest difference", "tolerance", "verdict")
    for one in compared:
        for row in one.rows:
            verdict = Text(row.verdict, style=_STYLES[row.verdict])
            table.add_row(row.check, row.on, amount(row.difference, row.unit), f"{row.tolerance:g}", verdict)
        table.add_section()
    console.print(table)
    for row in (row for one in compared for row in one.rows if row.verdict in ("not met", "FAILED")):
        console.print(f"{row.verdict}: {row.check}, {row.on}: {row.cause or row.note}", soft_wrap=True)
    console.print(", ".join(f"{one.suite} {one.seconds:.0f} s" for one in compared))


def _save(path: Path, compared: Sequence[Compared], full: bool) -> None:
    """The rows as JSON; suites that were not run now keep what the file holds of them."""
    kept = read_json(path)["suites"] if path.is_file() else {}
    for one in compared:
        kept[one.suite] = {
            "date": date.today().isoformat(),
            "full": full,
            "machine": machine(),
            "versions": {name: version(name) for name in peer.DISTRIBUTIONS},
            "seconds": round(one.seconds, 1),
            "rows": [_values(row) for row in one.rows],
        }
    from tests.peers.suites import SUITES

    order = [suite.name for suite in SUITES if suite.name in kept]
    write_json(path, {"suites": {name: kept[name] for name in order}})
    _log.print(f"kept in {path}")


def _values(row: Row) -> dict[str, Any]:
    """A row as JSON values; a difference that is no number is null."""
    difference = row.difference if math.isfinite(row.difference) else None
    return asdict(row) | {"difference": difference, "verdict": row.verdict}


if __name__ == "__main__":
    main(prog_name="tools/compare_nnunet.py")
