"""Grid: the one resampling of a case, every native grid -> the reference's grid in the brain's box.

Comes in: the case as it was given, its brains and transforms, its scans without bias field. Goes out: Prepared, what is
written for the network: the scans, the label, the brain, on one grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from kernels.holes import fill_holes
from strokenet.data.errors import InputError
from strokenet.data.geometry import Geometry
from strokenet.data.overlap import dice
from strokenet.prepare.config import time_of
from strokenet.prepare.itk import Matrix, resample, resample_label, resample_mask
from strokenet.prepare.scans import Given, Native
from strokenet.prepare.steps import Found
from strokenet.preprocess.crop import Box, bounding_box

SMALLEST = 1e-6  # stands for a 0 inside the field of view, which would look like the outside


@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """What is written. images, inside, label: on the grid (D, H, W). brain: before the crop. sources: whose it is.

    given_ml: of the label as it was drawn, 0 where there is none. outside_ml: of the label, once carried, outside the
    brain, where the scans are 0. agreement: Dice of both scans' brains, of more the least; None for one scan.
    """

    images: dict[str, NDArray[np.float32]]
    label: NDArray[np.int16] | None
    inside: NDArray[np.bool_]
    brain: NDArray[np.bool_]
    sources: tuple[str, ...]
    box: Box
    grid: Geometry
    given_ml: float
    outside_ml: float
    agreement: float | None


def on_one_grid(given: Given, found: Found, corrected: Mapping[str, NDArray[np.float32]], *, zscore: bool) -> Prepared:
    """Native grids -> the reference's grid in the brain's box. The T1's brain is the mask of all (IV.B, step 4).

    Of two times it is the brain of either, so that both are cut along one border, which is then no change, and new
    tissue that one mask leaves out is kept. A scan of two times is 0 where its own native voxels are 0 or end: what is
    not 0 in every channel is the common field of view (`PostprocessRule.common_field`).

    Args:
        corrected: scan name -> (D, H, W) float32 on its native grid, without bias field.

    Raises:
        InputError: the brain of one scan lies outside the other.
    """
    scans, transforms, brains = given.scans, found.transforms, found.brains
    whole = scans[given.reference].geometry
    carried = {
        name: resample_mask(brains[name].mask, scan.geometry, whole, transforms[name]) for name, scan in scans.items()
    }
    sources = _brain_sources(list(scans), given.reference)
    brain = np.logical_or.reduce([carried[name] for name in sources])
    box = _box(brain)
    grid, inside = _cropped(whole, box), brain[box.slices]
    several = len({time_of(name) for name in scans}) > 1
    images = {}
    for name, array in corrected.items():
        seen = _seen(scans[name], grid, transforms[name], inside) if several else inside
        image = _finished(array, scans[name].geometry, grid, transforms[name], seen, zscore=zscore)
        images[name] = np.where(seen & (image == 0), np.float32(SMALLEST), image) if several else image
    kept, given_ml, outside_ml = _carry_label(given, transforms, brain, box)
    return Prepared(
        images=images,
        label=kept,
        inside=inside,
        brain=brain,
        sources=sources,
        box=box,
        grid=grid,
        given_ml=given_ml,
        outside_ml=outside_ml,
        agreement=min((dice(a, b) for a, b in combinations(carried.values(), 2)), default=None),
    )


def _brain_sources(scans: Sequence[str], reference: str) -> tuple[str, ...]:
    """The scan of each time whose brain is taken, the reference's time first: the T1 where there is one."""
    first = time_of(reference)
    times = [[name for name in scans if time_of(name) == time] for time in (first, 3 - first)]
    return tuple(own[0] for own in times if own)  # scans are in the order of SCANS, T1 first


def _seen(scan: Native, grid: Geometry, grid_to_scan: Matrix, inside: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The part of the brain that was scanned: within the scan's own voxels that are not 0, holes filled. (D, H, W).

    A scanner writes 0 where it has nothing, and so does a program that took the skull or the face away.
    """
    seen = inside & resample_mask(fill_holes(scan.array != 0), scan.geometry, grid, grid_to_scan)
    if not seen.any():
        raise InputError(f"{scan.path.name} shows nothing of the brain; check that the scans show one head")
    return seen


def _box(brain: NDArray[np.bool_]) -> Box:
    """The brain's tight box: no margin, as the paper's (and what lies outside is 0)."""
    if not brain.any():
        raise InputError("the brain of one scan lies outside the other; check that the scans show one head")
    return bounding_box(brain)


def _cropped(geometry: Geometry, box: Box) -> Geometry:
    affine = geometry.affine.copy()
    affine[:3, 3] = geometry.affine[:3] @ [*box.start, 1]
    return replace(geometry, shape=box.shape, affine=affine)


def _finished(
    array: NDArray[np.float32],
    geometry: Geometry,
    grid: Geometry,
    grid_to_array: Matrix,
    inside: NDArray[np.bool_],
    *,
    zscore: bool,
) -> NDArray[np.float32]:
    """A corrected native scan on the prepared grid, 0 outside the brain.

    Cubic: linear interpolation blurs what lies between two voxels, and network input is resampled once more later. On
    its own voxels a scan is taken as it is, because a B-spline would give it back only up to rounding.
    """
    if np.array_equal(grid_to_array, np.eye(4)):
        place = np.linalg.inv(geometry.affine) @ grid.affine
        start = np.rint(place[:3, 3]).astype(int)
        image = array[tuple(slice(a, a + n) for a, n in zip(start.tolist(), grid.shape, strict=True))]
    else:
        image = resample(array, geometry, grid, grid_to_array, interpolation="cubic")
    if zscore:
        values = image[inside].astype(np.float64)
        image = ((image - values.mean()) / (values.std() + 1e-8)).astype(np.float32)
    return np.where(inside, image, np.float32(0))


def _carry_label(
    given: Given, transforms: Mapping[str, Matrix], brain: NDArray[np.bool_], box: Box
) -> tuple[NDArray[np.int16] | None, float, float]:
    """The label in the box; how much was drawn, and how much of what was carried lies outside the brain, ml."""
    if given.label is None:
        return None, 0.0, 0.0
    array, name = given.label.array, given.label.drawn_on
    own, grid = given.scans[name].geometry, given.scans[given.reference].geometry
    whole = array if name == given.reference else resample_label(array, own, grid, transforms[name])
    outside = int(np.count_nonzero((whole != 0) & ~brain))
    drawn_ml = int(np.count_nonzero(array)) * own.voxel_volume_mm3 / 1000
    return np.ascontiguousarray(whole[box.slices]), drawn_ml, outside * grid.voxel_volume_mm3 / 1000
