"""Registration from disturbed starts on real scans, against the transforms that came with them.

    python -m tests.prepare.starts [N] [DATA]     N (20) seeded starts of the two pairs of open_ms/.../patient12

A start is the scanners' common coordinates, disturbed by up to 15 mm along and 15 degrees about every axis.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from strokenet.data.geometry import turn_to_ras, turned
from strokenet.data.nifti import read_volume
from strokenet.prepare.brain import brain_by_network
from strokenet.prepare.itk import Matrix
from strokenet.prepare.register import Registration, Scan, brain_points, displacement_mm, register

MAX_MM, MAX_DEGREES = 15.0, 15.0
_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two scans of a head, and the given motion of a point of the fixed world to the moving world (RAS mm)."""

    name: str
    fixed: Scan
    moving: Scan
    truth: Matrix


@dataclass(frozen=True, kw_only=True)
class Trial:
    """error_mm, identity_mm, start_mm: mean over the brain's voxels of how far from the given transform it is."""

    error_mm: float
    identity_mm: float
    start_mm: float
    registration: Registration


def read_scan(path: Path) -> Scan:
    """The scan in RAS order with its brain by deepbet."""
    volume = read_volume(path)
    turn = turn_to_ras(volume.geometry)
    array, geometry = np.ascontiguousarray(turn.apply(volume.array)), turned(volume.geometry, turn)
    return Scan(array=array, brain=brain_by_network(array, geometry).mask, geometry=geometry)


def read_itk_text(path: Path) -> Matrix:
    """The (4, 4) RAS matrix of an ITK text transform, from its numbers alone: y = M (x - c) + t + c in LPS."""
    lines = dict(line.split(": ", 1) for line in path.read_text().splitlines() if ": " in line)
    numbers = np.array([float(v) for v in lines["Parameters"].split()])
    centre = np.array([float(v) for v in lines["FixedParameters"].split()])
    lps = np.eye(4)
    lps[:3, :3] = numbers[:9].reshape(3, 3)
    lps[:3, 3] = numbers[9:] + centre - lps[:3, :3] @ centre
    return np.asarray(_LPS @ lps @ _LPS)


def t1_to_flair(folder: Path) -> Pair:
    """T1 onto FLAIR of study 1."""
    return Pair(
        name="T1 -> FLAIR, study 1",
        fixed=read_scan(folder / "study1_FLAIR.nii.gz"),
        moving=read_scan(folder / "study1_T1W.nii.gz"),
        truth=read_itk_text(folder / "study1_T1W_intrastudy_to_FLAIR.txt"),
    )


def flair_2_to_1(folder: Path) -> Pair:
    """FLAIR of study 2 onto that of study 1, through the common space."""
    first, second = (read_itk_text(folder / f"study{n}_FLAIR_to_common_space.txt") for n in (1, 2))
    return Pair(  # each maps a point of the common space to its study
        name="FLAIR, study 2 -> 1",
        fixed=read_scan(folder / "study1_FLAIR.nii.gz"),
        moving=read_scan(folder / "study2_FLAIR.nii.gz"),
        truth=second @ np.linalg.inv(first),
    )


def disturbed(rng: np.random.Generator, about: NDArray[np.float64]) -> Matrix:
    """A rigid motion: angles and shifts uniform within the limits, turned about the point (3,) mm."""
    matrix = np.eye(4)
    for axis, angle in enumerate(np.deg2rad(rng.uniform(-MAX_DEGREES, MAX_DEGREES, 3))):
        a, b = (axis + 1) % 3, (axis + 2) % 3
        step = np.eye(4)
        step[a, a] = step[b, b] = np.cos(angle)
        step[a, b], step[b, a] = -np.sin(angle), np.sin(angle)
        matrix = step @ matrix
    matrix[:3, 3] = about - matrix[:3, :3] @ about + rng.uniform(-MAX_MM, MAX_MM, 3)
    return matrix


def try_start(pair: Pair, seed: int | None) -> Trial:
    """One registration; seed None: from the start that `register` chooses itself."""
    points = brain_points(pair.fixed)
    start = None if seed is None else disturbed(np.random.default_rng(seed), points.mean(0))
    found = register(pair.fixed, pair.moving, start=start)
    identity = np.eye(4)
    return Trial(
        error_mm=float(displacement_mm(points, found.fixed_to_moving, pair.truth).mean()),
        identity_mm=float(displacement_mm(points, identity, pair.truth).mean()),
        start_mm=float(displacement_mm(points, identity if start is None else start, pair.truth).mean()),
        registration=found,
    )


def main(count: int, folder: Path) -> None:
    """Writes a line a start."""
    for pair in (t1_to_flair(folder), flair_2_to_1(folder)):
        for seed in (None, *range(count)):
            t = try_start(pair, seed)
            r = t.registration
            sys.stdout.write(
                f"{pair.name}  seed {seed}: error {t.error_mm:.3f} mm, start {t.start_mm:.1f} mm, identity "
                f"{t.identity_mm:.3f} mm, metric {r.metric_start:.3f} -> {r.metric_end:.3f}, {r.iterations} iterations"
                f", {r.seconds:.1f} s\n"
            )
            sys.stdout.flush()


if __name__ == "__main__":
    root = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).resolve().parents[3] / "shared" / "data"
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20, root / "open_ms" / "longitudinal" / "patient12")
