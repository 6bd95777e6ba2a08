"""Result: one row of results.json, and the rows of all runs that filled a folder.

results.json holds a row a case: of this process, of other processes that share the cases, and of earlier runs into the
folder. It is made from the manifests (manifest.py), one a case, which no two processes write.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from planner.plan import Plan
from strokenet import __version__
from strokenet.data.dataset import CaseFiles
from strokenet.data.files import write_json
from strokenet.infer.agreement import Agreement, agreement_from
from strokenet.infer.manifest import FOLDER
from strokenet.infer.outputs import MASK, RESULTS, earlier_rows, output_files
from strokenet.model.checkpoint import Model

_log = logging.getLogger("strokenet")
READINGS = 5  # of the manifests, at most: who writes one later also writes results.json later
SHORT_S = 0.05  # a write of results.json that takes less is never left out


@dataclass(frozen=True, kw_only=True)
class CaseResult:
    """One row of results.json. error: one line, or None. lesion: all foreground labels together.

    folds: whose networks made the mask; () where none did.
    channels: those that were used. agreement: None where it was not asked (agreement.py:agreement_of).
    kept: an earlier run's, whose scans, model and settings have not changed since.
    """

    case: str
    status: Literal["ok", "failed", "skipped"]
    error: str | None
    seconds: float
    lesion_volume_ml: float | None
    lesion_count: int | None
    channels: tuple[str, ...]
    folds: tuple[str, ...] = ()
    agreement: Agreement | None = None
    kept: bool = False


def failed(files: CaseFiles, plan: Plan, error: str, seconds: float) -> CaseResult:
    """The row of a case without a mask, and why."""
    return _without_mask(files, plan, "failed", error, seconds)


def not_reached(files: CaseFiles, plan: Plan) -> CaseResult:
    """The row of a case that a run has not come to."""
    return _without_mask(files, plan, "skipped", "not reached, the run was ended", 0.0)


def left_alone(files: CaseFiles, plan: Plan, path: Path) -> CaseResult:
    """The row of a case with a file of someone's own."""
    why = f"{path.name} is not as a run left it, so it stays; move it, or --recompute to replace it"
    return _without_mask(files, plan, "skipped", why, 0.0)


def kept(row: Mapping[str, Any]) -> CaseResult | None:
    """The row of a finished case, from its manifest; None where it lacks something."""
    try:
        fields = {**row, "channels": tuple(row["channels"]), "folds": tuple(row["folds"]), "kept": True}
        return CaseResult(**(fields | {"agreement": agreement_from(row["agreement"])}))
    except (KeyError, TypeError):
        return None


def used_channels(files: CaseFiles, plan: Plan) -> tuple[str, ...]:
    """Names of the case's images, in their order."""
    return files.channels or plan.channels


def other_rows(out: Path, inputs: Sequence[CaseFiles], plan: Plan) -> list[dict[str, Any]]:
    """Rows of cases that are not among the inputs: those whose masks are still there, and those that have none."""
    now = {files.case_id for files in inputs}
    rows = [row for case, row in earlier_rows(out).items() if case not in now]
    return [row for row in rows if row["status"] != "ok" or output_files(out, row["case"], plan)[MASK].is_file()]


class Results:
    """The rows of a run as they come, and results.json that follows them.

    One process writes it after every case, though never for more than a twentieth of its time: of ten thousand cases
    it is megabytes. Processes that share a folder write it at their end, from the manifests of all. One that has read
    too early, while another wrote its last, sees so after its own write, and reads again.
    """

    def __init__(
        self, out: Path, model: Model, inputs: Sequence[CaseFiles], rows: Mapping[str, CaseResult], *, shared: bool
    ) -> None:
        """inputs: of this process. rows: of those that are finished, or left alone."""
        self.rows = dict(rows)
        self.begun: set[str] = set()
        self._out, self._model, self._inputs, self._shared = out, model, inputs, shared
        self._others = other_rows(out, inputs, model.plan)
        self._rested, self._took = 0.0, 0.0

    def start(self) -> None:
        """Before the first case."""
        if not self._shared:
            self._write()

    def add(self, result: CaseResult) -> None:
        """One more case."""
        self.rows[result.case] = result
        if result.error:
            _log.warning("%s failed: %s", result.case, result.error)
        if not self._shared and (self._took < SHORT_S or time.monotonic() - self._rested > 20 * self._took):
            with suppress(OSError):  # the write at the end is the one that must succeed
                self._write()

    def finish(self) -> None:
        """After the last case, or where the run ended."""
        if not self._shared:
            self._write()
            return
        for _ in range(READINGS):
            before = _stamps(self._out)
            rows = sorted(other_rows(self._out, (), self._model.plan), key=lambda row: str(row["case"]))
            _write_results(self._out, self._model, rows)
            if _stamps(self._out) == before:
                return

    def _write(self) -> None:
        began = time.monotonic()
        now = [self.rows.get(files.case_id) or not_reached(files, self._model.plan) for files in self._inputs]
        _write_results(self._out, self._model, [*self._others, *map(asdict, now)])
        self._rested = time.monotonic()
        self._took = self._rested - began


def _without_mask(
    files: CaseFiles, plan: Plan, status: Literal["failed", "skipped"], error: str, seconds: float
) -> CaseResult:
    return CaseResult(
        case=files.case_id,
        status=status,
        error=error,
        seconds=seconds,
        lesion_volume_ml=None,
        lesion_count=None,
        channels=used_channels(files, plan),
    )


def _stamps(out: Path) -> dict[str, int]:
    """When each manifest was changed, ns."""
    stamps = {}
    for path in (out / FOLDER).glob("[!.]*.json"):
        with suppress(FileNotFoundError):
            stamps[path.name] = path.stat().st_mtime_ns
    return stamps


def _write_results(out: Path, model: Model, rows: Sequence[Mapping[str, Any]]) -> None:
    content: Mapping[str, object] = {
        "cases": rows,
        "model": model.root.resolve().name,
        "folds": model.folds,
        "version": __version__,
    }
    write_json(out / RESULTS, content)
