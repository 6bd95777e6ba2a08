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

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from torch import Tensor

from planner.plan import Averaged, TileWeights, Triple
from strokenet.data.track import Track, silent
from strokenet.model.network import UNet

STEP = 0.5
PEAK = 10.0  # maximum of the importance map, the peer's value: keeps its float16 tails above zero
EMPTY_LOGIT = 20.0  # background over lesion where nothing was computed: a probability of 2e-9


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


def mirrored_average(network: UNet, tile: Tensor, axes: Sequence[int], rules: WindowRules = WindowRules()) -> Tensor:
    """Mean answer over the tile and its mirror images along every subset of `axes`. (N, C, ...) -> (N, K, ...).

    float32; in the exact form the type that the network answers in.
    """
    total: Tensor | None = None
    subsets = [s for r in range(len(axes) + 1) for s in itertools.combinations(axes, r)]
    for subset in subsets:
        flip = [axis + 2 for axis in subset]
        logits = network(tile.flip(flip))
        logits = logits if rules.exact else logits.float()
        answer = (logits.softmax(1) if rules.average == "probabilities" else logits).flip(flip)
        total = answer if total is None else total + answer
    assert total is not None
    return total / len(subsets)


def predict_logits(
    networks: Sequence[UNet],
    image: Tensor,
    *,
    patch: Triple,
    mirror_axes: Sequence[int] = (),
    rules: WindowRules = WindowRules(),
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    track: Track = silent,
) -> Tensor:
    """Logits of a whole image; probabilities where the rules average those.

    Args:
        networks: one a fold, their answers are averaged. image: (C, D, H, W) float32, preprocessed.
        patch: voxels of a tile. mirror_axes: spatial axes 0, 1, 2. dtype: of the network's arithmetic.
        device: where to compute; the image may be elsewhere.

    Returns:
        (K, D, H, W) on `device`, float32, or float16 where that is exact.
    """
    device = device or image.device
    padded, inside = _pad(image.to(device), patch)
    groups = [[network] for network in networks] if rules.exact else [networks]  # the peer finishes fold after fold
    total = _average_tiles(groups[0], padded, patch, mirror_axes, rules, dtype, track)
    for group in groups[1:]:
        total += _average_tiles(group, padded, patch, mirror_axes, rules, dtype, track)
    if len(groups) > 1:
        total /= len(groups)
    return total[(slice(None), *inside)]


def _average_tiles(
    networks: Sequence[UNet],
    image: Tensor,
    patch: Triple,
    mirror_axes: Sequence[int],
    rules: WindowRules,
    dtype: torch.dtype,
    track: Track,
) -> Tensor:
    """Weighted mean of the tiles' answers. image (C, D, H, W), at least one patch -> (K, D, H, W)."""
    d, h, w = image.shape[1:]
    starts = tile_grid((d, h, w), patch)
    weights = importance_map(patch, rules.tile_weights).to(image.device, rules.sums)
    if rules.tile_weights == "peak-1-float32" and len(starts) == 1:
        weights = torch.ones_like(weights)
    total = torch.zeros((networks[0].heads, d, h, w), dtype=rules.sums, device=image.device)
    norm = torch.zeros((d, h, w), dtype=rules.sums, device=image.device)
    for start in track(starts, total=len(starts), what="tiles"):
        box = tuple(slice(first, first + edge) for first, edge in zip(start, patch, strict=True))
        tile = image[(slice(None), *box)]
        if rules.exact or tile.any():
            total[(slice(None), *box)] += _fold_mean(networks, tile[None], mirror_axes, rules, dtype)[0] * weights
            norm[box] += weights
    total /= torch.where(norm == 0, 1, norm)
    total[0] += (1.0 if rules.average == "probabilities" else EMPTY_LOGIT) * (norm == 0)
    return total


def _fold_mean(
    networks: Sequence[UNet], tile: Tensor, axes: Sequence[int], rules: WindowRules, dtype: torch.dtype
) -> Tensor:
    with torch.inference_mode(), torch.autocast(tile.device.type, dtype=dtype, enabled=dtype != torch.float32):
        answers = [mirrored_average(network, tile, axes, rules) for network in networks]
    return torch.stack(answers).mean(0) if len(answers) > 1 else answers[0]


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
