"""Head: one record for both sources of anatomy, the drawn brain and a label map, so that all that follows is one code.

Comes in: a drawn Anatomy, or (labelmap.py) a label map. Goes out: a Head: the Anatomy in which lesions.py draws, and
beside it the matter of every voxel, skull and skin included. A drawn brain keeps its tissue shares (matter MIXED) and
is put into simple shells of CSF, bone, marrow and scalp, so that brain extraction has something to remove.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from strokenet.synth.anatomy import Anatomy, Floats, Tissue, draw_anatomy
from strokenet.synth.field import smooth_field, stretched

Mask = NDArray[np.bool_]
Box = tuple[slice, slice, slice]
Triple = tuple[int, int, int]

SHELL_MM = 20.0  # room for skull and scalp around a drawn brain
# thickness in mm from the brain outwards; the order is that of a head, the numbers are our own choice within it
SHELLS = (("CSF", 2.5), ("BONE", 2.0), ("MARROW", 2.5), ("BONE", 1.5), ("FAT", 4.5), ("SKIN", 2.0))
COARSE = 2  # distances are measured on every second voxel: a few tenths of a mm off, eight times faster


class Matter(IntEnum):
    """What a voxel of Head.matter is. MIXED: Anatomy.tissue says it. The last three are painted over by lesions."""

    MIXED = 0
    AIR = 1
    CSF = 2
    VENTRICLE = 3
    CHOROID = 4
    CORTEX = 5
    WHITE = 6
    THALAMUS = 7
    STRIATUM = 8
    PALLIDUM = 9
    HIPPOCAMPUS = 10
    CEREBELLAR_GREY = 11
    CEREBELLAR_WHITE = 12
    STEM = 13
    ARTERY = 14
    EYE = 15
    SOFT = 16
    MUSCLE = 17
    MUCOSA = 18
    SKIN = 19
    CORD = 20
    VEIN = 21
    BONE = 22
    MARROW = 23
    NERVE = 24
    FAT = 25
    WMH = 26
    RIM = 27
    CAVITY = 28


TISSUE_MATTER: Mapping[Tissue, Matter] = {  # how the tissues of a drawn brain look
    Tissue.CSF: Matter.CSF,
    Tissue.GREY: Matter.CORTEX,
    Tissue.DEEP_GREY: Matter.STRIATUM,
    Tissue.WHITE: Matter.WHITE,
}
FLUID = (Matter.VENTRICLE, Matter.CHOROID)  # where no stroke can be


@dataclass(frozen=True, kw_only=True, eq=False)
class Head:
    """anatomy: the brain and a margin, where lesions are. fossa: of anatomy.shape, bool, cerebellum and brain stem.
    matter: (D, H, W) uint8 of Matter, the whole head on the same raster. box: the part of matter that anatomy covers.
    """

    anatomy: Anatomy
    fossa: Mask
    matter: NDArray[np.uint8]
    box: Box

    def __post_init__(self) -> None:
        if self.inner.shape != self.anatomy.shape or self.fossa.shape != self.anatomy.shape:
            raise ValueError(f"box {self.inner.shape}, fossa {self.fossa.shape}, anatomy {self.anatomy.shape}")

    @property
    def inner(self) -> NDArray[np.uint8]:
        """matter where anatomy is, a view."""
        return self.matter[self.box]

    @property
    def affine(self) -> NDArray[np.float64]:
        """(4, 4), (d, h, w, 1) of matter -> head mm."""
        affine = self.anatomy.affine.copy()
        affine[:3, 3] -= affine[:3, :3] @ [s.start for s in self.box]
        return affine

    @property
    def fluid(self) -> Mask:
        """Ventricles with their choroid plexus, bool, of anatomy.shape."""
        if (self.inner == Matter.MIXED).any():
            return np.asarray(self.anatomy.ventricle_mm < 0)
        return among(self.inner, FLUID)


def drawn_head(rng: np.random.Generator) -> Head:
    """A drawn brain inside drawn shells, about 1.5 mm; the brain itself is draw_anatomy's."""
    anatomy = draw_anatomy(rng)
    margin = int(np.ceil(SHELL_MM / anatomy.spacing_mm))
    brain = np.pad(anatomy.brain, margin)
    d, h, w = brain.shape
    outside = -coarse_distance_mm(brain, anatomy.spacing_mm)  # positive outside the brain
    outside += 1.2 * smooth_field(rng, (d, h, w), 12 / anatomy.spacing_mm)
    matter = np.full(brain.shape, Matter.AIR, np.uint8)
    edge = 0.0
    for name, thickness in SHELLS:
        start, edge = edge, edge + thickness
        matter[(outside > start) & (outside <= edge)] = Matter[name]
    matter[(outside <= 0) & ~brain] = Matter.CSF
    matter[brain] = Matter.MIXED
    a, b, c = (slice(margin, margin + n) for n in anatomy.shape)
    return Head(anatomy=anatomy, fossa=_drawn_fossa(anatomy), matter=matter, box=(a, b, c))


def among(matter: NDArray[np.uint8], kinds: Iterable[Matter]) -> Mask:
    """Where the matter is one of these kinds: (D, H, W) bool."""
    table = np.zeros(256, bool)
    table[list(kinds)] = True
    return np.asarray(table[matter])


def coarse_distance_mm(inside: Mask, spacing_mm: float) -> NDArray[np.float32]:
    """Depth below the surface of a mask in mm, negative outside, measured on every second voxel.

    (D, H, W) bool -> (D, H, W) float32.
    """
    coarse = inside[::COARSE, ::COARSE, ::COARSE]
    if not coarse.any() or coarse.all():
        return np.full(inside.shape, np.inf if inside.all() else -np.inf, np.float32)
    depth = ndimage.distance_transform_edt(coarse) - ndimage.distance_transform_edt(~coarse)
    return enlarged(depth.astype(np.float32) * np.float32(COARSE * spacing_mm), inside.shape)


def enlarged(coarse: NDArray[np.float32], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Every second voxel -> all (D, H, W) of them, linearly; beyond the last one it is held."""
    fine = np.pad(coarse, (0, 1), mode="edge")
    for axis, length in enumerate(shape):
        fine = stretched(fine, axis, length, COARSE)
    return fine


def extent(mask: Mask) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """First and last index of a mask along D, H, W; (0, 0, 0) twice for an empty one."""
    low, high = [], []
    if not mask.any():
        return np.zeros(3), np.zeros(3)
    for axis in range(3):
        other: Triple = tuple(a for a in range(3) if a != axis)  # type: ignore[assignment]
        at = np.nonzero(mask.any(other))[0]
        low.append(float(at[0]))
        high.append(float(at[-1]))
    return np.array(low), np.array(high)


def widened(head: Head, side: int, wider_mm: float, reach_mm: float = 12.0) -> Head:
    """The head with the lateral ventricle of one side wider, as tissue lost nearby leaves it (ex vacuo).

    The anatomy is moved away from the ventricle along the gradient of the distance to it, by wider_mm at its wall and
    less further out; nothing folds, because the move falls over a longer way than its own length.

    Args:
        side: 1 right, -1 left. wider_mm: 0 or more. reach_mm: how far out the wall's displacement is felt.
    """
    box = _around_ventricle(head, side, reach_mm)
    if wider_mm <= 0 or box is None:
        return head
    anatomy = head.anatomy
    distance = ndimage.gaussian_filter(anatomy.ventricle_mm[box], 2.0 / anatomy.spacing_mm)
    away = np.clip(1 - np.maximum(distance, 0) / (2.5 * reach_mm), 0, 1) ** 2
    near_midline = np.clip((side * anatomy.right_mm[..., box[2]] - 1) / 8, 0, 1)
    step = (away * near_midline * wider_mm / anatomy.spacing_mm).astype(np.float32)
    index = np.indices(distance.shape, dtype=np.float32)
    at = [i - step * g for i, g in zip(index, _unit_gradient(distance), strict=True)]
    return _moved(head, box, at)


def _moved(head: Head, box: Box, at: list[NDArray[np.float32]]) -> Head:
    """What lies at `at` (voxels of the box) comes to every voxel of the box; outside it nothing changes.

    Shares move linearly, labels to the nearest voxel; so do the shares of a label map, which are 0 or 1.
    """
    anatomy = head.anatomy
    tissue, matter, fossa = anatomy.tissue.copy(), head.matter.copy(), head.fossa.copy()
    ventricle = anatomy.ventricle_mm.copy()
    nearest = tuple(np.clip(np.rint(a), 0, n - 1).astype(np.intp) for a, n in zip(at, at[0].shape, strict=True))
    inner = matter[head.box]
    drawn = bool((inner[box] == Matter.MIXED).any())
    for array in (inner, fossa, ventricle, *(() if drawn else tissue)):
        array[box] = array[box][nearest]
    for share in tissue if drawn else ():
        share[box] = ndimage.map_coordinates(share[box], at, order=1, mode="nearest")
    moved = replace(anatomy, tissue=tissue, ventricle_mm=ventricle)
    return replace(head, anatomy=moved, matter=matter, fossa=fossa)


def _around_ventricle(head: Head, side: int, reach_mm: float) -> Box | None:
    """The box of this side's ventricle with room for the whole displacement."""
    found = ndimage.find_objects((head.fluid & ~head.fossa & (side * head.anatomy.right_mm > 0)).astype(np.uint8))
    if not found:
        return None
    margin = int(np.ceil(2.5 * reach_mm / head.anatomy.spacing_mm)) + 1
    d, h, w = (
        slice(max(0, s.start - margin), min(n, s.stop + margin))
        for s, n in zip(found[0], head.anatomy.shape, strict=True)
    )
    return d, h, w


def _unit_gradient(distance: Floats) -> list[NDArray[np.float32]]:
    gradient = np.gradient(distance)
    length = np.sqrt(sum(g * g for g in gradient))
    return [np.asarray(g / np.maximum(length, 0.3), dtype=np.float32) for g in gradient]


def _drawn_fossa(anatomy: Anatomy) -> Mask:
    """Cerebellum and stem of a drawn brain, about: low and behind (the ellipsoids of anatomy.py)."""
    z = anatomy.up_mm
    y = (anatomy.affine[1, 1] * np.arange(anatomy.shape[1]) + anatomy.affine[1, 3]).astype(np.float32)[None, :, None]
    x = np.abs(anatomy.right_mm)
    low = (z < -22) & (y < -22) & (x < 50)
    stem = (z < -14) & (np.abs(y + 19) < 13) & (x < 13)
    return np.asarray((low | stem) & anatomy.brain)
