"""Augmentation: the transforms of the peer's own trainer draw and act, strokenet acts with the parameters drawn.

Every transform alone, then all in the trainer's order. An image counts as a share of its range before the operation.
The peer keeps the scores of labels in float16: where two labels are equally likely to a step of it (5e-4), it may take
the other one. Such voxels are counted in the note; a label that differs anywhere else fails the row.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from planner.plan import Triple
from strokenet.train.augment import PUBLISHED, Draw, augment
from strokenet.train.spatial import FLAT_ROTATION_DEGREES, SpatialDraw, initial_patch, is_flat
from tests.peers import peer  # noqa: F401 - before the peer: its folders are set
from tests.peers.row import Row

# isort: split
from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
from batchgeneratorsv2.transforms.intensity.contrast import ContrastTransform
from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.nnunet_masking import MaskImageTransform
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

TOLERANCE = 1e-4
TIE = 6e-4  # scores to float16 (0.5 / 1000 between 0.5 and 1), and a little for the places, which are float32
HEADS, CHANNELS = 4, 2
PATCHES: tuple[Triple, ...] = ((16, 20, 24), (24, 16, 16), (13, 21, 17))
FLAT_PATCHES: tuple[Triple, ...] = ((5, 24, 28), (4, 20, 16))
NAMES = {
    SpatialTransform: "spatial",
    GaussianNoiseTransform: "noise",
    GaussianBlurTransform: "blur",
    MultiplicativeBrightnessTransform: "brightness",
    ContrastTransform: "contrast",
    SimulateLowResolutionTransform: "low_resolution",
    GammaTransform: "gamma",
    MirrorTransform: "mirror",
    MaskImageTransform: "mask",
}  # of the others, that only change the layout or the label -1: "always"
VALUES = {
    "blur": "sigmas",
    "brightness": "multipliers",
    "contrast": "multipliers",
    "low_resolution": "scales",
    "gamma": "gamma",
    "gamma_inverted": "gamma",
}  # where the peer keeps what it drew, a value a channel


def rows(full: bool) -> Iterator[Row]:
    """The table of probabilities and ranges, each transform, and all of them one after the other."""
    samples = 120 if full else 24
    yield _table()
    yield _compared("rotation and scaling", PATCHES, "spatial", samples)
    yield _compared("rotation and scaling, thick slices", FLAT_PATCHES, "spatial", samples)
    for name in ("noise", "blur", "brightness", "contrast", "low_resolution", "gamma_inverted", "gamma", "mirror"):
        yield _compared(name.replace("_", " "), PATCHES, name, samples)
    yield _compared("low resolution, thick slices", FLAT_PATCHES, "low_resolution", samples)
    yield _compared("mask outside the head", PATCHES, "mask", samples)
    yield _compared("all, in the trainer's order", (*PATCHES, *FLAT_PATCHES), None, 2 * samples)


@dataclass
class _Noted:
    """A range that the peer draws numbers from, and what it drew."""

    low: float
    high: float
    drawn: list[float] = field(default_factory=list)

    def __call__(self, **_: object) -> float:
        self.drawn.append(float(np.random.uniform(self.low, self.high)))
        return self.drawn[-1]


@dataclass
class _Sample:
    """A sample on the peer's side. data: its record. draw: what was done to it. tied: voxels without a clear label."""

    data: dict[str, Any]
    draw: Draw
    tied: Tensor


@dataclass(frozen=True)
class _Outcome:
    """error: of the image, as a share of the range. ties, wrong: label voxels that differ, with and without a tie."""

    error: float
    ties: int
    wrong: int


def _compared(check: str, patches: Sequence[Triple], name: str | None, samples: int) -> Row:
    outcomes = [_compare(patches[seed % len(patches)], name, seed) for seed in range(samples)]
    ties, wrong = (sum(getattr(outcome, kind) for outcome in outcomes) for kind in ("ties", "wrong"))
    notes = [f"{wrong} labels differ"] if wrong else []
    notes += [f"{ties} labels differ where two are equally likely in the peer's float16"] if ties else []
    return Row(
        check=f"augmentation: {check}",
        on=f"{samples} samples, the peer's parameters",
        difference=math.inf if wrong else float(np.max([outcome.error for outcome in outcomes])),  # keeps a NaN
        tolerance=TOLERANCE,
        unit="of the range",
        note="; ".join(notes),
    )


def _compare(patch: Triple, name: str | None, seed: int) -> _Outcome:
    """One sample through both sides; name: of the operation, None for the whole table."""
    np.random.seed(seed)
    torch.manual_seed(seed)
    masked = [seed % 2 == 0, True] if name in ("mask", None) else [False, False]
    image, label = _random_sample(seed, initial_patch(patch) if name in ("spatial", None) else patch)
    theirs = _by_the_peer(image, label, _transforms(patch, masked), name)
    ours, our_label = augment(image[None], label[None], [theirs.draw], patch=patch, heads=HEADS, mask_channels=masked)
    differ = theirs.data["segmentation"][0] != our_label[0]
    apart = (theirs.data["image"] - ours[0]).abs() / (image.max() - image.min())
    if any(masked):
        apart *= ~theirs.tied  # a tie between a label and "outside the head" decides what is masked
    return _Outcome(float(apart.max()), int((differ & theirs.tied).sum()), int((differ & ~theirs.tied).sum()))


def _transforms(patch: Triple, masked: Sequence[bool]) -> list[Any]:
    """The trainer's transforms for training, without the label pyramid of the loss."""
    degrees = FLAT_ROTATION_DEGREES if is_flat(patch) else 30.0
    angle = math.radians(degrees)
    composed = nnUNetTrainer.get_training_transforms(
        patch, (-angle, angle), None, (0, 1, 2), is_flat(patch), use_mask_for_norm=list(masked)
    )
    return list(composed.transforms)


def _by_the_peer(image: Tensor, label: Tensor, transforms: Sequence[Any], name: str | None) -> _Sample:
    """The sample after the named operation, or after all, each of which then happens in half of the samples."""
    data = {"image": image.clone(), "segmentation": label[None].clone()}
    fields: dict[str, Any] = dict.fromkeys(VALUES, (None,) * len(image))
    fields |= {"spatial": None, "noise": None, "mirror": ()}
    sample = _Sample(data=data, draw=Draw(**fields), tied=torch.zeros(1, dtype=torch.bool))
    for transform in transforms:
        inner = transform.transform if isinstance(transform, RandomTransform) else transform
        happens = inner is transform or bool(torch.rand(1) < 0.5)
        this = _name(inner)
        if this == "always" or this == name or (name is None and happens):
            _apply(sample, this, inner)
    return sample


def _name(transform: Any) -> str:
    name = NAMES.get(type(transform), "always")
    return "gamma_inverted" if name == "gamma" and transform.p_invert_image == 1 else name


def _apply(sample: _Sample, name: str, transform: Any) -> None:
    """Draws and applies one transform, and writes down what it drew in strokenet's words."""
    if name == "spatial":
        angles, scales = _note_ranges(transform)
    drawn = transform.get_parameters(**sample.data)
    if name == "spatial" and drawn["grid"] is not None:
        sample.tied = _tied(sample.data["segmentation"], drawn["grid"])
        sample.draw = replace(sample.draw, spatial=_spatial(angles.drawn, scales.drawn))
    elif name == "noise":
        seed = int(np.random.randint(2**31))
        torch.manual_seed(seed)
        sample.draw = replace(sample.draw, noise=(drawn["sigmas"], seed))
    elif name == "mirror":
        sample.draw = replace(sample.draw, mirror=tuple(drawn["axes"]))
        sample.tied = sample.tied.flip(drawn["axes"]) if sample.tied.ndim == 3 else sample.tied
    elif name in VALUES:
        changed: dict[str, Any] = {name: _per_channel(name, drawn)}
        sample.draw = replace(sample.draw, **changed)
    sample.data = dict(transform.apply(sample.data, **drawn))


def _note_ranges(transform: Any) -> tuple[_Noted, _Noted]:
    """Makes a spatial transform note its angles and its scale, and turn and scale most samples."""
    transform.p_rotation = transform.p_scaling = 0.7
    transform.rotation, transform.scaling = _Noted(*transform.rotation), _Noted(*transform.scaling)
    return transform.rotation, transform.scaling


def _spatial(angles: Sequence[float], scales: Sequence[float]) -> SpatialDraw:
    """What was noted; thick slices have two angles, of which the peer uses the last."""
    turn = (0.0, 0.0, 0.0) if not angles else (angles[-1], 0.0, 0.0) if len(angles) == 2 else tuple(angles)
    return SpatialDraw(angles=(turn[0], turn[1], turn[2]), scale=scales[0] if scales else 1.0)


def _per_channel(name: str, drawn: dict[str, Any]) -> tuple[Any, ...]:
    """A value a channel, None where the peer leaves the channel alone."""
    chosen = drawn["apply_to_channel"]
    if chosen.dtype == torch.bool:
        chosen = chosen.nonzero().flatten()
    values: list[Any] = [None] * CHANNELS
    for place, value in zip(chosen.tolist(), drawn[VALUES[name]] if len(chosen) else (), strict=True):
        # Low resolution: the same factor on all axes, or on all but the first.
        values[place] = tuple(value) if name == "blur" else float(value[-1] if name == "low_resolution" else value)
    return tuple(values)


def _tied(label: Tensor, grid: Tensor) -> Tensor:
    """Where the two likeliest labels are within TIE of each other, by scores in float64.

    Args:
        label: as the peer holds it, (1, D', H', W') or, for thick slices, (D, H', W'). grid: the peer's.

    Returns:
        (D, H, W) bool.
    """
    sampled = partial(F.grid_sample, grid=grid[None].double(), padding_mode="zeros", align_corners=False)
    inside = torch.stack([sampled((label == value).double()[None])[0] for value in range(-1, HEADS)])
    inside[0] += 1 - inside.sum(0)  # beyond the raw patch lies -1
    first, second = inside.topk(2, 0).values
    tied: Tensor = first - second <= TIE
    return tied[0] if label.ndim == 4 else tied


def _random_sample(seed: int, shape: Triple) -> tuple[Tensor, Tensor]:
    """Smooth noise (C, D, H, W) float32 and blobs of every label, -1 too, (D, H, W) int16."""
    rng = torch.Generator().manual_seed(seed)
    coarse = [max(2, edge // 4) for edge in shape]
    smooth = partial(F.interpolate, size=shape, mode="trilinear", align_corners=False)
    image = smooth(torch.randn(1, CHANNELS, *coarse, generator=rng))[0] + 0.3 * torch.randn(
        CHANNELS, *shape, generator=rng
    )
    label = smooth(torch.rand(1, HEADS + 1, *coarse, generator=rng))[0].argmax(0) - 1
    return image, label.to(torch.int16)


def _table() -> Row:
    """The published table against the numbers of the trainer's own transforms, thin and thick slices."""
    theirs = [_numbers(_transforms(patch, (True, True))) for patch in (PATCHES[0], FLAT_PATCHES[0])]
    ours = [_published(30.0), _published(FLAT_ROTATION_DEGREES)]
    names = {*theirs[0], *ours[0]}
    pairs = [(a.get(name), b.get(name)) for a, b in zip(theirs, ours, strict=True) for name in names]
    wrong = sum(list(a) != list(b) for a, b in zip(theirs, ours, strict=True))  # the order
    wrong += sum(a is None or b is None or not np.allclose(a, b, rtol=0, atol=1e-9) for a, b in pairs)
    return Row(
        check="augmentation: table",
        on=f"order, chances and ranges of {len(names)} operations, thin and thick slices",
        difference=wrong,
        tolerance=0,
        unit="values",
    )


def _published(degrees: float) -> dict[str, tuple[float, ...]]:
    """Operation -> chance a sample, chance a channel, range. Degrees replace those of the table."""
    table = {}
    for name in ("rotation", "scaling", "noise", "blur", "brightness", "contrast", "low_resolution"):
        table[name] = getattr(PUBLISHED, name)
    table |= {"gamma_inverted": PUBLISHED.gamma_inverted, "gamma": PUBLISHED.gamma}
    table["rotation"] = replace(table["rotation"], low=-degrees, high=degrees)
    return {name: (row.p, row.p_channel, row.low, row.high) for name, row in table.items()}


def _numbers(transforms: Iterable[Any]) -> dict[str, tuple[float, ...]]:
    """The same of the peer's transforms."""
    found: dict[str, tuple[float, ...]] = {}
    for transform in transforms:
        name = _name(transform.transform if isinstance(transform, RandomTransform) else transform)
        if name == "spatial":
            assert transform.p_synchronize_scaling_across_axes == 1
            found["rotation"] = (transform.p_rotation, 1.0, *(math.degrees(a) for a in transform.rotation))
            found["scaling"] = (transform.p_scaling, 1.0, *transform.scaling)
        elif isinstance(transform, RandomTransform):
            inner = transform.transform
            found[name] = (transform.apply_probability, inner.p_per_channel, *_range(inner))
    return found


def _range(transform: Any) -> tuple[float, float]:
    """What a transform draws from; the peer's sampler of factors about 1 keeps its range."""
    names = ("noise_variance", "blur_sigma", "multiplier_range", "contrast_range", "scale", "gamma")
    value = next(getattr(transform, name) for name in names if hasattr(transform, name))
    low, high = getattr(value, "contrast_range", value)
    return low, high
