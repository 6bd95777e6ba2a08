"""The live view: every number that a run shows, as text; its curves; and where it is drawn."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from strokenet.console import watching
from strokenet.live import BARS, curve, training_table
from strokenet.train.moment import Moment
from strokenet.train.train import train
from tests.train.workspaces import make_workspace, short

ROW = {"train_loss": -0.4, "val_loss": -0.3, "pseudo_dice": 0.61, "ema_dice": 0.58, "seconds": 30.0}
MOMENT = Moment(
    fold="0",
    device="cuda:0",
    epoch=2,
    epochs=1000,
    step=130,
    steps=250,
    loss=-0.512,
    step_seconds=0.0231,
    waiting=0.017,
    memory_gb=12.34,
    seconds_left=11520.0,
    history=({**ROW, "ema_dice": 0.5}, ROW),
)


def drawn(moment: Moment) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(training_table(moment))
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_a_run_shows_its_place_losses_dice_speed_memory_and_time() -> None:
    text = drawn(MOMENT)
    for words in (
        "epoch 3/1000, step 130/250 on cuda:0",
        "3 h 12 min",
        "-0.512 this epoch, -0.400 the last",
        "-0.300",
        "0.610, mean 0.580, best mean 0.580",
        "23 ms, 2% of it waiting for data",
        "12.3 GB",
    ):
        assert words in text, text


def test_a_run_that_has_just_begun_shows_no_numbers_that_it_does_not_have() -> None:
    fresh = replace(
        MOMENT, epoch=0, step=0, loss=None, step_seconds=None, seconds_left=None, memory_gb=None, history=()
    )
    text = drawn(fresh)
    assert "epoch 1/1000" in text
    assert "nan" not in text.casefold()
    assert "None" not in text


def test_a_finished_run_is_in_its_last_epoch() -> None:
    assert "epoch 1000/1000" in drawn(replace(MOMENT, epoch=1000))


def test_a_curve_goes_from_the_lowest_bar_to_the_highest() -> None:
    assert curve([1.0, 2.0, 3.0]) == BARS[0] + BARS[4] + BARS[-1]
    assert curve([math.nan, 5.0, 5.0]) == BARS[0] * 2
    assert curve([1.0]) == ""
    long = curve([float(n) for n in range(1000)])
    assert len(long) == 40
    assert (long[0], long[-1]) == (BARS[0], BARS[-1])


def test_a_terminal_sees_the_run_and_a_file_does_not(tmp_path: Path) -> None:
    for terminal in (True, False):
        out = io.StringIO()
        console = Console(file=out, force_terminal=terminal, width=120)
        with watching(console) as (track, view):
            train(make_workspace(tmp_path / str(terminal)), short(epochs=1), track, view)
        assert ("waiting for data" in out.getvalue()) == terminal


def test_the_time_left_goes_by_the_epochs_that_were(tmp_path: Path) -> None:
    seen: list[Moment] = []
    result = train(make_workspace(tmp_path), short(epochs=3), view=seen.append)
    assert [(moment.epoch, moment.step) for moment in seen[:4]] == [(0, 1), (0, 2), (0, 3), (1, 1)]
    last = seen[-1]
    assert last.seconds_left == pytest.approx(
        sum(sorted(row["seconds"] for row in result.history[:2])) / 2 - 3 * last.step_seconds,
        abs=1e-6,  # type: ignore[operator]
    )
    assert last.memory_gb is not None
    assert last.memory_gb > 0.05
