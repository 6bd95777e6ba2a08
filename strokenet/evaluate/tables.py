"""Evaluate, last step: the scores as files. scores.json for programs, and the rows as CSV for spreadsheets.

Comes in: an Evaluation. Goes out: valid JSON (no NaN, no paths of this machine), and a CSV in which a case's name
cannot become a formula.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from strokenet import __version__
from strokenet.data.files import replacing, write_json
from strokenet.evaluate.records import FLAGS, METRICS, CaseScore, Evaluation, Summaries
from strokenet.evaluate.strata import Stratum


def to_json(evaluation: Evaluation) -> dict[str, Any]:
    """The content of scores.json.

    summary: all cases, empty masks by the ISLES'22 table. summary_ref_nonempty: only where the reference has a lesion.
    strata: of every label, its lesions by size (ml) over all cases. detection_rule: the limits behind anima_*.
    """
    content: dict[str, Any] = {
        "version": __version__,
        "cases": [_row(score) for score in evaluation.cases],
        **_summaries(evaluation.summary),
        "labels": {label: _summaries(summaries) for label, summaries in evaluation.by_label.items()},
        "empty": _empty(evaluation.cases, evaluation.empty),
        "strata": _strata(evaluation.strata),
        "detection_rule": asdict(evaluation.rule),
        "failures": [asdict(failure) for failure in evaluation.failures],
    }
    if evaluation.comparison is not None:
        content["against"] = {
            "cases": [_row(score) for score in evaluation.comparison.cases],
            **_summaries(evaluation.comparison.summary),
            "empty": _empty(evaluation.comparison.cases, evaluation.comparison.empty),
            "strata": _strata(evaluation.comparison.strata),
            "difference": {name: asdict(value) for name, value in evaluation.comparison.difference.items()},
        }
    return content


def write_scores(evaluation: Evaluation, out: Path) -> None:
    """Writes scores.json and, under the same name, the rows as CSV; each atomically."""
    write_json(out, to_json(evaluation))
    write_csv(evaluation.cases, out.with_suffix(".csv"))


def write_csv(rows: Sequence[CaseScore], path: Path) -> None:
    """One line a case and label, atomically."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["case", "label", *METRICS, *FLAGS])
        for score in rows:
            case, label, *values = _row(score).values()
            table.writerow([_cell(case), _cell(label), *values])


def _row(score: CaseScore) -> dict[str, Any]:
    return {name: getattr(score, name) for name in ("case", "label", *METRICS, *FLAGS)}


def _summaries(summaries: Summaries) -> dict[str, Any]:
    return {
        "summary": {name: asdict(value) for name, value in summaries.all_cases.items()},
        "summary_ref_nonempty": {name: asdict(value) for name, value in summaries.ref_nonempty.items()},
    }


def _strata(strata: Mapping[str, tuple[Stratum, ...]]) -> dict[str, Any]:
    return {label: [asdict(stratum) for stratum in by_size] for label, by_size in strata.items()}


def _empty(rows: Sequence[CaseScore], empty: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """Names and number by flag; where there is nothing to find, also how much was predicted all the same."""
    content: dict[str, Any] = {flag: {"n": len(names), "cases": list(names)} for flag, names in empty.items()}
    content["ref_empty"]["false_volume_ml"] = sum(row.prediction_volume_ml for row in rows if row.ref_empty)
    return content


def _cell(name: str) -> str:
    """A name that a spreadsheet does not take for a formula."""
    return f"'{name}" if name.startswith(("=", "+", "-", "@", "\t", "\r")) else name
