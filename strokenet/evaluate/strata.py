"""Evaluate, step 2d: lesions found, missed and false by size, to answer which sizes a model misses.

Comes in: the table of a case and what both rules say of its lesions. Goes out: one Stratum a size, which add up over
cases. Lesions are pooled: a patient counts once for every lesion, unlike in the summaries.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from kernels.components import VOLUME_MARGIN
from strokenet.evaluate.contingency import Contingency, Verdict

# Our own choice, no published grouping: powers of ten, since volumes span five of them; spheres of 6, 12 and 27 mm
# across. The median patient of ATLAS has 4 ml in all (Meddahi 2024, Table I), which lies in the third.
EDGES_ML = (0.1, 1.0, 10.0)
_MM3_PER_ML = 1000.0


@dataclass(frozen=True, kw_only=True)
class Stratum:
    """Lesions of low_ml <= volume < high_ml (None: no upper limit); the counts are those of the rows of the cases.

    reference_lesions, lesions_found, lesions_missed, anima_found, anima_missed: by the volume of the reference's
    lesion. prediction_lesions, lesions_false, anima_false: by the volume of the predicted one. lesions_*: ISLES'22.
    """

    low_ml: float
    high_ml: float | None
    reference_lesions: int = 0
    lesions_found: int = 0
    lesions_missed: int = 0
    anima_found: int = 0
    anima_missed: int = 0
    prediction_lesions: int = 0
    lesions_false: int = 0
    anima_false: int = 0


COUNTS = tuple(field.name for field in fields(Stratum) if field.name not in ("low_ml", "high_ml"))
NO_LESIONS = tuple(
    Stratum(low_ml=low, high_ml=high) for low, high in zip((0.0, *EDGES_ML), (*EDGES_ML, None), strict=True)
)


def strata_of(table: Contingency, isles: Verdict, anima: Verdict, voxel_volume_mm3: float) -> tuple[Stratum, ...]:
    """One case by size, smallest first. A lesion of exactly an edge belongs above it."""
    true = _places(table.row_sizes, voxel_volume_mm3)
    predicted = _places(table.column_sizes, voxel_volume_mm3)
    counts = {
        "reference_lesions": _count(true),
        "lesions_found": _count(true[isles.found]),
        "lesions_missed": _count(true[isles.missed]),
        "anima_found": _count(true[anima.found]),
        "anima_missed": _count(true[anima.missed]),
        "prediction_lesions": _count(predicted),
        "lesions_false": _count(predicted[isles.false]),
        "anima_false": _count(predicted[anima.false]),
    }
    return tuple(
        replace(stratum, **{name: count[place] for name, count in counts.items()})
        for place, stratum in enumerate(NO_LESIONS)
    )


def sum_strata(cases: Iterable[tuple[Stratum, ...]]) -> tuple[Stratum, ...]:
    """The strata of all cases together."""
    total = NO_LESIONS
    for strata in cases:
        total = tuple(
            replace(a, **{name: getattr(a, name) + getattr(b, name) for name in COUNTS})
            for a, b in zip(total, strata, strict=True)
        )
    return total


def _places(sizes: NDArray[np.int64], voxel_volume_mm3: float) -> NDArray[np.int64]:
    """The stratum of every lesion; rounding of the spacing does not move a lesion of exactly an edge."""
    mm3 = sizes * voxel_volume_mm3 * (1 + VOLUME_MARGIN)
    return np.searchsorted(np.multiply(EDGES_ML, _MM3_PER_ML), mm3)


def _count(places: NDArray[np.int64]) -> list[int]:
    counts: list[int] = np.bincount(places, minlength=len(NO_LESIONS)).tolist()
    return counts
