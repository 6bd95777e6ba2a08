"""Evaluation: random pairs of masks from files, through the peer's own folder evaluation and through ours.

Per case and label every number that both report must be equal. The two differ on purpose where both masks are empty:
the peer writes NaN and its mean passes over the case, strokenet counts it as right (1). That mean is rebuilt here from
our rows, so that the difference is seen to be that rule and no other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from strokenet.data.files import write_json
from strokenet.evaluate.evaluate import evaluate_paths
from strokenet.evaluate.records import CaseScore
from tests.peers import peer
from tests.peers.row import Row

# isort: split
from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

TOLERANCE = 1e-12
LABELS = {"background": 0, "core": 1, "oedema": 2}
SPACING = (0.75, 1.25, 3.0)  # mm, i j k; exact in the float32 of a NIfTI header
VOXEL_ML = math.prod(SPACING) / 1000
METRICS = ("Dice", "IoU", "n_pred", "n_ref", "TP", "FP", "FN")


def rows(full: bool) -> Iterator[Row]:
    """Per case and label, and the peer's means."""
    cases = 200 if full else 40
    with TemporaryDirectory() as folder:
        root = Path(folder)
        _write_pairs(root, cases)
        theirs = _by_the_peer(root)
        ours = evaluate_paths(root / "predictions", root / "labelsTr").cases
    scores = {(row.case, LABELS[row.label]): row for row in ours}
    yield _per_case(theirs["metric_per_case"], scores)
    yield _means(theirs, scores)


def _per_case(cases: Sequence[Mapping[str, Any]], scores: Mapping[tuple[str, int], CaseScore]) -> Row:
    largest, empty, count = 0.0, 0, 0
    for case in cases:
        name = Path(case["reference_file"]).name.removesuffix(".nii.gz")
        for label, theirs in case["metrics"].items():
            score = scores[name, label]
            ours = _in_their_words(score)
            largest = max(largest, *(_apart(ours[metric], theirs[metric]) for metric in METRICS))
            largest = max(largest, _empty_rule(score))
            empty += score.both_empty
            count += 1
    missing = abs(count - len(scores))
    return Row(
        check="evaluation: cases",
        on=f"{len(cases)} random pairs, {count} labels: {', '.join(METRICS)}",
        difference=math.inf if missing else largest,
        tolerance=TOLERANCE,
        unit="relative",
        note=f"{empty} labels in neither mask: the peer NaN, strokenet Dice and IoU 1",
    )


def _means(theirs: Mapping[str, Any], scores: Mapping[tuple[str, int], CaseScore]) -> Row:
    """The peer's mean of a label passes over cases without it; its foreground mean is over the labels."""
    largest, by_label = 0.0, []
    for label in (1, 2):
        rows = [_in_their_words(score) for (_, value), score in scores.items() if value == label]
        means = {metric: float(np.nanmean([row[metric] for row in rows])) for metric in METRICS}
        largest = max(largest, *(_apart(means[metric], theirs["mean"][label][metric]) for metric in METRICS))
        by_label.append(means)
    for metric in METRICS:
        mean = float(np.mean([means[metric] for means in by_label]))
        largest = max(largest, _apart(mean, theirs["foreground_mean"][metric]))
    own = float(np.mean([score.dice for score in scores.values()]))
    return Row(
        check="evaluation: means",
        on="the peer's mean and foreground_mean, rebuilt from our rows",
        difference=largest,
        tolerance=TOLERANCE,
        unit="relative",
        note=f"mean Dice: the peer {theirs['foreground_mean']['Dice']:.4f}, strokenet with empty pairs {own:.4f}",
    )


def _in_their_words(score: CaseScore) -> dict[str, float]:
    """Our row as the peer's metrics: volumes as voxels, and NaN where nothing is in either mask."""
    predicted, true = score.prediction_volume_ml / VOXEL_ML, score.reference_volume_ml / VOXEL_ML
    common = score.sensitivity * true
    undefined = math.nan if score.both_empty else 1.0
    return {
        "Dice": score.dice * undefined,
        "IoU": score.iou * undefined,
        "n_pred": predicted,
        "n_ref": true,
        "TP": common,
        "FP": predicted * (1 - score.precision),
        "FN": true - common,
    }


def _empty_rule(score: CaseScore) -> float:
    """How far the scores of two empty masks are from 1."""
    return max(abs(score.dice - 1), abs(score.iou - 1)) if score.both_empty else 0.0


def _apart(ours: float, theirs: float) -> float:
    """Difference, relative to a value above 1; NaN equals NaN and nothing else."""
    if math.isnan(ours) or math.isnan(theirs):
        return 0.0 if math.isnan(ours) and math.isnan(theirs) else math.inf
    return abs(ours - theirs) / max(1.0, abs(theirs))


def _by_the_peer(root: Path) -> dict[str, Any]:
    with peer.quiet():
        summary: dict[str, Any] = compute_metrics_on_folder(
            str(root / "labelsTr"),
            str(root / "predictions"),
            str(root / "summary.json"),
            SimpleITKIO(),
            ".nii.gz",
            [1, 2],
            num_processes=1,
            chill=False,
        )
    return summary


def _write_pairs(root: Path, cases: int) -> None:
    """Random masks; six of eight kinds are special: empty, equal, or without a label."""
    write_json(root / "dataset.json", {"labels": LABELS, "channel_names": {"0": "T1"}, "file_ending": ".nii.gz"})
    affine = np.diag([*SPACING, 1.0])
    for number in range(cases):
        reference, prediction = _pair(np.random.default_rng(number), number % 8)
        name = f"case_{number:03d}.nii.gz"
        peer.write_scan(root / "labelsTr" / name, reference, affine)
        peer.write_scan(root / "predictions" / name, prediction, affine)


def _pair(rng: np.random.Generator, kind: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    shape = tuple(rng.integers(3, 20, 3).tolist())
    share = [0.8, 0.1, 0.1]
    reference = rng.choice(np.arange(3, dtype=np.uint8), shape, p=share)
    changed = rng.choice(np.arange(3, dtype=np.uint8), shape, p=share)
    prediction = np.where(rng.random(shape) < 0.5, changed, reference).astype(np.uint8)
    if kind in (0, 1):
        reference[:] = 0
    if kind in (1, 2):
        prediction[:] = 0
    if kind == 3:
        prediction = reference.copy()
    if kind == 4:
        reference[reference == 2] = prediction[prediction == 2] = 0
    if kind == 5:
        reference[reference == 1] = 0
    return reference, prediction
