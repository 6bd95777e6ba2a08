"""New and changed lesions between two times, end to end on a drawn cohort (Meddahi 2024, III.B, VII.D).

    python tools/longitudinal.py OUT [--train 20] [--test 8] [--steps 1500] [--jobs 2] [--seed 0] [--mm 2] [--no-bias]

synth --times 2 -> prepare -> plan -> preprocess -> train -> infer -> evaluate, every station by its library call.
Prints how far the registrations are from the drawn motions, the Dice of the change over changed pairs and the false
lesions of unchanged ones, and writes them to OUT/longitudinal.json. Called again it goes on where it was; other
settings need another OUT. The heads are drawn: they show that the method learns, and nothing about patients.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from planner.rules import make_plan
from planner.smaller import at_spacing, narrower
from strokenet.console import show, show_error, start_logging, tracking
from strokenet.data.errors import InputError
from strokenet.data.files import read_json, write_json
from strokenet.data.nifti import read_volume
from strokenet.data.track import Track
from strokenet.demo import GPU_MEMORY_GB, NARROWER
from strokenet.evaluate.evaluate import evaluate_paths
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
from tools.paper.claim import claim, digest_of_code
from tools.paper.stages import Clock, Facts, Stage, Stopped, run_stages

CODE = ("strokenet", "planner", "kernels")
TEST_SEED = 1000  # added to the seed for the test cohort
STEPS_AN_EPOCH, VAL_STEPS = 25, 1
WANTED_DICE, WANTED_FALSE = 0.5, 1.0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """train, test: pairs. steps: of training. mm: spacing of the plan; the scans keep theirs. bias: N4 in prepare."""

    train: int
    test: int
    steps: int
    seed: int
    mm: float
    bias: bool


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is asked for, and where it is done."""

    out: Path
    settings: Settings
    jobs: int
    track: Track

    @property
    def workspace(self) -> Workspace:
        """The network on the training pairs."""
        return Workspace(self.out / "workspace")

    @property
    def cohorts(self) -> dict[str, tuple[int, int]]:
        """Part -> pairs and seed."""
        of = self.settings
        return {"train": (of.train, of.seed), "test": (of.test, of.seed + TEST_SEED)}


@click.command()
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--train", default=20, show_default=True, help="Pairs to train on.")
@click.option("--test", default=8, show_default=True, help="Pairs to test with; one of four is unchanged.")
@click.option("--steps", default=1500, show_default=True, help="Steps of training.")
@click.option("--jobs", default=2, show_default=True, help="Processes that draw and prepare.")
@click.option("--seed", default=0, show_default=True, help="Of the cohorts and the training.")
@click.option("--mm", default=2.0, show_default=True, help="Voxels of the plan.")
@click.option("--bias/--no-bias", default=True, show_default=True, help="N4 in prepare.")
def main(out: Path, jobs: int, **options: Any) -> None:
    """The whole of it into OUT."""
    settings = Settings(**options)
    try:
        claim(out, "settings.json", asdict(settings) | {"code": digest_of_code(CODE)})
        with tracking(start_logging(verbose=0)) as track:
            run = Run(out=out, settings=settings, jobs=jobs, track=track)
            found = results(run)
    except InputError as error:
        show_error(str(error))
        sys.exit(error.exit_code)
    except Stopped as stopped:
        sys.exit(stopped.exit_code)
    write_json(out / "longitudinal.json", found)
    report(found)


def results(run: Run) -> dict[str, Any]:
    """Every stage that is not done yet, and the numbers of all of them."""
    stages = (
        Stage(name="synth", title="draw the pairs", run=partial(draw, run)),
        Stage(name="prepare", title="prepare their scans", run=partial(prepare, run)),
        Stage(name="plan", title="plan and preprocess", run=partial(plan, run)),
        Stage(name="train", title="train", run=partial(learn, run)),
        Stage(name="test", title="segment the test pairs", run=partial(test, run)),
    )
    done = run_stages(stages, run.out / "marks", Clock())
    return {
        "settings": asdict(run.settings),
        **done["test"].facts,
        "registration_mm": registration_errors(run),
        "minutes": {name: round(result.seconds / 60, 2) for name, result in done.items()},
    }


def draw(run: Run, clock: Clock) -> Facts:
    """Both cohorts of pairs."""
    for part, (cases, seed) in run.cohorts.items():
        if not (run.out / f"drawn_{part}").exists():
            config = SynthConfig(cases=cases, style="clinic", times=2, seed=seed)
            synthesise(run.out / f"drawn_{part}", config, jobs=run.jobs, track=run.track)
    return {}


def prepare(run: Run, clock: Clock) -> Facts:
    """Four scans a pair on the first FLAIR's grid."""
    for part in run.cohorts:
        inputs, config = read_inputs(run.out / f"drawn_{part}" / "patients"), PrepareConfig(bias=run.settings.bias)
        done = prepare_cohort(inputs, run.out / part, config, jobs=run.jobs, track=run.track)
        if done.failed:
            raise InputError(f"{done.failed[0].case_id}: {done.failed[0].step}: {done.failed[0].error}")
    return {}


def plan(run: Run, clock: Clock) -> Facts:
    """The plan of scans brought to voxels of `mm`, and its network at the demo's width; preprocessed."""
    root = run.workspace.root
    planned = plan_workspace(run.out / "train", root, PlanConfig(gpu_memory_gb=GPU_MEMORY_GB, jobs=1), run.track)
    coarse = make_plan(
        at_spacing(planned.fingerprint, run.settings.mm),
        dataset=planned.plan.dataset,
        channels=planned.plan.channels,
        labels=planned.plan.labels,
        gpu_memory_gb=GPU_MEMORY_GB,
    )
    run.workspace.write_plan(narrower(coarse, NARROWER))
    preprocess_workspace(root, jobs=1, track=run.track)
    return {}


def learn(run: Run, clock: Clock) -> Facts:
    """Trains on every pair of the training cohort, from where an earlier run stopped."""
    config = TrainConfig(
        fold="all",
        epochs=max(1, run.settings.steps // STEPS_AN_EPOCH),
        iterations=STEPS_AN_EPOCH,
        val_iterations=VAL_STEPS,
        seed=run.settings.seed,
        resume=True,
    )
    result = train(run.workspace, config, run.track)
    if result.signal is not None:
        raise Stopped(128 + result.signal)
    return {}


def test(run: Run, clock: Clock) -> Facts:
    """dice: of every changed pair. false_lesions: of every pair where nothing changed."""
    out = run.out
    infer_folder(run.workspace.root, out / "test" / "imagesTr", out / "masks", InferConfig(), run.track)
    scored = evaluate_paths(out / "masks", out / "test" / "labelsTr", out=out / "scores.json", track=run.track)
    return {
        "dice": {row.case: row.dice for row in scored.cases if row.ref_nonempty},
        "false_lesions": {row.case: int(row.lesions_false) for row in scored.cases if not row.ref_nonempty},
    }


def registration_errors(run: Run) -> dict[str, float]:
    """Scan -> the median over cases of how far its transform sends the brain from where it is, mean mm."""
    errors: dict[str, list[float]] = {}
    for part in run.cohorts:
        for path in sorted((run.out / part / "prepare").glob("*_0*.json")):
            truth = read_json(run.out / f"drawn_{part}" / "truth" / path.name)["transforms"]
            brain = read_volume(run.out / part / "prepare" / f"{path.stem}_brain.nii.gz")
            points = np.argwhere(brain.array > 0) @ brain.geometry.affine[:3, :3].T + brain.geometry.affine[:3, 3]
            found = read_record(path)["transforms"]
            for name, transform in truth.items():
                away = displacement_mm(points, np.array(found[name]["matrix"]), np.array(transform["matrix"]))
                errors.setdefault(name, []).append(float(away.mean()))
    return {name: round(float(np.median(values)), 3) for name, values in errors.items()}


def report(found: dict[str, Any]) -> None:
    """The figures beside what is wanted."""
    dice, false = list(found["dice"].values()), list(found["false_lesions"].values())
    show(f"minutes: {', '.join(f'{name} {spent:.1f}' for name, spent in found['minutes'].items())}")
    errors = ", ".join(f"{name} {mm:.2f}" for name, mm in found["registration_mm"].items())
    show(f"median error of the motion to the first FLAIR, mm: {errors}")
    if dice:
        values = " ".join(f"{value:.2f}" for value in dice)
        show(f"change Dice of {len(dice)} changed pairs: mean {np.mean(dice):.3f}, median {np.median(dice):.3f}")
        show(f"  each: {values}; wanted: mean at least {WANTED_DICE}")
    if false:
        values = " ".join(str(value) for value in false)
        show(f"false lesions of {len(false)} unchanged pairs: {values}; wanted: at most {WANTED_FALSE:.0f} each")


if __name__ == "__main__":
    main()
