"""The console: the only file that prints. Results go to stdout, log and progress bars to stderr."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from strokenet.data.track import Track
from strokenet.live import training_table

if TYPE_CHECKING:  # a console does not wait for torch
    from strokenet.train.moment import Moment, View

Item = TypeVar("Item")

_PIPED_WIDTH = 160  # columns where stdout is no terminal and says nothing about its width
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


def start_logging(*, verbose: int = 0, rank: int = 0) -> Console:
    """Sends the package's log to stderr. verbose: -1 warnings alone, 0 the story, 1 everything.

    rank: of several processes with one terminal all but 0 say warnings alone, with their number, and draw no bars.
    """
    console = Console(stderr=True, highlight=False, force_terminal=False if rank else None)
    handler = ConsoleLog(console)
    log = logging.getLogger("strokenet")
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel({-1: logging.WARNING, 0: logging.INFO}.get(verbose, logging.DEBUG))
    if rank:
        handler.setFormatter(logging.Formatter(f"rank {rank}: %(message)s"))
        log.setLevel(logging.WARNING)
    return console


@contextmanager
def tracking(console: Console) -> Iterator[Track]:
    """A Track that draws bars with the time left; loops may be nested. Draws nothing where stderr is no terminal."""
    with Progress(*_columns(), console=console, transient=True, disable=not console.is_terminal) as bars:
        yield _track_of(bars)


@contextmanager
def watching(console: Console) -> Iterator[tuple[Track, View]]:
    """A Track as above, and a View that draws the moments of a training above its bars, four times a second."""
    bars = Progress(*_columns(), console=console)
    shown: list[Moment] = []

    def view(moment: Moment) -> None:
        shown[:] = [moment]

    def drawn() -> Group:
        return Group(*(training_table(moment) for moment in shown), bars)

    if not console.is_terminal:
        with tracking(console) as track:
            yield track, view
        return
    with Live(get_renderable=drawn, console=console, transient=True, refresh_per_second=4):
        yield _track_of(bars), view


def _columns() -> tuple[ProgressColumn, ...]:
    return (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )


def _track_of(bars: Progress) -> Track:
    def track(items: Iterable[Item], *, total: int, what: str) -> Iterator[Item]:
        task = bars.add_task(printable(what), total=total)
        try:
            for item in items:
                yield item
                bars.advance(task)
        finally:
            bars.remove_task(task)

    return track


def show_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Collection[str] = ()
) -> None:
    """A table on stdout. Cells are plain text: no markup in them is obeyed.

    numbers: columns that are right-aligned and never cut or folded; names give way where the terminal is narrow.
    """
    table = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        number = column in numbers
        whole = number or (index == 0 and not numbers)
        table.add_column(column, justify="right" if number else "left", overflow="fold", no_wrap=whole)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _PIPED_WIDTH
    console.print(table)


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
