"""plans.pkl of nnU-Net v1, read as our plan.

Comes in: plans that a stranger may have pickled, and which stage of them was trained. Goes out: Plan.
A pickle of plain values can still hold anything, nested into itself even: every value is taken by one of the small
readers at the end of this file, which ask for its type and size before they look at it or quote it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from planner import plan as plans
from planner.plan import MAX_STAGES, Plan, PlanError
from strokenet.data.description import MAX_CHANNELS, MAX_LABELS, told_apart
from strokenet.data.errors import InputError

PLANNER = "nnU-Net v1"
SCHEMES = {"nonCT": "zscore", "CT": "ct", "noNorm": "none"}
MOST_FEATURES = 320  # Generic_UNet's limit; no plan names it
STATISTICS = {  # our name -> v1's
    "mean": "mean",
    "std": "sd",
    "min": "mn",
    "max": "mx",
    "median": "median",
    "percentile_00_5": "percentile_00_5",
    "percentile_99_5": "percentile_99_5",
}
OTHER_GRIDS = ("PreprocessorFor3D_LeaveOriginalZSpacing", "PreprocessorFor3D_NoResampling")
EXPORT = {"force_separate_z": None, "interpolation_order": 1, "interpolation_order_z": 0}
MOST_ENTRIES = 256
MOST_NUMBER = 10**9


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a trainer of v1 records beside its weights. stage: key of plans_per_stage; None where there is one."""

    trainer: str
    stage: int | None
    batch_dice: bool
    dataset: str
    plans: Mapping[Any, Any]


def plan_of(trained: Trained, labels: Mapping[str, int], mirror_axes: tuple[int, ...], where: str) -> Plan:
    """Our plan of the stage that was trained.

    Raises:
        InputError: a key is missing or wrong, or the model is of a kind that is not supported.
    """
    stored = trained.plans
    stage = stage_plans(stored, trained.stage, where)
    names = told_apart(channels(stored, where))
    schemes = [_scheme(stored, channel, where) for channel in range(len(names))]
    fields = {
        "dataset": trained.dataset,
        "planner": PLANNER,
        "channels": list(names),
        "labels": dict(labels),
        "orientation": "as-stored",
        "transpose": _transpose(stored, where),
        "spacing": _reals(stage, "current_spacing", where),
        "median_shape": _reals(stage, "median_patient_size_in_voxels", where),
        "patch": wholes(entry(stage, "patch_size", where), 3, f"{where}: patch_size"),
        "batch_size": whole(entry(stage, "batch_size", where), f"{where}: batch_size"),
        "batch_dice": trained.batch_dice,
        "normalisation": schemes,
        "use_mask_for_norm": [_masked(stored, c, scheme, where) for c, scheme in enumerate(schemes)],
        "intensity": [_statistics(stored, channel, where) for channel in range(len(names))],
        "network": _network(stored, stage, where),
        "mirror_axes": mirror_axes,
        "normalise": "after-resampling",
        "average": "probabilities",
        "tile_weights": "peak-1-float32",
    }
    try:
        return plans.from_json(fields)
    except PlanError as error:
        raise InputError(f"{where}: {error}") from None


def stage_plans(stored: Mapping[Any, Any], stage: int | None, where: str) -> Mapping[Any, Any]:
    """The entry of plans_per_stage that was trained; one that is not 3D is refused."""
    stages = dictionary(entry(stored, "plans_per_stage", where), f"{where}: plans_per_stage")
    if stage is None:
        if len(stages) != 1:
            raise InputError(f"{where}: has {len(stages)} stages and the trainer names none; train or copy it again")
        (stage,) = stages
    found = dictionary(entry(stages, stage, f"{where}: plans_per_stage"), f"{where}: stage")
    edges = len(listed(entry(found, "patch_size", where), f"{where}: patch_size"))
    if edges != 3:
        raise InputError(f"{where}: the patch has {edges} axes; only 3D models are supported, use 3d_fullres")
    return found


def is_full_resolution(stored: Mapping[Any, Any], stage: int | None) -> bool:
    """Whether the stage is the last one; the ones before are 3d_lowres."""
    return stage is None or stage + 1 >= len(stored["plans_per_stage"])


def foreground_count(stored: Mapping[Any, Any], where: str) -> int:
    """Number of labels without the background."""
    count = whole(entry(stored, "num_classes", where), f"{where}: num_classes")
    if not 1 <= count < MAX_LABELS:
        raise InputError(f"{where}: num_classes is {count}; allowed: 1 to {MAX_LABELS - 1}")
    return count


def channels(stored: Mapping[Any, Any], where: str) -> tuple[str, ...]:
    """Names in input order; one may be there twice."""
    modalities = dictionary(entry(stored, "modalities", where), f"{where}: modalities")
    count = len(modalities)
    if not 1 <= count <= MAX_CHANNELS:
        raise InputError(f"{where}: {count} modalities; allowed: 1 to {MAX_CHANNELS}")
    return tuple(text(entry(modalities, n, f"{where}: modalities"), f"{where}: modality") for n in range(count))


def answer_notes(stored: Mapping[Any, Any], where: str) -> tuple[str, ...]:
    """What of the plans is not v1's default and not repeated here.

    Raises:
        InputError: a preprocessor that leaves the voxels as they are; the plan's spacing is then not the network's.
    """
    found = []
    name = stored.get("preprocessor_name")
    if name is not None and text(name, f"{where}: preprocessor_name") != "GenericPreprocessor":
        if name in OTHER_GRIDS:
            raise InputError(
                f"{where}: {name} keeps each scan's own spacing; not supported, use a model that resamples"
            )
        found.append(str(name))
    export = stored.get("segmentation_export_params")
    if export is not None:
        given = [dictionary(export, f"{where}: segmentation_export_params").get(key) for key in EXPORT]
        usual = zip(given, EXPORT.values(), strict=True)
        if not all(type(value) is type(wanted) and value == wanted for value, wanted in usual):
            found.append("segmentation_export_params")
    return tuple(f"{name} is not nnU-Net v1's default; here the default runs, answers may differ" for name in found)


def _network(stored: Mapping[Any, Any], stage: Mapping[Any, Any], where: str) -> dict[str, Any]:
    """Generic_UNet's shape: every stack of the bottleneck and the decoder ends with a convolution apart."""
    pools = _pools(stage, where)
    base = whole(entry(stored, "base_num_features", where), f"{where}: base_num_features")
    convs = whole(stored.get("conv_per_stage", 2), f"{where}: conv_per_stage")  # older plans have none
    kernels = _kernels(stage, len(pools) + 1, where)
    below = max(convs, 2)  # the part before has one at least
    return {
        "kind": "plain",
        "features": [min(base * 2**level, MOST_FEATURES) for level in range(len(pools) + 1)],
        "strides": [[1, 1, 1], *pools],
        "kernels": kernels,
        "encoder_blocks": [convs] * len(pools) + [below],
        "decoder_convs": [below] * len(pools),
        "decoder_kernels": kernels[1:],
    }


def _pools(stage: Mapping[Any, Any], where: str) -> list[list[int]]:
    """Strides into each level but the first. Plans of 2019 have their number an axis: short axes start late."""
    if "pool_op_kernel_sizes" in stage:
        sizes = listed(stage["pool_op_kernel_sizes"], f"{where}: pool_op_kernel_sizes", most=MAX_STAGES)
        return [wholes(size, 3, f"{where}: pool_op_kernel_sizes") for size in sizes]
    counts = wholes(entry(stage, "num_pool_per_axis", where), 3, f"{where}: num_pool_per_axis")
    most = max(counts)
    if not 1 <= most < MAX_STAGES or min(counts) < 0:
        raise InputError(f"{where}: num_pool_per_axis is {counts}; allowed: 0 to {MAX_STAGES - 1}")
    return [[2 if most - count <= level else 1 for count in counts] for level in range(most)]


def _kernels(stage: Mapping[Any, Any], stages: int, where: str) -> list[list[int]]:
    if "conv_kernel_sizes" not in stage:
        return [[3, 3, 3]] * stages
    what = f"{where}: conv_kernel_sizes"
    kernels = [wholes(kernel, 3, what) for kernel in listed(stage["conv_kernel_sizes"], what, most=MAX_STAGES)]
    for kernel in kernels:
        if not set(kernel) <= {1, 3}:  # v1 pads others with nothing
            raise InputError(f"{what} has {kernel}; allowed: 1 and 3")
    return kernels


def _transpose(stored: Mapping[Any, Any], where: str) -> list[int]:
    """v1 turns nothing where one of the two orders is missing."""
    order, back = stored.get("transpose_forward"), stored.get("transpose_backward")
    return [0, 1, 2] if order is None or back is None else wholes(order, 3, f"{where}: transpose_forward")


def _scheme(stored: Mapping[Any, Any], channel: int, where: str) -> str:
    what = f"{where}: normalization_schemes"
    name = text(entry(entry(stored, "normalization_schemes", where), channel, what), what)
    if name not in SCHEMES:
        raise InputError(f"{what} has {name!r:.80}, which is not supported; known: {', '.join(SCHEMES)}")
    return SCHEMES[name]


def _masked(stored: Mapping[Any, Any], channel: int, scheme: str, where: str) -> bool:
    """use_mask_for_norm of a channel. noNorm leaves a channel as it is, outside the head too."""
    what = f"{where}: use_mask_for_norm"
    masked = entry(entry(stored, "use_mask_for_norm", where), channel, what)
    if not isinstance(masked, (bool, np.bool_)):
        raise InputError(f"{what} holds a {type(masked).__name__}; True or False is needed")
    return bool(masked) and scheme != "none"


def _statistics(stored: Mapping[Any, Any], channel: int, where: str) -> dict[str, float] | None:
    """Of the foreground, None where v1 recorded none or had no foreground to measure."""
    properties = entry(entry(stored, "dataset_properties", where), "intensityproperties", where)
    if properties is None:
        return None
    what = f"{where}: intensityproperties"
    found = entry(properties, channel, what)
    statistics = {ours: real(entry(found, theirs, what), what) for ours, theirs in STATISTICS.items()}
    return statistics if all(math.isfinite(value) for value in statistics.values()) else None


def entry(values: Any, key: Any, where: str) -> Any:
    """One entry of a dictionary, else InputError."""
    if not isinstance(values, Mapping) or key not in values:
        raise InputError(f"{where} has no {key!r}; give the files that nnU-Net v1 wrote")
    return values[key]


def dictionary(value: Any, what: str) -> Mapping[Any, Any]:
    """A dictionary of a reasonable size, else InputError."""
    if not isinstance(value, Mapping) or len(value) > MOST_ENTRIES:
        raise InputError(
            f"{what} is a {type(value).__name__}; a dictionary of {MOST_ENTRIES} entries at most is needed"
        )
    return value


def listed(value: Any, what: str, most: int = MOST_ENTRIES) -> list[Any]:
    """The entries of a list, tuple or array of numbers, else InputError."""
    array = isinstance(value, np.ndarray) and value.ndim > 0 and value.dtype.kind in "iuf"
    if not (array or isinstance(value, (list, tuple))) or len(value) > most:
        raise InputError(f"{what} is a {type(value).__name__}; a list of {most} entries at most is needed")
    return list(value)


def whole(value: Any, what: str) -> int:
    """A whole number; numpy's and 3.0 too, else InputError."""
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    value = value.item() if isinstance(value, np.generic) else value  # numpy's own comparisons may overflow
    if not number or not abs(value) <= MOST_NUMBER or value != int(value):
        raise InputError(f"{what} is no whole number of a sensible size ({type(value).__name__})")
    return int(value)


def real(value: Any, what: str) -> float:
    """A number, NaN and infinity too, else InputError."""
    if isinstance(value, (float, np.floating)):
        return float(value)
    return float(whole(value, what))


def wholes(value: Any, count: int, what: str) -> list[int]:
    """So many whole numbers, else InputError."""
    numbers = [whole(number, what) for number in listed(value, what)]
    if len(numbers) != count:
        raise InputError(f"{what} has {len(numbers)} numbers; {count} are needed")
    return numbers


def text(value: Any, what: str) -> str:
    """A text that can be printed and is no longer than a name, else InputError."""
    if not isinstance(value, str) or not value.strip() or not value.isprintable() or len(value) > MOST_ENTRIES:
        raise InputError(f"{what} is a {type(value).__name__}; a name of printable text is needed")
    return value


def _reals(stage: Mapping[Any, Any], key: str, where: str) -> list[float]:
    what = f"{where}: {key}"
    return [real(number, what) for number in listed(entry(stage, key, where), what)]
