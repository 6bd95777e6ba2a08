"""Follow-up: the same patient at a second time, and the tissue that changed between the two (Meddahi 2024, III.B).

Comes in: the Patient of styles.py at the first time, and the masks to take strokes from. Goes out: the patient at the
second time and the changed tissue. Three of four patients have new strokes, or one that has grown, or both; one is
unchanged, so that a model is also measured by what it finds where there is nothing. Old strokes may shrink a little,
which is no change that is looked for. Head and hyperintensities stay. Numbers are our own choice.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from scipy import ndimage

from strokenet.synth.burden import PRIMARY, Burden, Side
from strokenet.synth.field import smooth_field
from strokenet.synth.head import Head, Mask
from strokenet.synth.lesions import Strokes, highest, softened
from strokenet.synth.masks import allowed, place_strokes
from strokenet.synth.signal import Overlay

Kind = Literal["none", "new", "grown", "both"]

UNCHANGED_ONE_OF = 4  # cases in a row of a cohort
KINDS: dict[Kind, float] = {"new": 0.5, "grown": 0.25, "both": 0.25}  # of the changed cases
NEW_ML, NEW_STROKES = (0.5, 15.0), (1, 3)  # volume of each new stroke, log-uniform; how many
GROWN, GROWN_ML = (0.3, 0.9), (0.5, 15.0)  # growth as a share of the old volume, within these limits
SHRUNK = (0.0, 0.15)  # of its volume that an old stroke loses where it does not grow
APART_MM = 4.0  # between a new stroke and what was there
EDGE_MM = 3.0  # smoothness of the edge that a stroke grows by


@dataclass(frozen=True, kw_only=True, eq=False)
class Followup:
    """overlay: lesions of the second time. changed: (D, H, W) bool, new or grown tissue, on the anatomy's grid.

    new_ml: of every new stroke. grown_ml, shrunk_ml: of the old ones. masks: names of those the new ones came from.
    """

    overlay: Overlay
    changed: Mask
    kind: Kind
    new_ml: tuple[float, ...]
    grown_ml: float
    shrunk_ml: float
    masks: tuple[str, ...]


def kind_of(seed: int, index: int) -> Kind:
    """What happens to case `index` of a cohort: nothing to one of its cases 0 to 3, one of 4 to 7 ...

    Which one is drawn: volumes run evenly through the cases (burden.py), so that every fourth would have old strokes of
    one size, and a network could tell by it that nothing is new.
    """
    if unchanged_in(seed, index // UNCHANGED_ONE_OF) == index % UNCHANGED_ONE_OF:
        return "none"
    rng = np.random.default_rng([seed, 6, index])
    return list(KINDS)[int(rng.choice(len(KINDS), p=list(KINDS.values())))]


def unchanged_in(seed: int, block: int) -> int:
    """Which case of so many in a row is unchanged, 0 the first."""
    return int(np.random.default_rng([seed, 5, block]).integers(UNCHANGED_ONE_OF))


def draw_followup(
    rng: np.random.Generator,
    head: Head,
    old: Strokes,
    lesions: Overlay,
    side: Side,
    masks: tuple[Path, ...],
    kind: Kind,
) -> Followup:
    """The lesions of the second time.

    Args:
        old: the strokes of the first time. lesions: all that was painted then. side: of the main stroke, where one may
            grow. masks: real ones for new strokes, empty for drawn ones.
    """
    ml = head.anatomy.spacing_mm**3 / 1000  # of a voxel
    stays = _grown(rng, head, old, side) if kind in ("grown", "both") else _shrunk(rng, old, head.anatomy.spacing_mm)
    new, names, volumes = _new(rng, head, old.mask | stays, lesions, masks, kind)
    cavity = np.where(stays & old.mask, old.cavity, np.float32(0))  # what has grown is solid yet
    overlay = Overlay(
        hyperintensity=lesions.hyperintensity,
        stroke=np.maximum(softened(stays), new.share),
        cavity=np.maximum(cavity, new.cavity),
    )
    return Followup(
        overlay=overlay,
        changed=np.asarray((stays | new.mask) & ~old.mask),
        kind=kind,
        new_ml=volumes,
        grown_ml=int(np.count_nonzero(stays & ~old.mask)) * ml,
        shrunk_ml=int(np.count_nonzero(old.mask & ~stays)) * ml,
        masks=names,
    )


def _shrunk(rng: np.random.Generator, old: Strokes, spacing_mm: float) -> Mask:
    """The old strokes without a part of their edge."""
    left = (1 - rng.uniform(*SHRUNK)) * int(np.count_nonzero(old.mask)) * spacing_mm**3 / 1000
    depth = ndimage.distance_transform_edt(old.mask).astype(np.float32)
    return highest(depth + rng.uniform(0, 0.01, depth.shape).astype(np.float32), old.mask, left, spacing_mm)


def _grown(rng: np.random.Generator, head: Head, old: Strokes, side: Side) -> Mask:
    """The old strokes and more at their edge, uneven as the edge of a stroke is."""
    anatomy = head.anatomy
    before = int(np.count_nonzero(old.mask)) * anatomy.spacing_mm**3 / 1000
    more = float(np.clip(before * rng.uniform(*GROWN), *GROWN_ML))
    edge = smooth_field(rng, anatomy.shape, EDGE_MM / anatomy.spacing_mm)
    score = 1.5 * edge - ndimage.distance_transform_edt(~old.mask) * anatomy.spacing_mm
    room = allowed(head, side) & ~old.mask
    return np.asarray(old.mask | highest(score.astype(np.float32), room, more, anatomy.spacing_mm))


def _new(
    rng: np.random.Generator, head: Head, there: Mask, lesions: Overlay, masks: tuple[Path, ...], kind: Kind
) -> tuple[Strokes, tuple[str, ...], tuple[float, ...]]:
    """New strokes apart from those that are there and from the hyperintensities, where nothing new could be told."""
    shape = head.anatomy.shape
    strokes = Strokes(
        mask=np.zeros(shape, bool), share=np.zeros(shape, np.float32), cavity=np.zeros(shape, np.float32), volumes_ml=()
    )
    names: tuple[str, ...] = ()
    taken = lesions.hyperintensity > 0.1
    for _ in range(int(rng.integers(NEW_STROKES[0], NEW_STROKES[1] + 1)) if kind in ("new", "both") else 0):
        near = ndimage.distance_transform_edt(~(there | strokes.mask)) * head.anatomy.spacing_mm < APART_MM
        side = list(PRIMARY)[int(rng.choice(len(PRIMARY), p=list(PRIMARY.values())))]
        burden = Burden(side=side, volume_ml=float(np.exp(rng.uniform(*np.log(NEW_ML)))))
        placed = place_strokes(rng, head, burden, masks, taken | near)
        if not placed.strokes.mask.any():
            continue  # no room is left there
        names += placed.masks
        strokes = replace(
            strokes,
            mask=strokes.mask | placed.strokes.mask,
            share=np.maximum(strokes.share, placed.strokes.share),
            cavity=np.maximum(strokes.cavity, placed.strokes.cavity),
            volumes_ml=strokes.volumes_ml + placed.strokes.volumes_ml,
        )
    return strokes, names, strokes.volumes_ml
