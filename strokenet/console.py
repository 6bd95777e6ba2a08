"""The console: the only file that prints. Results go to stdout, log and progress bars to stderr."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from strokenet.data.track import Track

if TYPE_CHECKING:
    from strokenet.demo import DemoOutcome
    from strokenet.doctor import Report
    from strokenet.evaluate.evaluate import Evaluation
    from strokenet.infer.infer import CaseResult
    from strokenet.preprocess.planning import Planned, Preprocessed
    from strokenet.train.train import TrainResult

Item = TypeVar("Item")

_STYLES = {logging.WARNING: "yellow", logging.ERROR: "bold red"}


class ConsoleLog(logging.Handler):
    """Log lines on stderr, above the progress bars."""

    def __init__(self, console: Console):
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        line = Text(printable(self.format(record)), style=_STYLES.get(record.levelno, ""))
        self._console.print(line, soft_wrap=True)


def printable(text: str) -> str:
    """Text without control characters: a file name cannot move the cursor or change colours."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


def start_logging(*, verbose: int = 0) -> Console:
    """Sends the package's log to stderr. verbose: -1 warnings alone, 0 the story, 1 everything."""
    console = Console(stderr=True, highlight=False)
    log = logging.getLogger("strokenet")
    log.handlers[:] = [ConsoleLog(console)]
    log.propagate = False
    log.setLevel({-1: logging.WARNING, 0: logging.INFO}.get(verbose, logging.DEBUG))
    return console


@contextmanager
def tracking(console: Console) -> Iterator[Track]:
    """A Track that draws bars with the time left; loops may be nested. Draws nothing where stderr is no terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:

        def track(items: Iterable[Item], *, total: int, what: str) -> Iterator[Item]:
            task = bars.add_task(printable(what), total=total)
            try:
                for item in items:
                    yield item
                    bars.advance(task)
            finally:
                bars.remove_task(task)

        yield track


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout. Cells are plain text: no markup in them is obeyed."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=index == 0)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    Console(highlight=False).print(table)


def show(text: str) -> None:
    """Lines on stdout."""
    Console(highlight=False).print(Text(printable(text)), soft_wrap=True)


def show_json(value: Any) -> None:
    """One JSON value on stdout, for scripts."""
    print(json.dumps(value, indent=2, allow_nan=False))


def show_error(text: str) -> None:
    """One line on stderr that says what went wrong and how to mend it."""
    line = " ".join(printable(text).split())
    Console(stderr=True, highlight=False).print(Text(f"error: {line}", style="bold red"), soft_wrap=True)


def show_plan(planned: Planned, *, as_json: bool) -> None:
    """Every decision with its reason, and the folds."""
    from planner.plan import to_json
    from planner.rules import explain

    if as_json:
        show_json(to_json(planned.plan))
        return
    decisions = explain(planned.plan, planned.fingerprint)
    show_table(f"Plan of {planned.plan.dataset}", ("what", "value", "why"), [(d.what, d.value, d.why) for d in decisions])
    sizes = ", ".join(f"{len(split.train)}+{len(split.val)}" for split in planned.splits)
    show(f"folds (train+validate): {sizes}" if sizes else "one subject: no folds, train with --fold all")
    show(f"written to {planned.workspace.root}; next: strokenet preprocess {planned.workspace.root}")


def show_preprocessed(done: Preprocessed, *, as_json: bool) -> None:
    """How many cases were made and how many were there."""
    if as_json:
        show_json({"made": list(done.made), "kept": list(done.kept)})
        return
    show(f"{len(done.made)} cases preprocessed, {len(done.kept)} were there already")


def show_training(result: TrainResult, *, as_json: bool) -> None:
    """Where the weights are and what the last epoch looked like."""
    last = {k: v for k, v in (result.history[-1] if result.history else {}).items() if v == v}  # JSON has no NaN
    if as_json:
        show_json({"folder": result.folder.root.name, "finished": result.finished, "last_epoch": last})
        return
    state = "finished" if result.finished else "stopped; --resume goes on"
    show(f"{result.folder.root}: {state} after {len(result.history)} epochs")
    if last:
        show(f"loss {last['train_loss']:.3f}, validation {last['val_loss']:.3f}, pseudo-Dice {last['ema_dice']:.3f}")


def show_inference(results: Sequence[CaseResult], *, as_json: bool) -> None:
    """One line a case; then the counts."""
    if as_json:
        show_json([asdict(result) for result in results])
        return
    rows = [
        (
            *(r.case, r.status, f"{r.seconds:.1f}"),
            "" if r.lesion_volume_ml is None else f"{r.lesion_volume_ml:.2f}",
            "" if r.lesion_count is None else str(r.lesion_count),
            r.error or "",
        )
        for r in results
    ]
    show_table("Inference", ("case", "status", "seconds", "lesion ml", "lesions", "error"), rows)


def show_doctor(report: Report, *, as_json: bool) -> None:
    """Versions, devices, the kernels' choices, the self-checks."""
    if as_json:
        kernels, checks = ([asdict(row) for row in rows] for rows in (report.kernels, report.checks))
        show_json({"facts": report.facts, "kernels": kernels, "checks": checks, "healthy": report.healthy})
        return
    show_table("Installation", ("what", "value"), list(report.facts.items()))
    show_table("Kernels", ("operator", "runs", "why"), [(k.operator, k.implementation, k.why) for k in report.kernels])
    rows = [(check.name, "ok" if check.passed else "FAILED", check.detail) for check in report.checks]
    show_table("Self-checks", ("check", "result", "detail"), rows)
