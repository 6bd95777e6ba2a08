"""What step, data and epoch compute on: a default plan for a patch, one batch, and a cohort of drawn heads.

All of it goes to the contenders as files (JSON, safetensors, the store of a workspace), so that both sides read the
same numbers.
"""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from itertools import product
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from bench.volume import SHAPE, stripped_head, write_volume
from planner.plan import NetworkPlan, Plan, Triple
from planner.rules import BUDGETS
from planner.topology import topology
from strokenet.data.case import read_case
from strokenet.data.dataset import CaseFiles
from strokenet.data.splits import Split
from strokenet.model.network import build_network
from strokenet.preprocess.preprocess import preprocess
from strokenet.preprocess.store import Store, case_key
from strokenet.workspace import Workspace

DATASET = "Dataset990_Drawn"
CHANNELS = ("T1", "FLAIR")
BATCH = "batch.safetensors"  # image (N, C, D, H, W) float32, label (N, D, H, W) int16
WEIGHTS = "weights.safetensors"
SEED = 0


def default_plan(patch: Triple, *, batch_size: int = 2) -> Plan:
    """What the planner gives for isotropic voxels and this patch: its strides, its features, two channels, one lesion.

    As-stored and mirrored along all axes, as nnU-Net has it.
    """
    shape, budget = topology((1.0, 1.0, 1.0), patch), BUDGETS["plain"]
    network = NetworkPlan(
        kind="plain",
        features=shape.features,
        strides=shape.strides,
        kernels=shape.kernels,
        encoder_blocks=budget.encoder_blocks[: shape.stages],
        decoder_convs=(budget.decoder_convs,) * (shape.stages - 1),
        decoder_kernels=shape.kernels[:-1],
    )
    k, j, i = (float(edge) for edge in SHAPE[::-1])
    return Plan(
        dataset=DATASET,
        planner="plain",
        channels=CHANNELS,
        labels={"background": 0, "lesion": 1},
        orientation="as-stored",
        transpose=(0, 1, 2),
        spacing=(1.0, 1.0, 1.0),
        median_shape=(k, j, i),
        patch=shape.patch,
        batch_size=batch_size,
        batch_dice=False,
        normalisation=("zscore", "zscore"),
        use_mask_for_norm=(False,) * len(CHANNELS),
        intensity=(None,) * len(CHANNELS),
        network=network,
        mirror_axes=(0, 1, 2),
    )


def write_step(folder: Path, plan: Plan) -> Workspace:
    """The plan, the weights that a network starts from, and one batch."""
    workspace = Workspace(folder)
    workspace.write_plan(plan)
    torch.manual_seed(SEED)
    save_file(build_network(plan).state_dict(), folder / WEIGHTS)
    save_file(_batch(plan), folder / BATCH)
    return workspace


def write_cohort(folder: Path, plan: Plan, shape: Triple, *, cases: int) -> Workspace:
    """A workspace of preprocessed heads, the last one to validate with. shape: of a scan, (i, j, k).

    No patch changes a preprocessed case, so that the heads of a shape are drawn once a process and linked here.
    """
    drawn, workspace = _cohort(shape, cases), Workspace(folder)
    workspace.write_plan(plan)
    workspace.write_splits(drawn.read_splits())
    workspace.preprocessed.symlink_to(drawn.preprocessed)
    return workspace


@functools.cache
def _cohort(shape: Triple, cases: int) -> Workspace:
    """Drawn, and removed when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="strokenet-bench-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    workspace, store, plan = Workspace(folder), Store(Workspace(folder).preprocessed), default_plan((32, 32, 32))
    names = tuple(f"head_{number}" for number in range(cases))
    workspace.write_splits([Split(train=names[:-1], val=names[-1:])])
    for number, name in enumerate(names):
        images = []
        for place, channel in enumerate(CHANNELS):
            voxels, lesion = stripped_head(shape, seed=len(CHANNELS) * number + place)
            images.append(write_volume(folder / "raw" / f"{name}_{channel}.nii", voxels))
        label = write_volume(folder / "raw" / f"{name}.nii", lesion)
        case = read_case(name, dict(zip(CHANNELS, images, strict=True)), label)
        files = CaseFiles(case_id=name, images=tuple(images), label=label)
        store.write(preprocess(case, plan), case_key(plan, files))
    shutil.rmtree(folder / "raw")
    return workspace


def _batch(plan: Plan) -> dict[str, Tensor]:
    """Noise, brighter in a ball for each label; the balls as labels."""
    rng = np.random.default_rng(SEED)
    label = np.zeros((plan.batch_size, *plan.patch), np.int16)
    axes = np.ogrid[tuple(slice(edge) for edge in plan.patch)]
    for sample, value in product(range(plan.batch_size), plan.foreground):
        centre = rng.uniform(0.3, 0.7, 3) * plan.patch
        away = sum((axis - place) ** 2 for axis, place in zip(axes, centre, strict=True))
        label[sample][np.asarray(away) < (0.2 * min(plan.patch)) ** 2] = value
    noise = rng.standard_normal((plan.batch_size, len(plan.channels), *plan.patch), dtype=np.float32)
    return {"image": torch.from_numpy(noise + 2 * label[:, None].astype(np.float32)), "label": torch.from_numpy(label)}
