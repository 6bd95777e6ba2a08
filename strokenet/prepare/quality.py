"""Quality: which cases of a prepared cohort a person should look at first.

Comes in: a CaseQuality of every case. Goes out: its flags, one short line each. Two kinds of rule: limits that hold for
any adult head, and distance from the rest of the cohort by the robust z-score (Iglewicz and Hoaglin 1993: 0.6745 times
the distance from the median over the median absolute deviation, suspicious above 3.5), from eight cases on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BRAIN_ML = (900.0, 2000.0)  # adults, with the CSF that brain extraction keeps
MAX_DISPLACEMENT_MM = 30.0  # within one examination a head moves by less; more is another examination or a failure
MIN_AGREEMENT = 0.90  # Dice of the two scans' brain masks on one grid; a miss of 5 mm all around costs more than 0.1
MAX_Z = 3.5
MIN_COHORT = 8  # fewer cases have no reliable spread
MIN_SPREAD = 0.02  # of the median: a cohort without spread would flag rounding errors


@dataclass(frozen=True, kw_only=True)
class CaseQuality:
    """What is looked at. metric: of the registration, lower is better; None where nothing was registered.

    displacement_mm: how far the registration moved the brain, mean. agreement: Dice of the brain masks of both scans.
    Of several registrations and scans the worst; displacement_mm only within a time, because between two times a
    patient lies anew.
    """

    case_id: str
    brain_ml: float
    metric: float | None = None
    displacement_mm: float | None = None
    agreement: float | None = None


def flag_outliers(cases: Sequence[CaseQuality]) -> dict[str, tuple[str, ...]]:
    """case id -> what is unusual about it, nothing where all is well."""
    flags = {case.case_id: _limits(case) for case in cases}
    for name in ("brain_ml", "metric", "displacement_mm", "agreement"):
        present = [(case.case_id, value) for case in cases if (value := getattr(case, name)) is not None]
        for (case_id, value), z in zip(present, robust_z([value for _, value in present]), strict=True):
            if abs(z) > MAX_Z:
                flags[case_id].append(f"{name} {value:.4g} is unlike the cohort's (robust z {z:+.1f})")
    return {case_id: tuple(lines) for case_id, lines in flags.items()}


def robust_z(values: Sequence[float]) -> list[float]:
    """0.6745 (x - median) / MAD of every value; all 0 where there are fewer than eight."""
    if len(values) < MIN_COHORT:
        return [0.0] * len(values)
    array = np.asarray(values, dtype=np.float64)
    median = float(np.median(array))
    spread = max(float(np.median(np.abs(array - median))), MIN_SPREAD * abs(median), 1e-12)
    return [float(z) for z in 0.6745 * (array - median) / spread]


def _limits(case: CaseQuality) -> list[str]:
    low, high = BRAIN_ML
    found = []
    if not low <= case.brain_ml <= high:
        found.append(f"brain {case.brain_ml:.0f} ml is outside {low:.0f} to {high:.0f} ml")
    if case.displacement_mm is not None and case.displacement_mm > MAX_DISPLACEMENT_MM:
        found.append(f"registration moved the brain by {case.displacement_mm:.1f} mm (over {MAX_DISPLACEMENT_MM:.0f})")
    if case.agreement is not None and case.agreement < MIN_AGREEMENT:
        found.append(f"brain masks of two scans agree by Dice {case.agreement:.3f} (under {MIN_AGREEMENT:.2f})")
    return found
