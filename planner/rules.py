"""The rules: from fingerprint to plan (Isensee 2021, Methods; the peer's planners of nnunetv2 2.8.1).

Comes in: Fingerprint, names of channels and labels, a memory budget. Goes out: Plan, and the reasons as a table.
Only the full-resolution 3D configuration is planned; whether a low-resolution stage would exist decides batch_dice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from planner.fingerprint import Fingerprint
from planner.memory import feature_map_voxels
from planner.plan import (
    NetworkKind,
    NetworkPlan,
    Normalisation,
    Orientation,
    Plan,
    PlanError,
    PostprocessRule,
    Spacing,
    Triple,
)
from planner.spacing import COARSE_PERCENTILE, resampled_shape, target_spacing, transpose_for
from planner.topology import Topology, topology

Planner = Literal["plain", "resenc-m", "resenc-l", "resenc-xl"]

REFERENCE_BATCH = 2
MIN_BATCH = 2
START_EDGE = 256  # edge of the cube whose volume the first patch has
SMALL_CROP = 0.75  # below this share left after cropping, z-scores use the brain alone
LOWRES_COVERAGE = 0.25  # a patch that sees less of the image asks for a low-resolution stage
LOWRES_STEP = 1.03
_MAX_STAGES = 12
_RAS_AXES = ("foot-head", "back-front", "left-right")  # D, H, W of a case turned to RAS


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a planner may spend (`voxels` of feature maps on a GPU of `gpu_memory_gb`), and on which network."""

    kind: NetworkKind
    gpu_memory_gb: float
    voxels: float
    encoder_blocks: tuple[int, ...]
    decoder_convs: int
    dataset_share: float  # a batch holds at most this share of the dataset's voxels


_RESIDUAL = (1, 3, 4, *(6,) * (_MAX_STAGES - 3))
BUDGETS: Mapping[Planner, Budget] = {
    "plain": Budget(
        kind="plain",
        gpu_memory_gb=8,
        voxels=560e6,
        encoder_blocks=(2,) * _MAX_STAGES,
        decoder_convs=2,
        dataset_share=0.05,
    ),
    "resenc-m": Budget(
        kind="residual", gpu_memory_gb=8, voxels=680e6, encoder_blocks=_RESIDUAL, decoder_convs=1, dataset_share=1
    ),
    "resenc-l": Budget(
        kind="residual", gpu_memory_gb=24, voxels=2100e6, encoder_blocks=_RESIDUAL, decoder_convs=1, dataset_share=1
    ),
    "resenc-xl": Budget(
        kind="residual", gpu_memory_gb=40, voxels=3600e6, encoder_blocks=_RESIDUAL, decoder_convs=1, dataset_share=1
    ),
}
_NORMALISATION: Mapping[str, Normalisation] = {
    "ct": "ct",
    "nonorm": "none",
    "zscore": "zscore",
    "rescale_to_0_1": "rescale_to_0_1",
    "rgb_to_0_1": "rgb_to_0_1",
}


@dataclass(frozen=True, kw_only=True)
class Decision:
    """One line of the plan's explanation."""

    what: str
    value: str
    why: str


def make_plan(
    fingerprint: Fingerprint,
    *,
    dataset: str,
    channels: Sequence[str],
    labels: Mapping[str, int],
    planner: Planner = "plain",
    gpu_memory_gb: float | None = None,
    orientation: Orientation = "RAS",
) -> Plan:
    """The plan of a dataset.

    Args:
        labels: name -> value, background included. gpu_memory_gb: scales the planner's budget, None takes its own.

    Raises:
        PlanError: the memory is too small for any network, the images are too small to be halved, or the fingerprint
            and the names do not belong together.
    """
    if len(channels) != len(fingerprint.intensity):
        raise PlanError(f"{len(channels)} channel names for a fingerprint of {len(fingerprint.intensity)} channels")
    budget = _scaled(BUDGETS[planner], gpu_memory_gb)
    order, spacing, median = _grid(fingerprint)
    shape = _full_resolution(spacing, median, budget, len(labels))
    schemes = tuple(_NORMALISATION.get(name.casefold(), "zscore") for name in channels)
    masked = fingerprint.median_relative_size < SMALL_CROP
    return Plan(
        dataset=dataset,
        planner=planner,
        channels=tuple(channels),
        labels=dict(labels),
        orientation=orientation,
        transpose=order,
        spacing=spacing,
        median_shape=median,
        patch=shape.patch,
        batch_size=_batch_size(shape, budget, len(labels), math.prod(median) * len(fingerprint.spacings)),
        batch_dice=_wants_low_resolution(shape.patch, spacing, median, budget, len(labels)),
        normalisation=schemes,
        use_mask_for_norm=tuple(masked and scheme == "zscore" for scheme in schemes),
        intensity=fingerprint.intensity,
        network=_network(shape, budget),
        # The paper mirrors left and right alone (Meddahi 2024, IV.C); axes of an unturned case have no name.
        mirror_axes=(order.index(2),) if orientation == "RAS" else (0, 1, 2),
        postprocess=_mask_defaults(channels, labels),
    )


def explain(plan: Plan, fingerprint: Fingerprint) -> tuple[Decision, ...]:
    """What the plan decided and why, a line each."""
    network = plan.network
    coverage = min(1, math.prod(plan.patch) / math.prod(plan.median_shape))
    rows = [
        ("orientation", plan.orientation, "every case is turned to it first; the mask is turned back"),
        ("spacing (mm)", _numbers(plan.spacing), _spacing_reason(plan, fingerprint)),
        ("median shape", _numbers(plan.median_shape), "voxels after cropping to the nonzero box, at that spacing"),
        ("patch", _numbers(plan.patch), f"largest that fits the memory; {coverage:.0%} of the median image"),
        (
            "batch size",
            str(plan.batch_size),
            "what fits the memory, at most 5 % (resenc: 100 %) of the data, at least 2",
        ),
        (
            "network",
            f"{network.kind}, {network.stages} stages",
            "each stage halves the patch, while a half has 4 voxels",
        ),
        ("features", _numbers(network.features), "doubled a stage up to 320"),
        ("strides", "; ".join(_numbers(s) for s in network.strides), "coarse axes wait until the fine ones catch up"),
        ("kernels", "; ".join(_numbers(k) for k in network.kernels), "1 along an axis twice as coarse as the finest"),
        ("normalisation", ", ".join(plan.normalisation), "z-score but for channels named CT, noNorm, ..."),
        (
            "z-score inside the head only",
            _masked_channels(plan),
            f"cropping leaves {fingerprint.median_relative_size:.0%} of the volume; yes below {SMALL_CROP:.0%}",
        ),
        (
            "batch Dice",
            "yes" if plan.batch_dice else "no",
            f"yes where a patch sees under {LOWRES_COVERAGE:.0%}, even of images with half the voxels",
        ),
        ("mirror axes", _mirrored(plan), "left-right where turned to RAS (the paper), else all (nnU-Net)"),
        ("mask", _mask_rule(plan.postprocess), "Meddahi 2024, IV.D, for one lesion label; else the most probable"),
    ]
    return tuple(Decision(what=what, value=value, why=why) for what, value, why in rows)


def _scaled(budget: Budget, gpu_memory_gb: float | None) -> Budget:
    """The budget of another amount of GPU memory, in proportion."""
    if gpu_memory_gb is None:
        return budget
    if not (math.isfinite(gpu_memory_gb) and gpu_memory_gb > 0):
        raise PlanError(f"GPU memory is {gpu_memory_gb} GB; a number above 0 is needed")
    voxels = budget.voxels * (gpu_memory_gb / budget.gpu_memory_gb)
    return replace(budget, voxels=voxels, gpu_memory_gb=gpu_memory_gb)


def _grid(fingerprint: Fingerprint) -> tuple[Triple, Spacing, tuple[float, float, float]]:
    """The order of the axes, and in that order the spacing (mm) and the median shape (voxels) at it."""
    target = target_spacing(fingerprint.spacings, fingerprint.shapes_after_crop)
    d, h, w = order = transpose_for(target)
    shapes = [
        resampled_shape(shape, spacing, target)
        for shape, spacing in zip(fingerprint.shapes_after_crop, fingerprint.spacings, strict=True)
    ]
    median = np.median(shapes, axis=0)
    return order, (target[d], target[h], target[w]), (float(median[d]), float(median[h]), float(median[w]))


def _first_patch(spacing: Spacing, median: Sequence[float]) -> tuple[float, ...]:
    """A patch of 256^3 voxels with the aspect of isotropic millimetres, cut to the median image."""
    density = 1 / np.array(spacing)
    edges = density * (START_EDGE**3 / np.prod(density)) ** (1 / 3)
    return tuple(min(round(float(edge)), limit) for edge, limit in zip(edges, median, strict=True))


def _cost(shape: Topology, budget: Budget, labels: int) -> int:
    return feature_map_voxels(
        shape,
        kind=budget.kind,
        encoder_blocks=budget.encoder_blocks[: shape.stages],
        decoder_convs=(budget.decoder_convs,) * (shape.stages - 1),
        labels=labels,
    )


def _full_resolution(spacing: Spacing, median: Sequence[float], budget: Budget, labels: int) -> Topology:
    shape = _fitting_topology(spacing, median, budget, labels)
    if shape.stages < 2:
        raise PlanError(
            f"patch {shape.patch} of images of {_numbers(median)} voxels cannot be halved; "
            "larger images or more GPU memory are needed"
        )
    return shape


def _fitting_topology(spacing: Spacing, median: Sequence[float], budget: Budget, labels: int) -> Topology:
    """Shrinks the patch where it exceeds the median image most, until the network fits the memory."""
    shape = topology(spacing, _first_patch(spacing, median))
    while _cost(shape, budget, labels) > budget.voxels:
        axis = int(np.argsort([p / m for p, m in zip(shape.patch, median, strict=True)])[-1])
        # The step is the divisor of the patch one step smaller: 256 may become 224, not only 192.
        step = topology(spacing, _reduced(shape.patch, axis, shape.divisor[axis])).divisor[axis]
        smaller = _reduced(shape.patch, axis, step)
        if min(smaller) < 1:
            raise PlanError(f"the memory budget is too small for any patch (last tried {shape.patch}); raise it")
        shape = topology(spacing, smaller)
    return shape


def _reduced(patch: Triple, axis: int, step: int) -> Triple:
    d, h, w = (edge - step if a == axis else edge for a, edge in enumerate(patch))
    return (d, h, w)


def _batch_size(shape: Topology, budget: Budget, labels: int, dataset_voxels: float) -> int:
    """What the memory left allows, at most a share of the dataset's voxels, and never below 2."""
    fits = round(budget.voxels / _cost(shape, budget, labels) * REFERENCE_BATCH)
    cap = round(dataset_voxels * budget.dataset_share / math.prod(shape.patch))
    return max(min(fits, cap), MIN_BATCH)


def _wants_low_resolution(
    patch: Triple, spacing: Spacing, median: Sequence[float], budget: Budget, labels: int
) -> bool:
    """Whether nnU-Net would add a low-resolution stage: the patch sees too little, and coarsening helps twofold."""
    full = np.array(spacing)
    coarse, voxels, seen = full.copy(), math.prod(median), float(math.prod(patch))
    while seen / voxels < LOWRES_COVERAGE:
        behind = coarse.max() / coarse > 2
        coarse = np.where(behind, coarse * LOWRES_STEP, coarse) if behind.any() else coarse * LOWRES_STEP
        shape = full / coarse * np.array(median)
        voxels = float(np.prod(shape))
        rounded = [max(1, round(float(n))) for n in shape]
        try:
            seen = float(math.prod(_fitting_topology(tuple(coarse), rounded, budget, labels).patch))
        except PlanError:
            return False  # no network fits the coarse images either
    return math.prod(median) / voxels >= 2


def _network(shape: Topology, budget: Budget) -> NetworkPlan:
    return NetworkPlan(
        kind=budget.kind,
        features=shape.features,
        strides=shape.strides,
        kernels=shape.kernels,
        encoder_blocks=budget.encoder_blocks[: shape.stages],
        decoder_convs=(budget.decoder_convs,) * (shape.stages - 1),
        decoder_kernels=shape.kernels[:-1],
    )


def _spacing_reason(plan: Plan, fingerprint: Fingerprint) -> str:
    axes = " x ".join("DHW"[axis] for axis in plan.transpose)
    median = np.median(fingerprint.spacings, axis=0)[list(plan.transpose)]
    thick = f" ({COARSE_PERCENTILE}th percentile along the thick slices)" if plan.spacing[0] < median[0] else ""
    return f"median of {len(fingerprint.spacings)} cases{thick}, axes {axes}"


def _masked_channels(plan: Plan) -> str:
    """yes or no; the channels by name where they differ."""
    flags = plan.use_mask_for_norm
    if len(set(flags)) == 1:
        return "yes" if flags[0] else "no"
    return ", ".join(f"{name} {'yes' if flag else 'no'}" for name, flag in zip(plan.channels, flags, strict=True))


def _mirrored(plan: Plan) -> str:
    """The mirror axes in words; axes of an unturned case have no name, only their place."""
    names = _RAS_AXES if plan.orientation == "RAS" else tuple(f"axis {axis}" for axis in range(3))
    places = plan.transpose if plan.orientation == "RAS" else (0, 1, 2)
    return ", ".join(names[places[axis]] for axis in plan.mirror_axes) or "none"


def _mask_defaults(channels: Sequence[str], labels: Mapping[str, int]) -> PostprocessRule:
    """The paper's rule for one lesion label, in what was scanned; of two times, in the common field (III.B, IV.D).

    Differs: neither nnU-Net nor the paper keeps lesions out of the zeros around a stripped brain, where a network that
    saw little of them in training may well put some.
    """
    if len(labels) != 2:
        return PostprocessRule()
    return PostprocessRule(threshold=0.2, min_volume_mm3=4.0, scanned_only=True, common_field=has_two_times(channels))


def has_two_times(channels: Sequence[str]) -> bool:
    """Whether the channels are of two times of a patient, as `strokenet prepare` names them: FLAIR and FLAIR_2.

    Names decide here as they do for the normalisation, so that a raw folder of any origin can say it.
    """
    names = {name.casefold() for name in channels}
    return any(name.removesuffix("_2") in names - {name} for name in names)


def _numbers(values: Sequence[float]) -> str:
    return " x ".join(f"{value:.4g}" for value in values) or "none"


def _mask_rule(rule: PostprocessRule) -> str:
    if rule.threshold is None:
        return "most probable label"
    steps = [f"p > {rule.threshold:g}, {rule.connectivity}-connected, > {rule.min_volume_mm3:g} mm3"]
    steps += [f"peak >= {rule.min_peak:g}"] if rule.min_peak else []
    steps += [f"trimmed below {rule.trim_below:g}"] if rule.trim_below else []
    if rule.looks_at_scans:
        steps.append("where every channel was scanned" if rule.common_field else "where scanned")
    return ", ".join(steps)
