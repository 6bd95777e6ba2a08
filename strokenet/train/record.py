"""What a run leaves on disk: the state to resume from, weights, log.csv and the curve.

The state is the only source; everything else is derived from it and made again by the next start. Every file is written
atomically, so that `infer` finds a whole model at any time.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

from strokenet.data.errors import InputError
from strokenet.data.files import write_bytes
from strokenet.model.checkpoint import DROPOUT, save_weights
from strokenet.train.curve import draw_curve
from strokenet.train.run import Run
from strokenet.train.state import State, save_state

COLUMNS = (
    *("epoch", "lr", "train_loss", "val_loss", "pseudo_dice", "ema_dice"),
    *("seconds", "data_wait_share", "skipped_steps", "volume_dice"),
)


def checkpoint(run: Run) -> None:
    """State first, then what is derived from it: a kill in between is mended by the next --resume."""
    save(run)
    derive(run)


def save(run: Run) -> None:
    """The resumable state alone. One rank writes it."""
    if not run.ranks.first:
        return
    state = State(
        progress=run.progress,
        network=run.network.state_dict(),
        optimizer=run.optimizer.state_dict(),
        scaler=run.scaler.state_dict(),
        history=run.history,
        settings=run.settings,
    )
    with _writing(run):
        save_state(run.folder, state)


@contextmanager
def _writing(run: Run) -> Iterator[None]:
    """A full disk, or a folder that cannot be written, in one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InputError(
            f"{run.folder.root}: cannot be written ({reason}); free space or mend the permissions, then --resume: "
            "what was written before is whole"
        ) from error


def derive(run: Run) -> None:
    """last and best weights, log.csv and the curve, from the run as it stands. A new run has but an empty log.

    One rank writes them.
    """
    if not run.ranks.first:
        return
    with _writing(run):
        _write_all(run)


def _write_all(run: Run) -> None:
    _write_log(run)
    if not (run.history or run.progress.step):
        return
    kept = {name: run.settings[name] for name in ("init", "heads", DROPOUT)}
    note = {"epoch": str(run.progress.epoch), **kept}
    weights = run.network.state_dict()
    save_weights(run.folder.last, weights, note=note)
    if run.progress.step == 0 and _is_best(run.history):
        save_weights(run.folder.best, weights, note=note)
    if run.history:
        draw_curve(run.history, run.folder.curve)


def _is_best(history: list[dict[str, float]]) -> bool:
    """Whether the last epoch has the highest moving average so far, for the first time."""
    *before, last = (row["ema_dice"] for row in history)
    return last > max((mean for mean in before if not math.isnan(mean)), default=-math.inf)


def _write_log(run: Run) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: "" if math.isnan(v) else v for k, v in row.items()} for row in run.history)
    write_bytes(run.folder.log, text.getvalue().encode())
