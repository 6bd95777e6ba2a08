"""Evaluate, step 3a: which prediction belongs to which reference, and the two masks on one grid.

Comes in: two folders of CASE.nii.gz or CASE.nii, or two files. Goes out: pairs of paths, then pairs of label maps
whose voxels lie on each other. The reference decides which cases count; what the values mean is said by the
dataset.json beside the reference, where there is one.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from strokenet.data.case import CORNER_TOLERANCE_MM, read_label
from strokenet.data.errors import InputError
from strokenet.data.files import read_json, safe_name
from strokenet.data.geometry import Geometry, Spacing, corner_distance_mm

ENDINGS = (".nii.gz", ".nii")
MAX_LABEL = 255  # label maps are read up to it, and masks are written as uint8
_log = logging.getLogger("strokenet")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The files of one case. prediction: None where there is none."""

    case: str
    reference: Path
    prediction: Path | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Masks:
    """Label maps (D, H, W) int16 of one case on one grid. spacing: mm (D, H, W)."""

    prediction: NDArray[np.int16]
    reference: NDArray[np.int16]
    spacing: Spacing


def find_pairs(prediction: Path, reference: Path, *, missing_are: str = "counted as empty") -> tuple[Pair, ...]:
    """The pairs of two folders or two files, one for every reference case.

    missing_are: what the caller does with cases that have no prediction, for the log.

    Raises:
        InputError: there is no reference, one side is a folder and one a file, or no case has a prediction.
    """
    references = _reference_masks(reference)
    if not prediction.exists():
        raise InputError(f"{prediction}: not found; give a folder of masks or one mask")
    if prediction.is_dir() != reference.is_dir():
        raise InputError(f"{prediction} and {reference}: one is a folder and one a file; give two of a kind")
    if not prediction.is_dir():
        return tuple(Pair(case=case, reference=path, prediction=prediction) for case, path in references.items())
    masks = _masks(prediction)
    missing = [case for case in references if case not in masks]
    if len(missing) == len(references):
        raise InputError(
            f"{prediction}: has no mask for any of the {len(references)} reference cases; "
            f"name the masks like the references, e.g. {references[missing[0]].name}"
        )
    if missing:
        _log.warning("%s: no prediction for %s; %s", prediction, _listed(missing), missing_are)
    extra = [case for case in masks if case not in references]
    if extra:
        _log.warning("%s: no reference for %s; left out", prediction, _listed(extra))
    return tuple(Pair(case=case, reference=path, prediction=masks.get(case)) for case, path in references.items())


def read_pair(pair: Pair, labels: Mapping[str, int] | None) -> Masks:
    """The two label maps of a case; a missing prediction is an empty one. Both (D, H, W) int16.

    Args:
        labels: name -> value of the dataset, background included; None allows every value up to 255.

    Raises:
        InputError: a file cannot be used, or the grids differ.
    """
    true = read_label(pair.reference, labels)
    if pair.prediction is None:
        predicted = np.zeros_like(true.array)
    else:
        found = read_label(pair.prediction, labels)
        check_grid(f"prediction {pair.prediction.name}", found.geometry, true.geometry)
        predicted = found.array
    reference = true.array
    if labels is None:
        predicted, reference = _from_255(pair.case, predicted, reference)
    return Masks(prediction=predicted, reference=reference, spacing=true.geometry.spacing)


def check_grid(name: str, predicted: Geometry, true: Geometry) -> None:
    """Refuses a prediction whose voxels are not the reference's.

    Raises:
        InputError: beginning with `name`.
    """
    if predicted.shape != true.shape:
        raise InputError(
            f"{name} has {predicted.shape[::-1]} voxels, the reference {true.shape[::-1]}; "
            "predict on the grid of the reference or resample one to the other"
        )
    distance = corner_distance_mm(predicted, true)
    if distance >= CORNER_TOLERANCE_MM:
        raise InputError(
            f"{name} lies up to {distance:.3g} mm away from the reference (allowed: below {CORNER_TOLERANCE_MM:g}); "
            "correct its header or resample one to the other"
        )


def values_of(array: NDArray[np.int16]) -> set[int]:
    """The label values that occur in (D, H, W), none negative, without the background 0."""
    return set(np.flatnonzero(np.bincount(array.ravel())).tolist()) - {0}


def description_of(reference: Path) -> Path | None:
    """The dataset.json beside the reference folder (labelsTr) or in it; None without one."""
    folder = (reference if reference.is_dir() else reference.parent).resolve()
    found = (path for path in (folder.parent / "dataset.json", folder / "dataset.json") if path.is_file())
    return next(found, None)


def read_labels(path: Path) -> dict[str, int]:
    """Label names and values of a dataset.json, background included.

    Raises:
        InputError: it has no labels, or some that cannot be scored (regions, an ignore label).
    """
    description = read_json(path)
    labels = description.get("labels") if isinstance(description, dict) else None
    if not isinstance(labels, dict):
        raise InputError(f'{path}: "labels" must map names to values')
    numbers = {name: _number(path, name, value) for name, value in labels.items()}
    if 0 not in numbers.values() or len(numbers) < 2 or len(set(numbers.values())) < len(numbers):
        raise InputError(f"{path}: label values {sorted(numbers.values())}; 0 (background) and one value a label")
    return numbers


def _number(path: Path, name: str, value: object) -> int:
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if type(value) is not int or not 0 <= value <= MAX_LABEL or name == "ignore":
        raise InputError(
            f"{path}: label {name!r} is {value!r}; whole numbers from 0 to {MAX_LABEL} can be scored, "
            "regions and ignore labels cannot"
        )
    return value


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
        case = name.removesuffix(next((e for e in ENDINGS if name.endswith(e)), ""))
        return {safe_name(case, "reference case"): reference}
    if not reference.is_dir():
        raise InputError(f"{reference}: not found; give a folder of masks or one mask")
    masks = _masks(reference)
    if not masks:
        hint = "labelsTr" if (reference / "labelsTr").is_dir() else "CASE.nii.gz or CASE.nii"
        raise InputError(f"{reference}: holds no masks; give the folder with them ({hint})")
    return {safe_name(case, "reference case"): path for case, path in masks.items()}


def _from_255(case: str, a: NDArray[np.int16], b: NDArray[np.int16]) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
    """Masks of 0 and 255 as masks of 0 and 1, where no dataset.json says what the values mean."""
    sides = [values_of(a), values_of(b)]
    if 255 not in sides[0] | sides[1] or not all(side in (set(), {1}, {255}) for side in sides):
        return a, b
    _log.info("%s: 255 is taken as the label 1", case)
    return np.minimum(a, 1), np.minimum(b, 1)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown
