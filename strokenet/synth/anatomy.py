"""Anatomy: a drawn brain on a fine grid, as the share of every tissue in every voxel.

Comes in: a Generator. Goes out: an Anatomy, in which lesions.py paints and which contrast.py turns into T1 and FLAIR.
The brain is made of distances in mm to a few drawn surfaces: hemispheres, cerebellum and stem, the two fissures, sulci
(the zero level of a smooth random field that runs in from the surface), ventricles, nuclei. Everything is then bent by
a smooth random displacement, so that no two brains agree and none is symmetric. There is no skull: the paper strips it
before training (Meddahi 2024, IV.B). The shapes and their sizes in mm are our own choice, near those of an adult brain.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from strokenet.synth.field import smooth_field

Triple = tuple[int, int, int]
Floats = NDArray[np.floating]  # float32 throughout; numpy's types give float32 times a number as any float

FINE_MM = 1.5
BOX_MM = ((-81.0, 72.0), (-95.0, 95.0), (-75.0, 75.0))  # z, y, x in RAS: what the largest brain fills
CSF_MM = 0.8  # a voxel nearer than this to the pial surface is subarachnoid CSF
BRAIN_MARGIN_MM = 1.5  # CSF that brain extraction leaves outside the pial surface
BEND_MM, BEND_LENGTH_MM = 2.0, 24.0  # displacement that makes each brain its own, and how smooth it is


class Tissue(IntEnum):
    """First axis of Anatomy.tissue. The last three are painted by lesions.py."""

    CSF = 0
    GREY = 1
    DEEP_GREY = 2
    WHITE = 3
    WMH = 4
    RIM = 5
    CAVITY = 6


@dataclass(frozen=True, kw_only=True, eq=False)
class Anatomy:
    """A brain on an isotropic grid; D, H, W run to the head, the front and the right (RAS).

    tissue: (len(Tissue), D, H, W) float32, shares that add up to 1 in every voxel (CSF outside the brain).
    brain: (D, H, W) bool, what brain extraction keeps. depth_mm: below the brain's outer surface, negative outside.
    ventricle_mm: to the nearest ventricle, negative in it. spacing_mm: of the grid.
    affine: (4, 4), (d, h, w, 1) -> RAS mm.
    """

    tissue: NDArray[np.float32]
    brain: NDArray[np.bool_]
    depth_mm: NDArray[np.float32]
    ventricle_mm: NDArray[np.float32]
    spacing_mm: float
    affine: NDArray[np.float64]

    @property
    def shape(self) -> Triple:
        """Voxels (D, H, W)."""
        d, h, w = self.brain.shape
        return (d, h, w)

    @property
    def right_mm(self) -> Floats:
        """Distance to the right of the midline, negative on the left: (1, 1, W), to be broadcast."""
        right = self.affine[0, 2] * np.arange(self.shape[2]) + self.affine[0, 3]
        return np.asarray(right, dtype=np.float32)[None, None]

    @property
    def up_mm(self) -> Floats:
        """Height above the brain's centre, negative below it: (D, 1, 1), to be broadcast."""
        up = self.affine[2, 0] * np.arange(self.shape[0]) + self.affine[2, 3]
        return np.asarray(up, dtype=np.float32)[:, None, None]


class Place(NamedTuple):
    """Bent coordinates of every voxel, mm: to the right, to the front, to the head."""

    x: Floats
    y: Floats
    z: Floats


class Cortex(NamedTuple):
    """pial_mm: distance to the folded surface, clefts included. thickness_mm: of the grey matter below it."""

    pial_mm: Floats
    thickness_mm: Floats


def draw_anatomy(rng: np.random.Generator) -> Anatomy:
    """One brain without a lesion: about 1.2 litres, with ventricles of an aged head."""
    low = np.array([low for low, _ in BOX_MM])
    d, h, w = (int(np.ceil((high - low) / FINE_MM)) for low, high in BOX_MM)
    affine = np.eye(4)[[2, 1, 0, 3]] @ np.diag([FINE_MM, FINE_MM, FINE_MM, 1.0])  # d, h, w run along z, y, x
    affine[:3, 3] = low[::-1]
    place = _bent(rng, (d, h, w), low)
    cerebrum = _cerebrum_mm(rng, place)
    cerebellum, stem = _cerebellum_mm(place), _stem_mm(place)
    ventricle = _ventricle_mm(rng, place)
    depth = np.maximum(np.maximum(cerebrum, cerebellum), stem)
    return Anatomy(
        tissue=_tissue(_cortex(rng, place, cerebrum, cerebellum, stem), _nuclei_mm(place), ventricle),
        brain=_brain(depth),
        depth_mm=depth,
        ventricle_mm=ventricle,
        spacing_mm=FINE_MM,
        affine=affine,
    )


def _bent(rng: np.random.Generator, shape: Triple, low: NDArray[np.float64]) -> Place:
    """Coordinates in mm about the brain's centre, each bent by a smooth field and scaled by 0.92 to 1.02."""
    sigma = BEND_LENGTH_MM / FINE_MM
    scale = rng.uniform(0.92, 1.02, 3)
    bent = []
    for axis in range(3):
        along = (low[axis] + FINE_MM * np.arange(shape[axis])) / scale[axis]
        line = along.astype(np.float32).reshape([-1 if a == axis else 1 for a in range(3)])
        bent.append(line + np.float32(BEND_MM) * smooth_field(rng, shape, sigma))
    return Place(x=bent[2], y=bent[1], z=bent[0])


def _cerebrum_mm(rng: np.random.Generator, place: Place) -> NDArray[np.float32]:
    """Depth below the hemispheres' hull: an ellipsoid, narrower in front, its base flat and raised at the back."""
    x, y, z = place
    half_y = 83 * rng.uniform(0.97, 1.03)
    half_x = 66 * (1 - 0.1 * y / half_y)
    base = 39 + 7 * np.tanh((y + 10) / 20)
    half_z = np.where(z > 0, np.float32(60), base)
    return _ellipsoid_mm(x / half_x, y / half_y, z / half_z, 60)


def _cerebellum_mm(place: Place) -> NDArray[np.float32]:
    """Depth below the hull of the cerebellum."""
    x, y, z = place
    return _ellipsoid_mm((np.abs(x) - 21) / 32, (y + 47) / 28, (z + 41) / 23, 24)


def _stem_mm(place: Place) -> NDArray[np.float32]:
    """Depth in pons and medulla."""
    x, y, z = place
    return _ellipsoid_mm(x / 13, (y + 19) / 13, (z + 42) / 30, 13)


def _ventricle_mm(rng: np.random.Generator, place: Place) -> NDArray[np.float32]:
    """Distance to the lateral ventricles (three tubes a side) and the third; they widen with age and atrophy."""
    x, y, z = place
    x = x + np.float32(rng.uniform(-1, 1))
    wide = rng.uniform(0.8, 1.7)
    side = np.abs(x)
    tubes = (
        ((9.0, 30.0, 6.0), (13.0, -16.0, 18.0), 4.5 * wide),  # frontal horn and body
        ((13.0, -16.0, 18.0), (25.0, -44.0, 4.0), 4.5 * wide),  # atrium and occipital horn
        ((24.0, -34.0, 2.0), (32.0, -4.0, -18.0), 2.0 * wide),  # temporal horn
    )
    nearest = np.full(x.shape, np.inf, np.float32)
    for start, end, radius in tubes:
        np.minimum(nearest, _tube_mm(Place(side, y, z), start, end, radius), out=nearest)
    third = np.maximum(side - np.float32(1.2 * wide), np.maximum(np.abs(y + 4) - 13, np.abs(z + 4) - 9))
    return np.asarray(np.minimum(nearest, third), dtype=np.float32)


def _tissue(cortex: Cortex, nuclei: Floats, ventricle: Floats) -> NDArray[np.float32]:
    """Shares of every tissue: layers of the distance to the pial surface, then nuclei, then ventricles."""
    csf = _inside(CSF_MM - cortex.pial_mm)
    outer = np.maximum(csf, _inside(CSF_MM + cortex.thickness_mm - cortex.pial_mm))
    deep = (1 - outer) * _inside(nuclei)
    tissue = np.zeros((len(Tissue), *csf.shape), np.float32)
    tissue[Tissue.CSF], tissue[Tissue.GREY] = csf, outer - csf
    tissue[Tissue.DEEP_GREY], tissue[Tissue.WHITE] = deep, 1 - outer - deep
    fluid = _inside(-ventricle)
    tissue *= 1 - fluid
    tissue[Tissue.CSF] += fluid
    return tissue


def _cortex(rng: np.random.Generator, place: Place, cerebrum: Floats, cerebellum: Floats, stem: Floats) -> Cortex:
    """The folded surfaces of the three parts; white matter joins the stem to the other two."""
    folded = np.minimum(np.minimum(cerebrum, _fissures_mm(rng, place)), _sulci_mm(rng, place, cerebrum))
    folia = np.minimum(cerebellum, _folia_mm(place, cerebellum))
    tent = np.where(np.minimum(cerebrum, cerebellum) > 0, np.abs(cerebrum - cerebellum) / 2, np.float32(np.inf))
    pial = np.maximum(np.minimum(np.maximum(folded, folia), tent), stem)
    thickness = np.where(cerebellum > cerebrum, np.float32(2.4), np.float32(rng.uniform(3.2, 4.2)))
    return Cortex(pial_mm=pial, thickness_mm=np.where(stem > -1, np.float32(0.3), thickness))


def _fissures_mm(rng: np.random.Generator, place: Place) -> Floats:
    """Distance to the cleft between the hemispheres, around the corpus callosum, and to the Sylvian fissures."""
    x, y, z = place
    shape = (x.shape[0], x.shape[1], x.shape[2])
    wave = smooth_field(rng, shape, 7 / FINE_MM)
    around = 1 - np.sqrt((y / 50) ** 2 + ((z + 4) / 28) ** 2)  # positive: the hemispheres are joined here
    middle = np.maximum(np.abs(x + 0.7 * wave) - 0.3, 28 * around)
    slope, deep = rng.uniform(0.25, 0.45), rng.uniform(34, 39)
    height = z + 6 - np.float32(slope) * y + 2.5 * wave
    sylvian = np.maximum(np.abs(height) - 0.4, np.maximum(deep + 2 * wave - np.abs(x), np.abs(y - 2) - 28))
    return np.asarray(np.minimum(middle, sylvian))


def _sulci_mm(rng: np.random.Generator, place: Place, cerebrum: Floats) -> Floats:
    """Distance to the sulci: the zero level of a field that hardly changes with depth, down to 10 to 25 mm."""
    sigma_mm = rng.uniform(3.2, 3.9)  # neighbouring sulci are then 4.4 sigma apart
    d, h, w = cerebrum.shape
    field = smooth_field(rng, (d + 8, h + 8, w + 8), sigma_mm / FINE_MM)
    deepest = 17 + 4 * smooth_field(rng, (d, h, w), 12 / FINE_MM)
    shell = (cerebrum > -4) & (cerebrum < 36)
    depth = cerebrum[shell]
    toward = np.maximum(1 - depth / 60, 0.3) ** -0.75  # a point below looks almost at the place above it on the surface
    at = [(n + 7) / 2 + toward * p[shell] / FINE_MM for n, p in zip((d, h, w), place[::-1], strict=True)]
    level = np.abs(ndimage.map_coordinates(field, at, order=1, mode="reflect"))
    to_sheet = level * sigma_mm * 1.41  # |field| over its typical gradient, 1 / (sigma sqrt 2)
    distance = np.full(cerebrum.shape, np.inf, np.float32)
    distance[shell] = to_sheet + np.maximum(0, depth - deepest[shell])
    return distance


def _folia_mm(place: Place, cerebellum: Floats) -> Floats:
    """Distance to the clefts of the cerebellum: sheets 7 mm apart, down to 8 mm."""
    turns = (place.z + 0.5 * place.y) / 7
    to_sheet = 0.5 + 7 * np.abs(turns - np.rint(turns))  # 0.5: they are narrow
    return to_sheet + np.maximum(0, cerebellum - 8)


def _nuclei_mm(place: Place) -> Floats:
    """Depth in thalamus, lentiform nucleus and head of the caudate."""
    side, y, z = np.abs(place.x), place.y, place.z
    thalamus = _ellipsoid_mm((side - 11) / 8, (y + 12) / 13, (z - 3) / 9, 8)
    lentiform = _ellipsoid_mm((side - 24 - 0.15 * y) / 6, (y - 4) / 16, z / 9, 6)
    caudate = _ellipsoid_mm((side - 15) / 4.5, (y - 22) / 11, (z - 6) / 9, 4.5)
    return np.maximum(thalamus, np.maximum(lentiform, caudate))


def _ellipsoid_mm(x: Floats, y: Floats, z: Floats, half_mm: float) -> NDArray[np.float32]:
    """Depth below the surface of the unit sphere of scaled coordinates, times a half axis: near a distance there."""
    return np.asarray((1 - np.sqrt(x * x + y * y + z * z)) * np.float32(half_mm), dtype=np.float32)


def _tube_mm(place: Place, start: tuple[float, ...], end: tuple[float, ...], radius: float) -> Floats:
    """Distance to the tube of this radius about the line from start to end."""
    a, line = np.array(start, np.float32), np.array(end, np.float32) - np.array(start, np.float32)
    from_start = [p - v for p, v in zip(place, a, strict=True)]
    along = sum(p * v for p, v in zip(from_start, line, strict=True)) / float(line @ line)
    along = np.clip(along, 0, 1)
    off = sum((p - along * v) ** 2 for p, v in zip(from_start, line, strict=True))
    return np.asarray(np.sqrt(off) - np.float32(radius), dtype=np.float32)


def _inside(depth_mm: Floats) -> Floats:
    """Share of a voxel that lies inside a surface at this depth below it: partial volume of a flat surface."""
    return np.asarray(np.clip(depth_mm / np.float32(FINE_MM) + np.float32(0.5), 0, 1), dtype=np.float32)


def _brain(depth_mm: Floats) -> NDArray[np.bool_]:
    """One piece without holes, smooth as a brain extraction leaves it."""
    mask = ndimage.gaussian_filter((depth_mm > -BRAIN_MARGIN_MM).astype(np.float32), 1.0) > 0.5
    return np.asarray(mask)
