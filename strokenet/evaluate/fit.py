"""Fit: the threshold and the smallest volume that serve a model best (Meddahi 2024, IV.D, found 0.2 and 4 mm3 so).

Comes in: probability maps of cases that the model was not trained on, and their reference masks. Goes out: the mean
Dice of every pair of a grid, and the best pair in the model's plan.json, where `infer` reads it. A map is labelled once
a threshold; all volumes are read from the sizes of its components. The Dice at the best pair is that of the cases it
was chosen on: report another set's.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kernels.components import VOLUME_MARGIN, Connectivity, label_components
from planner.plan import Plan, PostprocessRule
from strokenet.data.case import read_case, read_label
from strokenet.data.errors import InputError
from strokenet.data.files import read_json, write_json
from strokenet.data.nifti import read_volume
from strokenet.data.overlap import dice_of_counts, overlap
from strokenet.data.splits import Split
from strokenet.data.track import Track, silent
from strokenet.evaluate.evaluate import check_out
from strokenet.evaluate.pairs import Pair, check_grid, description_of, find_pairs
from strokenet.infer.outputs import RESULTS, output_files, result_rows
from strokenet.infer.postprocess import field_of_view, postprocess
from strokenet.workspace import Workspace

_log = logging.getLogger("strokenet")

THRESHOLDS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
VOLUMES_MM3 = (0.0, 2.0, 4.0, 8.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0)
EQUAL = 1e-9  # means so close are one: the rule that changes least is taken


@dataclass(frozen=True, kw_only=True, eq=False)
class Fit:
    """dice: (len(thresholds), len(volumes_mm3)) mean over the cases, float64. cases: those it was fitted on.

    left_out: case -> why. before, after: the model's rule.
    """

    model: str
    thresholds: tuple[float, ...]
    volumes_mm3: tuple[float, ...]
    dice: NDArray[np.float64]
    cases: tuple[str, ...]
    left_out: Mapping[str, str]
    before: PostprocessRule
    after: PostprocessRule

    def dice_of(self, rule: PostprocessRule) -> float:
        """The mean Dice with a rule of the grid."""
        assert rule.threshold is not None
        return float(self.dice[self.thresholds.index(rule.threshold), self.volumes_mm3.index(rule.min_volume_mm3)])


def fit_postprocessing(
    prediction: Path, reference: Path, model: Path, *, out: Path | None = None, track: Track = silent
) -> Fit:
    """Fits the rule on validation cases and writes it to the model's plan.json.

    Args:
        prediction: a folder of `strokenet infer MODEL --validation --probabilities`.
        reference: a folder of masks; those without a prediction are left out. out: JSON file for the grid.

    Raises:
        InputError: the plan takes no threshold, another model made the maps, no case can be used, `out` is a file that
            is read here, or a file cannot be read. Nothing is written then.
    """
    workspace = Workspace(model)
    plan = workspace.read_plan()
    now = _present_rule(plan, model)
    _require_maps_of(model, prediction)
    if out is not None:
        _check_grid_file(out, workspace, prediction, reference)
    pairs = find_pairs(prediction, reference, missing_are="left out")
    usable, left_out = _usable(pairs, prediction, workspace, plan)
    assert now.threshold is not None
    thresholds, volumes = tuple(sorted({*THRESHOLDS, now.threshold})), tuple(sorted({*VOLUMES_MM3, now.min_volume_mm3}))
    tables = [
        _case_table(pair, prediction, workspace, plan, thresholds, volumes)
        for pair in track(usable, total=len(usable), what="fit")
    ]
    dice = np.mean(tables, axis=0)
    fit = Fit(
        model=model.resolve().name,
        thresholds=thresholds,
        volumes_mm3=volumes,
        dice=dice,
        cases=tuple(pair.case for pair in usable),
        left_out=left_out,
        before=now,
        after=best_rule(dice, thresholds, volumes, now),
    )
    if out is not None:
        write_json(out, to_json(fit))
    workspace.write_plan(replace(plan, postprocess=fit.after))
    return fit


def dice_table(
    probability: NDArray[np.float32],
    reference: NDArray[np.bool_],
    voxel_volume_mm3: float,
    thresholds: Sequence[float],
    volumes_mm3: Sequence[float],
    connectivity: Connectivity = 26,
) -> NDArray[np.float64]:
    """Dice of the masks that `kernels.components.lesion_mask` makes of a map, for every threshold and volume.

    Args:
        probability, reference: (D, H, W) on one grid.

    Returns:
        (len(thresholds), len(volumes_mm3)); 1 where both masks are empty, as in metrics.py.
    """
    table = np.empty((len(thresholds), len(volumes_mm3)))
    true = int(np.count_nonzero(reference))
    limits = np.asarray(volumes_mm3)[:, None] * (1 + VOLUME_MARGIN)
    for row, threshold in enumerate(thresholds):
        labels, sizes = label_components(probability > np.float32(threshold), connectivity)
        hits = np.bincount(labels[reference], minlength=len(sizes))
        kept = (sizes[1:] * voxel_volume_mm3 > limits) | (limits <= 0)  # (V, components)
        table[row] = dice_of_counts(kept @ hits[1:], kept @ sizes[1:], true)
    return table


def dice_table_of_rule(
    probability: NDArray[np.float32],
    reference: NDArray[np.bool_],
    voxel_volume_mm3: float,
    thresholds: Sequence[float],
    volumes_mm3: Sequence[float],
    rule: PostprocessRule,
) -> NDArray[np.float64]:
    """The same with the rule's min_peak and trim_below, by a mask a pair: what is trimmed hangs on both."""
    maps = torch.from_numpy(np.stack([1 - probability, probability]))
    table = np.empty((len(thresholds), len(volumes_mm3)))
    for (row, threshold), (column, volume) in product(enumerate(thresholds), enumerate(volumes_mm3)):
        tried = replace(rule, threshold=threshold, min_volume_mm3=volume, scanned_only=False, common_field=False)
        mask = postprocess(maps, tried, voxel_volume_mm3).numpy() != 0
        table[row, column] = dice_of_counts(*overlap(mask, reference))
    return table


def best_rule(
    dice: NDArray[np.float64], thresholds: Sequence[float], volumes_mm3: Sequence[float], now: PostprocessRule
) -> PostprocessRule:
    """The pair of the highest mean; among equal ones the nearest to the present threshold, then volume."""
    assert now.threshold is not None
    equal = np.argwhere(dice >= dice.max() - EQUAL)
    near = [
        (abs(thresholds[t] - now.threshold), abs(volumes_mm3[v] - now.min_volume_mm3), int(t), int(v)) for t, v in equal
    ]
    _, _, t, v = min(near)
    return replace(now, threshold=thresholds[t], min_volume_mm3=volumes_mm3[v])


def to_json(fit: Fit) -> dict[str, Any]:
    """Plain JSON values; dice is a row a threshold."""
    return {
        "model": fit.model,
        "cases": list(fit.cases),
        "left_out": dict(fit.left_out),
        "thresholds": list(fit.thresholds),
        "min_volumes_mm3": list(fit.volumes_mm3),
        "dice": fit.dice.tolist(),
        "before": asdict(fit.before) | {"dice": fit.dice_of(fit.before)},
        "after": asdict(fit.after) | {"dice": fit.dice_of(fit.after)},
    }


def _present_rule(plan: Plan, model: Path) -> PostprocessRule:
    if plan.postprocess.threshold is None:
        raise InputError(f"{model}: takes the most probable of {plan.heads} labels; a plan with a threshold is needed")
    return plan.postprocess


def _require_maps_of(model: Path, prediction: Path) -> None:
    """The maps must be this model's: another one's best threshold says nothing about it. Known by the folder's name."""
    results = prediction / RESULTS
    content = read_json(results) if results.is_file() else None
    maker = content.get("model") if isinstance(content, dict) else None
    if isinstance(maker, str) and maker != model.resolve().name:
        raise InputError(
            f"{results}: model {maker} made these maps, not {model.resolve().name}; "
            f"run `strokenet infer {model} --validation --probabilities -o MASKS`"
        )


def _check_grid_file(out: Path, workspace: Workspace, prediction: Path, reference: Path) -> None:
    check_out(out, description_of(reference))
    read = (workspace.plan_file, workspace.splits_file, workspace.dataset_file, workspace.fingerprint_file)
    if out.resolve() in {path.resolve() for path in (*read, prediction / RESULTS)}:
        raise InputError(f"{out}: is read here and would be lost; give the grid another name, e.g. fit.json")


def _usable(
    pairs: Sequence[Pair], prediction: Path, workspace: Workspace, plan: Plan
) -> tuple[list[Pair], dict[str, str]]:
    """The cases with a map by networks that were not trained on them, one at least; and why not the others."""
    rows, splits = result_rows(prediction), workspace.read_splits()
    usable, left_out = [], {}
    for pair in (pair for pair in pairs if pair.prediction is not None):
        why = _unusable(rows.get(pair.case), pair.case, splits)
        if why is None and not _map_of(prediction, pair.case, plan).is_file():
            why = "no probability map, infer with --probabilities"
        if why is None:
            usable.append(pair)
        else:
            left_out[pair.case] = why
            _log.warning("%s: left out: %s", pair.case, why)
    if not usable:
        raise InputError(
            f"{prediction}: no case to fit on ({next(iter(left_out.values()))}); "
            f"run `strokenet infer {workspace.root} --validation --probabilities -o MASKS`"
        )
    return usable, left_out


def _unusable(row: Mapping[str, Any] | None, case: str, splits: Sequence[Split]) -> str | None:
    folds = row.get("folds") if row is not None else None
    if not folds or not isinstance(folds, list):
        return f"{RESULTS} does not say which folds made its mask"
    for fold in folds:
        number = int(fold) if str(fold).isdecimal() else None
        if number is None or number >= len(splits):
            return f"fold {fold} trains on every case"
        if case in splits[number].train:
            return f"fold {fold} was trained on it"
    return None


def _map_of(prediction: Path, case: str, plan: Plan) -> Path:
    return output_files(prediction, case, plan)[plan.foreground[0]]


def _case_table(
    pair: Pair,
    prediction: Path,
    workspace: Workspace,
    plan: Plan,
    thresholds: Sequence[float],
    volumes: Sequence[float],
) -> NDArray[np.float64]:
    """The table of one case; the map is cut to the field of view where the plan's rule asks for it."""
    true = read_label(pair.reference, plan.labels)
    found = read_volume(_map_of(prediction, pair.case, plan))
    check_grid(f"probability map of {pair.case}", found.geometry, true.geometry)
    reference, voxel_mm3, rule = true.array != 0, true.geometry.voxel_volume_mm3, plan.postprocess
    probability = found.array
    if rule.looks_at_scans:
        probability = np.where(_field(pair.case, workspace, plan), probability, np.float32(0))
    if rule.min_peak or rule.trim_below:
        return dice_table_of_rule(probability, reference, voxel_mm3, thresholds, volumes, rule)
    return dice_table(probability, reference, voxel_mm3, thresholds, volumes, rule.connectivity)


def _field(case_id: str, workspace: Workspace, plan: Plan) -> NDArray[np.bool_]:
    """Where the plan's rule lets a lesion of a case of the workspace be, (D, H, W) bool."""
    files = next((files for files in workspace.read_dataset().cases if files.case_id == case_id), None)
    if files is None:
        raise InputError(f"{case_id}: the plan keeps to the field of view, and dataset.json has no such scans")
    image = read_case(case_id, dict(zip(plan.channels, files.images, strict=True))).image
    field = field_of_view(torch.from_numpy(image), plan.postprocess)
    assert field is not None
    return field.numpy()
