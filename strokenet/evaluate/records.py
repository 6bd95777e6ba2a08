"""Evaluate: its records, from one row to everything that is known about a prediction.

A row (CaseScore) is a case and a label. A Summary is one metric over the cases. An Evaluation holds the rows, their
summaries, which cases were empty or missing, and which could not be scored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from strokenet.evaluate.anima import AnimaScores, DetectionRule
from strokenet.evaluate.lesions import LesionScores
from strokenet.evaluate.metrics import VoxelScores
from strokenet.evaluate.strata import Stratum

METRICS = tuple(field.name for record in (VoxelScores, LesionScores, AnimaScores) for field in fields(record))
FLAGS = ("both_empty", "ref_empty", "missed", "missing_prediction")


@dataclass(frozen=True, kw_only=True)
class CaseScore(AnimaScores, LesionScores, VoxelScores):
    """One row: a case and a label. The metrics are those of VoxelScores, LesionScores and AnimaScores.

    both_empty: no voxel in either mask. ref_empty: only the reference is empty (all that was predicted is false).
    missed: only the prediction is empty. missing_prediction: there was no file, scored as an empty mask. strata: the
    same lesions by size; not written for each case, but summed over them.
    """

    case: str
    label: str
    both_empty: bool
    ref_empty: bool
    missed: bool
    missing_prediction: bool
    strata: tuple[Stratum, ...]

    @property
    def ref_nonempty(self) -> bool:
        """Whether the reference holds the label."""
        return not (self.both_empty or self.ref_empty)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A case that could not be scored, and why, in one line."""

    case: str
    error: str


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One metric over n cases. ci95: bootstrap interval of the mean, None for fewer than two cases."""

    n: int
    mean: float
    median: float
    q1: float
    q3: float
    min: float
    max: float
    ci95: tuple[float, float] | None


@dataclass(frozen=True, kw_only=True)
class Summaries:
    """Summaries by metric. all_cases: empty masks by the ISLES'22 convention. ref_nonempty: where a lesion is to find.

    Both say something: a model that never predicts is perfect on lesion-free cases. A set without cases is {}.
    """

    all_cases: Mapping[str, Summary]
    ref_nonempty: Mapping[str, Summary]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Paired difference of one metric, first prediction minus the other, over the n cases that both have.

    ci95: paired bootstrap interval of the mean, None for fewer than two cases.
    """

    n: int
    mean: float
    median: float
    ci95: tuple[float, float] | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A second prediction: its own rows, summary, empty cases and strata, and the paired difference by metric."""

    cases: tuple[CaseScore, ...]
    summary: Summaries
    empty: Mapping[str, tuple[str, ...]]
    strata: Mapping[str, tuple[Stratum, ...]]
    difference: Mapping[str, Difference]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All that is known about a prediction.

    empty: flag of CaseScore -> the cases that carry it. strata: label -> its lesions by size, summed over the cases.
    rule: what anima_* and the strata were counted with.
    """

    cases: tuple[CaseScore, ...]
    summary: Summaries
    by_label: Mapping[str, Summaries]
    empty: Mapping[str, tuple[str, ...]]
    strata: Mapping[str, tuple[Stratum, ...]]
    rule: DetectionRule
    failures: tuple[Failure, ...]
    comparison: Comparison | None
