"""From a raw dataset to a workspace: survey -> fingerprint -> plan -> splits; then the plan carried out on all."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from planner.fingerprint import Fingerprint, make_fingerprint
from planner.plan import Orientation, Plan
from planner.rules import Planner, make_plan
from strokenet.data.dataset import read_dataset
from strokenet.data.errors import InputError
from strokenet.data.splits import Split, make_splits
from strokenet.data.track import Track, silent
from strokenet.preprocess.cohort import preprocess_dataset, survey_dataset
from strokenet.preprocess.store import Store
from strokenet.workspace import Workspace

_log = logging.getLogger("strokenet")


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Choices of `strokenet plan`. jobs: processes, None by cores and free memory."""

    planner: Planner = "plain"
    gpu_memory_gb: float | None = None
    orientation: Orientation = "RAS"
    jobs: int | None = None


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What `plan_workspace` wrote."""

    workspace: Workspace
    fingerprint: Fingerprint
    plan: Plan
    splits: tuple[Split, ...]


@dataclass(frozen=True, kw_only=True)
class Preprocessed:
    """Which cases were made now and which were there already."""

    made: tuple[str, ...]
    kept: tuple[str, ...]


def plan_workspace(dataset_root: Path, root: Path, config: PlanConfig, track: Track = silent) -> Planned:
    """Looks at every case of a raw dataset, decides how to train, and writes the workspace.

    Raises:
        InputError: the dataset or one of its cases cannot be used, or the workspace would replace a raw dataset or the
            plan of a model. PlanError: no plan fits the data.
    """
    workspace = Workspace(root)
    dataset = read_dataset(dataset_root)
    _refuse_replacing(workspace, dataset.root)
    summaries = survey_dataset(dataset, config.orientation, config.jobs, track)
    fingerprint = make_fingerprint(summaries)
    plan = make_plan(
        fingerprint,
        dataset=dataset.name,
        channels=dataset.channels,
        labels=dataset.labels,
        planner=config.planner,
        gpu_memory_gb=config.gpu_memory_gb,
        orientation=config.orientation,
    )
    splits = make_splits([case.case_id for case in dataset.cases])
    workspace.write_dataset(dataset)
    workspace.write_fingerprint(fingerprint)
    workspace.write_splits(splits)
    workspace.write_plan(plan)
    return Planned(workspace=workspace, fingerprint=fingerprint, plan=plan, splits=splits)


def _refuse_replacing(workspace: Workspace, dataset_root: Path) -> None:
    root = workspace.root
    raw = workspace.dataset_file.exists() and not workspace.plan_file.exists()
    if raw or root.resolve() == dataset_root.resolve():
        raise InputError(f"{root}: holds a dataset.json that is no workspace's; give another folder with -o")
    if workspace.is_started:
        raise InputError(f"{root}: a model was trained here by its plan; choose another -o, or remove its fold_* first")


def preprocess_workspace(root: Path, jobs: int | None = None, track: Track = silent) -> Preprocessed:
    """Carries the workspace's plan out on every case that is not there yet, or not by this plan."""
    workspace = Workspace(root)
    plan = workspace.read_plan()
    dataset = workspace.read_dataset()
    made = preprocess_dataset(dataset, plan, Store(workspace.preprocessed), jobs, track)
    kept = tuple(case.case_id for case in dataset.cases if case.case_id not in set(made))
    return Preprocessed(made=tuple(made), kept=kept)
