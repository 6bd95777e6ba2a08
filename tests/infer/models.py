"""Models and scans that the tests of inference share: a network whose answer is known, random weights, small files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from torch import Tensor, nn

from planner.plan import Plan, PostprocessRule
from strokenet.model.checkpoint import Model, save_weights
from strokenet.model.network import build_network
from strokenet.workspace import Workspace
from tests.plans import STATS, tiny_plan

BRIGHT = 5.5  # what KnownNetwork calls lesion is brighter


class KnownNetwork(nn.Module):
    """The first channel above BRIGHT is lesion, voxel by voxel: (N, 1, D, H, W) -> (N, 2, D, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 2
        self.decoder = nn.Module()
        self.decoder.seg_layers = nn.ModuleList([nn.Conv3d(1, 2, 1)])

    def forward(self, image: Tensor) -> Tensor:
        return torch.cat([BRIGHT - image[:, :1], image[:, :1] - BRIGHT], 1)


def known_plan(**changes: Any) -> Plan:
    """One channel as it is, lesion above one half, nothing removed."""
    fields: dict[str, Any] = {
        "channels": ("T1",),
        "normalisation": ("none",),
        "use_mask_for_norm": (False,),
        "intensity": (STATS,),
        "postprocess": PostprocessRule(threshold=0.5),
    }
    return tiny_plan(**(fields | changes))


def known_model(plan: Plan) -> Model:
    return Model(root=Path("known"), plan=plan, folds=("0",), networks=(KnownNetwork(),))  # type: ignore[arg-type]


def write_model(root: Path, plan: Plan | None = None, folds: Sequence[str] = ("0",), dropout: float = 0.0) -> Plan:
    """A model folder with random weights, one draw a fold, noted as trained with this modality dropout."""
    plan = plan or tiny_plan()
    workspace = Workspace(root)
    workspace.write_plan(plan)
    for seed, fold in enumerate(folds):
        torch.manual_seed(seed)
        weights = build_network(plan).state_dict()
        save_weights(workspace.fold(fold).last, weights, note={"epoch": "1", "modality_dropout": str(dropout)})
    return plan


def oblique(spacing: Sequence[float] = (1.0, 1.0, 1.0), degrees: float = 11.0) -> np.ndarray:
    """A RAS affine (4, 4), i, j, k -> mm, turned about an axis that is no coordinate axis; columns spacing long."""
    axis, angle = np.array([1.0, 2.0, -1.5]), np.deg2rad(degrees)
    x, y, z = axis / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    rotation = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    affine = np.eye(4)
    affine[:3, :3] = rotation * spacing
    affine[:3, 3] = -12.5, 7.25, 30
    return affine


def head(shape: Sequence[int] = (20, 18, 16), seed: int = 0) -> np.ndarray:
    """An ellipsoid of noise in a border of zeros, (i, j, k) float32."""
    grid = np.stack(np.meshgrid(*(np.linspace(-1.15, 1.15, n) for n in shape), indexing="ij"))
    noise = np.random.default_rng(seed).normal(100, 15, size=tuple(shape))
    return np.where((grid**2).sum(0) < 1, noise, 0).astype(np.float32)


def write_scan(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    """A NIfTI file with both forms set, as scanners' converters write it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(array, oblique() if affine is None else affine)
    image.header.set_xyzt_units("mm", "sec")
    image.set_qform(image.affine, code=1)
    image.set_sform(image.affine, code=2)
    nibabel.save(image, path)
    return path


def write_case(folder: Path, case: str, seed: int = 0, shape: Sequence[int] = (20, 18, 16)) -> tuple[Path, Path]:
    """CASE_0000.nii.gz and CASE_0001.nii.gz."""
    first, second = (write_scan(folder / f"{case}_{c:04d}.nii.gz", head(shape, seed + c)) for c in (0, 1))
    return first, second
