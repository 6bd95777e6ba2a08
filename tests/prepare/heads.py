"""A drawn head that the tests of this room share: T1 and FLAIR on grids of their own, a known motion apart."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from strokenet.data.geometry import Geometry
from strokenet.data.nifti import header_of, write_image, write_mask
from strokenet.prepare.inputs import CaseInputs
from strokenet.prepare.itk import Matrix
from strokenet.synth.acquisition import GridStyle, bias_field, grid_around, resample
from strokenet.synth.anatomy import Anatomy, draw_anatomy
from strokenet.synth.contrast import CHANNELS, render

T1_STYLE = GridStyle(spacing=(2.5, 2.5, 2.5), axes="SPL")
FLAIR_STYLE = GridStyle(spacing=(4.0, 2.0, 2.0), axes="SAL", tilt_degrees=6.0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Head:
    """Stripped scans (D, H, W) as stored. flair_to_t1: a point of the FLAIR's world -> the T1's world, RAS mm.

    lesion: on the FLAIR's grid. bias: what the FLAIR was multiplied by.
    """

    t1: NDArray[np.float32]
    flair: NDArray[np.float32]
    t1_grid: Geometry
    flair_grid: Geometry
    lesion: NDArray[np.uint8]
    flair_to_t1: Matrix
    bias: NDArray[np.float32]


@cache
def head() -> Head:
    """Always the same one."""
    rng = np.random.default_rng(5)
    anatomy = draw_anatomy(rng)
    motion = np.eye(4)
    angle = np.deg2rad(7.0)
    motion[:3, :3] = [[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]]
    motion[:3, 3] = 6.0, -4.0, 5.0
    moved = replace(anatomy, affine=motion @ anatomy.affine)
    t1_grid, flair_grid = grid_around(rng, moved, T1_STYLE), grid_around(rng, anatomy, FLAIR_STYLE)
    t1_look, flair_look = CHANNELS["T1"], CHANNELS["FLAIR"]
    t1 = _scan(rng, resample(render(rng, moved, t1_look), moved, t1_grid), _brain(moved, t1_grid))
    flair = resample(render(rng, anatomy, flair_look), anatomy, flair_grid)
    inside = _brain(anatomy, flair_grid)
    bias = bias_field(np.random.default_rng(1), inside, flair_grid.spacing) ** 2
    world = np.argwhere(inside) @ flair_grid.affine[:3, :3].T + flair_grid.affine[:3, 3]
    near = np.linalg.norm(world - world.mean(0) - (25, 10, 15), axis=1) < 14
    lesion = np.zeros(inside.shape, np.uint8)
    lesion[tuple(np.argwhere(inside)[near].T)] = 1
    return Head(
        t1=t1,
        flair=_scan(rng, flair * bias, inside),
        t1_grid=t1_grid,
        flair_grid=flair_grid,
        lesion=lesion,
        flair_to_t1=motion,
        bias=bias,
    )


def write_head(folder: Path, *, t1: bool = True, flair: bool = True, label: bool = True) -> CaseInputs:
    """The head as folder/{t1,flair,label}.nii.gz."""
    drawn, files = head(), {}
    if t1:
        files["t1"] = folder / "t1.nii.gz"
        write_image(files["t1"], drawn.t1, header_of(drawn.t1_grid))
    if flair:
        files["flair"] = folder / "flair.nii.gz"
        write_image(files["flair"], drawn.flair, header_of(drawn.flair_grid))
    if label:
        files["label"] = folder / "label.nii.gz"
        write_mask(files["label"], drawn.lesion, header_of(drawn.flair_grid))
    return CaseInputs(case_id=folder.name, **files)


def dice(a: NDArray[np.generic], b: NDArray[np.generic]) -> float:
    """Of two masks."""
    return 2 * float(np.count_nonzero((a != 0) & (b != 0))) / float(np.count_nonzero(a) + np.count_nonzero(b))


def _brain(anatomy: Anatomy, grid: Geometry) -> NDArray[np.bool_]:
    return np.asarray(resample(anatomy.brain.astype(np.float32), anatomy, grid) > 0.5)


def _scan(rng: np.random.Generator, signal: NDArray[np.float32], inside: NDArray[np.bool_]) -> NDArray[np.float32]:
    noisy = 500 * signal + 10 * rng.standard_normal(signal.shape, dtype=np.float32)
    return np.where(inside, np.maximum(noisy, 1), 0).astype(np.float32)
