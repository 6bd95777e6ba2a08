"""Scans: the files of a case, read and turned to RAS (Meddahi 2024, IV.B, step 1). Nothing is resampled.

Comes in: paths. Goes out: a Native a scan, and the label with the name of the scan that it was drawn on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from strokenet.data.case import CORNER_TOLERANCE_MM, read_label
from strokenet.data.errors import InputError
from strokenet.data.files import file_sha256
from strokenet.data.geometry import Geometry, corner_distance_mm, turn_to_ras, turned
from strokenet.data.nifti import Header, read_volume
from strokenet.prepare.config import LABELS, Name, PrepareConfig, time_of
from strokenet.prepare.inputs import CaseInputs


@dataclass(frozen=True, kw_only=True, eq=False)
class Native:
    """A scan in RAS order, and the header that it came with."""

    path: Path
    sha256: str
    array: NDArray[np.float32]
    geometry: Geometry
    header: Header


@dataclass(frozen=True, kw_only=True, eq=False)
class DrawnLabel:
    """array: (D, H, W) int16 in RAS order, on the voxels of the scan `drawn_on`."""

    path: Path
    sha256: str
    array: NDArray[np.int16]
    drawn_on: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Given:
    """A case as it was given. scans: name -> scan, t1 first. reference: the scan whose voxels all are brought to."""

    case_id: str
    scans: dict[str, Native]
    reference: str
    label: DrawnLabel | None


def read_given(inputs: CaseInputs, config: PrepareConfig) -> Given:
    """The files of a case; where the wanted reference is missing, another scan takes its place, one of its time if any.

    Raises:
        InputError: a file cannot be used, or the label lies on the voxels of no scan.
    """
    scans = {name: read_scan(path) for name, path in inputs.scans.items()}
    instead = [name for name in scans if time_of(name) == time_of(config.reference)] or list(scans)
    reference = config.reference if config.reference in scans else instead[0]
    label = None if inputs.label is None else read_drawn_label(inputs.label, scans, reference, config.label_on)
    return Given(case_id=inputs.case_id, scans=scans, reference=reference, label=label)


def read_scan(path: Path) -> Native:
    """The scan in RAS order."""
    volume = read_volume(path)
    turn = turn_to_ras(volume.geometry)
    return Native(
        path=path,
        sha256=file_sha256(path),
        array=np.ascontiguousarray(turn.apply(volume.array)),
        geometry=turned(volume.geometry, turn),
        header=volume.header,
    )


def read_drawn_label(path: Path, scans: Mapping[str, Native], reference: str, label_on: Name | None) -> DrawnLabel:
    """The label in RAS order.

    Raises:
        InputError: the file cannot be used, or lies on the voxels of no scan, or not on those of label_on.
    """
    label = read_label(path, LABELS)
    turn = turn_to_ras(label.geometry)
    return DrawnLabel(
        path=path,
        sha256=file_sha256(path),
        array=np.ascontiguousarray(turn.apply(label.array)),
        drawn_on=_drawn_on(path, turned(label.geometry, turn), scans, reference, label_on),
    )


def _drawn_on(
    path: Path, geometry: Geometry, scans: Mapping[str, Native], reference: str, label_on: Name | None
) -> str:
    """The scan on whose voxels the label lies: the reference where both would do."""
    fitting = [name for name, scan in scans.items() if same_grid(geometry, scan.geometry)]
    wanted: str | None = label_on or (reference if reference in fitting else next(iter(fitting), None))
    if wanted not in fitting:
        raise InputError(
            f"{path}: label of {geometry.shape[::-1]} voxels lies not on the grid of {wanted or 'any scan'} "
            f"({how_far(geometry, scans)}); resample it to the scan that it was drawn on, or name that scan"
        )
    return wanted


def how_far(geometry: Geometry, scans: Mapping[str, Native]) -> str:
    """Why a grid is that of no scan: their shapes, or where these agree how far its corners are away."""
    lines = []
    for name, scan in scans.items():
        away = corner_distance_mm(geometry, scan.geometry) if geometry.shape == scan.geometry.shape else None
        shape = f"{name} {scan.geometry.shape[::-1]}"
        lines.append(
            shape if away is None else f"{shape}, {away:.3g} mm away, below {CORNER_TOLERANCE_MM:g} is allowed"
        )
    return "; ".join(lines)


def same_grid(a: Geometry, b: Geometry) -> bool:
    """Whether two grids have the same voxels in the same places."""
    return a.shape == b.shape and corner_distance_mm(a, b) < CORNER_TOLERANCE_MM
