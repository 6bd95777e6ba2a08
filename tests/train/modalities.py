"""One model for T1, FLAIR or both, beside a model of its own for each, on drawn heads (Meddahi 2024, VII.A).

    python -m tests.train.modalities [--train 20] [--test 8] [--steps 500] [--times 3] [--p 0.67] [--seed 0] [--out DIR]

Models learn the same cohort: without dropout one of T1, one of FLAIR, one of both; and one of all three subsets with
modality dropout, for --times as many steps: by default as many as the three that it replaces together, each subset in
a third of them. Printed: Dice of each subset of the held-out cases, beside its own model's (goal: within 0.03); then,
with the held-out scans as drawn, and with a T1 or a FLAIR that is degraded more and more, Dice of each subset by the
model with dropout and the cases in which `infer` would flag a channel as surer alone. Called again with the same DIR it
trains nothing anew.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter

from planner.smaller import narrower
from strokenet.data.case import Case, read_case
from strokenet.data.dataset import CaseFiles
from strokenet.data.files import write_json
from strokenet.data.overlap import dice
from strokenet.demo import GPU_MEMORY_GB, NARROWER
from strokenet.infer.agreement import compare
from strokenet.infer.config import InferConfig
from strokenet.infer.predict import Prediction, predict
from strokenet.model.checkpoint import Model, load_model
from strokenet.preprocess.planning import PlanConfig, plan_workspace, preprocess_workspace
from strokenet.synth.cohort import ENDING, LABELS, CohortConfig, draw_cohort
from strokenet.train.run import TrainConfig
from strokenet.train.train import train
from strokenet.workspace import Workspace

GOAL = 0.03
ITERATIONS = 20  # steps an epoch, as in the demo
LEVELS = ((1.0, 2.0), (3.0, 2.0), (6.0, 4.0))  # of degrading: deviation of the noise over the brain's; blur, mm
CHANNELS = ("T1", "FLAIR")
SUBSETS = (("T1",), ("FLAIR",), ("T1", "FLAIR"))


@dataclass(frozen=True, kw_only=True)
class Found:
    """One held-out case by one model: the prediction of every subset it was asked for, and its Dice."""

    predictions: dict[tuple[str, ...], Prediction]
    dice: dict[tuple[str, ...], float]
    voxel_volume_mm3: float


def narrowed(dataset: Path, out: Path, channels: Sequence[str]) -> Path:
    """The training part of a raw dataset with some of its channels, numbered anew."""
    (out / "imagesTr").mkdir(parents=True)
    shutil.copytree(dataset / "labelsTr", out / "labelsTr")
    for label in sorted((dataset / "labelsTr").glob(f"*{ENDING}")):
        case_id = label.name.removesuffix(ENDING)
        for new, name in enumerate(channels):
            old = dataset / "imagesTr" / f"{case_id}_{CHANNELS.index(name):04d}{ENDING}"
            shutil.copyfile(old, out / "imagesTr" / f"{case_id}_{new:04d}{ENDING}")
    names = {str(number): name for number, name in enumerate(channels)}
    cases = len(list((out / "labelsTr").iterdir()))
    write_json(
        out / "dataset.json",
        {"channel_names": names, "labels": LABELS, "numTraining": cases, "file_ending": ENDING},
    )
    return out


def trained(dataset: Path, root: Path, *, steps: int, p: float, seed: int) -> Model:
    """Planned as the demo plans, preprocessed, and trained on all cases for so many steps on the CPU."""
    workspace = Workspace(root)
    if not workspace.is_started:
        planned = plan_workspace(dataset, root, PlanConfig(gpu_memory_gb=GPU_MEMORY_GB, jobs=1))
        planned.workspace.write_plan(narrower(planned.plan, NARROWER))
        preprocess_workspace(root)
    config = TrainConfig(
        fold="all",
        epochs=max(1, round(steps / ITERATIONS)),
        iterations=min(steps, ITERATIONS),
        val_iterations=1,
        modality_dropout=p,
        device="cpu",
        seed=seed,
        resume=True,  # what is finished stays as it is
    )
    train(workspace, config)
    return load_model(root)


def held_out(files: Sequence[CaseFiles]) -> list[Case]:
    """The cases with their labels, both channels."""
    return [read_case(f.case_id, dict(zip(CHANNELS, f.images, strict=True)), f.label) for f in files]


def degraded(case: Case, channel: str, level: tuple[float, float], rng: np.random.Generator) -> Case:
    """One channel blurred and noisy inside the brain, as by a moving patient; the other and the zeros stay."""
    index = CHANNELS.index(channel)
    image, scan = case.image.copy(), case.image[index]
    inside = scan != 0
    strength, blur_mm = level
    blurred = gaussian_filter(scan, [blur_mm / mm for mm in case.geometry.spacing])
    noise = rng.normal(0, strength * float(scan[inside].std()), scan.shape)
    image[index] = np.where(inside, blurred + noise, 0)
    return replace(case, image=image)


def subset_of(case: Case, channels: Sequence[str]) -> Case:
    """The case as if the other scans had not been made."""
    indices = [case.channels.index(name) for name in channels]
    return replace(case, channels=tuple(channels), image=case.image[indices])


def examined(model: Model, case: Case, subsets: Sequence[tuple[str, ...]]) -> Found:
    """Every subset of one case by one model."""
    assert case.label is not None
    truth = case.label > 0
    predictions = {names: predict(model, subset_of(case, names), InferConfig()) for names in subsets}
    scores = {names: dice(found.mask > 0, truth) for names, found in predictions.items()}
    return Found(predictions=predictions, dice=scores, voxel_volume_mm3=case.geometry.voxel_volume_mm3)


def surer_alone(found: Found) -> tuple[str, ...]:
    """The channels that `infer` would flag in this case."""
    alone = {names[0]: one for names, one in found.predictions.items() if len(names) == 1}
    return compare(found.predictions[CHANNELS], alone.items(), found.voxel_volume_mm3).surer_alone


def mean_dice(found: Sequence[Found], names: tuple[str, ...]) -> float:
    """Over the cases."""
    return float(np.mean([one.dice[names] for one in found]))


def say(line: str) -> None:
    """A line, at once: a run takes minutes."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def show_beside(found: Sequence[Found], own: Sequence[Model], cases: Sequence[Case]) -> None:
    """Dice of each subset beside its own model's."""
    for names, model in zip(SUBSETS, own, strict=True):
        one, dedicated = mean_dice(found, names), mean_dice([examined(model, c, [names]) for c in cases], names)
        verdict = "within the goal" if one >= dedicated - GOAL else "goal NOT reached"
        say(f"{'+'.join(names):9s} one model {one:.3f}, its own {dedicated:.3f}, {one - dedicated:+.3f}: {verdict}")


def show_flags(title: str, found: Sequence[Found]) -> None:
    """Dice of each subset, in how many cases a channel is surer alone, and in how many it is better alone."""
    flags = [surer_alone(one) for one in found]
    better = {name: sum(one.dice[(name,)] > one.dice[CHANNELS] for one in found) for name in CHANNELS}
    shares = [
        f"{name} surer alone in {sum(name in f for f in flags)}, better in {better[name]} of {len(flags)}"
        for name in CHANNELS
    ]
    scores = [f"{'+'.join(names)} {mean_dice(found, names):.3f}" for names in SUBSETS]
    say(f"{title}: Dice {', '.join(scores)}; {'; '.join(shares)}")


def main(options: argparse.Namespace, root: Path) -> None:
    """The cohort, the four models, and what they say."""
    drawn = CohortConfig(train=options.train, held_out=options.test, seed=options.seed)
    cohort = draw_cohort(root / "dataset", drawn)  # the same files, where they are there
    steps = options.steps * options.times
    say(f"{options.train} drawn heads to train, {options.test} held out, {options.steps} steps a model of its own")
    say(f"one model: {steps} steps, p {options.p}")
    one = trained(root / "dataset", root / f"one_{steps}_{options.p:g}", steps=steps, p=options.p, seed=options.seed)
    own = []
    for names in SUBSETS:
        place = root / "own" / "-".join(names)
        if not place.exists():
            narrowed(root / "dataset", place / "dataset", names)
        own.append(trained(place / "dataset", place / "work", steps=options.steps, p=0.0, seed=options.seed))
    cases = held_out(cohort.held_out)
    found = [examined(one, case, SUBSETS) for case in cases]
    show_beside(found, own, cases)
    show_flags("as drawn", found)
    for number, channel in enumerate(CHANNELS):
        for step, level in enumerate(LEVELS, start=1):
            rng = np.random.default_rng([options.seed, number, step])
            worse = [degraded(case, channel, level, rng) for case in cases]
            show_flags(f"degraded {channel}, {step} of 3", [examined(one, case, SUBSETS) for case in worse])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("train", 20), ("test", 8), ("steps", 500), ("times", 3), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--p", type=float, default=0.67)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        main(given, given.out or Path(temporary))
