"""The plan: everything nnU-Net decides before training, as one frozen record.

Comes in: nothing; the rules in rules.py fill it. Goes out: plan.json, read by every station after planning.
A plan is data that a stranger may hand us, so from_json accepts exactly the known fields and checks every range.
Axes: all triples are in the order of the network's input, that is after `orientation` and `transpose`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

Triple = tuple[int, int, int]
Spacing = tuple[float, float, float]
Orientation = Literal["RAS", "as-stored"]
Semantics = Literal["improved", "exact"]
Connectivity = Literal[6, 18, 26]
R = TypeVar("R")
NetworkKind = Literal["plain", "residual"]
Normalisation = Literal["zscore", "ct", "none", "rescale_to_0_1", "rgb_to_0_1"]
NormaliseWhen = Literal["before-resampling", "after-resampling"]
Averaged = Literal["logits", "probabilities"]
TileWeights = Literal["peak-10-float16", "peak-1-float32"]

MAX_STAGES = 12
MAX_EDGE = 2048
MAX_FEATURES = 4096
LARGEST = 2**53  # whole numbers below it are floats too, to the last digit


class PlanError(ValueError):
    """A plan or fingerprint that cannot be used; the message names the field, its value and what is allowed."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise PlanError(message)


@dataclass(frozen=True, kw_only=True)
class IntensityStats:
    """Statistics of the foreground voxels of one channel over the whole dataset (Isensee 2021, Methods)."""

    mean: float
    std: float
    min: float
    max: float
    median: float
    percentile_00_5: float
    percentile_99_5: float

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            _require(math.isfinite(value), f"intensity statistic {field.name} is {value}; a finite number is needed")
        _require(self.std >= 0, f"intensity statistic std is {self.std}; it cannot be negative")


@dataclass(frozen=True, kw_only=True)
class PostprocessRule:
    """How a probability map becomes a mask.

    threshold: a voxel is lesion when its probability is strictly above it; None takes the most probable label.
    min_volume_mm3: components are kept when strictly larger; 0 keeps all. connectivity: 6, 18 or 26 neighbours.

    Rules that need a threshold, all but scanned_only of LongiSeg4MS; 0 and False do nothing:
    min_peak: a component whose highest probability is below it is removed.
    trim_below: voxels below it are removed from their component, but never its brightest min_volume_mm3 and one more.
    scanned_only: only voxels that some channel has scanned can be lesion: none in the zeros around a stripped brain.
    common_field: only voxels that every channel has scanned (two times of one patient) can be lesion.
    """

    threshold: float | None = None
    min_volume_mm3: float = 0.0
    connectivity: Connectivity = 26
    min_peak: float = 0.0
    trim_below: float = 0.0
    scanned_only: bool = False
    common_field: bool = False

    def __post_init__(self) -> None:
        if self.threshold is not None:
            _require(0 <= self.threshold < 1, f"threshold is {self.threshold}; allowed: 0 <= threshold < 1")
        _require(
            math.isfinite(self.min_volume_mm3) and self.min_volume_mm3 >= 0,
            f"min_volume_mm3 is {self.min_volume_mm3}; allowed: 0 or more",
        )
        allowed = get_args(Connectivity)
        _require(self.connectivity in allowed, f"connectivity is {self.connectivity}; allowed: {allowed}")
        for name in ("min_peak", "trim_below"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"{name} is {value}; allowed: 0 to 1")
        _require(
            self.threshold is not None or not (self.min_peak or self.trim_below or self.looks_at_scans),
            "min_peak, trim_below, scanned_only and common_field need a threshold",
        )

    @property
    def looks_at_scans(self) -> bool:
        """Whether the mask depends on where the scans are not 0."""
        return self.scanned_only or self.common_field


@dataclass(frozen=True, kw_only=True)
class NetworkPlan:
    """The shape of the U-Net. Level 0 is the full resolution, level S-1 the bottleneck.

    features[l], kernels[l], encoder_blocks[l]: convolutions (plain) or residual blocks (residual) of level l.
    strides[l]: applied on entering level l, so strides[0] is (1, 1, 1).
    decoder_convs[l], decoder_kernels[l]: convolutions of the decoder at level l = 0 .. S-2.
    """

    kind: NetworkKind
    features: tuple[int, ...]
    strides: tuple[Triple, ...]
    kernels: tuple[Triple, ...]
    encoder_blocks: tuple[int, ...]
    decoder_convs: tuple[int, ...]
    decoder_kernels: tuple[Triple, ...]

    def __post_init__(self) -> None:
        stages = len(self.features)
        _require(self.kind in get_args(NetworkKind), f"network kind {self.kind!r}; allowed: {get_args(NetworkKind)}")
        _require(2 <= stages <= MAX_STAGES, f"network has {stages} stages; allowed: 2 to {MAX_STAGES}")
        for name, wanted in (
            ("strides", stages),
            ("kernels", stages),
            ("encoder_blocks", stages),
            ("decoder_convs", stages - 1),
            ("decoder_kernels", stages - 1),
        ):
            given = len(getattr(self, name))
            _require(given == wanted, f"network {name} has {given} entries for {stages} stages; {wanted} are needed")
        _require(self.strides[0] == (1, 1, 1), f"the first stride is {self.strides[0]}; it must be (1, 1, 1)")
        for f in self.features:
            _require(1 <= f <= MAX_FEATURES, f"network features {self.features}; allowed: 1 to {MAX_FEATURES} a level")
        for stride in self.strides:
            _require(len(stride) == 3 and all(1 <= s <= 8 for s in stride), f"stride {stride}; allowed: 1 to 8 an axis")
        for kernel in (*self.kernels, *self.decoder_kernels):
            _require(
                len(kernel) == 3 and all(k in (1, 3, 5, 7) for k in kernel), f"kernel {kernel}; allowed: 1, 3, 5, 7"
            )
        for n in (*self.encoder_blocks, *self.decoder_convs):
            _require(1 <= n <= 32, f"{n} convolutions at one level; allowed: 1 to 32")

    @property
    def stages(self) -> int:
        """Number of resolutions S, the bottleneck included."""
        return len(self.features)

    @property
    def divisor(self) -> Triple:
        """Product of the strides an axis: patch edges are multiples of it."""
        return _triple(math.prod(stride[axis] for stride in self.strides) for axis in range(3))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the data says about how to train: the one record that preprocessing, training and inference share.

    channels: names in input order. labels: name -> value, background (0) included.
    orientation: "RAS" turns every case to RAS first (Meddahi 2024, IV.B); "as-stored" never turns (nnU-Net).
    transpose: order of the (turned) D, H, W axes in the network's input, largest target spacing first.
    spacing (mm), patch, median_shape (voxels): in network axis order. mirror_axes: spatial axes 0, 1, 2 of it.
    batch_dice: the Dice loss sums over the batch before dividing (set when a low-resolution stage would exist).
    intensity: one record a channel; None where the source recorded none (only "ct" needs it).
    semantics: "improved" sums the tiles' logits in float32; "exact" repeats the peer's rounding, voxel by voxel.

    What nnU-Net v1 does otherwise, as fields, so that its models keep their answer (defaults: v2):
    normalise: v1 "after-resampling", and a masked zscore or ct is then 0 outside the head.
    average: over tiles, mirrored copies and folds; v1 "probabilities", which are then resampled to the scan.
    tile_weights: v1 "peak-1-float32", and no weights where one tile covers the image.
    """

    dataset: str
    planner: str
    channels: tuple[str, ...]
    labels: Mapping[str, int]
    orientation: Orientation
    transpose: Triple
    spacing: Spacing
    median_shape: tuple[float, float, float]
    patch: Triple
    batch_size: int
    batch_dice: bool
    normalisation: tuple[Normalisation, ...]
    use_mask_for_norm: tuple[bool, ...]
    intensity: tuple[IntensityStats | None, ...]
    network: NetworkPlan
    mirror_axes: tuple[int, ...]
    semantics: Semantics = "improved"
    normalise: NormaliseWhen = "before-resampling"
    average: Averaged = "logits"
    tile_weights: TileWeights = "peak-10-float16"
    postprocess: PostprocessRule = PostprocessRule()

    def __post_init__(self) -> None:
        _require(1 <= len(self.channels) <= 64, f"plan has {len(self.channels)} channels; allowed: 1 to 64")
        for name in ("normalisation", "use_mask_for_norm", "intensity"):
            given = len(getattr(self, name))
            _require(given == len(self.channels), f"plan {name} has {given} entries for {len(self.channels)} channels")
        for name in (self.dataset, self.planner, *self.channels, *self.labels):
            _require(name.isprintable(), f"plan holds the name {name!r:.80}; allowed: text that can be printed")
        values = sorted(self.labels.values())
        _require(self.labels.get("background") == 0, "plan labels need background: 0")
        _require(2 <= len(values) <= 256, f"plan has {len(values)} labels; allowed: 2 to 256 with background")
        _require(values == list(range(len(values))), f"label values {values}; allowed: consecutive from 0")
        _require(self.orientation in get_args(Orientation), f"orientation {self.orientation!r}; use RAS or as-stored")
        _require(self.semantics in get_args(Semantics), f"semantics {self.semantics!r}; allowed: improved, exact")
        for name, kind in (("normalise", NormaliseWhen), ("average", Averaged), ("tile_weights", TileWeights)):
            _require(
                getattr(self, name) in get_args(kind), f"{name} {getattr(self, name)!r}; allowed: {get_args(kind)}"
            )
        for scheme, stats in zip(self.normalisation, self.intensity, strict=True):
            _require(scheme in get_args(Normalisation), f"normalisation {scheme!r}; allowed: {get_args(Normalisation)}")
            _require(scheme != "ct" or stats is not None, "normalisation ct needs the channel's intensity statistics")
        _require(sorted(self.transpose) == [0, 1, 2], f"transpose {self.transpose}; a permutation of 0, 1, 2 is needed")
        for s in self.spacing:
            _require(math.isfinite(s) and 1e-3 < s <= 1e3, f"spacing {self.spacing} mm; allowed: 0.001 to 1000")
        for n in self.median_shape:
            _require(math.isfinite(n) and n > 0, f"median_shape {self.median_shape}; positive numbers are needed")
        for edge, divisor in zip(self.patch, self.network.divisor, strict=True):
            _require(1 <= edge <= MAX_EDGE, f"patch {self.patch}; allowed: 1 to {MAX_EDGE} an axis")
            _require(edge % divisor == 0, f"patch {self.patch} is no multiple of the strides' {self.network.divisor}")
        _require(1 <= self.batch_size <= 4096, f"batch_size {self.batch_size}; allowed: 1 to 4096")
        _require(
            set(self.mirror_axes) <= {0, 1, 2} and len(set(self.mirror_axes)) == len(self.mirror_axes),
            f"mirror_axes {self.mirror_axes}; allowed: distinct axes of 0, 1, 2",
        )
        if self.postprocess.threshold is not None:
            _require(
                len(self.labels) == 2, "a probability threshold needs exactly one lesion label; use threshold: null"
            )

    @property
    def foreground(self) -> tuple[int, ...]:
        """Label values that are not background, ascending."""
        return tuple(sorted(v for v in self.labels.values() if v != 0))

    @property
    def heads(self) -> int:
        """Output channels of the network: every label, background included."""
        return len(self.labels)


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain JSON values, in the order of the fields."""
    return dataclasses.asdict(plan)


def from_json(data: Any) -> Plan:
    """Plan from the values of a plan.json.

    Raises:
        PlanError: unknown or missing field, wrong type, or a value outside its range.
    """
    fields = _known_fields(Plan, data, "plan")
    fields["network"] = _record(NetworkPlan, fields.get("network"), "network")
    fields["postprocess"] = _record(PostprocessRule, fields.get("postprocess", {}), "postprocess")
    fields["intensity"] = tuple(
        None if s is None else _record(IntensityStats, s, "intensity") for s in _listed(fields, "intensity")
    )
    _require(isinstance(fields.get("labels"), dict), "plan labels must be an object of name -> value")
    return _record(Plan, fields, "plan")


def _listed(fields: Mapping[str, Any], name: str) -> list[Any]:
    value = fields.get(name)
    _require(isinstance(value, list), f"plan {name} must be a list, got {type(value).__name__}")
    return list(value or ())


def _known_fields(kind: type, data: Any, where: str) -> dict[str, Any]:
    _require(isinstance(data, dict), f"{where} must be a JSON object, got {type(data).__name__}")
    known = {field.name for field in dataclasses.fields(kind)}
    unknown = sorted(set(data) - known)
    _require(not unknown, f"{where} has unknown fields {unknown!s:.200}; known: {sorted(known)}")
    return dict(data)


def _record(kind: type[R], data: Any, where: str) -> R:
    """An instance of `kind`, lists turned into tuples; a missing field or a wrong type becomes a PlanError."""
    values = {name: _tuples(value) for name, value in _known_fields(kind, data, where).items()}
    hints = get_type_hints(kind)
    for name, value in values.items():
        _require(_fits(value, hints[name]), f"{where} {name} is {value!r:.100}; needed: {_named(hints[name])}")
    try:
        return kind(**values)
    except PlanError:
        raise
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise PlanError(f"{where} cannot be read: {error}") from error


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of the type that a field declares. A whole number is a float too, a bool is no number."""
    kind, inner = get_origin(hint), get_args(hint)
    if kind is UnionType:
        return any(_fits(value, option) for option in inner)
    if kind is Literal:
        return any(type(value) is type(option) and value == option for option in inner)
    if kind is Mapping:
        return isinstance(value, dict) and all(_fits(k, inner[0]) and _fits(v, inner[1]) for k, v in value.items())
    if kind is tuple:
        if not isinstance(value, tuple):
            return False
        wanted = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        return len(value) == len(wanted) and all(_fits(v, w) for v, w in zip(value, wanted, strict=True))
    if type(value) is int:
        return hint in (int, float) and abs(value) < LARGEST
    return type(value) is hint


def _named(hint: Any) -> str:
    """A type in the words of an error message: "int", "tuple[int, ...]", "Literal['RAS', 'as-stored']"."""
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).removeprefix("typing.")


def _tuples(value: Any, depth: int = 3) -> Any:
    """Lists as tuples; no field nests deeper than strides, a list of lists."""
    if not isinstance(value, (list, tuple)):
        return value
    _require(depth > 0, "plan has lists nested deeper than any of its fields")
    return tuple(_tuples(v, depth - 1) for v in value)


def _triple(values: Any) -> Triple:
    d, h, w = values
    return (d, h, w)
