"""How far `infer --crop brain` is from the default, and what it saves, on real FLAIRs.

    python -m tests.infer.brain_crop [DATA]     DATA: folder of open_ms and native_grids_tcga; needs strokenet[mri]

A model is trained here for minutes, on the first head: the default plan, a quarter of its features, and bright brain
tissue for a label, because answers of random weights say nothing. It is kept as the models of bench/ are. Both ways
then segment heads that it knows, nearly knows and has never seen the like of, and a stripped scan. What differs: the
places of the tiles, and what the default finds outside of the box. Seconds are of one run each, deepbet's among them.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from bench.model import cache
from strokenet.data.case import Case, read_case
from strokenet.data.files import new_folder, write_json
from strokenet.data.nifti import read_volume, write_mask
from strokenet.data.overlap import dice
from strokenet.infer.brain_box import find_brain
from strokenet.infer.config import InferConfig
from strokenet.infer.engine import Engine
from strokenet.infer.predict import predict_case
from strokenet.model.checkpoint import Model, load_model
from strokenet.preprocess.planning import PlanConfig, plan_workspace, preprocess_workspace
from strokenet.train.run import TrainConfig
from strokenet.train.train import train

STEPS, EDGE = 250, 64  # of the training: steps, and voxels of a patch along an axis at most
BRIGHT = 90  # percentile of the smoothed brain above which a voxel is labelled
SCANS = {
    "whole head, trained on": "open_ms/longitudinal/patient12/study1_FLAIR.nii.gz",
    "whole head, same patient later": "open_ms/longitudinal/patient12/study2_FLAIR.nii.gz",
    "whole head, other scanner": "native_grids_tcga/fla.nii.gz",
    "stripped": "open_ms/cross_sectional/patient07/FLAIR.nii.gz",
}
Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True, eq=False)
class Ran:
    """mask: (D, H, W) bool. tiles: that were computed; those that are zero are not."""

    mask: NDArray[np.bool_]
    tiles: int
    seconds: float


def case_of(path: Path) -> Case:
    """The FLAIR alone."""
    return read_case("flair", {"FLAIR": path})


def trained(path: Path) -> Model:
    """The model, made where it is not kept yet."""
    root = cache() / f"brain-crop-{STEPS}-{EDGE}-{BRIGHT}"
    if not root.exists():
        with new_folder(root) as folder:
            _make(folder, path)
    return load_model(root / "work")


def _make(root: Path, path: Path) -> None:
    raw = root / "raw"
    (raw / "imagesTr").mkdir(parents=True)
    shutil.copyfile(path, raw / "imagesTr" / "head_0000.nii.gz")
    brain, volume = find_brain(case_of(path)), read_volume(path)
    smooth = gaussian_filter(volume.array, [1.4 / mm for mm in volume.geometry.spacing])
    bright = brain & (smooth > np.percentile(smooth[brain], BRIGHT))
    write_mask(raw / "labelsTr" / "head.nii.gz", bright.astype(np.uint8), volume.header)
    named = {"channel_names": {"0": "FLAIR"}, "labels": {"background": 0, "lesion": 1}}
    write_json(raw / "dataset.json", named | {"numTraining": 1, "file_ending": ".nii.gz"})
    workspace = plan_workspace(raw, root / "work", PlanConfig(jobs=1)).workspace
    plan = workspace.read_plan()
    plan = replace(plan, network=replace(plan.network, features=tuple(n // 4 for n in plan.network.features)))
    steps = np.prod(plan.network.strides, axis=0)
    d, h, w = (int(min(edge, max(step, EDGE // step * step))) for edge, step in zip(plan.patch, steps, strict=True))
    workspace.write_plan(replace(plan, patch=(d, h, w), batch_size=2))
    preprocess_workspace(workspace.root, jobs=1)
    train(workspace, TrainConfig(fold="all", epochs=1, iterations=STEPS, val_iterations=1, seed=0, device="cpu"))
    workspace.write_plan(plan)


def ran(model: Model, case: Case, config: InferConfig) -> Ran:
    """One way, its tiles counted."""
    counts: list[int] = []

    def counting(items: Iterable[Item], total: int, what: str) -> Iterable[Item]:
        counts.append(total)
        return items

    began = time.monotonic()
    found = predict_case(Engine(model, config), case, counting)
    return Ran(mask=found.mask > 0, tiles=sum(counts), seconds=time.monotonic() - began)


def main(data: Path) -> None:
    """Trains or loads the model, and prints a line a scan."""
    model = trained(data / SCANS["whole head, trained on"])
    sys.stdout.write(f"patch {model.plan.patch} at {model.plan.spacing} mm\n")
    for name, path in SCANS.items():
        case = case_of(data / path)
        scan, brain = (ran(model, case, InferConfig(crop=crop, tta="none")) for crop in ("nonzero", "brain"))  # type: ignore[arg-type]
        inside = find_brain(case)
        millilitres = case.geometry.voxel_volume_mm3 / 1000
        sys.stdout.write(
            f"{name}: tiles {scan.tiles} -> {brain.tiles}, {scan.seconds:.1f} -> {brain.seconds:.1f} s, "
            f"Dice {dice(scan.mask, brain.mask):.4f}, {np.count_nonzero(scan.mask != brain.mask)} voxels differ; "
            f"in the brain Dice {dice(scan.mask & inside, brain.mask & inside):.4f}, "
            f"{np.count_nonzero((scan.mask != brain.mask) & inside)} voxels of {np.count_nonzero(scan.mask & inside)}; "
            f"{scan.mask.sum() * millilitres:.1f} -> {brain.mask.sum() * millilitres:.1f} ml\n"
        )
        sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[3] / "shared" / "data")
