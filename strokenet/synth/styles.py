"""Styles: one case of a cohort, read top-down: head -> strokes -> hyperintensities -> looks -> scans.

`atlas` looks like a case of ATLAS v2.0 as the paper trains on it: T1 alone on the MNI grid of 197 x 233 x 189 voxels of
1 mm, brain extracted (Meddahi 2024, IV.B strips it), from one of 11 simulated sites. `clinic` looks like what comes out
of a hospital: the whole head, a FLAIR of thick oblique slices, and a T1 between whose start and the FLAIR's the patient
has moved; the lesion is marked on the FLAIR, and everything that `prepare` has to find out is kept as truth. Of two
times the first is the case that there is with one, and what changed since (followup.py) is marked on its FLAIR.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from strokenet.data.geometry import Geometry, Spacing
from strokenet.synth.anatomy import Anatomy
from strokenet.synth.burden import DIRECTION, Burden
from strokenet.synth.followup import draw_followup, kind_of
from strokenet.synth.head import Head, Mask, drawn_head, extent, widened
from strokenet.synth.labelmap import bent_head, read_label_map
from strokenet.synth.lesions import draw_hyperintensities
from strokenet.synth.masks import Placed, place_strokes
from strokenet.synth.scanner import ATLAS_SITES, Scan, Site, at_points, scan
from strokenet.synth.signal import Domain, Overlay, draw_look, signal

Style = Literal["atlas", "clinic"]
STYLES: tuple[Style, ...] = ("atlas", "clinic")

ATLAS_SHAPE = (189, 233, 197)  # D, H, W; ATLAS v2.0, MNI152NLin2009aSym at 1 mm
ATLAS_LOW_MM = (-72.0, -134.0, -98.0)  # z, y, x of its first voxel
TO_MNI_MM = (20.0, -16.0, 0.0)  # z, y, x from a head's own origin to the template's (labelmap.py)
FLAIR_SPACING: Spacing = (3.0, 0.7, 0.7)
TILT_DEGREES = (4.0, 14.0)  # of the FLAIR slab about the left-right axis; a third of it about the others
MOVED_DEGREES, MOVED_MM = 10.0, 10.0  # between the scans, largest, each axis
WIDER_MM_AT_100_ML = 5.0  # a ventricle beside 100 ml of old stroke is so much wider; the square root of volume between
WIDER_MM = (0.0, 7.0)


@dataclass(frozen=True, kw_only=True)
class CaseRecipe:
    """What one case is made from: picklable, so that a worker can make it.

    seed, index: of the cohort and the case; they alone decide. label_maps, masks: files, empty for drawn ones.
    times: 1, or 2 in style clinic.
    """

    case_id: str
    style: Style
    domain: Domain
    seed: int
    index: int
    burden: Burden
    label_maps: tuple[Path, ...] = ()
    masks: tuple[Path, ...] = ()
    times: int = 1


@dataclass(frozen=True, kw_only=True, eq=False)
class SynthCase:
    """One case in memory.

    scans: "t1", in style clinic "flair", of a second time "t1_2" and "flair_2". brains: (D, H, W) bool on the grid of
    each. label: (D, H, W) uint8 on the grid of `marked`. matrices: scan -> (4, 4), FLAIR world mm -> its world mm, the
    FLAIR left out; empty in style atlas. stroke_ml: of the strokes of the first time, as one would mark them. facts:
    plain JSON about it.
    """

    scans: dict[str, Scan]
    brains: dict[str, Mask]
    label: NDArray[np.uint8]
    marked: str
    stroke_ml: float
    matrices: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    facts: dict[str, object] = field(default_factory=dict)

    @property
    def volume_ml(self) -> float:
        """Of the label, as it is written."""
        return int(self.label.sum()) * self.scans[self.marked].geometry.voxel_volume_mm3 / 1000


@dataclass(frozen=True, kw_only=True, eq=False)
class Patient:
    """A head with its lesions, before any scan. name: of the label map, or "drawn"."""

    head: Head
    placed: Placed
    overlay: Overlay
    name: str


def draw_synth_case(recipe: CaseRecipe) -> SynthCase:
    """The case of a recipe; the same one in whatever process and cohort it is made.

    Raises:
        InputError: a label map or mask cannot be read.
    """
    rng = np.random.default_rng([recipe.seed, 2 + ("atlas", "clinic").index(recipe.style), recipe.index])
    patient = draw_patient(rng, recipe)
    case = _atlas(rng, patient, recipe) if recipe.style == "atlas" else _clinic(rng, patient, recipe)
    if recipe.times == 2:
        rng = np.random.default_rng([recipe.seed, 4, recipe.index])  # its own: the first time is as it is without
        case = _with_second(rng, case, patient, recipe)
    facts = {
        "head": patient.name,
        "masks": list(patient.placed.masks),
        "side": recipe.burden.side,
        "second_side": recipe.burden.second_side,
        "wanted_ml": recipe.burden.total_ml,
        "volume_ml": case.volume_ml,
        **case.facts,
    }
    return replace(case, facts=facts)


def draw_patient(rng: np.random.Generator, recipe: CaseRecipe) -> Patient:
    """Head, strokes and hyperintensities."""
    if recipe.label_maps:
        path = recipe.label_maps[int(rng.integers(len(recipe.label_maps)))]
        fit = recipe.style == "atlas"
        head, name = bent_head(rng, read_label_map(path), whole=not fit, to_template=fit), path.name
    else:
        head, name = drawn_head(rng), "drawn"
    burden = recipe.burden
    wider = float(np.clip(WIDER_MM_AT_100_ML * np.sqrt(burden.volume_ml / 100) * rng.uniform(0.3, 1.3), *WIDER_MM))
    if burden.side != "other":
        head = widened(head, DIRECTION[burden.side], wider)
    placed = place_strokes(rng, head, burden, recipe.masks)
    strokes = placed.strokes
    hyperintensity = draw_hyperintensities(rng, head.anatomy, strokes)
    overlay = Overlay(hyperintensity=hyperintensity, stroke=strokes.share, cavity=strokes.cavity)
    return Patient(head=head, placed=placed, overlay=overlay, name=name)


def marked_voxels(share: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Voxels at least half of which are lesion; of a lesion too small to fill half of any, the fullest.

    (D, H, W) float32 -> (D, H, W) uint8.
    """
    level = min(0.5, 0.6 * float(share.max()))
    return (share >= max(level, 1e-3)).astype(np.uint8)


def _atlas(rng: np.random.Generator, patient: Patient, recipe: CaseRecipe) -> SynthCase:
    """T1 alone on the MNI grid, 0 outside the brain."""
    anatomy = patient.head.anatomy
    site = ATLAS_SITES[recipe.index % len(ATLAS_SITES)]
    grid = _mni_part(anatomy)
    to_head = np.eye(4)
    to_head[:3, 3] = -np.array(TO_MNI_MM)[::-1]
    t1 = signal(rng, patient.head, patient.overlay, draw_look(rng, "T1", recipe.domain))
    stored = scan(rng, at_points(t1, patient.head.affine, grid, to_head), grid, site)
    brain = at_points(anatomy.brain.astype(np.float32), anatomy.affine, grid, to_head) > 0.5
    label = brain * marked_voxels(
        at_points(patient.placed.strokes.mask.astype(np.float32), anatomy.affine, grid, to_head)
    )
    image = np.where(brain, np.maximum(1, stored.image), np.float32(0))
    full = _mni_grid()
    start = _offset(grid, full)
    return SynthCase(
        scans={"t1": replace(stored, image=_placed(image, full.shape, start), geometry=full)},
        brains={"t1": _placed(brain, full.shape, start)},
        label=_placed(label, full.shape, start),
        marked="t1",
        stroke_ml=int(label.sum()) / 1000,
        facts={"site": site.name, "moved": {"t1": stored.moved}},
    )


def _clinic(rng: np.random.Generator, patient: Patient, recipe: CaseRecipe) -> SynthCase:
    """Whole head, FLAIR and T1 on grids of their own; the FLAIR's world is the head's."""
    matrix = _moved(rng, patient.head.anatomy)
    scans, brains = _examined(rng, patient.head, patient.overlay, recipe.domain, t1=matrix, flair=np.eye(4))
    grid = scans["flair"].geometry
    label = _marked_on(patient.placed.strokes.mask, patient.head.anatomy, grid)
    return SynthCase(
        scans=scans,
        brains=brains,
        label=label,
        marked="flair",
        stroke_ml=int(label.sum()) * grid.voxel_volume_mm3 / 1000,
        matrices={"t1": matrix},
        facts={"moved": {name: of.moved for name, of in scans.items()}},
    )


def _with_second(rng: np.random.Generator, case: SynthCase, patient: Patient, recipe: CaseRecipe) -> SynthCase:
    """The case with a second examination; its label is now what changed, on the FLAIR of the first."""
    head, strokes = patient.head, patient.placed.strokes
    kind = kind_of(recipe.seed, recipe.index)
    then = draw_followup(rng, head, strokes, patient.overlay, recipe.burden.side, recipe.masks, kind)
    flair = _moved(rng, head.anatomy)
    t1 = _moved(rng, head.anatomy) @ flair
    scans, brains = _examined(rng, head, then.overlay, recipe.domain, t1=t1, flair=flair)
    second = {f"{name}_2": scan for name, scan in scans.items()}
    moved = {name: of.moved for name, of in (case.scans | second).items()}
    change = {
        "kind": then.kind,
        "new_ml": list(then.new_ml),
        "grown_ml": then.grown_ml,
        "shrunk_ml": then.shrunk_ml,
        "masks": list(then.masks),
    }
    label = _marked_on(then.changed, head.anatomy, case.scans["flair"].geometry)
    return replace(
        case,
        scans=case.scans | second,
        brains=case.brains | {f"{name}_2": brain for name, brain in brains.items()},
        label=label,
        matrices=case.matrices | {"t1_2": t1, "flair_2": flair},
        facts={"moved": moved, "stroke_ml": case.stroke_ml, "changed": bool(label.any()), "change": change},
    )


def _examined(
    rng: np.random.Generator,
    head: Head,
    lesions: Overlay,
    domain: Domain,
    *,
    t1: NDArray[np.float64],
    flair: NDArray[np.float64],
) -> tuple[dict[str, Scan], dict[str, Mask]]:
    """T1 and FLAIR of one examination, and the brain on each. t1, flair: (4, 4), head mm -> world of the scan."""
    grids = {"t1": _t1_grid(head, t1), "flair": _flair_grid(rng, head, flair)}
    scans, brains = {}, {}
    for name, sequence, matrix in (("t1", "T1", t1), ("flair", "FLAIR", flair)):
        to_head, anatomy = np.linalg.inv(matrix).astype(np.float64), head.anatomy
        perfect = signal(rng, head, lesions, draw_look(rng, sequence, domain))  # type: ignore[arg-type]
        perfect = _slices(perfect, anatomy, grids[name])
        on_scan = at_points(perfect, head.affine, grids[name], to_head)
        scans[name] = scan(rng, on_scan, grids[name], _hospital(rng, grids[name]))
        brains[name] = at_points(anatomy.brain.astype(np.float32), anatomy.affine, grids[name], to_head) > 0.5
    return scans, brains


def _marked_on(mask: Mask, anatomy: Anatomy, grid: Geometry) -> NDArray[np.uint8]:
    """A lesion as it is drawn on the FLAIR of the first time, whose world is the head's."""
    share = _slices(mask.astype(np.float32), anatomy, grid)
    return marked_voxels(at_points(share, anatomy.affine, grid, np.eye(4)))


def _hospital(rng: np.random.Generator, grid: Geometry) -> Site:
    """A scanner of the clinic: worse than a research site's, and no two scans alike. Motion in one of four."""
    return Site(
        name="hospital",
        resolution_mm=grid.spacing,
        noise=float(rng.uniform(0.02, 0.05)),
        bias=float(rng.uniform(0.10, 0.20)),
        bias_mm=float(rng.uniform(45, 65)),
        gamma=float(rng.uniform(0.85, 1.15)),
        gain=float(rng.uniform(200, 900)),
        motion=0.25,
        motion_mm=1.2,
    )


def _slices(volume: NDArray[np.float32], anatomy: Anatomy, grid: Geometry) -> NDArray[np.float32]:
    """The mean over a thick slice, taken along the head's own axis: over a few degrees of tilt it is the same.

    At 25 degrees, the most that a head of a second time and its slab lie apart, a slice of 3 mm is sheared by 0.7 mm.
    """
    return slice_mean(volume, round(grid.spacing[0] / anatomy.spacing_mm))


def slice_mean(volume: NDArray[np.float32], thickness: int) -> NDArray[np.float32]:
    """The mean over so many voxels along D, about the voxel itself. (D, H, W) -> (D, H, W).

    An even number has no middle: half of the voxel on either end is taken, so that nothing moves.
    """
    if thickness < 2:
        return volume
    window = np.ones(thickness) if thickness % 2 else np.array([0.5, *np.ones(thickness - 1), 0.5])
    return np.asarray(ndimage.convolve1d(volume, window / thickness, axis=0))


def _moved(rng: np.random.Generator, anatomy: Anatomy) -> NDArray[np.float64]:
    """A rigid motion about the brain's middle: the world of one scan -> the world of the next."""
    middle = _middle_mm(anatomy)
    turn = _rotation(rng.uniform(-MOVED_DEGREES, MOVED_DEGREES, 3))
    matrix = np.eye(4)
    matrix[:3, :3] = turn
    matrix[:3, 3] = middle - turn @ middle + rng.uniform(-MOVED_MM, MOVED_MM, 3)
    return matrix


def _rotation(degrees: NDArray[np.float64]) -> NDArray[np.float64]:
    """About x, then y, then z."""
    rotation = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(degrees)):
        a, b = (axis + 1) % 3, (axis + 2) % 3
        step = np.eye(3)
        step[a, a] = step[b, b] = np.cos(angle)
        step[a, b], step[b, a] = -np.sin(angle), np.sin(angle)
        rotation = step @ rotation
    return rotation


def _middle_mm(anatomy: Anatomy) -> NDArray[np.float64]:
    """The middle of the brain's box, (x, y, z) mm."""
    low, high = extent(anatomy.brain)
    return np.asarray((anatomy.affine @ [*((low + high) / 2), 1])[:3])


def _t1_grid(head: Head, matrix: NDArray[np.float64]) -> Geometry:
    """1 mm along the T1's own axes, as large as the head's box, about where the head has moved to."""
    size = np.array(head.matter.shape) * head.anatomy.spacing_mm
    middle = matrix @ (head.affine @ [*((np.array(head.matter.shape) - 1) / 2), 1])
    return _grid(middle[:3], size, (1.0, 1.0, 1.0), np.eye(3))


def _flair_grid(rng: np.random.Generator, head: Head, matrix: NDArray[np.float64]) -> Geometry:
    """Thick slices, tilted about the left-right axis most, about where the head lies."""
    tilt = rng.uniform(*TILT_DEGREES)
    turn = _rotation(np.array([tilt, *rng.uniform(-tilt / 3, tilt / 3, 2)]))
    size = np.array(head.matter.shape) * head.anatomy.spacing_mm
    middle = matrix @ (head.affine @ [*((np.array(head.matter.shape) - 1) / 2), 1])
    return _grid(middle[:3], size, FLAIR_SPACING, turn)


def _grid(
    middle: NDArray[np.float64], size: NDArray[np.float64], spacing: Spacing, turn: NDArray[np.float64]
) -> Geometry:
    """A grid about a place; size: mm (D, H, W). turn: (3, 3) in x, y, z."""
    d, h, w = (int(np.ceil(n / s)) for n, s in zip(size, spacing, strict=True))
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.eye(3)[:, ::-1] * spacing  # columns: D along z, H along y, W along x
    affine[:3, 3] = middle - affine[:3, :3] @ ((np.array([d, h, w]) - 1) / 2)
    return Geometry(shape=(d, h, w), spacing=spacing, affine=affine)


def _mni_grid() -> Geometry:
    affine = np.eye(4)[[2, 1, 0, 3]]
    affine[:3, 3] = ATLAS_LOW_MM[::-1]
    return Geometry(shape=ATLAS_SHAPE, spacing=(1.0, 1.0, 1.0), affine=affine)


def _mni_part(anatomy: Anatomy) -> Geometry:
    """The part of the MNI grid that holds the brain: all that has to be drawn."""
    low, high = extent(anatomy.brain)
    ends = [(anatomy.affine @ [*end, 1])[2::-1] + TO_MNI_MM for end in (low, high)]  # z, y, x mm
    first = np.maximum(0, np.floor(ends[0] - ATLAS_LOW_MM).astype(int) - 2)
    last = np.minimum(ATLAS_SHAPE, np.ceil(ends[1] - ATLAS_LOW_MM).astype(int) + 3)
    d, h, w = (int(n) for n in last - first)
    affine = _mni_grid().affine.copy()
    affine[:3, 3] += first[::-1]
    return Geometry(shape=(d, h, w), spacing=(1.0, 1.0, 1.0), affine=affine)


def _offset(part: Geometry, full: Geometry) -> tuple[slice, slice, slice]:
    first = np.rint(part.affine[2::-1, 3] - full.affine[2::-1, 3]).astype(int)
    d, h, w = (slice(int(a), int(a) + n) for a, n in zip(first, part.shape, strict=True))
    return d, h, w


def _placed(part: NDArray[np.generic], shape: tuple[int, ...], at: tuple[slice, slice, slice]) -> NDArray:  # type: ignore[type-arg]
    whole = np.zeros(shape, part.dtype)
    whole[at] = part
    return whole
