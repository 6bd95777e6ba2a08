"""New and changed lesions between two times, end to end on a drawn cohort (Meddahi 2024, III.B, VII.D).

    python tools/longitudinal.py OUT [--train 20] [--test 8] [--steps 1500] [--jobs 2] [--seed 0] [--mm 2] [--no-bias]

synth --times 2 -> prepare -> plan -> preprocess -> train -> infer -> evaluate, every station by its library call.
Prints how far the registrations are from the drawn motions, the Dice of the change over changed pairs and the false
lesions of unchanged ones, and writes them to OUT/longitudinal.json. What is there is not made again; another OUT begins
anew. The heads are drawn: they show that the method learns, and nothing about patients.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from planner.rules import make_plan
from planner.smaller import at_spacing, narrower
from strokenet.console import start_logging, tracking
from strokenet.data.files import write_json
from strokenet.data.nifti import read_volume
from strokenet.data.track import Track
from strokenet.demo import GPU_MEMORY_GB, NARROWER
from strokenet.evaluate.evaluate import evaluate_paths
from strokenet.evaluate.records import Evaluation
from strokenet.infer.infer import InferConfig, infer_folder
from strokenet.prepare.cohort import prepare_cohort
from strokenet.prepare.config import PrepareConfig
from strokenet.prepare.inputs import read_inputs
from strokenet.prepare.record import read_record
from strokenet.prepare.register import displacement_mm
from strokenet.preprocess.planning import PlanConfig, plan_workspace, preprocess_workspace
from strokenet.synth.synth import SynthConfig, synthesise
from strokenet.train.run import TrainConfig
from strokenet.train.train import train
from strokenet.workspace import Workspace

TEST_SEED = 1000  # added to the seed for the test cohort
STEPS_AN_EPOCH, VAL_STEPS = 25, 1
WANTED_DICE, WANTED_FALSE = 0.5, 1.0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """train, test: pairs. steps: of training. mm: spacing of the plan; the scans keep theirs."""

    train: int
    test: int
    steps: int
    jobs: int
    seed: int
    mm: float
    bias: bool


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """dice: of every changed pair. false_lesions: of every unchanged pair. registration_mm: scan -> median error."""

    dice: dict[str, float]
    false_lesions: dict[str, int]
    registration_mm: dict[str, float]
    minutes: dict[str, float]


@click.command()
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--train", "train_", default=20, show_default=True, help="Pairs to train on.")
@click.option("--test", default=8, show_default=True, help="Pairs to test with; one of four is unchanged.")
@click.option("--steps", default=1500, show_default=True, help="Steps of training.")
@click.option("--jobs", default=2, show_default=True, help="Processes that draw and prepare.")
@click.option("--seed", default=0, show_default=True, help="Of the cohorts and the training.")
@click.option("--mm", default=2.0, show_default=True, help="Voxels of the plan.")
@click.option("--bias/--no-bias", default=True, show_default=True, help="N4 in prepare.")
def main(out: Path, train_: int, test: int, steps: int, jobs: int, seed: int, mm: float, bias: bool) -> None:
    """The whole of it into OUT."""
    settings = Settings(train=train_, test=test, steps=steps, jobs=jobs, seed=seed, mm=mm, bias=bias)
    with tracking(start_logging(verbose=0)) as track:
        outcome = run(out, settings, track)
    write_json(out / "longitudinal.json", {"settings": asdict(settings), **asdict(outcome)})
    show(outcome)


def run(out: Path, settings: Settings, track: Track) -> Outcome:
    """Every station in order."""
    minutes: dict[str, float] = {}
    began = time.monotonic()

    def clock(station: str) -> None:
        nonlocal began
        minutes[station] = round((time.monotonic() - began) / 60, 2)
        began = time.monotonic()

    parts = {"train": (settings.train, settings.seed), "test": (settings.test, settings.seed + TEST_SEED)}
    for part, (cases, seed) in parts.items():
        if not (out / f"drawn_{part}").exists():
            config = SynthConfig(cases=cases, style="clinic", times=2, seed=seed)
            synthesise(out / f"drawn_{part}", config, jobs=settings.jobs, track=track)
    clock("synth")
    for part in parts:
        inputs = read_inputs(out / f"drawn_{part}" / "patients")
        done = prepare_cohort(inputs, out / part, PrepareConfig(bias=settings.bias), jobs=settings.jobs, track=track)
        if done.failed:
            raise click.ClickException(f"{done.failed[0].case_id}: {done.failed[0].step}: {done.failed[0].error}")
    clock("prepare")
    workspace = plan_coarsely(out, settings, track)
    clock("plan")
    train_on_all(workspace, settings, track)
    clock("train")
    infer_folder(workspace.root, out / "test" / "imagesTr", out / "masks", InferConfig(), track)
    evaluation = evaluate_paths(out / "masks", out / "test" / "labelsTr", out=out / "scores.json", track=track)
    clock("test")
    return Outcome(
        dice={row.case: row.dice for row in evaluation.cases if row.ref_nonempty},
        false_lesions=false_lesions(evaluation),
        registration_mm=registration_errors(out, list(parts)),
        minutes=minutes,
    )


def plan_coarsely(out: Path, settings: Settings, track: Track) -> Workspace:
    """The plan of scans brought to voxels of `mm`, and its network at the demo's width; preprocessed."""
    workspace = Workspace(out / "workspace")
    if workspace.is_started:
        return workspace
    planned = plan_workspace(out / "train", workspace.root, PlanConfig(gpu_memory_gb=GPU_MEMORY_GB, jobs=1), track)
    coarse = make_plan(
        at_spacing(planned.fingerprint, settings.mm),
        dataset=planned.plan.dataset,
        channels=planned.plan.channels,
        labels=planned.plan.labels,
        gpu_memory_gb=GPU_MEMORY_GB,
    )
    workspace.write_plan(narrower(coarse, NARROWER))
    preprocess_workspace(workspace.root, jobs=1, track=track)
    return workspace


def train_on_all(workspace: Workspace, settings: Settings, track: Track) -> None:
    """Trains on every pair of the training cohort, from where an earlier run stopped."""
    config = TrainConfig(
        fold="all",
        epochs=max(1, settings.steps // STEPS_AN_EPOCH),
        iterations=STEPS_AN_EPOCH,
        val_iterations=VAL_STEPS,
        seed=settings.seed,
        resume=workspace.is_started,
    )
    train(workspace, config, track)


def false_lesions(evaluation: Evaluation) -> dict[str, int]:
    """Lesions that were found in pairs where nothing changed."""
    return {row.case: int(row.lesions_false) for row in evaluation.cases if not row.ref_nonempty}


def registration_errors(out: Path, parts: list[str]) -> dict[str, float]:
    """Scan -> the median over cases of how far its transform sends the brain from where it is, mean mm."""
    errors: dict[str, list[float]] = {}
    for part in parts:
        for path in sorted((out / part / "prepare").glob("*_0*.json")):
            truth = json.loads((out / f"drawn_{part}" / "truth" / path.name).read_text())["transforms"]
            brain = read_volume(out / part / "prepare" / f"{path.stem}_brain.nii.gz")
            points = np.argwhere(brain.array > 0) @ brain.geometry.affine[:3, :3].T + brain.geometry.affine[:3, 3]
            found = read_record(path)["transforms"]
            for name, transform in truth.items():
                away = displacement_mm(points, np.array(found[name]["matrix"]), np.array(transform["matrix"]))
                errors.setdefault(name, []).append(float(away.mean()))
    return {name: round(float(np.median(values)), 3) for name, values in errors.items()}


def show(outcome: Outcome) -> None:
    """The figures beside what is wanted."""
    dice, false = list(outcome.dice.values()), list(outcome.false_lesions.values())
    click.echo(f"minutes: {', '.join(f'{station} {spent:.1f}' for station, spent in outcome.minutes.items())}")
    errors = ", ".join(f"{name} {mm:.2f}" for name, mm in outcome.registration_mm.items())
    click.echo(f"median error of the motion to the first FLAIR, mm: {errors}")
    if dice:
        values = " ".join(f"{value:.2f}" for value in dice)
        click.echo(f"change Dice of {len(dice)} changed pairs: mean {np.mean(dice):.3f}, median {np.median(dice):.3f}")
        click.echo(f"  each: {values}; wanted: mean at least {WANTED_DICE}")
    if false:
        values = " ".join(str(value) for value in false)
        click.echo(f"false lesions of {len(false)} unchanged pairs: {values}; wanted: at most {WANTED_FALSE:.0f} each")


if __name__ == "__main__":
    main()
