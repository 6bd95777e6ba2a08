"""What a run leaves on disk: the state to resume from, weights, log.csv and the curve.

The state is the only source; everything else is derived from it and made again by the next start. Every file is written
atomically, so that `infer` finds a whole model at any time. Nothing here but `state_of` reads the run, so that a thread
can do the rest (writer.py).
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator
from contextlib import contextmanager

from strokenet.data.errors import InputError
from strokenet.data.files import write_bytes
from strokenet.model.checkpoint import DROPOUT, save_weights
from strokenet.train.curve import draw_curve
from strokenet.train.run import Run
from strokenet.train.state import State, save_state
from strokenet.workspace import FoldFolder

COLUMNS = (
    *("epoch", "lr", "train_loss", "val_loss", "pseudo_dice", "ema_dice"),
    *("seconds", "data_wait_share", "skipped_steps", "volume_dice"),
)


def state_of(run: Run) -> State:
    """The run as it stands. Its tensors are the run's own: they change with the next step."""
    return State(
        progress=run.progress,
        network=run.network.state_dict(),
        optimizer=run.optimizer.state_dict(),
        scaler=run.scaler.state_dict(),
        history=run.history,
        settings=run.settings,
    )


def save(folder: FoldFolder, state: State) -> None:
    """The resumable state. It comes first: what a kill leaves out of the rest, the next --resume makes."""
    with _writing(folder):
        save_state(folder, state)


@contextmanager
def _writing(folder: FoldFolder) -> Iterator[None]:
    """A full disk, or a folder that cannot be written, in one line."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{folder.root}: cannot be written ({error.strerror or error}); free space or mend the permissions, then "
            "--resume: what was written before is whole"
        ) from error


def derive(folder: FoldFolder, state: State) -> None:
    """log.csv, last and best weights. A new run has but an empty log."""
    with _writing(folder):
        _write_log(folder, state.history)
        if state.history or state.progress.step:
            _write_weights(folder, state)


def draw(folder: FoldFolder, state: State) -> None:
    """The curve, from the first epoch on."""
    if state.history:
        with _writing(folder):
            draw_curve(state.history, folder.curve)


def _write_weights(folder: FoldFolder, state: State) -> None:
    kept = {name: state.settings[name] for name in ("init", "heads", DROPOUT)}
    note = {"epoch": str(state.progress.epoch), **kept}
    save_weights(folder.last, state.network, note=note)
    if state.progress.step == 0 and _is_best(state.history):
        save_weights(folder.best, state.network, note=note)


def _is_best(history: list[dict[str, float]]) -> bool:
    """Whether the last epoch has the highest moving average so far, for the first time."""
    *before, last = (row["ema_dice"] for row in history)
    return last > max((mean for mean in before if not math.isnan(mean)), default=-math.inf)


def _write_log(folder: FoldFolder, history: list[dict[str, float]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: "" if math.isnan(v) else v for k, v in row.items()} for row in history)
    write_bytes(folder.log, text.getvalue().encode())
