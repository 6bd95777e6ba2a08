"""Brain box: the part of the network's grid that `infer --crop brain` tiles, because lesions lie in the brain.

Comes in: a case as it was given, and where its preprocessed image lies. Goes out: logits of the whole image, background
outside the box. Crop and normalisation stay what they were in training, so the network sees the same numbers; but its
tiles lie elsewhere, and that is another answer (`python -m tests.infer.brain_crop` says how far).

    brain    of a head by deepbet, from the first channel, where the engine is; of a stripped scan what is not zero
    margin   5 mm, and then all that costs no tile; an axis along which no tile is saved stays whole, as without

Where the brain is in doubt, or no tile is saved, the whole crop is tiled: then the answer is that of `--crop nonzero`.
"""

from __future__ import annotations

import logging
import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.components import label_components
from planner.plan import Averaged, Plan, Spacing, Triple
from strokenet.data.case import Case
from strokenet.data.errors import InputError
from strokenet.data.geometry import turn_to_ras, turned
from strokenet.data.track import Track, silent
from strokenet.infer.engine import Engine
from strokenet.infer.sliding_window import EMPTY_LOGIT, STEP, tile_grid, tile_starts
from strokenet.prepare.brain import CPU, NoBrain, brain_by_network, weights_folder
from strokenet.preprocess.crop import Box, bounding_box
from strokenet.preprocess.preprocess import Origin

# A real head's published brain mask reaches 1.4 mm beyond deepbet's box in plane, and a slice of 3 mm across.
MARGIN_MM = 5.0
FACE_SHARE = 0.2  # non-zero on a face of the box: up to 0.06 of stripped scans, over 0.4 on some face of every head
PIECE_SHARE = 0.99  # of what is not zero in a stripped scan, in the box of its largest piece; else halves may be apart
LEAST_ML = 500.0  # deepbet found something else in less: an eye, or the brain of a slab
_log = logging.getLogger("strokenet")


def check_brain_finder() -> None:
    """Refuses the option where heads could not be computed: whether a scan is one is known only once it is read.

    Raises:
        InputError: deepbet is not installed, or its weights are not the known ones.
    """
    try:
        weights_folder()
    except InputError as error:
        raise InputError(f"--crop brain: {error}") from None


def brain_logits(engine: Engine, case: Case, image: Tensor, origin: Origin, track: Track = silent) -> Tensor:
    """`engine.logits` of the part of the image where the brain is, and background around it.

    Args:
        case: as it was given, without channels put in for absent ones. image: (C, D, H, W), preprocessed.

    Returns:
        (K, D, H, W), as engine.logits.

    Raises:
        InputError: deepbet is needed and cannot be used.
    """
    d, h, w = image.shape[1:]
    box = brain_box(case, engine.model.plan, origin, (d, h, w), engine.place)
    return with_background(engine.logits(image[:, *box.slices], track), box, (d, h, w), engine.rules.average)


def brain_box(case: Case, plan: Plan, origin: Origin, shape: Triple, device: torch.device = CPU) -> Box:
    """The voxels of the network's grid to be tiled; all where the brain is in doubt or no tile is saved.

    shape: of the preprocessed image. device: where deepbet computes. One line of the log says what came of it.
    """
    whole = Box(start=(0, 0, 0), stop=shape)
    if count_tiles(shape, plan.patch) == 1:
        _log.info("%s: --crop brain: the whole crop is one tile", case.case_id)
        return whole
    try:
        brain = find_brain(case, device)
    except NoBrain as error:
        _log.info("%s: --crop brain: %s; the whole crop is tiled", case.case_id, error)
        return whole
    box = without_extra_tiles(on_network_grid(brain, origin, shape, plan.spacing), shape, plan.patch)
    tiles, of = (count_tiles(part.shape, plan.patch) for part in (box, whole))
    _log.info("%s: --crop brain: %d tiles instead of %d", case.case_id, tiles, of)
    return box


def find_brain(case: Case, device: torch.device = CPU) -> NDArray[np.bool_]:
    """Where the brain is, on the scan's own voxels. (D, H, W) bool.

    Raises:
        NoBrain: none was found, or it is implausible. InputError: deepbet is needed and cannot be used.
    """
    inside = np.asarray((case.image != 0).any(0))
    return _largest_piece(inside) if is_stripped(inside) else _brain_of_head(case, device)


def is_stripped(inside: NDArray[np.bool_]) -> bool:
    """Whether a scan was stripped of its skull: a brain is round and touches no face of its box with much of itself.

    A head is cut by the field of view at the neck or the vertex, or lies in noise. inside: (D, H, W), what is not zero.
    """
    cropped = inside[bounding_box(inside).slices]
    return all(cropped.take(end, axis).mean() <= FACE_SHARE for axis in range(3) for end in (0, -1))


def on_network_grid(brain: NDArray[np.bool_], origin: Origin, shape: Triple, spacing: Spacing) -> Box:
    """The box of the brain on the preprocessed image, MARGIN_MM wider at either end.

    Both grids begin and end at the same edges, so that a voxel's edges scale by the ratio of the shapes.

    Args:
        brain: (D, H, W), stored axes, not empty. shape: of the preprocessed image. spacing: its mm.
    """
    own = bounding_box(np.asarray(origin.turn.apply(brain)[origin.box.slices]))
    start, stop = [], []
    for first, end, was, size, mm in zip(own.start, own.stop, origin.box.shape, shape, spacing, strict=True):
        margin = math.ceil(MARGIN_MM / mm)
        start.append(max(0, first * size // was - margin))
        stop.append(min(size, -(-end * size // was) + margin))
    return Box(start=(start[0], start[1], start[2]), stop=(stop[0], stop[1], stop[2]))


def without_extra_tiles(box: Box, shape: Triple, patch: Triple) -> Box:
    """The largest box about this one that needs no more tiles: the brain's surface moves away from the tiles' rims.

    What was a tile's rim is wherever there is image a place with neighbours, which is what the network was trained on.
    """
    spans = [_span(*axis) for axis in zip(box.start, box.stop, shape, patch, strict=True)]
    (d0, d1), (h0, h1), (w0, w1) = spans
    return Box(start=(d0, h0, w0), stop=(d1, h1, w1))


def count_tiles(shape: Triple, patch: Triple) -> int:
    """Tiles of an image of this shape; one that is smaller than the patch is grown to it."""
    d, h, w = (max(size, edge) for size, edge in zip(shape, patch, strict=True))
    return len(tile_grid((d, h, w), patch))


def with_background(answer: Tensor, box: Box, shape: Triple, average: Averaged) -> Tensor:
    """The answer in its box, and what the sliding window says where it computes nothing. (K, *box) -> (K, *shape)."""
    if box.shape == shape:
        return answer
    full = answer.new_zeros((len(answer), *shape))
    full[0] = 1.0 if average == "probabilities" else EMPTY_LOGIT
    full[:, *box.slices] = answer
    return full


def _largest_piece(inside: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The brain of a stripped scan, without the specks that stripping left. (D, H, W) -> (D, H, W)."""
    labels, sizes = label_components(inside)
    if len(sizes) < 2:
        raise NoBrain("no brain found, the scan is empty")
    piece = np.asarray(labels == 1 + int(np.argmax(sizes[1:])))
    if inside[bounding_box(piece).slices].sum() < PIECE_SHARE * inside.sum():
        raise NoBrain("the stripped scan is in pieces")
    return piece


def _brain_of_head(case: Case, device: torch.device) -> NDArray[np.bool_]:
    """deepbet's brain of the first channel, in stored axes; its networks know heads that are upright (RAS)."""
    turn = turn_to_ras(case.geometry)
    scan = np.asarray(turn.apply(case.image[0]), np.float32)
    brain = brain_by_network(scan, turned(case.geometry, turn), device)
    if brain.volume_ml < LEAST_ML:
        raise NoBrain(f"deepbet's brain has {brain.volume_ml:.0f} ml only")
    return turn.invert(brain.mask)


def _span(start: int, stop: int, size: int, edge: int) -> tuple[int, int]:
    """One axis of without_extra_tiles: all that its tiles can cover, about the same middle, within the image."""
    tiles = len(tile_starts(max(stop - start, edge), edge))
    length = min(size, math.floor(edge + (tiles - 1) * edge * STEP))
    first = min(max(0, (start + stop - length) // 2), size - length)
    return first, first + length
