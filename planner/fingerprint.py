"""The fingerprint: what the data looks like, as numbers (Isensee 2021, Methods, "dataset fingerprint").

Comes in: one CaseSummary a case, from preprocess/survey. Goes out: Fingerprint, the planner's only view of the data.
The intensity statistics are those of 100 million foreground voxels drawn with replacement, as the peer draws them.
Differs: the draws are kept as a count a voxel, so that a million-voxel multiset is never sorted or stored; sums run in
float64, the peer's in float32 (equal to 1e-5).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.plan import IntensityStats, PlanError, Spacing, Triple

FOREGROUND_DRAWS = 100_000_000
_CHUNK = 1 << 22
_PERCENTILES = (0.5, 50.0, 99.5)


@dataclass(frozen=True, kw_only=True, eq=False)
class CaseSummary:
    """One case. shape_after_crop, spacing (mm): (D, H, W). relative_size: voxels after crop / before.

    values: one array a channel, the intensities of the foreground voxels, float32 (n,).
    counts: one array a channel, how often each was drawn, int64 (n,). n is 0 in a case without foreground.
    """

    case_id: str
    shape_after_crop: Triple
    spacing: Spacing
    relative_size: float
    values: tuple[NDArray[np.float32], ...]
    counts: tuple[NDArray[np.int64], ...]


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """The dataset. One shape and spacing a case, in the order of case_ids; one IntensityStats a channel."""

    case_ids: tuple[str, ...]
    shapes_after_crop: tuple[Triple, ...]
    spacings: tuple[Spacing, ...]
    median_relative_size: float
    intensity: tuple[IntensityStats, ...]


def foreground_counts(n_voxels: Sequence[int], draws: int) -> tuple[NDArray[np.int64], ...]:
    """How often each foreground voxel of a case is drawn, one array a channel.

    The stream is RandomState(1234).choice(n, draws) of each channel in turn; drawing in chunks gives the same numbers.

    Args:
        n_voxels: foreground voxels a channel. draws: samples a channel, 100 million divided by the number of cases.
    """
    rng = np.random.RandomState(1234)
    counted = []
    for n in n_voxels:
        counts = np.zeros(n, dtype=np.int64)
        for done in range(0, draws if n else 0, _CHUNK):
            counts += np.bincount(rng.randint(0, n, size=min(_CHUNK, draws - done)), minlength=n)
        counted.append(counts)
    return tuple(counted)


def make_fingerprint(summaries: Sequence[CaseSummary]) -> Fingerprint:
    """The fingerprint of a dataset.

    Raises:
        PlanError: no case, cases that differ in their number of channels, or no labelled voxel in the whole dataset.
    """
    if not summaries:
        raise PlanError("the dataset has no case; at least one is needed")
    channels = {len(summary.values) for summary in summaries}
    if len(channels) != 1:
        raise PlanError(f"cases have {sorted(channels)} channels; every case needs the same")
    if not any(counts.sum() for summary in summaries for counts in summary.counts):
        raise PlanError("no case has a labelled lesion voxel: nothing can be learned; check the label files")
    return Fingerprint(
        case_ids=tuple(summary.case_id for summary in summaries),
        shapes_after_crop=tuple(summary.shape_after_crop for summary in summaries),
        spacings=tuple(summary.spacing for summary in summaries),
        median_relative_size=float(np.median([summary.relative_size for summary in summaries])),
        intensity=tuple(_intensity(summaries, channel) for channel in range(channels.pop())),
    )


def to_json(fingerprint: Fingerprint) -> dict[str, Any]:
    """Plain JSON values under the peer's names, and the case ids."""
    return {
        "cases": list(fingerprint.case_ids),
        "foreground_intensity_properties_per_channel": {
            str(channel): asdict(stats) for channel, stats in enumerate(fingerprint.intensity)
        },
        "median_relative_size_after_cropping": fingerprint.median_relative_size,
        "shapes_after_crop": [list(shape) for shape in fingerprint.shapes_after_crop],
        "spacings": [list(spacing) for spacing in fingerprint.spacings],
    }


def from_json(data: Any) -> Fingerprint:
    """The fingerprint of a fingerprint.json.

    Raises:
        PlanError: a missing key or a wrong type.
    """
    try:
        channels = data["foreground_intensity_properties_per_channel"]
        names = {field.name for field in fields(IntensityStats)}
        stats = [{name: float(channels[str(c)][name]) for name in names} for c in range(len(channels))]
        return Fingerprint(
            case_ids=tuple(str(name) for name in data["cases"]),
            shapes_after_crop=tuple((int(d), int(h), int(w)) for d, h, w in data["shapes_after_crop"]),
            spacings=tuple((float(d), float(h), float(w)) for d, h, w in data["spacings"]),
            median_relative_size=float(data["median_relative_size_after_cropping"]),
            intensity=tuple(IntensityStats(**values) for values in stats),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise PlanError(f"fingerprint cannot be read ({type(error).__name__}: {error}); run `plan` again") from None


def _intensity(summaries: Sequence[CaseSummary], channel: int) -> IntensityStats:
    """Statistics of the multiset in which every voxel stands as often as it was drawn."""
    values = np.concatenate([summary.values[channel] for summary in summaries]).astype(np.float64)
    counts = np.concatenate([summary.counts[channel] for summary in summaries])
    drawn = counts > 0
    order = np.argsort(values[drawn])
    values, counts = values[drawn][order], counts[drawn][order]
    mean = float(np.average(values, weights=counts))
    deviation = float(np.sqrt(np.average((values - mean) ** 2, weights=counts)))
    low, median, high = _percentiles(values, counts)
    return IntensityStats(
        mean=mean,
        std=deviation,
        min=float(values[0]),
        max=float(values[-1]),
        median=median,
        percentile_00_5=low,
        percentile_99_5=high,
    )


def _percentiles(values: NDArray[np.float64], counts: NDArray[np.int64]) -> tuple[float, ...]:
    """Percentiles 0.5, 50 and 99.5 of the expanded multiset, linear between neighbours (numpy's default)."""
    last = np.cumsum(counts)  # one past the last index of each value
    places = np.array(_PERCENTILES) / 100 * (last[-1] - 1)
    below = values[np.searchsorted(last, np.floor(places), side="right")]
    above = values[np.searchsorted(last, np.ceil(places), side="right")]
    return tuple(float(v) for v in below + (above - below) * (places - np.floor(places)))
