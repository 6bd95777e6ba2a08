"""The README's table of the comparison, from the rows that tools/compare_nnunet.py --save has kept."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results" / "compare_nnunet.cpu.json"
_VERDICTS = ("equal", "within", "not met", "FAILED")  # the worst of a line's rows is shown


def readme_table(kept: Mapping[str, Any]) -> str:
    """Markdown: one line for the rows of one station that have one tolerance; shown is the largest difference.

    kept: the values of RESULTS.
    """
    lines: dict[tuple[str, str, float], list[Mapping[str, Any]]] = {}
    for row in (row for suite in kept["suites"].values() for row in suite["rows"]):
        station = re.split(r"[:,]", row["check"])[0]
        lines.setdefault((station, row["unit"], row["tolerance"]), []).append(row)
    head = ["| check | rows | largest difference | on | tolerance | verdict |", "|---|---|---|---|---|---|"]
    return "\n".join([*head, *(_line(station, rows) for (station, _, _), rows in lines.items())])


def amount(difference: float | None, unit: str) -> str:
    """A difference with its unit: counts whole, the rest with two digits; None is no number."""
    if difference is None or difference != difference:
        return "none"
    return f"{difference:g} {unit}".strip() if difference % 1 == 0 else f"{difference:.1e} {unit}".strip()


def _line(station: str, rows: Sequence[Mapping[str, Any]]) -> str:
    worst = max(rows, key=lambda row: (_VERDICTS.index(row["verdict"]), row["difference"] or 0.0))
    counts = {v: sum(row["verdict"] == v for row in rows) for v in _VERDICTS}
    verdicts = ", ".join(f"{count} {v}" for v, count in counts.items() if count)
    what = worst["check"].removeprefix(station).lstrip(":, ")
    on = f"{what}: {worst['on']}" if what else worst["on"]
    cells = (station, str(len(rows)), amount(worst["difference"], worst["unit"]), on, f"{worst['tolerance']:g}")
    return f"| {' | '.join([*cells, verdicts])} |"
