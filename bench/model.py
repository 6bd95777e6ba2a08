"""A model that both sides can run: trained briefly here, exported to nnU-Net's folder, imported again from it.

Answers are compared on trained weights: of random ones half of the voxels lie at the threshold, and every rounding
shows. The label is bright tissue, which a network learns in a minute. The plan is the default one of the scans, so that
the network and its patch are those of a user; it is trained on smaller patches, because it is fully convolutional.
Made once a case and kept in STROKENET_BENCH_CACHE (default ~/.cache/strokenet/bench).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter

from planner.plan import Plan, PostprocessRule
from strokenet.data.files import new_folder, write_json
from strokenet.data.nifti import read_volume, write_mask
from strokenet.nnunet.export import export_nnunet
from strokenet.nnunet.importing import import_nnunet
from strokenet.preprocess.planning import PlanConfig, plan_workspace, preprocess_workspace
from strokenet.train.run import TrainConfig
from strokenet.train.train import train

STEPS, EDGE = 60, 64  # of the training: steps, and voxels of a patch along an axis at most
SEED = 0
BRIGHT = 85  # percentile of the smoothed scan above which a voxel is labelled


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One model on both sides. images: the case, one file a channel."""

    name: str
    images: tuple[Path, ...]
    exported: Path  # nnU-Net's folder
    imported: Path  # ours, made from it


def cache() -> Path:
    """Where models are kept."""
    return Path(os.environ.get("STROKENET_BENCH_CACHE", Path.home() / ".cache" / "strokenet" / "bench"))


def pair(name: str, channels: Mapping[str, Path]) -> Pair:
    """The model of a case, and the case under nnU-Net's names.

    Args:
        name: of the case; what was made under it before is used again.
        channels: channel -> scan; the last one is labelled.
    """
    root = cache() / f"{name}-{STEPS}-{EDGE}-{SEED}"
    if not root.exists():
        with new_folder(root) as folder:
            _make(folder, name, channels)
    images = tuple(sorted((root / "raw" / "imagesTr").glob("*.nii.gz")))
    return Pair(name=name, images=images, exported=root / "exported", imported=root / "imported")


def _make(root: Path, name: str, channels: Mapping[str, Path]) -> None:
    raw = root / "raw"
    (raw / "imagesTr").mkdir(parents=True)
    for number, path in enumerate(channels.values()):
        shutil.copyfile(path, raw / "imagesTr" / f"{name}_{number:04d}.nii.gz")
    labelled = read_volume(list(channels.values())[-1])
    smooth = gaussian_filter(labelled.array, 2.0)
    bright = smooth > np.percentile(smooth[labelled.array > 0], BRIGHT)
    write_mask(raw / "labelsTr" / f"{name}.nii.gz", bright.astype(np.uint8), labelled.header)
    description = {
        "channel_names": {str(number): channel for number, channel in enumerate(channels)},
        "labels": {"background": 0, "lesion": 1},
        "numTraining": 1,
        "file_ending": ".nii.gz",
    }
    write_json(raw / "dataset.json", description)
    workspace = plan_workspace(raw, root / "work", PlanConfig(orientation="as-stored", jobs=1)).workspace
    plan = replace(workspace.read_plan(), postprocess=PostprocessRule(), mirror_axes=(0, 1, 2))
    workspace.write_plan(_on_small_patches(plan))
    preprocess_workspace(workspace.root, jobs=1)
    train(workspace, TrainConfig(fold="all", epochs=1, iterations=STEPS, val_iterations=1, seed=SEED, device="cpu"))
    (workspace.root / "fold_all").rename(workspace.root / "fold_0")
    workspace.write_plan(plan)
    export_nnunet(workspace.root, root / "exported")
    import_nnunet(root / "exported", root / "imported")
    shutil.rmtree(workspace.root)


def _on_small_patches(plan: Plan) -> Plan:
    """The plan with patches that train in seconds, each edge a multiple of what the network needs."""
    steps = np.prod(plan.network.strides, axis=0)
    d, h, w = (int(min(edge, max(step, EDGE // step * step))) for edge, step in zip(plan.patch, steps, strict=True))
    return replace(plan, patch=(d, h, w), batch_size=1)
