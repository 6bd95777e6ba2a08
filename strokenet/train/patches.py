"""Patches: which case, where, and the cut (Isensee 2021, Methods: foreground oversampling).

Comes in: preprocessed cases read by memory map. Goes out: the spots of a batch, and the patches cut there, larger than
the network's where rotations need a margin. Every sample's randomness is a Generator of its own, seeded by (seed,
epoch, step, index in the global batch): a resumed run, several ranks and a prefetching thread all see the same samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from planner.plan import Triple
from strokenet.preprocess.store import StoredCase

OVERSAMPLING = 0.33
OUTSIDE_LABEL = -1  # beyond the image, and outside the brain: becomes background after augmentation

Phase = Literal["train", "val"]
Stream = Literal["train", "val", "dropout"]
_STREAMS: dict[Stream, int] = {"train": 0, "val": 1, "dropout": 2}  # part of every seed: never to be renumbered


@dataclass(frozen=True, kw_only=True, eq=False)
class Spot:
    """Where one sample is cut: its case, and the first voxel of the patch, which may lie outside."""

    case: StoredCase
    start: Triple

    def centred(self, patch: Triple, inner: Triple) -> Spot:
        """The spot of the smaller box in the middle of this patch: what `transform` looks at."""
        d, h, w = (first + beside for first, beside in zip(self.start, middle(patch, inner), strict=True))
        return Spot(case=self.case, start=(d, h, w))


def middle(patch: Triple, inner: Triple) -> Triple:
    """First voxel of the smaller box in the middle of a patch, both (D, H, W)."""
    d, h, w = (edge // 2 - kept // 2 for edge, kept in zip(patch, inner, strict=True))
    return (d, h, w)


@dataclass(frozen=True, kw_only=True, eq=False)
class RawBatch:
    """Patches as cut, before augmentation.

    image: (N, C, D, H, W) float32. label: (N, D, H, W) int16, -1 outside. cases: the N case ids.
    """

    image: Tensor
    label: Tensor
    cases: tuple[str, ...]


def sample_rng(seed: int, stream: Stream, epoch: int, step: int, index: int) -> np.random.Generator:
    """The Generator of one sample: position in the batch `index` of step `step` of epoch `epoch`.

    stream: the phase, of which it is cut and augmented; "dropout" draws a training sample's channels, beside that.
    """
    key = (_STREAMS[stream], epoch, step, index)
    return np.random.default_rng(np.random.SeedSequence(entropy=seed, spawn_key=key))


def is_forced(index: int, batch_size: int) -> bool:
    """Whether the sample must be centred on foreground: the last third of a batch (1 of 2, 1 of 3, 2 of 5).

    A batch of one is never forced: nnU-Net rounds the unforced share, and so do we.
    """
    return index >= round(batch_size * (1 - OVERSAMPLING))


def place(
    rng: np.random.Generator,
    shape: Triple,
    patch: Triple,
    final_patch: Triple,
    foreground: Sequence[NDArray[np.integer]],
) -> Triple:
    """First voxel of a patch in a case; it may lie outside, the cut pads.

    Args:
        shape: of the case. patch: to cut. final_patch: what remains after augmentation.
        foreground: per lesion label (n, 3) voxels, empty for an unforced sample; else one voxel becomes the centre.
    """
    need = [max(p - f, p - s) for p, f, s in zip(patch, final_patch, shape, strict=True)]
    lower = [-n // 2 for n in need]
    upper = [s + n // 2 + n % 2 - p for s, n, p in zip(shape, need, patch, strict=True)]
    present = [voxels for voxels in foreground if len(voxels)]
    if present:
        voxels = present[int(rng.integers(len(present)))]
        centre = voxels[int(rng.integers(len(voxels)))]
        # No upper limit, as in the peer: a lesion at the border stays in the centre.
        start = [max(low, int(c) - p // 2) for low, c, p in zip(lower, centre, patch, strict=True)]
    else:
        start = [int(rng.integers(low, high + 1)) for low, high in zip(lower, upper, strict=True)]
    return (start[0], start[1], start[2])


def overlap(start: Sequence[int], box: Sequence[int], limits: Sequence[int]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """What of a box lies within an array: an index into the array, and one into the box. Empty where nothing does.

    Args:
        start: first voxel of the box. box: its edges. limits: edges of the array; all (d, h, w).

    Returns:
        two of (..., slice, slice, slice).
    """
    source: list[Any] = [...]
    target: list[Any] = [...]
    for first, length, limit in zip(start, box, limits, strict=True):
        low = min(max(first, 0), limit)
        high = max(low, min(first + length, limit))
        source.append(slice(low, high))
        target.append(slice(low - first, high - first) if high > low else slice(0, 0))
    return tuple(source), tuple(target)


def cut(array: NDArray[Any], start: Triple, out: NDArray[Any], fill: float) -> None:
    """Writes the box of `array` that begins at `start` into `out`, `fill` where it leaves the array.

    Args:
        array: (..., D, H, W). out: (..., d, h, w), its shape is the size of the box; changed in place.
    """
    source, target = overlap(start, out.shape[-3:], array.shape[-3:])
    inner = out[target]
    if inner.size < out.size:
        out[...] = fill
    inner[...] = array[source]


def draw_spots(
    cases: Sequence[StoredCase],
    rngs: Sequence[np.random.Generator],
    *,
    patch: Triple,
    final_patch: Triple,
    forced: Sequence[bool] | None = None,
) -> list[Spot]:
    """The spots of one batch: a case with replacement, then a place, a sample at a time from its own Generator.

    Args:
        cases: the fold's preprocessed cases. rngs: one a sample. patch, final_patch: see `place`.
        forced: which samples are centred on foreground; None where these are the whole batch: is_forced says it.
    """
    if forced is None:
        forced = [is_forced(index, len(rngs)) for index in range(len(rngs))]
    spots = []
    for index, rng in enumerate(rngs):
        case = cases[int(rng.integers(len(cases)))]
        foreground = tuple(case.foreground.values()) if forced[index] else ()
        d, h, w = case.image.shape[1:]
        spots.append(Spot(case=case, start=place(rng, (d, h, w), patch, final_patch, foreground)))
    return spots


def draw_batch(
    cases: Sequence[StoredCase], rngs: Sequence[np.random.Generator], *, patch: Triple, final_patch: Triple
) -> RawBatch:
    """The spots of one batch, drawn and cut: see `draw_spots`."""
    return cut_batch(draw_spots(cases, rngs, patch=patch, final_patch=final_patch), patch)


def cut_batch(spots: Sequence[Spot], patch: Triple) -> RawBatch:
    """A patch of the memory maps at every spot: image (N, C, *patch) float32, label (N, *patch) int16, on the CPU."""
    image = empty((len(spots), spots[0].case.image.shape[0], *patch), np.float32)
    label = empty((len(spots), *patch), np.int16)
    for index, spot in enumerate(spots):
        cut(spot.case.image, spot.start, image[index].numpy(), 0.0)
        cut(spot.case.label, spot.start, label[index].numpy(), OUTSIDE_LABEL)
    return RawBatch(image=image, label=label, cases=tuple(spot.case.case_id for spot in spots))


def empty(shape: tuple[int, ...], dtype: type[np.generic]) -> Tensor:
    """A CPU tensor, not filled: numpy's, whose large arrays come in huge pages and fill faster."""
    return torch.from_numpy(np.empty(shape, dtype))
