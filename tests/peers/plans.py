"""Plans: both planners on the same random fingerprints.

The peer's planner builds its networks on torch's meta device, where a network of any size costs nothing. Its 2d
configuration, which strokenet does not plan, is left out, because it takes a third of the time.
"""

from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice, product
from typing import Any, get_args
from unittest import mock

import numpy as np
import torch

from planner.fingerprint import Fingerprint
from planner.plan import IntensityStats, Plan, PlanError, Spacing, Triple
from planner.rules import Planner, make_plan
from tests.peers import peer
from tests.peers.row import Row
from tests.peers.translate import LAYERS, NETWORKS, RESAMPLING, SCHEMES

# isort: split
from nnunetv2.experiment_planning.experiment_planners import default_experiment_planner as planner_module
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    nnUNetPlannerResEncL,
    nnUNetPlannerResEncM,
    nnUNetPlannerResEncXL,
)

DATASET = "Dataset900_Plans"
PLANNERS: Mapping[Planner, type[ExperimentPlanner]] = {
    "plain": ExperimentPlanner,
    "resenc-m": nnUNetPlannerResEncM,
    "resenc-l": nnUNetPlannerResEncL,
    "resenc-xl": nnUNetPlannerResEncXL,
}
STATS = IntensityStats(mean=1.0, std=2.0, min=-1.0, max=9.0, median=1.0, percentile_00_5=-0.5, percentile_99_5=8.0)
CHANNELS = ("T1", "FLAIR", "DWI", "CT", "noNorm", "zScore", "rescale_to_0_1", "rgb_to_0_1", "ct")
LISTING = "get_filenames_of_train_images_and_targets"
MEMORIES_GB = (0.3, 0.7, 1.0, 2.0, 4.0, 6.0, 11.0, 16.0, 24.0, 48.0)


def rows(full: bool) -> Iterator[Row]:
    """A row a planner with the memory it is made for; and, in full, one with other memories."""
    _write_dataset()
    count = 500 if full else 200
    with ProcessPoolExecutor(peer.cores(), multiprocessing.get_context("spawn"), _one_thread) as pool:
        jobs = list(product(get_args(Planner), range(count)))
        compared = pool.map(_compare, *zip(*jobs, strict=True), chunksize=5)
        for planner in get_args(Planner):
            outcomes = list(islice(compared, count))
            yield _row(f"plans, {planner}", f"{count} random fingerprints, to 10x anisotropic", outcomes)
        if full:
            outcomes = list(pool.map(_compare_with_memory, range(count), chunksize=5))
            yield _row("plans, other memory", f"{count} random fingerprints, planners, 0.3 to 48 GB", outcomes)


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    """wrong: names of the values that differ. values: how many were compared. The rest tells what the plan was like."""

    wrong: tuple[str, ...]
    values: int = 0
    stages: int = 0
    batch_dice: bool = False
    transposed: bool = False
    refused: bool = False


@dataclass(frozen=True, kw_only=True)
class _Dataset:
    """What both sides plan for. shapes and spacings (mm) in the stored order (D, H, W), one a case."""

    shapes: tuple[Triple, ...]
    spacings: tuple[Spacing, ...]
    relative_size: float
    channels: tuple[str, ...]
    labels: dict[str, int]


def _row(check: str, on: str, outcomes: list[_Outcome]) -> Row:
    planned = [outcome for outcome in outcomes if not outcome.refused]
    wrong = Counter(name for outcome in outcomes for name in outcome.wrong)
    stages = [outcome.stages for outcome in planned]
    note = (
        f"{sum(outcome.values for outcome in planned)} values; {min(stages)} to {max(stages)} stages, "
        f"{sum(outcome.transposed for outcome in planned)} transposed, "
        f"{sum(outcome.batch_dice for outcome in planned)} with batch Dice"
    )
    if len(planned) < len(outcomes):
        note += f"; {len(outcomes) - len(planned)} refused by strokenet, where the peer's network has no output"
    if wrong:
        note += f"; differing: {dict(wrong)}"
    return Row(check=check, on=on, difference=wrong.total(), tolerance=0, unit="values", note=note)


def _compare(planner: Planner, seed: int, memory_gb: float | None = None) -> _Outcome:
    """Both plans of one fingerprint.

    The peer plans a network of one stage for images too small to be halved; it has no decoder and so no output.
    There strokenet must refuse, and nowhere else.
    """
    data = _random_dataset(np.random.default_rng(seed))
    theirs = _peer_values(_peer_plans(planner, memory_gb, data))
    try:
        ours = _our_values(_our_plan(planner, memory_gb, data))
    except PlanError as error:
        single = len(theirs["strides"]) == 1
        return _Outcome(wrong=() if single else (f"refused: {error}",), refused=True)
    assert theirs.keys() == ours.keys()
    return _Outcome(
        wrong=tuple(name for name in theirs if theirs[name] != ours[name]),
        values=len(theirs),
        stages=len(ours["strides"]),
        batch_dice=theirs["batch_dice"],
        transposed=theirs["transpose"] != (0, 1, 2),
    )


def _compare_with_memory(seed: int) -> _Outcome:
    rng = np.random.default_rng(100_000 + seed)
    planner: Planner = get_args(Planner)[int(rng.integers(len(PLANNERS)))]
    return _compare(planner, seed, float(rng.choice(MEMORIES_GB)))


def _random_dataset(rng: np.random.Generator) -> _Dataset:
    """1 to 300 cases of 4 to 900 voxels an axis, 0.2 to 25 mm, isotropic to 10 times anisotropic, along any axis."""
    cases = int(rng.choice([1, 2, 3, 5, 8, 20, 60, 300]))
    axis = int(rng.integers(3))
    ratio = float(rng.choice([1, 1, 1.2, 2, 2.9, 3.0, 3.1, 4, 6, 10]))
    base = np.full(3, np.exp(rng.uniform(np.log(0.2), np.log(2.5))))  # mm
    base[axis] *= ratio
    if rng.random() < 0.3:
        base *= rng.uniform(0.8, 1.25, 3)
    extent = np.exp(rng.uniform(np.log(15), np.log(700)))  # mm
    alike = rng.random() < 0.4
    spacings, shapes = [], []
    for _ in range(cases):
        spacing = base if alike else base * rng.uniform(0.85, 1.2, 3)
        if rng.random() < 0.5:
            spacing = np.round(spacing, 3)  # as a file's header has it
        size = extent * rng.uniform(0.7, 1.3, 3)
        if ratio >= 3 and rng.random() < 0.6:
            size[axis] *= 0.4  # few slices: the rule for coarse axes asks for that
        shape = np.clip(np.round(size / spacing), 4, 900).astype(int)
        spacings.append(tuple(spacing.tolist()))
        shapes.append(tuple(shape.tolist()))
    lesions = int(rng.choice([1, 1, 2, 4, 11]))
    return _Dataset(
        shapes=tuple(shapes),
        spacings=tuple(spacings),
        relative_size=float(rng.choice([0.2, 0.74, 0.75, 0.76, 1.0])),
        channels=tuple(str(name) for name in rng.choice(CHANNELS, int(rng.integers(1, 5)), replace=False)),
        labels={"background": 0, **{f"lesion_{value}": value for value in range(1, lesions + 1)}},
    )


def _our_plan(planner: Planner, memory_gb: float | None, data: _Dataset) -> Plan:
    fingerprint = Fingerprint(
        case_ids=tuple(f"case_{n}" for n in range(len(data.shapes))),
        shapes_after_crop=data.shapes,
        spacings=data.spacings,
        median_relative_size=data.relative_size,
        intensity=(STATS,) * len(data.channels),
    )
    return make_plan(
        fingerprint,
        dataset=DATASET,
        channels=data.channels,
        labels=data.labels,
        planner=planner,
        gpu_memory_gb=memory_gb,
        orientation="as-stored",
    )


def _peer_plans(planner: Planner, memory_gb: float | None, data: _Dataset) -> dict[str, Any]:
    """plans.json as the peer's own planner makes it, without the 2d configuration."""
    memory = {} if memory_gb is None else {"gpu_memory_target_in_gb": memory_gb}
    with peer.quiet(), torch.device("meta"), mock.patch.object(planner_module, LISTING, _listed_files):
        theirs = PLANNERS[planner](DATASET, **memory)
        plan_any = theirs.get_plans_for_configuration
        theirs.get_plans_for_configuration = lambda mm, *rest: plan_any(mm, *rest) if len(mm) == 3 else {}
        theirs.save_plans = lambda plans: None
        theirs.dataset_json = {
            "channel_names": {str(place): name for place, name in enumerate(data.channels)},
            "labels": data.labels,
            "numTraining": len(data.shapes),
            "file_ending": ".nii.gz",
        }
        theirs.dataset_fingerprint = {
            "spacings": [list(spacing) for spacing in data.spacings],
            "shapes_after_crop": [list(shape) for shape in data.shapes],
            "median_relative_size_after_cropping": data.relative_size,
            "foreground_intensity_properties_per_channel": {str(n): asdict(STATS) for n in range(len(data.channels))},
        }
        plans: dict[str, Any] = theirs.plan_experiment()
    return plans


def _listed_files(*_: Any) -> dict[str, Any]:
    """The one case of the dataset; the peer starts twelve processes to look for it, for every planner anew."""
    root = peer.RAW / DATASET
    image, label = root / "imagesTr" / "case_0000.nii.gz", root / "labelsTr" / "case.nii.gz"
    return {"case": {"images": [str(image)], "label": str(label)}}


def _peer_values(plans: Mapping[str, Any]) -> dict[str, Any]:
    """Every value of the peer's plan that changes what is computed."""
    full = plans["configurations"]["3d_fullres"]
    network = full["architecture"]
    shape = network["arch_kwargs"]
    blocks = "n_conv_per_stage" if "n_conv_per_stage" in shape else "n_blocks_per_stage"
    return {
        "transpose": tuple(plans["transpose_forward"]),
        "spacing": tuple(float(mm) for mm in full["spacing"]),
        "median shape": tuple(float(n) for n in full["median_image_size_in_voxels"]),
        "patch": _whole(full["patch_size"]),
        "batch size": int(full["batch_size"]),
        "batch_dice": bool(full["batch_dice"]),
        "normalisation": tuple(full["normalization_schemes"]),
        "mask for norm": tuple(bool(masked) for masked in full["use_mask_for_norm"]),
        "intensity": tuple(plans["foreground_intensity_properties_per_channel"].values()),
        "network": network["network_class_name"].split(".")[-1],
        "features": _whole(shape["features_per_stage"]),
        "strides": tuple(_whole(stride) for stride in shape["strides"]),
        "kernels": tuple(_whole(kernel) for kernel in shape["kernel_sizes"]),
        "encoder": _whole(shape[blocks]),
        "decoder": _whole(shape["n_conv_per_stage_decoder"][::-1]),  # the peer's starts at the bottleneck
        "layers": {name: shape[name] for name in LAYERS},
        "resampling": {name: full[name] for name in RESAMPLING},
    }


def _our_values(plan: Plan) -> dict[str, Any]:
    """The same of ours. strokenet has no other layers and resampling than LAYERS and RESAMPLING say."""
    network = plan.network
    assert network.decoder_kernels == network.kernels[:-1]  # the peer's decoder takes the encoder's
    return {
        "transpose": plan.transpose,
        "spacing": plan.spacing,
        "median shape": plan.median_shape,
        "patch": plan.patch,
        "batch size": plan.batch_size,
        "batch_dice": plan.batch_dice,
        "normalisation": tuple(SCHEMES[name] for name in plan.normalisation),
        "mask for norm": plan.use_mask_for_norm,
        "intensity": tuple(None if stats is None else asdict(stats) for stats in plan.intensity),
        "network": NETWORKS[network.kind],
        "features": network.features,
        "strides": network.strides,
        "kernels": network.kernels,
        "encoder": network.encoder_blocks,
        "decoder": network.decoder_convs,
        "layers": dict(LAYERS),
        "resampling": dict(RESAMPLING),
    }


def _whole(values: Any) -> tuple[int, ...]:
    return tuple(int(value) for value in values)


def _write_dataset() -> None:
    """A dataset of one tiny case: the planner looks for its files, but plans by the fingerprint it is given."""
    root = peer.write_description(DATASET, channels=("T1",), labels={"background": 0, "lesion": 1}, cases=1)
    peer.write_scan(root / "imagesTr" / "case_0000.nii.gz", np.ones((4, 4, 4), np.float32))
    peer.write_scan(root / "labelsTr" / "case.nii.gz", np.ones((4, 4, 4), np.uint8))
    folder = peer.PREPROCESSED / DATASET
    folder.mkdir(exist_ok=True)
    (folder / "dataset_fingerprint.json").write_text("{}")


def _one_thread() -> None:
    torch.set_num_threads(1)
