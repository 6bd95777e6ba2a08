"""Label map: a real head's anatomy, FreeSurfer numbering, as the Head that lesions are painted in.

Comes in: a whole-head label map (Billot 2023, SynthSeg, publishes such maps; numbers up to 164 are FreeSurfer's
FreeSurferColorLUT.txt, 502 to 530 its tissues outside the brain). Goes out: a Head at 1 mm, turned to RAS, bent and
mirrored at random, so that a few maps make many heads. The head's world has its origin at the midline, the middle of
the brain from front to back, and TOP_MM below the brain's top, so that heights agree with those of a drawn brain.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from strokenet.data.errors import InputError
from strokenet.data.geometry import turn_to_ras
from strokenet.data.nifti import read_volume
from strokenet.synth.anatomy import Anatomy, Tissue
from strokenet.synth.field import smooth_field
from strokenet.synth.head import COARSE, FLUID, Head, Matter, among, coarse_distance_mm, enlarged, extent

SPACING_MM = 1.0
TOP_MM = 62.0  # the brain's top above the origin, as in a drawn brain
MARGIN_MM = 5.0  # beside the brain where the skull is not wanted
NECK_MM = 22.0  # below the brain where the whole head is wanted
SCALE = (0.94, 1.05)  # of the map along each axis, at random
FITTED = (0.97, 1.03)  # the same after registration to the template
TEMPLATE_SIZE_MM = np.array([150.0, 179.0, 142.0])  # z, y, x: the brain's box in MNI space
BEND_MM, BEND_LENGTH_MM = 2.5, 18.0
STRAIGHT_MM = 20.0  # so far from the midline the head bends sideways as much as everywhere
SCALP_MM = 0.0  # soft tissue above this height is the scalp's fat; below it is muscle and fat in turn
HULL_MM = 4.0  # the brain's hull bridges the sulci: the brain labels blurred so, and cut
SURFACE_LEVEL = 0.38  # at this level where lesions end
# Fitted to deepbet's own masks on three cases: 0.38 gave Dice 0.92 to 0.94; 0.3, 0.22, 0.15 and 0.1 were tried (only
# 0.3 validly), 0.17 was taken and gives 0.96. A Dice of deepbet with this brain is no evidence for `prepare`.
EXTRACTED_LEVEL = 0.17  # and at this one, some 2 mm further out in the CSF, where brain extraction does

LABELS = {  # number -> what it looks like; left and right look alike
    0: Matter.AIR,
    2: Matter.WHITE, 41: Matter.WHITE, 25: Matter.WHITE, 57: Matter.WHITE,  # 25, 57 and 77 to 82: spots
    **dict.fromkeys(range(77, 83), Matter.WHITE),
    **dict.fromkeys(range(250, 256), Matter.WHITE),  # fornix and corpus callosum
    3: Matter.CORTEX, 42: Matter.CORTEX,
    **dict.fromkeys([*range(1000, 1036), *range(2000, 2036)], Matter.CORTEX),  # aparc+aseg: cortex by region
    4: Matter.VENTRICLE, 43: Matter.VENTRICLE, 5: Matter.VENTRICLE, 44: Matter.VENTRICLE,
    14: Matter.VENTRICLE, 15: Matter.VENTRICLE, 72: Matter.VENTRICLE,
    7: Matter.CEREBELLAR_WHITE, 46: Matter.CEREBELLAR_WHITE,
    8: Matter.CEREBELLAR_GREY, 47: Matter.CEREBELLAR_GREY,
    10: Matter.THALAMUS, 49: Matter.THALAMUS, 28: Matter.THALAMUS, 60: Matter.THALAMUS,
    11: Matter.STRIATUM, 50: Matter.STRIATUM, 12: Matter.STRIATUM, 51: Matter.STRIATUM,
    26: Matter.STRIATUM, 58: Matter.STRIATUM,
    13: Matter.PALLIDUM, 52: Matter.PALLIDUM,
    16: Matter.STEM,
    17: Matter.HIPPOCAMPUS, 53: Matter.HIPPOCAMPUS, 18: Matter.HIPPOCAMPUS, 54: Matter.HIPPOCAMPUS,
    24: Matter.CSF, 30: Matter.CSF, 62: Matter.CSF,  # 30, 62: dilated perivascular spaces and small vessels
    31: Matter.CHOROID, 63: Matter.CHOROID,
    136: Matter.CHOROID, 137: Matter.CHOROID, 163: Matter.CHOROID, 164: Matter.CHOROID,
    85: Matter.NERVE,
    502: Matter.ARTERY, 506: Matter.EYE, 507: Matter.SOFT, 508: Matter.MUSCLE, 509: Matter.MUCOSA, 511: Matter.SKIN,
    512: Matter.CORD, 514: Matter.VEIN, 515: Matter.BONE, 516: Matter.MARROW, 530: Matter.NERVE,
}  # fmt: skip
SIDES = ((2,), (41,), (3, *range(1000, 1036)), (42, *range(2000, 2036)))  # white matter and cortex: all are needed
BRAIN = (
    Matter.VENTRICLE, Matter.CHOROID, Matter.CORTEX, Matter.WHITE, Matter.THALAMUS, Matter.STRIATUM, Matter.PALLIDUM,
    Matter.HIPPOCAMPUS, Matter.CEREBELLAR_GREY, Matter.CEREBELLAR_WHITE, Matter.STEM,
)  # fmt: skip
FOSSA = (Matter.CEREBELLAR_GREY, Matter.CEREBELLAR_WHITE, Matter.STEM)
TISSUES = {
    Matter.CORTEX: Tissue.GREY,
    Matter.CEREBELLAR_GREY: Tissue.GREY,
    Matter.HIPPOCAMPUS: Tissue.DEEP_GREY,
    Matter.THALAMUS: Tissue.DEEP_GREY,
    Matter.STRIATUM: Tissue.DEEP_GREY,
    Matter.PALLIDUM: Tissue.DEEP_GREY,
    Matter.WHITE: Tissue.WHITE,
    Matter.CEREBELLAR_WHITE: Tissue.WHITE,
    Matter.STEM: Tissue.WHITE,
}  # all others are CSF to lesions.py


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelMap:
    """matter: (D, H, W) uint8 of Matter, in RAS. spacing: mm (D, H, W). low, high: of the brain, voxels.

    midline: voxels along W, between the hemispheres.
    """

    matter: NDArray[np.uint8]
    spacing: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    midline: float


def read_label_map(path: Path) -> LabelMap:
    """One label map.

    Raises:
        InputError: it cannot be read, holds a number that is none of LABELS, or has no two hemispheres.
    """
    volume = read_volume(path)
    turn = turn_to_ras(volume.geometry)
    stored = turn.apply(volume.array)
    number = stored.astype(np.int16)
    table = np.full(max(LABELS) + 2, 255, np.uint8)
    table[list(LABELS)] = list(LABELS.values())
    matter = table[np.clip(number, -1, len(table) - 1)]  # -1: the last entry, which no label has
    strange = matter == 255
    if strange.any() or (number != stored).any():
        value = float(stored[strange][0]) if strange.any() else "a fraction"
        raise InputError(f"{path}: holds {value}, no FreeSurfer label that is known here; give an aseg-like label map")
    if not all(np.isin(number, side).any() for side in SIDES):
        raise InputError(f"{path}: labels 2, 3, 41 and 42 (white matter and cortex) are needed; give a whole head")
    return _measured(matter, number, np.array(turn.permute(volume.geometry.spacing)))


def bent_head(rng: np.random.Generator, labels: LabelMap, *, whole: bool, to_template: bool = False) -> Head:
    """The head of a label map, scaled, bent and, every second time, mirrored; 1 mm, RAS.

    Args:
        whole: with skull, face and skin; else only the brain's box.
        to_template: the brain is about as large as the template's, as after registration to MNI space.
    """
    size = labels.spacing * rng.uniform(*(FITTED if to_template else SCALE), 3)  # mm of a stored voxel, once scaled
    if to_template:
        size *= TEMPLATE_SIZE_MM / ((labels.high - labels.low + 1) * labels.spacing)
    mirror = -1.0 if rng.random() < 0.5 else 1.0
    origin = np.array([labels.high[0] - TOP_MM / size[0], (labels.low[1] + labels.high[1]) / 2, labels.midline])
    low, high = ((end - origin) * size for end in _box(labels, whole))
    half = max(-low[2], high[2])  # the midline stays in the middle, mirrored or not
    low[2], high[2] = -half, half
    low = np.floor(low)  # whole mm: a scan of whole mm then needs no interpolation
    d, h, w = (int(np.ceil(n / SPACING_MM)) + 1 for n in high - low)
    lines = []
    for axis, length in enumerate((d, h, w)):
        line = (low[axis] + SPACING_MM * np.arange(length)) * (mirror if axis == 2 else 1.0)
        lines.append((line / size[axis] + origin[axis]).astype(np.float32))
    across = np.minimum(np.abs(low[2] + SPACING_MM * np.arange(w)) / STRAIGHT_MM, 1).astype(np.float32)
    matter = _bent(rng, labels.matter, lines, BEND_MM / size, across)
    affine = np.eye(4)[[2, 1, 0, 3]] @ np.diag([SPACING_MM, SPACING_MM, SPACING_MM, 1.0])
    affine[:3, 3] = low[::-1]
    scalp = matter[max(0, int(SCALP_MM - low[0])) :]
    scalp[scalp == Matter.SOFT] = Matter.FAT
    return head_of(matter, affine)


def _bent(
    rng: np.random.Generator,
    matter: NDArray[np.uint8],
    lines: list[NDArray[np.float32]],
    bend: NDArray[np.float64],
    across: NDArray[np.float32],
) -> NDArray[np.uint8]:
    """The matter at the voxels that the lines (one an axis) span, each moved by a smooth field; air outside.

    bend: standard deviation of the move along each axis, in voxels of the map. across: (W,), the part of the sideways
    move that is made, 0 at the midline, so that a hemisphere stays on its side.
    """
    d, h, w = (len(line) for line in lines)
    flat = np.zeros((d, h, w), np.int32)
    inside = np.ones((d, h, w), bool)
    for axis, line in enumerate(lines):
        at = smooth_field(rng, (d, h, w), BEND_LENGTH_MM / SPACING_MM)
        at *= np.float32(bend[axis]) * (across if axis == 2 else np.float32(1))
        at += line.reshape([-1 if a == axis else 1 for a in range(3)])
        index = np.rint(at, out=at).astype(np.int32)
        inside &= (index >= 0) & (index < matter.shape[axis])
        np.clip(index, 0, matter.shape[axis] - 1, out=index)
        flat *= np.int32(matter.shape[axis])
        flat += index
    return np.where(inside, matter.ravel()[flat], np.uint8(Matter.AIR))


def head_of(matter: NDArray[np.uint8], affine: NDArray[np.float64]) -> Head:
    """The Head of a grid of matter: what lesions need is measured in it, around the brain.

    matter: (D, H, W) uint8, 1 mm, RAS. affine: (4, 4), (d, h, w, 1) -> head mm.
    """
    low, high = extent(among(matter, BRAIN))
    margin = MARGIN_MM / SPACING_MM
    first, last = np.maximum(low - margin, 0).astype(int), (high + margin).astype(int)
    d, h, w = (slice(int(a), int(b) + 1) for a, b in zip(first, last, strict=True))  # a slice may end beyond the array
    inner = matter[d, h, w]
    solid = among(inner, BRAIN)
    coarse = solid[::COARSE, ::COARSE, ::COARSE].astype(np.float32)
    hull = enlarged(ndimage.gaussian_filter(coarse, HULL_MM / SPACING_MM / COARSE, truncate=3), solid.shape)
    csf = inner == Matter.CSF
    brain = solid | ((hull > EXTRACTED_LEVEL) & csf)
    tissue = np.zeros((len(Tissue), *inner.shape), np.float32)
    for kind in (Tissue.GREY, Tissue.DEEP_GREY, Tissue.WHITE):
        tissue[kind] = among(inner, [m for m, t in TISSUES.items() if t is kind])
    tissue[Tissue.CSF] = 1 - tissue[Tissue.GREY] - tissue[Tissue.DEEP_GREY] - tissue[Tissue.WHITE]
    origin = affine.copy()
    origin[:3, 3] += affine[:3, :3] @ first
    anatomy = Anatomy(
        tissue=tissue,
        brain=brain,
        depth_mm=coarse_distance_mm(solid | ((hull > SURFACE_LEVEL) & csf), SPACING_MM),
        ventricle_mm=-coarse_distance_mm(among(inner, FLUID), SPACING_MM),
        spacing_mm=SPACING_MM,
        affine=origin,
    )
    return Head(anatomy=anatomy, fossa=among(inner, FOSSA), matter=matter, box=(d, h, w))


def _measured(matter: NDArray[np.uint8], number: NDArray[np.int16], spacing: NDArray[np.float64]) -> LabelMap:
    solid = among(matter, BRAIN)
    low, high = extent(solid)
    left, right = (float(np.nonzero((number == n).any((0, 1)))[0].mean()) for n in (2, 41))
    return LabelMap(matter=matter, spacing=spacing, low=low, high=high, midline=(left + right) / 2)


def _box(labels: LabelMap, whole: bool) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """First and last voxel to keep: the brain's, or the head's down to the upper neck."""
    if not whole:
        margin = MARGIN_MM / labels.spacing
        return labels.low - margin, labels.high + margin
    low, high = extent(labels.matter != Matter.AIR)
    low[0] = max(low[0], labels.low[0] - NECK_MM / labels.spacing[0])
    margin = np.full(3, 4.0) / labels.spacing
    return low - margin * np.array([0, 1, 1]), high + margin
