"""Fingerprints that the tests of this room share."""

from __future__ import annotations

from collections.abc import Sequence

from planner.fingerprint import Fingerprint
from planner.plan import IntensityStats, Spacing, Triple

STATS = IntensityStats(mean=1.0, std=2.0, min=-1.0, max=9.0, median=1.0, percentile_00_5=-0.5, percentile_99_5=8.0)


def fingerprint(
    shapes: Sequence[Triple], spacings: Sequence[Spacing], *, channels: int = 2, relative_size: float = 0.9
) -> Fingerprint:
    """The fingerprint of a dataset whose cases have these cropped shapes and spacings."""
    return Fingerprint(
        case_ids=tuple(f"case_{i}" for i in range(len(shapes))),
        shapes_after_crop=tuple(shapes),
        spacings=tuple(spacings),
        median_relative_size=relative_size,
        intensity=(STATS,) * channels,
    )


def brains(cases: int = 10) -> Fingerprint:
    """Brains at 1 mm, the size of the common atlas after cropping."""
    return fingerprint([(155, 180, 147)] * cases, [(1.0, 1.0, 1.0)] * cases)
