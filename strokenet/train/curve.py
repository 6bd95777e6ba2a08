"""The training curve as a picture: losses and pseudo-Dice by epoch (the paper's Fig. 2, 3 and 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from strokenet.data.files import replacing


def draw_curve(history: Sequence[Mapping[str, float]], path: Path, changes: Mapping[int, str] | None = None) -> None:
    """Writes the curve of a run as PNG, atomically.

    Args:
        history: one row an epoch with the columns of log.csv. path: the PNG.
        changes: epoch (0 is the first) -> what begins with it, e.g. fine-tuning; drawn as a line with its name.
    """
    figure = Figure(figsize=(9, 7), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    epochs = [row["epoch"] + 1 for row in history]
    marker = "o" if len(epochs) < 3 else ""
    top.plot(epochs, [row["train_loss"] for row in history], marker=marker, color="tab:blue", label="training loss")
    top.plot(epochs, [row["val_loss"] for row in history], marker=marker, color="tab:red", label="validation loss")
    top.set_ylabel("loss (Dice + cross-entropy)")
    right = top.twinx()
    right.plot(epochs, [row["pseudo_dice"] for row in history], color="tab:green", alpha=0.35, label="pseudo-Dice")
    right.plot(epochs, [row["ema_dice"] for row in history], color="tab:green", label="pseudo-Dice, moving average")
    right.set_ylim(0, 1)
    right.set_ylabel("pseudo-Dice of validation patches")
    lines = [*top.get_lines(), *right.get_lines()]
    top.legend(lines, [str(line.get_label()) for line in lines], loc="upper center", ncols=2, fontsize="small")
    low, high = top.get_ylim()
    top.set_ylim(low, high + 0.25 * (high - low))  # room for the legend
    for epoch, what in (changes or {}).items():
        for axes in (top, bottom):
            axes.axvline(epoch + 0.5, color="0.4", linestyle="--", linewidth=1)
        place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "xytext": (4, 0)}
        top.annotate(what, (epoch + 0.5, 0.3), rotation=90, color="0.4", **place)
    bottom.plot(epochs, [row["seconds"] for row in history], marker=marker, color="tab:gray")
    bottom.set_ylabel("seconds an epoch")
    bottom.set_ylim(bottom=0)
    bottom.set_xlabel("epoch")
    bottom.xaxis.get_major_locator().set_params(integer=True)
    with replacing(path, durable=False) as temporary:
        figure.savefig(temporary, dpi=110)
