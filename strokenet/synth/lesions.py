"""Lesions: drawn strokes and the white-matter hyperintensities that look like them on FLAIR and are none.

Comes in: an Anatomy and a Generator. Goes out: the Strokes (truth of the label), the hyperintensities, and, by
paint(), an Anatomy whose tissue shares hold both. A chronic stroke is drawn as a cavity with a rim of gliosis, dark on
T1 (Meddahi 2024, V names that) and bright-rimmed on FLAIR; hyperintensities as caps and halos of the ventricles and as
deep foci, the two kinds that Fazekas 1987 grades. Volumes are our own choice: log-uniform, so that small strokes are as
frequent as large ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from strokenet.synth.anatomy import Anatomy, Floats, Tissue
from strokenet.synth.field import smooth_field

Mask = NDArray[np.bool_]
Triple = tuple[int, int, int]

MAIN_ML, SECOND_ML, SATELLITE_ML = (5.0, 40.0), (0.8, 5.0), (0.3, 0.8)
SECOND_SHARE, SATELLITE_SHARE = 0.2, 0.25  # of the cases
PLACES_TRIED, ROOM = 8, 0.75  # a place with less room than this share of the volume is given up
RIM_MM = (3.2, 5.0)
FLUID = (0.35, 0.85)  # of the middle of a cavity; in the demo few are empty
TENTORIUM_MM = -12.0  # strokes are drawn in the hemispheres, above this height
PERIVENTRICULAR_ML, DEEP_ML = (5.0, 18.0), (1.5, 6.0)
EDGE_VOXELS = 0.6  # lesions have no sharp edge: Gaussian on the fine grid


@dataclass(frozen=True, kw_only=True, eq=False)
class Strokes:
    """mask: (D, H, W) bool, cavity and rim together. share: the same with a soft edge, 0 to 1 float32.

    cavity: share of the lesion's tissue that is fluid, 0 in the rim, up to 1. volumes_ml: of every lesion, the main one
    first.
    """

    mask: Mask
    share: NDArray[np.float32]
    cavity: NDArray[np.float32]
    volumes_ml: tuple[float, ...]


def draw_strokes(rng: np.random.Generator, anatomy: Anatomy) -> Strokes:
    """One stroke, left as often as right; in one case of five a second, in one of four a small satellite nearby.

    Its arrays are (D, H, W), of anatomy.shape.
    """
    side = 1 if rng.random() < 0.5 else -1
    strokes = Strokes(
        mask=np.zeros(anatomy.shape, dtype=bool),
        share=np.zeros(anatomy.shape, np.float32),
        cavity=np.zeros(anatomy.shape, np.float32),
        volumes_ml=(),
    )
    strokes = _add(rng, anatomy, strokes, MAIN_ML, _side(anatomy, side))
    if rng.random() < SECOND_SHARE:
        other = 1 if rng.random() < 0.5 else -1
        strokes = _add(rng, anatomy, strokes, SECOND_ML, _side(anatomy, other))
    if rng.random() < SATELLITE_SHARE:
        strokes = _add(rng, anatomy, strokes, SATELLITE_ML, _near(strokes.mask) & _side(anatomy, side))
    return strokes


def draw_hyperintensities(rng: np.random.Generator, anatomy: Anatomy, strokes: Strokes) -> NDArray[np.float32]:
    """White-matter hyperintensities: (D, H, W) float32, share of the voxel, none within a few mm of a stroke."""
    free = (anatomy.tissue[Tissue.WHITE] > 0.6) & (ndimage.gaussian_filter(strokes.share, 2.0) < 0.02)
    halo = free & (anatomy.ventricle_mm < 12) & (anatomy.depth_mm > 12)
    mask = highest(_halo_score(rng, anatomy), halo, rng.uniform(*PERIVENTRICULAR_ML), anatomy.spacing_mm)
    deep = free & (anatomy.ventricle_mm > 8) & (anatomy.depth_mm > 9)
    foci = smooth_field(rng, anatomy.shape, 3.0 / anatomy.spacing_mm)
    mask |= highest(foci, deep, rng.uniform(*DEEP_ML), anatomy.spacing_mm)
    return softened(mask)


def paint(anatomy: Anatomy, strokes: Strokes, hyperintensities: NDArray[np.float32]) -> Anatomy:
    """The anatomy with both: they take the place of what was there, so that the shares still add up to 1.

    hyperintensities: (D, H, W) float32, share of the voxel. Goes out: tissue (T, D, H, W) is new, the rest as it was.
    """
    tissue = anatomy.tissue * (1 - hyperintensities)
    tissue[Tissue.WMH] += hyperintensities
    tissue *= 1 - strokes.share
    tissue[Tissue.RIM] += strokes.share * (1 - strokes.cavity)
    tissue[Tissue.CAVITY] += strokes.share * strokes.cavity
    return replace(anatomy, tissue=tissue)


def _side(anatomy: Anatomy, side: int) -> Mask:
    """Where the centre of a stroke may lie: one hemisphere, not near the midline and not at the very surface."""
    depth = anatomy.depth_mm
    inside = (side * anatomy.right_mm > 14) & (depth > 9) & (depth < 32) & (anatomy.ventricle_mm > 4)
    return np.asarray(inside & (anatomy.up_mm > TENTORIUM_MM))


def _near(mask: Mask) -> Mask:
    """Between about 8 and 20 mm outside a lesion."""
    spread = ndimage.gaussian_filter(mask.astype(np.float32), 6.0)
    return np.asarray((spread > 0.01) & (ndimage.gaussian_filter(mask.astype(np.float32), 3.0) < 0.02))


def _add(
    rng: np.random.Generator, anatomy: Anatomy, strokes: Strokes, range_ml: tuple[float, float], centres: Mask
) -> Strokes:
    """The strokes with one more of a volume from this range; as they were where no place has room for it."""
    places = np.flatnonzero(centres & ~strokes.mask)
    volume_ml = float(np.exp(rng.uniform(*np.log(range_ml))))
    for _ in range(PLACES_TRIED if len(places) else 0):
        d, h, w = np.unravel_index(int(places[rng.integers(len(places))]), anatomy.shape)
        mask = _blob(rng, anatomy, strokes.share, (int(d), int(h), int(w)), volume_ml)
        if _volume_ml(mask, anatomy) >= ROOM * volume_ml:
            return _with(rng, anatomy, strokes, mask)
    return strokes


def _with(rng: np.random.Generator, anatomy: Anatomy, strokes: Strokes, mask: Mask) -> Strokes:
    return Strokes(
        mask=strokes.mask | mask,
        share=np.maximum(strokes.share, softened(mask)),
        cavity=np.maximum(strokes.cavity, cavity_of(rng, mask, anatomy.spacing_mm)),
        volumes_ml=(*strokes.volumes_ml, _volume_ml(mask, anatomy)),
    )


def _blob(rng: np.random.Generator, anatomy: Anatomy, taken: Floats, centre: Triple, volume_ml: float) -> Mask:
    """An irregular blob: an ellipsoid plus smooth noise, cut at the level that gives the volume, in one piece.

    It stays in one hemisphere, under the brain's surface, out of the ventricles and apart from other lesions.
    """
    radius = (volume_ml * 1000 * 3 / (4 * np.pi)) ** (1 / 3) / anatomy.spacing_mm  # of the ball of this volume
    reach = int(np.ceil(2.2 * radius)) + 3
    d, h, w = (slice(max(0, c - reach), min(n, c + reach + 1)) for c, n in zip(centre, anatomy.shape, strict=True))
    right_mm, start_mm = anatomy.right_mm[..., w], anatomy.right_mm[0, 0, centre[2]]
    allowed = (right_mm * np.sign(start_mm) > 3) & (anatomy.depth_mm[d, h, w] > 1.5) & (taken[d, h, w] < 0.01)
    allowed &= (anatomy.ventricle_mm[d, h, w] > 1.5) & (anatomy.up_mm[d] > TENTORIUM_MM - 8)
    distance = ellipsoid_distance(rng, [range(s.start - c, s.stop - c) for s, c in zip((d, h, w), centre, strict=True)])
    noise = smooth_field(rng, distance.shape, max(1.5, 0.4 * radius))
    piece = highest(0.3 * noise - distance / radius, allowed, volume_ml, anatomy.spacing_mm)
    mask = np.zeros(anatomy.shape, dtype=bool)
    mask[d, h, w] = _largest(ndimage.binary_opening(piece))
    return mask


def ellipsoid_distance(rng: np.random.Generator, offsets: Sequence[Sequence[int]]) -> NDArray[Any]:
    """Distance from the centre, measured by a turned ellipsoid of axes up to 1.6 to 1; (D, H, W) for three axes."""
    axes = np.linalg.qr(rng.standard_normal((3, 3)))[0]
    stretch = np.exp(rng.uniform(-0.25, 0.25, 3))
    stretch /= np.prod(stretch) ** (1 / 3)  # the volume stays
    at = np.stack(np.meshgrid(*offsets, indexing="ij"))
    along = np.tensordot(axes, at, 1) / stretch[:, None, None, None]
    return np.asarray(np.sqrt((along**2).sum(0)), dtype=np.float32)


def cavity_of(
    rng: np.random.Generator, mask: Mask, spacing_mm: float, fluid: tuple[float, float] = FLUID
) -> NDArray[np.float32]:
    """Share of fluid: 0 in a rim of uneven width, rising towards the middle; a small stroke may have none.

    fluid: limits of the share in the middle. (D, H, W) float32.
    """
    box = ndimage.find_objects(mask.astype(np.uint8))[0]
    depth = ndimage.distance_transform_edt(np.pad(mask[box], 1))[1:-1, 1:-1, 1:-1] * spacing_mm
    rim = rng.uniform(*RIM_MM) + 0.8 * smooth_field(rng, depth.shape, 6 / spacing_mm)
    share = np.clip((depth - rim) / 3 + 0.15, 0, 1) * rng.uniform(*fluid)
    cavity = np.zeros(mask.shape, np.float32)
    cavity[box] = share * mask[box]
    return cavity


def _halo_score(rng: np.random.Generator, anatomy: Anatomy) -> Floats:
    """High beside the ventricles, more so at the frontal and occipital horns, with an uneven edge."""
    to_front = anatomy.affine[1, 1] * np.arange(anatomy.shape[1]) + anatomy.affine[1, 3]
    horns = np.minimum(np.abs(to_front - 36), np.abs(to_front + 46)).astype(np.float32)[None, :, None]
    cap = 5 * np.exp(-((horns / 12) ** 2))
    return np.asarray(cap + 3.5 * smooth_field(rng, anatomy.shape, 5 / anatomy.spacing_mm) - anatomy.ventricle_mm)


def highest(score: Floats, allowed: Mask, volume_ml: float, spacing_mm: float) -> Mask:
    """The allowed voxels of highest score that fill this volume; all of them where they do not suffice."""
    scores = score[allowed]
    count = round(volume_ml * 1000 / spacing_mm**3)
    if count >= len(scores):
        return allowed
    level = np.partition(scores, len(scores) - count)[len(scores) - count]
    return np.asarray(allowed & (score >= level))


def _largest(mask: Mask) -> Mask:
    """The largest 6-connected piece."""
    labels, count = ndimage.label(mask)
    if count < 2:
        return mask
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return np.asarray(labels == sizes.argmax())


def _volume_ml(mask: Mask, anatomy: Anatomy) -> float:
    return int(np.count_nonzero(mask)) * anatomy.spacing_mm**3 / 1000


def softened(mask: Mask) -> NDArray[np.float32]:
    return np.asarray(ndimage.gaussian_filter(mask.astype(np.float32), EDGE_VOXELS, truncate=3), dtype=np.float32)
