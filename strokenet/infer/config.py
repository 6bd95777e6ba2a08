"""What is asked of inference: the options, and what they come to with a model's plan."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

from planner.plan import Plan, PostprocessRule, Semantics
from strokenet.data.errors import InputError
from strokenet.infer.shard import Shard
from strokenet.infer.sliding_window import WindowRules
from strokenet.model.device import Precision, choose_dtype

Mirroring = Literal["none", "plan", "full"]
Crop = Literal["nonzero", "brain"]


@dataclass(frozen=True, kw_only=True)
class InferConfig:
    """How to infer; None and "plan" take what the model's plan says.

    tta: mirrored copies averaged: none, the plan's axes, or full (all three; refused where training did not mirror
    along all). threshold, min_volume_mm3: replace the plan's rule. postprocess: False takes the most probable label
    and removes nothing. probabilities, native: also write OUT/probabilities/CASE.nii.gz, OUT/native/CASE.nii.gz.
    agreement: of `infer`: each channel alone beside all of them, where the model knows subsets (agreement.py); costs an
    inference a channel. native_scan: the prepared scan, "flair_2" for one, to whose grid the native mask goes; None:
    the reference. folds, device: of `infer`, too; a Model in memory has them already. semantics: "exact" repeats
    nnU-Net's rounding, "improved" sums in float32. crop: "brain" tiles a tighter box, and that is another answer
    (brain_box.py). Of `infer`, too: shard: the part of the cases to segment; recompute: also those that are finished,
    and those whose masks someone has changed.
    """

    tta: Mirroring = "plan"
    precision: Precision = "auto"
    folds: tuple[str, ...] | None = None
    threshold: float | None = None
    min_volume_mm3: float | None = None
    postprocess: bool = True
    probabilities: bool = False
    native: bool = False
    agreement: bool = True
    native_scan: str | None = None
    semantics: Semantics | None = None
    crop: Crop = "nonzero"
    device: str = "auto"
    shard: Shard | None = None
    recompute: bool = False

    def __post_init__(self) -> None:
        if self.tta not in get_args(Mirroring):
            raise InputError(f"--tta {self.tta!r}; allowed: {', '.join(get_args(Mirroring))}")
        if self.semantics not in (None, *get_args(Semantics)):
            raise InputError(f"--semantics {self.semantics!r}; allowed: {', '.join(get_args(Semantics))}")
        if self.crop not in get_args(Crop):
            raise InputError(f"--crop {self.crop!r}; allowed: {', '.join(get_args(Crop))}")
        if self.threshold is not None and not 0 <= self.threshold < 1:  # not: NaN too
            raise InputError(f"--threshold {self.threshold}; allowed: 0 <= threshold < 1")
        if self.min_volume_mm3 is not None and not 0 <= self.min_volume_mm3 < math.inf:
            raise InputError(f"--min-volume {self.min_volume_mm3} mm3; allowed: 0 or more")
        if self.native_scan is not None and not self.native:
            raise InputError(f"--native-scan {self.native_scan}: names the grid of the native mask; add --native")
        if not self.postprocess and (self.threshold is not None or self.min_volume_mm3 is not None):
            raise InputError("--no-postprocess takes the most probable label; leave --threshold and --min-volume out")


def window_rules(plan: Plan, config: InferConfig) -> WindowRules:
    """How tiles are summed: the plan's fields, and --semantics where given."""
    exact = (config.semantics or plan.semantics) == "exact"
    return WindowRules(average=plan.average, tile_weights=plan.tile_weights, exact=exact)


def mirror_axes(plan: Plan, tta: Mirroring) -> tuple[int, ...]:
    """Axes to mirror at test time: never one that training did not mirror.

    Raises:
        InputError: "full" for a model that was not mirrored along all three axes.
    """
    if tta == "none":
        return ()
    if tta == "full" and set(plan.mirror_axes) != {0, 1, 2}:
        raise InputError(f"--tta full: training mirrored along {_axis_names(plan)}; use --tta plan")
    return plan.mirror_axes


def _axis_names(plan: Plan) -> str:
    """D, H, W of the scan, as the import shows them."""
    return ", ".join("DHW"[plan.transpose[axis]] for axis in plan.mirror_axes) or "no axis"


def mask_rule(plan: Plan, config: InferConfig) -> PostprocessRule:
    """The plan's rule with what the config replaces.

    Raises:
        InputError: a threshold for a model of several labels.
    """
    if not config.postprocess:
        return PostprocessRule()
    rule = plan.postprocess
    if config.threshold is not None:
        if plan.heads != 2:
            raise InputError(f"--threshold needs a model of one lesion label; this one has {plan.heads - 1}")
        rule = replace(rule, threshold=config.threshold)
    return replace(rule, min_volume_mm3=config.min_volume_mm3) if config.min_volume_mm3 is not None else rule


def arithmetic(config: InferConfig, rules: WindowRules, device: torch.device) -> torch.dtype:
    """The network's arithmetic. "auto" in the exact form is the peer's: float16 on a GPU, float32 elsewhere."""
    if rules.exact and config.precision == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    return choose_dtype(config.precision, device)
