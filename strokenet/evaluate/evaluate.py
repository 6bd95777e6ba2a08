"""Evaluate: masks against the reference, case by case, and what all cases say together.

Comes in: two folders of masks (or two files). Goes out: an Evaluation, and scores.json with a CSV beside it. The
reference decides which cases count. A case without a prediction is scored as an empty mask and named; a file that
cannot be used is a named failure. No case leaves a mean in silence.

The unit of every summary is the case: its labels are averaged first, so that the bootstrap resamples patients.
"""

from __future__ import annotations

import csv
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from strokenet import __version__
from strokenet.data.case import CORNER_TOLERANCE_MM, LabelMap, read_label
from strokenet.data.errors import InputError
from strokenet.data.files import read_json, replacing, safe_name, write_json
from strokenet.data.geometry import Spacing, corner_distance_mm
from strokenet.data.track import Track, silent
from strokenet.evaluate.lesions import LesionScores, lesion_scores
from strokenet.evaluate.metrics import VoxelScores, voxel_scores

ENDINGS = (".nii.gz", ".nii")
METRICS = tuple(field.name for record in (VoxelScores, LesionScores) for field in fields(record))
FLAGS = ("both_empty", "ref_empty", "missed", "missing_prediction")
RESAMPLES = 10_000
_log = logging.getLogger("strokenet")


@dataclass(frozen=True, kw_only=True)
class CaseScore(LesionScores, VoxelScores):
    """One row: a case and a label. The metrics are those of VoxelScores and LesionScores.

    both_empty: no voxel in either mask. ref_empty: only the reference is empty (all that was predicted is false).
    missed: only the prediction is empty. missing_prediction: there was no file, scored as an empty mask.
    """

    case: str
    label: str
    both_empty: bool
    ref_empty: bool
    missed: bool
    missing_prediction: bool

    @property
    def ref_nonempty(self) -> bool:
        """Whether the reference holds the label."""
        return not (self.both_empty or self.ref_empty)


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
    """A second prediction: its own rows and summary, and the paired difference by metric."""

    cases: tuple[CaseScore, ...]
    summary: Summaries
    difference: Mapping[str, Difference]


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A case that could not be scored, and why, in one line."""

    case: str
    error: str


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All that is known about a prediction. empty: flag of CaseScore -> the cases that carry it."""

    cases: tuple[CaseScore, ...]
    summary: Summaries
    by_label: Mapping[str, Summaries]
    empty: Mapping[str, tuple[str, ...]]
    failures: tuple[Failure, ...]
    comparison: Comparison | None


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
    track: Track = silent,
) -> Evaluation:
    """Scores a prediction.

    Args:
        prediction, reference: two folders of CASE.nii.gz or CASE.nii, or two files.
        against: a second prediction to compare with, of the same kind.
        out: scores.json to write; the rows go to a CSV of the same name.
        track: progress.

    Raises:
        InputError: nothing can be scored at all: no masks, or no prediction for any case. What is wrong with a single
            case goes to Evaluation.failures.
    """
    if out is not None:
        _check_out(out)
    references, labels = _reference_masks(reference), _labels_of(reference)
    scored = _score_all(_pairs(references, prediction, reference), labels, track, "evaluate")
    other = None
    if against is not None:
        other = _score_all(_pairs(references, against, reference), labels, track, "against")
    evaluation = _evaluation(scored, other, _label_names(labels, scored, other))
    if out is not None:
        write_json(out, to_json(evaluation))
        _write_csv(out.with_suffix(".csv"), evaluation.cases)
    return evaluation


def score_case(
    case: str,
    label: str,
    prediction: NDArray[np.bool_],
    reference: NDArray[np.bool_],
    spacing: Spacing,
    *,
    missing_prediction: bool = False,
) -> CaseScore:
    """The row of two masks (D, H, W) bool on one grid. spacing: mm (D, H, W)."""
    voxels, lesions = voxel_scores(prediction, reference, spacing), lesion_scores(prediction, reference)
    predicted, true = voxels.prediction_volume_ml > 0, voxels.reference_volume_ml > 0
    return CaseScore(
        case=case,
        label=label,
        both_empty=not predicted and not true,
        ref_empty=predicted and not true,
        missed=true and not predicted,
        missing_prediction=missing_prediction,
        **asdict(voxels),
        **asdict(lesions),
    )


def summarise(rows: Sequence[CaseScore]) -> Summaries:
    """The summaries of rows; a case with several labels counts once, as the mean of its labels."""
    return Summaries(all_cases=_summary(rows), ref_nonempty=_summary([row for row in rows if row.ref_nonempty]))


def bootstrap_ci95(values: NDArray[np.float64], seed: int = 0) -> NDArray[np.float64]:
    """Percentile bootstrap of the mean (Efron 1979): 10,000 resamples of the cases, the same for every metric.

    Args:
        values: (n, m), n cases and m metrics.

    Returns:
        (2, m): the 2.5th and 97.5th percentile of the resampled means.
    """
    n = len(values)
    rng = np.random.default_rng(seed)
    means = np.empty((RESAMPLES, values.shape[1]))
    step = max(1, 2**22 // n)  # about 32 MB of counts at a time
    for start in range(0, RESAMPLES, step):
        drawn = rng.integers(0, n, (min(step, RESAMPLES - start), n))
        drawn += n * np.arange(len(drawn))[:, None]
        counts = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape)  # how often each case is drawn
        means[start : start + step] = counts @ values / n
    return np.percentile(means, [2.5, 97.5], axis=0)


def to_json(evaluation: Evaluation) -> dict[str, Any]:
    """The content of scores.json."""
    content: dict[str, Any] = {
        "version": __version__,
        "cases": [_row(score) for score in evaluation.cases],
        **_summaries_json(evaluation.summary),
        "labels": {label: _summaries_json(summaries) for label, summaries in evaluation.by_label.items()},
        "empty": {flag: {"n": len(names), "cases": list(names)} for flag, names in evaluation.empty.items()},
        "failures": [asdict(failure) for failure in evaluation.failures],
    }
    if evaluation.comparison is not None:
        content["against"] = {
            "cases": [_row(score) for score in evaluation.comparison.cases],
            **_summaries_json(evaluation.comparison.summary),
            "difference": {name: asdict(value) for name, value in evaluation.comparison.difference.items()},
        }
    return content


def _masks(folder: Path) -> dict[str, Path]:
    """The masks of a folder by case name."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        ending = next((e for e in ENDINGS if path.name.endswith(e)), None)
        if ending is None or path.name.startswith(".") or not path.is_file():
            continue
        case = path.name.removesuffix(ending)
        if case in found:
            raise InputError(f"{folder}: holds both {found[case].name} and {path.name}; remove one of them")
        found[case] = path
    return found


def _reference_masks(reference: Path) -> dict[str, Path]:
    if reference.is_file():
        name = reference.name
        return {name.removesuffix(next((e for e in ENDINGS if name.endswith(e)), "")): reference}
    if not reference.is_dir():
        raise InputError(f"{reference}: not found; give a folder of masks or one mask")
    masks = _masks(reference)
    if not masks:
        hint = "labelsTr" if (reference / "labelsTr").is_dir() else "CASE.nii.gz or CASE.nii"
        raise InputError(f"{reference}: holds no masks; give the folder with them ({hint})")
    return {safe_name(case, "reference case"): path for case, path in masks.items()}


def _pairs(references: Mapping[str, Path], prediction: Path, reference: Path) -> dict[str, tuple[Path, Path | None]]:
    """case -> (reference, prediction or None where it is missing)."""
    if not prediction.exists():
        raise InputError(f"{prediction}: not found; give a folder of masks or one mask")
    if prediction.is_dir() != reference.is_dir():
        raise InputError(f"{prediction} and {reference}: one is a folder and one a file; give two of a kind")
    if not prediction.is_dir():
        return {case: (path, prediction) for case, path in references.items()}
    masks = _masks(prediction)
    missing = [case for case in references if case not in masks]
    if len(missing) == len(references):
        raise InputError(
            f"{prediction}: has no mask for any of the {len(references)} reference cases; "
            f"name the masks like the references, e.g. {references[missing[0]].name}"
        )
    if missing:
        _log.warning("%s: no prediction for %s; counted as empty", prediction, _listed(missing))
    extra = [case for case in masks if case not in references]
    if extra:
        _log.warning("%s: no reference for %s; left out", prediction, _listed(extra))
    return {case: (path, masks.get(case)) for case, path in references.items()}


def _labels_of(reference: Path) -> dict[str, int] | None:
    """Label names and values of the dataset.json beside the reference folder or in it; None without one."""
    folder = (reference if reference.is_dir() else reference.parent).resolve()
    for path in (folder.parent / "dataset.json", folder / "dataset.json"):
        if path.is_file():
            description = read_json(path)
            labels = description.get("labels") if isinstance(description, dict) else None
            if not isinstance(labels, dict) or 0 not in labels.values():
                raise InputError(f'{path}: "labels" must map names to values, background to 0')
            for name, value in labels.items():
                if type(value) is not int or name == "ignore":
                    raise InputError(f"{path}: label {name!r} is {value!r}; regions and ignore labels cannot be scored")
            return labels
    return None


def _label_names(labels: Mapping[str, int] | None, *scored: _Scored | None) -> dict[int, str]:
    """value -> name of every label that the dataset names or, without names, that occurs in any mask."""
    if labels is not None:
        return {value: name for name, value in sorted(labels.items(), key=lambda item: item[1]) if value}
    found = {value for side in scored if side for rows in side.rows.values() for value in rows}
    return {value: str(value) for value in sorted(found or {1})}


def _score_all(
    pairs: Mapping[str, tuple[Path, Path | None]], labels: Mapping[str, int] | None, track: Track, what: str
) -> _Scored:
    rows, failures = {}, []
    for case, (reference, prediction) in track(pairs.items(), total=len(pairs), what=what):
        try:
            rows[case] = _score_pair(case, reference, prediction, labels)
        except (InputError, OSError) as error:
            line = _without_folders(str(error), reference, prediction)
            failures.append(Failure(case=case, error=line))
            _log.warning("%s: not scored: %s", case, line)
    missing = frozenset(case for case, (_, prediction) in pairs.items() if prediction is None)
    return _Scored(rows=rows, missing=missing, failures=tuple(failures))


def _score_pair(
    case: str, reference: Path, prediction: Path | None, labels: Mapping[str, int] | None
) -> dict[int, CaseScore]:
    true = read_label(reference, labels)
    predicted = None if prediction is None else read_label(prediction, labels)
    if predicted is not None and prediction is not None:
        _check_grid(f"prediction {prediction.name}", predicted, true)
    a = np.zeros_like(true.array) if predicted is None else predicted.array
    b = true.array
    if labels is None:
        a, b = _from_255(case, a, b)
    return {
        value: score_case(
            case, str(value), a == value, b == value, true.geometry.spacing, missing_prediction=prediction is None
        )
        for value in sorted(_values(a) | _values(b))
    }


def _values(array: NDArray[np.int16]) -> set[int]:
    return set(np.flatnonzero(np.bincount(array.ravel())).tolist()) - {0}


def _from_255(case: str, a: NDArray[np.int16], b: NDArray[np.int16]) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
    """Masks of 0 and 255 as masks of 0 and 1, where no dataset.json says what the values mean."""
    sides = [_values(a), _values(b)]
    if 255 not in sides[0] | sides[1] or not all(side in (set(), {1}, {255}) for side in sides):
        return a, b
    _log.info("%s: 255 is taken as the label 1", case)
    return np.minimum(a, 1), np.minimum(b, 1)


def _check_grid(name: str, predicted: LabelMap, true: LabelMap) -> None:
    if predicted.geometry.shape != true.geometry.shape:
        raise InputError(
            f"{name} has {predicted.geometry.shape[::-1]} voxels, the reference {true.geometry.shape[::-1]}; "
            "predict on the grid of the reference or resample one to the other"
        )
    distance = corner_distance_mm(predicted.geometry, true.geometry)
    if distance >= CORNER_TOLERANCE_MM:
        raise InputError(
            f"{name} lies up to {distance:.3g} mm away from the reference (allowed: below {CORNER_TOLERANCE_MM:g}); "
            "correct its header or resample one to the other"
        )


def _without_folders(text: str, *paths: Path | None) -> str:
    """One line that names files but not where they lie: scores.json may be passed on."""
    for path in paths:
        if path is not None:
            text = text.replace(f"{path.parent}/", "").replace(f"{path.resolve().parent}/", "")
    return " ".join(text.split())


def _evaluation(scored: _Scored, other: _Scored | None, names: Mapping[int, str]) -> Evaluation:
    rows = _rows(scored, names)
    failures, comparison = scored.failures, None
    if other is not None:
        other_rows = _rows(other, names)
        comparison = Comparison(
            cases=other_rows, summary=summarise(other_rows), difference=_difference(rows, other_rows)
        )
        known = {failure.case for failure in failures}
        failures += tuple(
            Failure(case=f.case, error=f"against: {f.error}") for f in other.failures if f.case not in known
        )
    return Evaluation(
        cases=rows,
        summary=summarise(rows),
        by_label={name: summarise([row for row in rows if row.label == name]) for name in names.values()},
        empty={flag: _flagged(rows, flag, several=len(names) > 1) for flag in FLAGS},
        failures=failures,
        comparison=comparison,
    )


def _rows(scored: _Scored, names: Mapping[int, str]) -> tuple[CaseScore, ...]:
    """A row for every case and label; a label that occurs in neither mask of a case is a pair of empty masks."""
    nothing = np.zeros((1, 1, 1), bool)
    table = []
    for case, found in scored.rows.items():
        empty = score_case(case, "", nothing, nothing, (1.0, 1.0, 1.0), missing_prediction=case in scored.missing)
        table += [replace(found.get(value, empty), label=name) for value, name in names.items()]
    return tuple(table)


def _by_case(rows: Sequence[CaseScore]) -> tuple[list[str], NDArray[np.float64]]:
    """Case names and the mean over each case's labels, (n, metrics)."""
    groups: dict[str, list[list[float]]] = {}
    for row in rows:
        groups.setdefault(row.case, []).append([float(getattr(row, name)) for name in METRICS])
    return list(groups), np.array([np.mean(values, axis=0) for values in groups.values()])


def _summary(rows: Sequence[CaseScore]) -> dict[str, Summary]:
    if not rows:
        return {}
    _, values = _by_case(rows)
    minimum, q1, median, q3, maximum = np.percentile(values, [0, 25, 50, 75, 100], axis=0).tolist()
    means, intervals = values.mean(axis=0).tolist(), _intervals(values)
    return {
        name: Summary(
            n=len(values),
            mean=means[m],
            median=median[m],
            q1=q1[m],
            q3=q3[m],
            min=minimum[m],
            max=maximum[m],
            ci95=intervals[m],
        )
        for m, name in enumerate(METRICS)
    }


def _difference(rows: Sequence[CaseScore], other: Sequence[CaseScore]) -> dict[str, Difference]:
    """Paired: the cases are resampled, each with both its scores."""
    cases, values = _by_case(rows)
    other_cases, other_values = _by_case(other)
    shared = [case for case in cases if case in set(other_cases)]
    if not shared:
        return {}
    ours, theirs = [cases.index(case) for case in shared], [other_cases.index(case) for case in shared]
    paired = values[ours] - other_values[theirs]
    means, medians, intervals = paired.mean(axis=0).tolist(), np.median(paired, axis=0).tolist(), _intervals(paired)
    return {
        name: Difference(n=len(shared), mean=means[m], median=medians[m], ci95=intervals[m])
        for m, name in enumerate(METRICS)
    }


def _intervals(values: NDArray[np.float64]) -> list[tuple[float, float] | None]:
    if len(values) < 2:
        return [None] * values.shape[1]
    return [(low, high) for low, high in bootstrap_ci95(values).T.tolist()]


def _flagged(rows: Sequence[CaseScore], flag: str, *, several: bool) -> tuple[str, ...]:
    """The cases that carry a flag; with the label where there are several and the flag belongs to one."""
    named = [
        f"{row.case} ({row.label})" if several and flag != "missing_prediction" else row.case
        for row in rows
        if getattr(row, flag)
    ]
    return tuple(dict.fromkeys(named))


def _row(score: CaseScore) -> dict[str, Any]:
    return {name: getattr(score, name) for name in ("case", "label", *METRICS, *FLAGS)}


def _summaries_json(summaries: Summaries) -> dict[str, Any]:
    return {
        "summary": {name: asdict(value) for name, value in summaries.all_cases.items()},
        "summary_ref_nonempty": {name: asdict(value) for name, value in summaries.ref_nonempty.items()},
    }


def _check_out(out: Path) -> None:
    """Asked before the work: the CSV beside it must not be the same file, nor may a mask be written over."""
    if out.suffix != ".json" or out.is_dir():
        raise InputError(f"{out}: the scores need the name of a file that ends in .json")


def _write_csv(path: Path, rows: Sequence[CaseScore]) -> None:
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["case", "label", *METRICS, *FLAGS])
        for score in rows:
            case, label, *values = _row(score).values()
            table.writerow([_cell(case), _cell(label), *values])


def _cell(name: str) -> str:
    """A name that a spreadsheet does not take for a formula."""
    return f"'{name}" if name.startswith(("=", "+", "-", "@", "\t", "\r")) else name


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown
