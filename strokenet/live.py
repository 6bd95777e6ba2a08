"""The live view of a training: a table that console.watching keeps drawing while the run goes on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:  # the console must not wait for torch
    from strokenet.train.moment import Moment

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 40  # of a curve, in characters


def training_table(moment: Moment) -> Table:
    """What a run is at: a line each for place, losses, pseudo-Dice, speed and memory."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column()
    table.add_column(style="cyan", no_wrap=True)
    for name, value, curve in _lines(moment):
        table.add_row(name, Text(value), Text(curve))
    return table


def _lines(moment: Moment) -> list[tuple[str, str, str]]:
    rows = moment.history
    last = rows[-1] if rows else {}
    mean, best = last.get("ema_dice"), max((r["ema_dice"] for r in rows if not math.isnan(r["ema_dice"])), default=None)
    place = f"epoch {min(moment.epoch + 1, moment.epochs)}/{moment.epochs}, step {moment.step}/{moment.steps}"
    dice = f"{_number(last.get('pseudo_dice'))}, mean {_number(mean)}, best mean {_number(best)}"
    loss = f"{_number(moment.loss)} this epoch, {_number(last.get('train_loss'))} the last"
    return [
        (f"fold {moment.fold}", f"{place} on {moment.device}", ""),
        ("left", _duration(moment.seconds_left), ""),
        ("loss", loss, curve([r["train_loss"] for r in rows])),
        ("validation", _number(last.get("val_loss")), curve([r["val_loss"] for r in rows])),
        ("pseudo-Dice", dice, curve([r["ema_dice"] for r in rows])),
        ("step", f"{_seconds(moment.step_seconds)}, {moment.waiting:.0%} of it waiting for data", ""),
        ("memory", "unknown" if moment.memory_gb is None else f"{moment.memory_gb:.1f} GB at its peak", ""),
    ]


def curve(values: Sequence[float], width: int = WIDTH) -> str:
    """Values as bars, the lowest one the smallest; of many, means of neighbours; without those that are not finite."""
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < 2:
        return ""
    count = min(width, len(finite))
    edges = [round(i * len(finite) / count) for i in range(count + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    span = high - low or 1.0
    return "".join(BARS[round((value - low) / span * (len(BARS) - 1))] for value in means)


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{1000 * value:.0f} ms" if value < 1 else f"{value:.1f} s"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes < 2880 else f"{minutes / 1440:.1f} days"
