"""The paper's experiment from beginning to end, on semi-synthetic cohorts, its numbers beside ours.

    .venv/bin/python tools/reproduce_paper.py -o OUT [--scale smoke|cpu|gpu|full] [--max-minutes M] [--save FILE.json]

Called again with the same OUT it goes on where it was: after a signal, a crash, or --max-minutes, whose exit status is
75. OUT/results.json holds all numbers, OUT/figures the analogues of Figs. 2, 3, 5 and 6. The stages: tools/paper/.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from planner.plan import PlanError
from strokenet.console import show, show_error, show_table, start_logging, tracking
from strokenet.data.errors import InputError
from strokenet.data.files import read_json
from strokenet.signals import heeded
from strokenet.synth.burden import MEAN_ML, MEDIAN_ML
from tools.paper import table
from tools.paper.protocol import Protocol
from tools.paper.results import keep, reproduce
from tools.paper.scales import SCALES
from tools.paper.stages import Clock, Stopped

FOLDER = click.Path(path_type=Path, file_okay=False)
DATA = click.Path(path_type=Path, exists=True, file_okay=False)


@click.command()
@click.option("-o", "--out", type=FOLDER, required=True, help="Folder to make, or to go on in.")
@click.option("--scale", type=click.Choice(list(SCALES)), default="cpu", show_default=True, help="How large.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of every random draw.")
@click.option("--label-maps", type=DATA, help="Heads from these FreeSurfer label maps; default: drawn ones.")
@click.option("--lesions", type=DATA, help="Strokes from these masks in MNI space; default: drawn ones.")
@click.option("--max-minutes", type=click.FloatRange(min=0, min_open=True), help="Stop after about so long; see above.")
@click.option("--jobs", type=click.IntRange(min=1), help="Processes to draw and prepare with; default: one a CPU.")
@click.option(
    "--save", type=click.Path(dir_okay=False, path_type=Path), help="Keep the numbers of this scale there too."
)
@click.option("-v", "--verbose", is_flag=True, help="Show more of the log.")
def main(
    out: Path,
    scale: str,
    seed: int,
    label_maps: Path | None,
    lesions: Path | None,
    max_minutes: float | None,
    jobs: int | None,
    save: Path | None,
    verbose: bool,
) -> None:
    """Reproduces Meddahi et al. 2024 on semi-synthetic cohorts. Exit status 75: the time was up, run it again."""
    for number in heeded():
        signal.signal(number, _stop)
    with tracking(start_logging(verbose=int(verbose))) as track:
        protocol = Protocol(
            out=out, scale=SCALES[scale], seed=seed, label_maps=label_maps, lesions=lesions, jobs=jobs, track=track
        )
        found = _guarded(protocol, Clock.of(max_minutes))
    _show(found)
    if save is not None:
        keep(save, found)
        show(f"kept in {save}; the README's table of it:\n\n{table.readme_table(read_json(save))}")


def _guarded(protocol: Protocol, clock: Clock) -> dict[str, Any]:
    """Every expected end that is none becomes one line and its exit status."""
    try:
        return reproduce(protocol, clock)
    except Stopped as stopped:
        click.echo(f"stopped: {stopped}; what is done is kept, the same command goes on from here", err=True)
        sys.exit(stopped.exit_code)
    except InputError as error:
        show_error(str(error))
        sys.exit(error.exit_code)
    except (PlanError, OSError) as error:
        show_error(str(error))
        sys.exit(InputError.exit_code)


def _show(found: dict[str, Any]) -> None:
    dice, validation, scale = found["dice"], found["validation"], found["scale"]
    heads = "drawn heads" if found["label_maps"] is None else f"heads of {found['label_maps']}"
    strokes = "drawn strokes" if found["lesions"] is None else f"strokes of {found['lesions']}"
    show(f"semi-synthetic: {heads}, {strokes}; no patient. Scale {scale['name']}, seed {found['seed']}, both plans at")
    show(f"{scale['spacing_mm']:g} mm, nnU-Net's features divided by {scale['narrower']}; steps: {found['steps']}")
    for name, achieved in found["cohorts"].items():
        numbers = f"median {achieved['median_ml']:.1f} ml ({MEDIAN_ML:g}), mean {achieved['mean_ml']:.1f} ({MEAN_ML:g})"
        show(f"{name}: {achieved['cases']} cases, lesions {numbers}; in brackets the paper's Table I")
    columns = ("dataset", "pretrained, validation", "pretrained, all", "fine-tuned, validation")
    rows = table.console_rows(dice, validation, scale["other_lr"])
    show_table("Table II: mean Dice, in brackets the paper's", columns, rows, numbers=columns[1:])
    show_table("Fig. 6", ("network", "", *table.STATISTICS), table.box_rows(dice, validation))
    gained = table.difference_text(table.difference(dice["T1+FLAIR"], dice["T1"], validation))
    show(f"T1+FLAIR minus T1, paired, bootstrap 95 %: {gained}; the paper's means: +0.015")
    for shape in table.shapes(dice, validation):
        show(f"shape {table.verdict(shape)}: {shape.expected}: {shape.why}")
    show(f"{sum(found['seconds'].values()) / 60:.1f} minutes")


def _stop(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    main(prog_name="tools/reproduce_paper.py")
