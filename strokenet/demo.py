"""The demo: every station by name, on drawn heads, in a few minutes on two CPU cores and without a download.

draw a cohort -> plan -> preprocess -> train -> infer -> evaluate, and beside it the best single intensity threshold.
The plan is nnU-Net's for a small budget; only the network is made narrower, because a laptop shall train it while its
owner waits. What the score proves is that the method learns; the heads are drawn, not scanned.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from planner.plan import Plan
from planner.smaller import narrower
from strokenet import __version__
from strokenet.data.case import Case, read_case
from strokenet.data.dataset import CaseFiles
from strokenet.data.errors import InputError
from strokenet.data.files import write_json
from strokenet.data.geometry import turn_to_ras
from strokenet.data.nifti import write_mask
from strokenet.data.track import Track, silent
from strokenet.evaluate.evaluate import evaluate_paths
from strokenet.evaluate.figures import draw_boxes, draw_overlay
from strokenet.evaluate.records import Evaluation
from strokenet.evaluate.threshold import Threshold, apply_threshold, fit_threshold
from strokenet.infer.infer import InferConfig, infer
from strokenet.preprocess.planning import PlanConfig, plan_workspace, preprocess_workspace
from strokenet.synth.cohort import Cohort, CohortConfig, draw_cohort
from strokenet.train.feed import Batch
from strokenet.train.launch import make_steps
from strokenet.train.run import FoldCases, TrainConfig, start_run
from strokenet.train.train import speedups_of, train
from strokenet.workspace import Workspace

_log = logging.getLogger("strokenet")

GPU_MEMORY_GB = 0.3  # of the plan: patches of about half a head an edge
FOLDERS = ("dataset", "workspace", "predictions", "threshold", "overlays")
MARK = "demo.json"  # written first: only a folder that has it is ever emptied
NARROWER = 2  # features of the network: nnU-Net's 32 .. 320 divided by it; a quarter learns far more slowly
ITERATIONS, VAL_ITERATIONS = 20, 2
LEAST_EPOCHS = 3  # 60 steps, which a slow machine takes longer for: after 20 the network has hardly learned anything


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """minutes: of training, and more on a slow machine; the rest takes about one. seed: of the cohort and the training.

    train, held_out: cases to draw.
    """

    minutes: float = 2.5
    seed: int = 0
    train: int = 20
    held_out: int = 6


@dataclass(frozen=True, kw_only=True)
class DemoOutcome:
    """What the demo ends with.

    evaluation: of the held-out cases, compared with the threshold's masks. threshold: fitted on the training cases.
    channel: its channel's name. pictures: the box plot and an overlay a case. steps: of training. seconds: in all.
    """

    root: Path
    evaluation: Evaluation
    threshold: Threshold
    channel: str
    pictures: tuple[Path, ...]
    steps: int
    seconds: float


def run_demo(root: Path, config: DemoConfig, track: Track = silent) -> DemoOutcome:
    """The whole method on a drawn cohort; `root` then holds dataset/, workspace/, predictions/, scores.json, pictures.

    Raises:
        InputError: the folder holds something else than an earlier demo.
    """
    began = time.monotonic()
    _start_folder(root, config)
    drawn = CohortConfig(train=config.train, held_out=config.held_out, seed=config.seed)
    cohort = draw_cohort(root / "dataset", drawn, track)
    workspace = _workspace(root / "workspace", cohort, track)
    steps = _train(workspace, config.minutes, config.seed, track)
    infer(workspace.root, cohort.held_out, root / "predictions", InferConfig(), track)
    threshold = _threshold_masks(cohort, root / "threshold")
    evaluation = evaluate_paths(
        root / "predictions",
        cohort.held_out[0].label.parent,  # type: ignore[union-attr]
        against=root / "threshold",
        out=root / "scores.json",
        track=track,
    )
    return DemoOutcome(
        root=root,
        evaluation=evaluation,
        threshold=threshold,
        channel=cohort.dataset.channels[threshold.channel],
        pictures=_pictures(root, cohort.held_out, cohort.dataset.channels, evaluation),
        steps=steps,
        seconds=time.monotonic() - began,
    )


def _start_folder(root: Path, config: DemoConfig) -> None:
    """An empty folder with a mark, or an earlier demo's, which the mark shows: what that left is taken away."""
    if root.is_dir() and any(root.iterdir()):
        if not (root / MARK).is_file():
            raise InputError(f"{root}: is not empty and holds no earlier demo; choose another -o")
        for name in FOLDERS:
            shutil.rmtree(root / name, ignore_errors=True)
    write_json(root / MARK, {"made by": f"strokenet demo {__version__}", **asdict(config)})


def _workspace(root: Path, cohort: Cohort, track: Track) -> Workspace:
    """Planned, made narrower, preprocessed."""
    planned = plan_workspace(cohort.dataset.root, root, PlanConfig(gpu_memory_gb=GPU_MEMORY_GB, jobs=1), track)
    plan = narrower(planned.plan, NARROWER)
    planned.workspace.write_plan(plan)
    _log.info("plan: patch %s at %s mm, %s", plan.patch, _rounded(plan.spacing), _features(plan))
    preprocess_workspace(root, track=track)
    return planned.workspace


def _train(workspace: Workspace, minutes: float, seed: int, track: Track) -> int:
    """Trains on all cases for about so many minutes, LEAST_EPOCHS at least; returns the number of steps."""
    plan = workspace.read_plan()
    seconds = seconds_a_step(workspace, TrainConfig(fold="all", seed=seed))
    epoch_minutes = seconds * (ITERATIONS + 0.5 * VAL_ITERATIONS) / 60  # validation costs half a step
    epochs = max(LEAST_EPOCHS, round(minutes / epoch_minutes))
    _log.info("training: %d epochs of %d steps, batch %d", epochs, ITERATIONS, plan.batch_size)
    config = TrainConfig(
        fold="all",
        epochs=epochs,
        iterations=ITERATIONS,
        val_iterations=VAL_ITERATIONS,
        seed=seed,
        max_time_minutes=1.5 * max(minutes, epochs * epoch_minutes) + 0.5,  # where the machine slows down meanwhile
    )
    result = train(workspace, config, track)
    return len(result.history) * ITERATIONS


def seconds_a_step(workspace: Workspace, config: TrainConfig) -> float:
    """Seconds of one training step on this machine, the median of a few, so that the schedule fits the time."""
    plan = workspace.read_plan()
    run = start_run(workspace, plan, config, FoldCases(train=(), val=()))
    run.network.train()
    steps = make_steps(run, speedups_of(config, run.device))
    image = torch.randn(plan.batch_size, len(plan.channels), *plan.patch, device=run.device)
    batch = Batch(image=image, label=(image[:, 0] > 1).long(), cases=("noise",) * plan.batch_size)
    steps.begin(config.lr)
    times = []
    for number in range(4):
        began = time.monotonic()
        steps(batch, number)
        steps.rest()  # waits for a GPU
        times.append(time.monotonic() - began)
    return float(np.median(times[1:])) * 1.15  # cutting and augmentation


def _threshold_masks(cohort: Cohort, out: Path) -> Threshold:
    """The best threshold of the training cases, and its masks of the held-out ones."""
    channels = cohort.dataset.channels
    threshold = fit_threshold(_image_and_lesion(case) for case in _read(cohort.dataset.cases, channels))
    for case in _read(cohort.held_out, channels):
        write_mask(out / f"{case.case_id}.nii.gz", apply_threshold(case.image, threshold), case.header)
    return threshold


def _read(files: Sequence[CaseFiles], channels: Sequence[str]) -> list[Case]:
    return [read_case(f.case_id, dict(zip(channels, f.images, strict=True)), f.label) for f in files]


def _image_and_lesion(case: Case) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    assert case.label is not None
    return case.image, case.label > 0


def _pictures(
    root: Path, held_out: Sequence[CaseFiles], channels: Sequence[str], evaluation: Evaluation
) -> tuple[Path, ...]:
    """A box plot of both sets of masks, and the outlines of every held-out case."""
    boxes = root / "dice.png"
    assert evaluation.comparison is not None
    draw_boxes(
        {
            "strokenet": [score.dice for score in evaluation.cases],
            "best threshold": [score.dice for score in evaluation.comparison.cases],
        },
        boxes,
    )
    overlays = []
    for case in _read(held_out, channels):
        predicted = read_case(case.case_id, {"mask": root / "predictions" / f"{case.case_id}.nii.gz"})
        turn = turn_to_ras(case.geometry)
        overlays.append(root / "overlays" / f"{case.case_id}.png")
        assert case.label is not None
        draw_overlay(
            {name: turn.apply(image) for name, image in zip(channels, case.image, strict=True)},
            turn.permute(case.geometry.spacing),
            overlays[-1],
            case=case.case_id,
            reference=turn.apply(case.label > 0),
            prediction=turn.apply(predicted.image[0] > 0),
        )
    return (boxes, *overlays)


def _rounded(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(round(value, 2) for value in values)


def _features(plan: Plan) -> str:
    first, last = plan.network.features[0], plan.network.features[-1]
    return f"{plan.network.stages} levels of {first} to {last} features (nnU-Net's divided by {NARROWER})"
