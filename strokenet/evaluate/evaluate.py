"""Evaluate, step 3: masks against the reference, case by case, and what all cases say together.

Comes in: two folders of masks (or two files). Goes out: an Evaluation, and scores.json with a CSV beside it. The
reference decides which cases count. A case without a prediction is scored as an empty mask and named; a file that
cannot be used is a named failure. No case leaves a mean in silence.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from strokenet.data.errors import InputError
from strokenet.data.geometry import Spacing
from strokenet.data.track import Track, silent
from strokenet.evaluate.anima import DetectionRule, anima_scores, anima_verdict
from strokenet.evaluate.contingency import contingency
from strokenet.evaluate.lesions import lesion_scores, overlap_verdict
from strokenet.evaluate.metrics import voxel_scores
from strokenet.evaluate.pairs import Pair, description_of, find_pairs, read_labels, read_pair, values_of
from strokenet.evaluate.records import CaseScore, Comparison, Evaluation, Failure
from strokenet.evaluate.strata import Stratum, strata_of, sum_strata
from strokenet.evaluate.summary import empty_cases, paired_difference, summarise
from strokenet.evaluate.tables import write_scores

_log = logging.getLogger("strokenet")


@dataclass(frozen=True, kw_only=True)
class _Scored:
    """rows: case -> label value -> its row, only values that occur. missing: cases without a prediction."""

    rows: Mapping[str, Mapping[int, CaseScore]]
    missing: frozenset[str]
    failures: tuple[Failure, ...]


def evaluate_paths(
    prediction: Path,
    reference: Path,
    *,
    against: Path | None = None,
    out: Path | None = None,
    rule: DetectionRule | None = None,
    track: Track = silent,
) -> Evaluation:
    """Scores a prediction.

    Args:
        prediction, reference: two folders of CASE.nii.gz or CASE.nii, or two files.
        against: a second prediction to compare with, of the same kind.
        out: scores.json to write; the rows go to a CSV of the same name.
        rule: limits of the anima_* scores; None for Anima's own.
        track: progress.

    Raises:
        InputError: nothing can be scored at all: no masks, or no prediction for any case. What is wrong with a single
            case goes to Evaluation.failures.
    """
    pairs = find_pairs(prediction, reference)
    other_pairs = None if against is None else find_pairs(against, reference)
    description = description_of(reference)
    labels = None if description is None else read_labels(description)
    if out is not None:
        check_out(out, description)
    rule = rule or DetectionRule()
    scored = _score_all(pairs, labels, rule, track, "evaluate")
    other = None if other_pairs is None else _score_all(other_pairs, labels, rule, track, "against")
    evaluation = _evaluation(scored, other, _label_names(labels, scored, other), rule)
    if out is not None:
        write_scores(evaluation, out)
    return evaluation


def score_case(
    case: str,
    label: str,
    prediction: NDArray[np.bool_],
    reference: NDArray[np.bool_],
    spacing: Spacing,
    *,
    rule: DetectionRule | None = None,
    missing_prediction: bool = False,
) -> CaseScore:
    """The row of two masks (D, H, W) bool on one grid. spacing: mm (D, H, W). rule: None for Anima's own limits."""
    voxel_mm3 = float(np.prod(np.asarray(spacing, dtype=np.float64)))
    table = contingency(prediction, reference)
    isles, anima = overlap_verdict(table), anima_verdict(table, rule or DetectionRule(), voxel_mm3)
    voxels, lesions = voxel_scores(prediction, reference, spacing), lesion_scores(isles)
    predicted, true = lesions.prediction_lesions > 0, lesions.reference_lesions > 0
    return CaseScore(
        case=case,
        label=label,
        both_empty=not predicted and not true,
        ref_empty=predicted and not true,
        missed=true and not predicted,
        missing_prediction=missing_prediction,
        strata=strata_of(table, isles, anima, voxel_mm3),
        **asdict(voxels),
        **asdict(lesions),
        **asdict(anima_scores(anima)),
    )


def _score_all(
    pairs: Sequence[Pair], labels: Mapping[str, int] | None, rule: DetectionRule, track: Track, what: str
) -> _Scored:
    rows, failures = {}, []
    for pair in track(pairs, total=len(pairs), what=what):
        try:
            rows[pair.case] = _score_pair(pair, labels, rule)
        except (InputError, OSError) as error:
            line = _without_folders(str(error), pair.reference, pair.prediction)
            failures.append(Failure(case=pair.case, error=line))
            _log.warning("%s: not scored: %s", pair.case, line)
    missing = frozenset(pair.case for pair in pairs if pair.prediction is None)
    return _Scored(rows=rows, missing=missing, failures=tuple(failures))


def _score_pair(pair: Pair, labels: Mapping[str, int] | None, rule: DetectionRule) -> dict[int, CaseScore]:
    masks = read_pair(pair, labels)
    a, b, mm, missing = masks.prediction, masks.reference, masks.spacing, pair.prediction is None
    return {
        value: score_case(pair.case, str(value), a == value, b == value, mm, rule=rule, missing_prediction=missing)
        for value in sorted(values_of(a) | values_of(b))
    }


def _label_names(labels: Mapping[str, int] | None, *scored: _Scored | None) -> dict[int, str]:
    """value -> name of every label that the dataset names or, without names, that occurs in any mask."""
    if labels is not None:
        return {value: name for name, value in sorted(labels.items(), key=lambda item: item[1]) if value}
    found = {value for side in scored if side for rows in side.rows.values() for value in rows}
    return {value: str(value) for value in sorted(found or {1})}


def _evaluation(scored: _Scored, other: _Scored | None, names: Mapping[int, str], rule: DetectionRule) -> Evaluation:
    rows = _rows(scored, names)
    return Evaluation(
        cases=rows,
        summary=summarise(rows),
        by_label={name: summarise([row for row in rows if row.label == name]) for name in names.values()},
        empty=empty_cases(rows, several=len(names) > 1),
        strata=_strata(rows, names.values()),
        rule=rule,
        failures=scored.failures if other is None else _all_failures(scored, other),
        comparison=None if other is None else _comparison(rows, _rows(other, names), names.values()),
    )


def _comparison(rows: Sequence[CaseScore], other: tuple[CaseScore, ...], labels: Collection[str]) -> Comparison:
    return Comparison(
        cases=other,
        summary=summarise(other),
        empty=empty_cases(other, several=len(labels) > 1),
        strata=_strata(other, labels),
        difference=paired_difference(rows, other),
    )


def _strata(rows: Sequence[CaseScore], labels: Collection[str]) -> dict[str, tuple[Stratum, ...]]:
    return {label: sum_strata(row.strata for row in rows if row.label == label) for label in labels}


def _all_failures(scored: _Scored, other: _Scored) -> tuple[Failure, ...]:
    """Failures of both predictions; a case that failed in the first is named once."""
    known = {failure.case for failure in scored.failures}
    added = (Failure(case=f.case, error=f"against: {f.error}") for f in other.failures if f.case not in known)
    return (*scored.failures, *added)


def _rows(scored: _Scored, names: Mapping[int, str]) -> tuple[CaseScore, ...]:
    """A row for every case and label; a label that occurs in neither mask of a case is a pair of empty masks."""
    nothing = np.zeros((1, 1, 1), bool)
    table = []
    for case, found in scored.rows.items():
        empty = score_case(case, "", nothing, nothing, (1.0, 1.0, 1.0), missing_prediction=case in scored.missing)
        table += [replace(found.get(value, empty), label=name) for value, name in names.items()]
    return tuple(table)


def _without_folders(text: str, *paths: Path | None) -> str:
    """One line that names files but not where they lie: scores.json may be passed on."""
    for path in paths:
        if path is not None:
            text = text.replace(f"{path.parent}/", "").replace(f"{path.resolve().parent}/", "")
    return " ".join(text.encode("utf-8", "replace").decode().split())  # a file's name may be no valid text


def check_out(out: Path, description: Path | None) -> None:
    """Asked before the work: the CSV beside it must not be the same file, nor may an input be written over.

    Raises:
        InputError: `out` is no name of a JSON file, or is the description of the dataset.
    """
    if out.suffix != ".json" or out.is_dir():
        raise InputError(f"{out}: the scores need the name of a file that ends in .json")
    if description is not None and out.resolve() == description.resolve():
        raise InputError(f"{out}: is the description of the dataset; give the scores another name, e.g. scores.json")
