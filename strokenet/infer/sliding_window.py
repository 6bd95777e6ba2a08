"""Sliding window: logits of a whole image from a network that sees one patch (Isensee 2021, Methods).

Comes in: a preprocessed image (C, D, H, W). Goes out: logits (K, D, H, W), for models of nnU-Net v1 probabilities.
Tiles overlap by half a patch on the peer's grid, are weighted by a Gaussian and averaged, and so are mirrored copies
and folds. Two ways of rounding, one grid:

    improved   sums in float32; tiles that are zero in every channel are background without being computed
    exact      the peer's: sums in float16, one fold after the other, every tile computed. Corner logits then become
               integers (a weight of 6e-8 times a logit is a multiple of 6e-8): differences up to 0.5, and a few
               voxels of a thousand where two labels are nearly even

Differs: "improved" is the default, because its answer is the one that the network's arithmetic gives.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from torch import Tensor

from planner.plan import Averaged, TileWeights, Triple
from strokenet.data.track import Track, silent

STEP = 0.5
PEAK = 10.0  # maximum of the importance map, the peer's value: keeps its float16 tails above zero
EMPTY_LOGIT = 20.0  # background over lesion where nothing was computed: a probability of 2e-9


class Network(Protocol):
    """What answers a batch of tiles: a UNet, or its inference form."""

    heads: int

    def __call__(self, x: Tensor) -> Tensor:
        """(N, C, D, H, W) -> logits (N, K, D, H, W)."""
        ...


def tile_starts(size: int, patch: int) -> tuple[int, ...]:
    """First voxels of the tiles along one axis: evenly spread, half a patch apart at most, rounded half to even."""
    count = math.ceil((size - patch) / (patch * STEP)) + 1
    spread = (size - patch) / (count - 1) if count > 1 else 0.0
    return tuple(int(np.round(spread * i)) for i in range(count))


def tile_grid(shape: Triple, patch: Triple) -> tuple[Triple, ...]:
    """First voxels of every tile, last axis fastest. shape must be at least patch."""
    d, h, w = (tile_starts(size, edge) for size, edge in zip(shape, patch, strict=True))
    return tuple(itertools.product(d, h, w))


@dataclass(frozen=True, kw_only=True)
class WindowRules:
    """How the tiles are summed; the fields are the plan's, exact is its semantics."""

    average: Averaged = "logits"
    tile_weights: TileWeights = "peak-10-float16"
    exact: bool = False

    @property
    def sums(self) -> torch.dtype:
        """Of the accumulators. nnU-Net v1 sums in float32, so its exact form is that too."""
        return torch.float16 if self.exact and self.tile_weights == "peak-10-float16" else torch.float32


def importance_map(patch: Triple, kind: TileWeights = "peak-10-float16") -> Tensor:
    """Weight of each voxel of a tile, (D, H, W) float32: a Gaussian of sigma patch / 8, never zero.

    The peak is 10 and the values are rounded through float16 as nnU-Net v2 stores them, or 1 and float32 as in v1.
    """
    delta = np.zeros(patch)
    delta[tuple(edge // 2 for edge in patch)] = 1
    bell = gaussian_filter(delta, [edge / 8 for edge in patch], order=0, mode="constant", cval=0)
    if kind == "peak-10-float16":
        weights = torch.from_numpy(bell / (bell.max() / PEAK)).to(torch.float16)
    else:
        weights = torch.from_numpy(bell / bell.max()).to(torch.float32)
    weights[weights == 0] = weights[weights > 0].min()
    return weights.float()


def predict_logits(
    networks: Sequence[Network],
    image: Tensor,
    *,
    patch: Triple,
    mirror_axes: Sequence[int] = (),
    rules: WindowRules = WindowRules(),
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    batch: int = 1,
    sums_on: torch.device | None = None,
    track: Track = silent,
) -> Tensor:
    """Logits of a whole image; probabilities where the rules average those.

    Args:
        networks: one a fold, their answers are averaged. image: (C, D, H, W) float32, preprocessed.
        patch: voxels of a tile. mirror_axes: spatial axes 0, 1, 2. dtype: of autocast; float32 is none.
        device: where to compute; the image may be elsewhere. batch: tiles and mirror images in one call of a network.
        sums_on: where the image and the sums are kept; None: on `device`.

    Returns:
        (K, D, H, W) on `sums_on`, float32, or float16 where that is exact.
    """
    device = device or image.device
    padded, inside = _pad(image.to(sums_on or device), patch)
    run = _Run(patch=patch, axes=tuple(mirror_axes), rules=rules, dtype=dtype, device=device, batch=batch)
    groups = [[network] for network in networks] if rules.exact else [networks]  # the peer finishes fold after fold
    total = _average_tiles(groups[0], padded, run, track)
    for group in groups[1:]:
        total += _average_tiles(group, padded, run, track)
    if len(groups) > 1:
        total /= len(groups)
    return total[(slice(None), *inside)]


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What every tile has in common; the fields are predict_logits' arguments."""

    patch: Triple
    axes: tuple[int, ...]
    rules: WindowRules
    dtype: torch.dtype
    device: torch.device
    batch: int

    @property
    def mirrors(self) -> tuple[tuple[int, ...], ...]:
        """Every subset of the mirror axes, the empty one first, as axes of a tile (K, D, H, W)."""
        axes = tuple(axis + 1 for axis in self.axes)
        return tuple(subset for r in range(len(axes) + 1) for subset in itertools.combinations(axes, r))

    def box(self, start: Triple) -> tuple[slice, slice, slice, slice]:
        """The tile at `start`, of all channels."""
        d, h, w = (slice(first, first + edge) for first, edge in zip(start, self.patch, strict=True))
        return (slice(None), d, h, w)


def _average_tiles(networks: Sequence[Network], image: Tensor, run: _Run, track: Track) -> Tensor:
    """Weighted mean of the tiles' answers. image (C, D, H, W), at least one patch -> (K, D, H, W)."""
    rules = run.rules
    d, h, w = image.shape[1:]
    starts = tile_grid((d, h, w), run.patch)
    weights = importance_map(run.patch, rules.tile_weights).to(image.device, rules.sums)
    if rules.tile_weights == "peak-1-float32" and len(starts) == 1:
        weights = torch.ones_like(weights)
    total = torch.zeros((networks[0].heads, d, h, w), dtype=rules.sums, device=image.device)
    norm = torch.zeros((d, h, w), dtype=rules.sums, device=image.device)
    seen = starts if rules.exact else _not_empty(image, starts, run)
    answers = _tile_answers(networks, image, seen, run)
    for (start, answer), _ in zip(answers, track(seen, total=len(seen), what="tiles"), strict=True):
        total[run.box(start)] += answer.to(image.device) * weights
        norm[run.box(start)[1:]] += weights
    total /= torch.where(norm == 0, 1, norm)
    total[0] += (1.0 if rules.average == "probabilities" else EMPTY_LOGIT) * (norm == 0)
    return total


def _not_empty(image: Tensor, starts: Sequence[Triple], run: _Run) -> tuple[Triple, ...]:
    """The tiles that are not zero in every channel; one question to the device for all of them."""
    some = torch.stack([image[run.box(start)].any() for start in starts]).tolist()
    return tuple(start for start, any_ in zip(starts, some, strict=True) if any_)


def _tile_answers(
    networks: Sequence[Network], image: Tensor, starts: Sequence[Triple], run: _Run
) -> Iterator[tuple[Triple, Tensor]]:
    """Mean answer over each tile's mirror images and the networks, (K, *patch), tile after tile.

    Tiles and mirror images go through the networks in batches; the answers are summed in one order for every batch.
    """
    mirrors = run.mirrors
    waiting = [(start, mirror) for start in starts for mirror in mirrors]
    total: Tensor | None = None
    for first in range(0, len(waiting), run.batch):
        chunk = waiting[first : first + run.batch]
        tiles = torch.stack([image[run.box(start)].flip(mirror) for start, mirror in chunk])  # (B, C, *patch)
        answers = _answers(networks, tiles.to(run.device), run)
        for (start, mirror), answer in zip(chunk, answers, strict=True):
            back = answer.flip(mirror)
            total = back if total is None else total + back
            if mirror == mirrors[-1]:
                yield start, total / len(mirrors)
                total = None


def _answers(networks: Sequence[Network], tiles: Tensor, run: _Run) -> Tensor:
    """Mean of the networks' answers. (B, C, *patch) -> (B, K, *patch) float32, or in exact the networks' own type."""
    total: Tensor | None = None
    autocast = torch.autocast(tiles.device.type, dtype=run.dtype, enabled=run.dtype != torch.float32)
    for network in networks:
        with torch.inference_mode(), autocast:
            logits = network(tiles)
        logits = logits if run.rules.exact else logits.float()
        answer = logits.softmax(1) if run.rules.average == "probabilities" else logits
        total = answer if total is None else total + answer
    assert total is not None
    return total / len(networks) if len(networks) > 1 else total


def _pad(image: Tensor, patch: Triple) -> tuple[Tensor, tuple[slice, slice, slice]]:
    """The image grown to at least the patch with zeros (smaller half in front), and the box that undoes it."""
    pads, inside = [], []
    for size, edge in zip(image.shape[1:], patch, strict=True):
        missing = max(edge - size, 0)
        pads.append((missing // 2, missing - missing // 2))
        inside.append(slice(missing // 2, missing // 2 + size))
    if any(low or high for low, high in pads):
        image = F.pad(image, list(_reversed_pairs(pads)))
    return image, (inside[0], inside[1], inside[2])


def _reversed_pairs(pads: Sequence[tuple[int, int]]) -> Iterator[int]:
    for low, high in reversed(pads):  # torch pads the last axis first
        yield low
        yield high
