"""Masks: where the strokes of a head are, from real expert masks or drawn.

Comes in: a Head, the volumes and sides wanted, and perhaps a folder of NIfTI masks in MNI or Colin27 space. Goes out:
Strokes. A real mask is brought to the head by the affine that takes the template brain's box to this brain's, mirrored
to the wanted side, scaled about its centre, warped, and then cut at the level that gives the wanted volume within what
is allowed: inside the brain, outside the ventricles, on its side of the midline.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from strokenet.data.errors import InputError
from strokenet.data.nifti import read_volume
from strokenet.synth.anatomy import Floats
from strokenet.synth.burden import DIRECTION, Burden, Side
from strokenet.synth.field import smooth_field
from strokenet.synth.head import Head, Mask, extent
from strokenet.synth.lesions import Strokes, cavity_of, ellipsoid_distance, highest, softened

# the brain's box in MNI space, mm, (z, y, x) low and high: ICBM 152, cerebellum included, to about 2 mm. Colin27 lies
# in the same space and is a few mm larger; what then sticks out is cut.
TEMPLATE_MM = np.array([[-68.0, -106.0, -71.0], [82.0, 73.0, 71.0]])
MASKS_TRIED, NEAR_VOLUME = 8, 2.0  # masks looked at until one has the side and the wanted volume within this factor
GROW = (0.5, 1.8)  # limits of the scaling along each axis
WARP_MM, WARP_LENGTH_MM = 2.0, 10.0
MIDLINE_MM = 1.0  # a stroke of one side stays so far from the other
LARGEST_MASK_ML = 1000.0
CENTRAL_MM = 8.0  # a stroke whose centre is nearer to the midline counts as "other"
FOSSA_MM = (-20.0, -38.0)  # so does one whose centre is below and behind these z, y in MNI space
CHRONIC_FLUID = (0.7, 1.0)  # of a cavity's middle: darker than white matter on FLAIR, at last as dark as CSF in tissue
ENOUGH = 0.6  # a mask that finds room for less than this share of the volume is given up


class Source(NamedTuple):
    """A real mask around its lesion. soft: (D, H, W) float32. affine: (d, h, w, 1) -> MNI mm. centre: (x, y, z) mm."""

    soft: NDArray[np.float32]
    affine: NDArray[np.float64]
    centre: NDArray[np.float64]
    volume_ml: float
    side: Side


@dataclass(frozen=True, kw_only=True, eq=False)
class Placed:
    """strokes: on the head's grid. masks: names of the real masks used, "drawn" for a drawn stroke."""

    strokes: Strokes
    masks: tuple[str, ...]


def place_strokes(
    rng: np.random.Generator, head: Head, burden: Burden, masks: tuple[Path, ...], taken: Mask | None = None
) -> Placed:
    """The strokes of a burden in a head; drawn where there is no mask, or none that fits. taken: where none may be."""
    wanted = [(burden.side, burden.volume_ml)]
    if burden.second_side is not None:
        wanted.append((burden.second_side, burden.second_ml))
    taken = np.zeros(head.anatomy.shape, bool) if taken is None else taken.copy()
    shares, names, volumes = [], [], []
    for side, volume_ml in wanted:
        room = allowed(head, side) & ~taken
        mask, name = _stroke(rng, head, room, side, volume_ml, masks)
        taken |= mask
        shares.append(mask)
        names.append(name)
        volumes.append(int(np.count_nonzero(mask)) * head.anatomy.spacing_mm**3 / 1000)
    whole = np.logical_or.reduce(shares)
    cavity = np.zeros(whole.shape, np.float32)
    for mask in [m for m in shares if m.any()]:
        np.maximum(cavity, cavity_of(rng, mask, head.anatomy.spacing_mm, CHRONIC_FLUID), out=cavity)
    strokes = Strokes(mask=whole, share=softened(whole), cavity=cavity, volumes_ml=tuple(volumes))
    return Placed(strokes=strokes, masks=tuple(names))


def allowed(head: Head, side: Side) -> Mask:
    """Where a stroke of this side may be: (D, H, W) bool."""
    anatomy = head.anatomy
    room = anatomy.brain & ~head.fluid & (anatomy.depth_mm > 0.5)
    if side == "other":
        return np.asarray(room & (head.fossa | (np.abs(anatomy.right_mm) < 25)))
    return np.asarray(room & (DIRECTION[side] * anatomy.right_mm > MIDLINE_MM) & ~head.fossa)


def _stroke(
    rng: np.random.Generator, head: Head, room: Mask, side: Side, volume_ml: float, masks: tuple[Path, ...]
) -> tuple[Mask, str]:
    if masks:
        source, path = _choose(rng, masks, side, volume_ml)
        if source is not None:
            mask = _brought(rng, head, source, room, side, volume_ml)
            if np.count_nonzero(mask) * head.anatomy.spacing_mm**3 >= ENOUGH * 1000 * volume_ml:
                return mask, path.name
    return _drawn(rng, head, room, side, volume_ml), "drawn"


def _choose(
    rng: np.random.Generator, masks: tuple[Path, ...], side: Side, volume_ml: float
) -> tuple[Source | None, Path]:
    """Of a few masks at random the one nearest in volume that has, or mirrored can have, the side."""
    best: tuple[float, Source | None, Path] = (np.inf, None, masks[0])
    for number in rng.permutation(len(masks))[:MASKS_TRIED]:
        path = masks[number]
        source = read_source(path)
        if source is None or (source.side == "other") != (side == "other"):
            continue
        off = abs(float(np.log(source.volume_ml / volume_ml)))
        if off < best[0]:
            best = (off, source, path)
        if off < np.log(NEAR_VOLUME):
            break
    return best[1], best[2]


def read_source(path: Path) -> Source | None:
    """A real mask cropped to its lesion; None where it is empty.

    Raises:
        InputError: it cannot be read, or holds more than a brain's volume.
    """
    volume = read_volume(path)
    lesion = volume.array > 0
    if not lesion.any():
        return None
    volume_ml = float(np.count_nonzero(lesion)) * volume.geometry.voxel_volume_mm3 / 1000
    if volume_ml > LARGEST_MASK_ML:
        raise InputError(f"{path}: {volume_ml:.0f} ml are marked, more than {LARGEST_MASK_ML:.0f}; give lesion masks")
    low, high = extent(lesion)
    cut = tuple(slice(int(a), int(b) + 1) for a, b in zip(low, high, strict=True))
    at = np.argwhere(lesion[cut]).mean(0) + low
    centre = (volume.geometry.affine @ [*at, 1])[:3]
    blur = max(0.7, 0.12 * (volume_ml * 1000 * 0.24) ** (1 / 3))  # in voxels of about 1 mm; 0.24 = 3 / (4 pi)
    pad = int(np.ceil(3 * blur))
    affine = volume.geometry.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ (low - pad)
    soft = ndimage.gaussian_filter(np.pad(lesion[cut].astype(np.float32), pad), blur, truncate=3)
    return Source(soft=soft, affine=affine, centre=centre, volume_ml=volume_ml, side=_side_of(centre))


def _side_of(centre: NDArray[np.float64]) -> Side:
    x, y, z = centre
    if abs(x) < CENTRAL_MM or (z < FOSSA_MM[0] and y < FOSSA_MM[1]):
        return "other"
    return "right" if x > 0 else "left"


def _brought(rng: np.random.Generator, head: Head, source: Source, room: Mask, side: Side, volume_ml: float) -> Mask:
    """The mask in the head: its soft image at every voxel of a box, of which the highest that are allowed are kept."""
    anatomy = head.anatomy
    low, high = extent(anatomy.brain)
    to_head = (high - low) * anatomy.spacing_mm / (TEMPLATE_MM[1] - TEMPLATE_MM[0])  # z, y, x: head mm a template mm
    grow = (volume_ml / (source.volume_ml * np.prod(to_head))) ** (1 / 3)
    grow = float(np.clip(grow, *GROW))
    mirror = -1.0 if side != "other" and source.centre[0] * DIRECTION[side] < 0 else 1.0
    centre = source.centre[::-1] * [1, 1, mirror]  # z, y, x
    middle = low + (centre - TEMPLATE_MM[0]) * to_head / anatomy.spacing_mm  # voxels of the head
    half = np.array(source.soft.shape)[::-1].max() * grow * to_head.max() / 2 / anatomy.spacing_mm + 4
    start = [int(max(0, m - half)) for m in middle]
    stop = [int(min(n, m + half + 1)) for m, n in zip(middle, anatomy.shape, strict=True)]
    mask = np.zeros(anatomy.shape, bool)
    if any(a >= b for a, b in zip(start, stop, strict=True)):
        return mask
    box = (slice(start[0], stop[0]), slice(start[1], stop[1]), slice(start[2], stop[2]))
    shape = (stop[0] - start[0], stop[1] - start[1], stop[2] - start[2])
    warp = [WARP_MM * smooth_field(rng, shape, WARP_LENGTH_MM / anatomy.spacing_mm) for _ in range(3)]
    offset = []  # z, y, x mm in the template, from the lesion's centre
    for axis in range(3):
        line = (np.arange(start[axis], stop[axis]) - middle[axis]) * anatomy.spacing_mm / (to_head[axis] * grow)
        offset.append(line.reshape([-1 if a == axis else 1 for a in range(3)]) + warp[axis])
    score = _sampled(source, [*offset[:2], mirror * offset[2]])
    mask[box] = highest(score, room[box] & (score > 0.02), volume_ml, anatomy.spacing_mm)
    return mask


def _sampled(source: Source, offset_mm: list[Floats]) -> NDArray[np.float32]:
    """The soft mask at offsets (z, y, x) mm from the lesion's centre."""
    to_voxel = np.linalg.inv(source.affine)
    z, y, x = offset_mm
    at = []
    start = (to_voxel @ [*source.centre, 1])[:3]
    for axis in range(3):
        a, b, c = to_voxel[axis, :3]
        at.append((start[axis] + a * x + b * y + c * z).astype(np.float32))
    return np.asarray(ndimage.map_coordinates(source.soft, at, order=1, prefilter=False), dtype=np.float32)


def _drawn(rng: np.random.Generator, head: Head, room: Mask, side: Side, volume_ml: float) -> Mask:
    """An irregular blob about a place of its side that is not at the very surface."""
    anatomy = head.anatomy
    places = np.flatnonzero(room & (anatomy.depth_mm > 6) & (head.fossa if side == "other" else anatomy.depth_mm < 32))
    if not len(places):
        places = np.flatnonzero(room)
    mask = np.zeros(anatomy.shape, bool)
    if not len(places):
        return mask
    radius = (volume_ml * 1000 * 0.24) ** (1 / 3) / anatomy.spacing_mm  # voxels, of the ball of this volume
    reach = int(np.ceil(2.6 * radius)) + 3
    middle = [int(c) for c in np.unravel_index(int(places[rng.integers(len(places))]), anatomy.shape)]
    d, h, w = (slice(max(0, c - reach), min(n, c + reach + 1)) for c, n in zip(middle, mask.shape, strict=True))
    offsets = [range(s.start - c, s.stop - c) for s, c in zip((d, h, w), middle, strict=True)]
    distance = ellipsoid_distance(rng, offsets)
    noise = smooth_field(rng, distance.shape, max(1.0, 0.4 * radius))
    mask[d, h, w] = highest(0.3 * noise - distance / radius, room[d, h, w], volume_ml, anatomy.spacing_mm)
    return mask
