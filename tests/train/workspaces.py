"""A workspace of drawn cases that the tests of this room share: noise with a bright lesion, preprocessed already."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from planner.plan import Plan
from strokenet.data.dataset import CaseFiles, Dataset
from strokenet.data.geometry import AS_STORED, Geometry
from strokenet.data.splits import Split
from strokenet.preprocess.crop import Box
from strokenet.preprocess.preprocess import Origin, Prepared
from strokenet.preprocess.store import Store, plan_key
from strokenet.train.run import TrainConfig
from strokenet.workspace import Workspace
from tests.plans import tiny_plan

CASES = ("a", "b", "c")
SHORT = TrainConfig(epochs=3, iterations=3, val_iterations=2, device="cpu", seed=7)


def drawn_case(case_id: str, seed: int, *, shape: tuple[int, int, int] = (20, 24, 22)) -> Prepared:
    """Noise of deviation 0.3 with a ball of brightness 3, its label, and -1 in one corner."""
    rng = np.random.default_rng(seed)
    centre = [int(rng.integers(8, edge - 8)) for edge in shape]
    distance = sum((axis - c) ** 2 for axis, c in zip(np.indices(shape), centre, strict=True))
    label = (distance < 20).astype(np.int16)
    image = rng.normal(0, 0.3, (2, *shape)) + 3 * label
    label[:3, :3, :3] = -1
    return Prepared(
        case_id=case_id,
        image=torch.from_numpy(image.astype(np.float32)),
        label=label,
        foreground={1: np.argwhere(label == 1)},
        inside=torch.from_numpy(label >= 0),
        origin=Origin(
            geometry=Geometry(shape=shape, spacing=(1.0, 1.0, 1.0), affine=np.eye(4)),
            turn=AS_STORED,
            box=Box(start=(0, 0, 0), stop=shape),
        ),
    )


def make_workspace(root: Path, plan: Plan | None = None) -> Workspace:
    """Three cases; fold 0 trains on a and b and validates on c, fold 1 on a and c, and on b."""
    plan = plan or tiny_plan()
    workspace = Workspace(root)
    raw = root / "raw"  # named, never read
    files = [
        CaseFiles(
            case_id=case_id,
            images=tuple(raw / f"{case_id}_{channel:04d}.nii.gz" for channel in range(len(plan.channels))),
            label=None,
        )
        for case_id in CASES
    ]
    workspace.write_dataset(
        Dataset(
            root=raw,
            name="tiny",
            channels=plan.channels,
            labels=dict(plan.labels),
            file_ending=".nii.gz",
            cases=tuple(files),
        )
    )
    workspace.write_plan(plan)
    workspace.write_splits([Split(train=("a", "b"), val=("c",)), Split(train=("a", "c"), val=("b",))])
    for seed, case_id in enumerate(CASES):
        Store(workspace.preprocessed).write(drawn_case(case_id, seed), f"{plan_key(plan)}-drawn")
    return workspace


def short(**changes: Any) -> TrainConfig:
    """Three epochs of three steps."""
    return replace(SHORT, **changes)


def rows(workspace: Workspace, fold: str = "0") -> list[dict[str, str]]:
    """log.csv without what the clock says."""
    with workspace.fold(fold).log.open(newline="") as file:
        return [
            {k: v for k, v in row.items() if k not in ("seconds", "data_wait_share")} for row in csv.DictReader(file)
        ]


def weights(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file."""
    return load_file(path)


def assert_same_run(one: Workspace, other: Workspace, fold: str = "0") -> None:
    """Weights bit for bit, the best ones too, and the log but for the times."""
    for name in ("last", "best"):
        a, b = weights(getattr(one.fold(fold), name)), weights(getattr(other.fold(fold), name))
        assert a.keys() == b.keys()
        for key in a:
            assert torch.equal(a[key], b[key]), f"{name}: {key}"
    assert rows(one, fold) == rows(other, fold)
