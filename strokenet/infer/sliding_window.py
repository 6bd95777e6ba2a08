"""Sliding window: logits of a whole image from a network that sees one patch (Isensee 2021, Methods).

Comes in: a preprocessed image (C, D, H, W). Goes out: logits (K, D, H, W) float32. Tiles overlap by half a patch on
the peer's grid, are weighted by a Gaussian and averaged; mirrored copies and folds are averaged as logits.

Differs: sums run in float32. The peer sums in float16, where corner logits are rounded to integers (differences up to
0.48). The plan's field `semantics` calls ours "improved"; its "exact" is refused until it is built.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from torch import Tensor

from planner.plan import Triple
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


def importance_map(patch: Triple) -> Tensor:
    """Weight of each voxel of a tile, (D, H, W) float32: a Gaussian of sigma patch / 8, peak 10, never zero.

    The values are rounded through float16 as the peer stores them, so that both weigh tiles alike.
    """
    delta = np.zeros(patch)
    delta[tuple(edge // 2 for edge in patch)] = 1
    bell = gaussian_filter(delta, [edge / 8 for edge in patch], order=0, mode="constant", cval=0)
    weights = torch.from_numpy(bell / (bell.max() / PEAK)).to(torch.float16)
    weights[weights == 0] = weights[weights > 0].min()
    return weights.float()


def mirrored_logits(network: UNet, tile: Tensor, axes: Sequence[int]) -> Tensor:
    """Mean logits over the tile and its mirror images along every subset of `axes`. (N, C, ...) -> (N, K, ...)."""
    total: Tensor | None = None
    subsets = [s for r in range(len(axes) + 1) for s in itertools.combinations(axes, r)]
    for subset in subsets:
        flip = [axis + 2 for axis in subset]
        logits = network(tile.flip(flip)).float().flip(flip)
        total = logits if total is None else total + logits
    assert total is not None
    return total / len(subsets)


def predict_logits(
    networks: Sequence[UNet],
    image: Tensor,
    *,
    patch: Triple,
    mirror_axes: Sequence[int] = (),
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    track: Track = silent,
) -> Tensor:
    """Logits of a whole image.

    Args:
        networks: one a fold, their logits are averaged. image: (C, D, H, W) float32, preprocessed.
        patch: voxels of a tile. mirror_axes: spatial axes 0, 1, 2. dtype: of the network's arithmetic.
        device: where to compute; the image may be elsewhere.

    Returns:
        (K, D, H, W) float32 on `device`. Tiles that are zero in every channel are not computed: background.
    """
    device = device or image.device
    padded, inside = _pad(image.to(device), patch)
    shape = padded.shape[1:]
    weights = importance_map(patch).to(device)
    total: Tensor | None = None
    norm = torch.zeros(shape, device=device)
    steps = tile_grid((shape[0], shape[1], shape[2]), patch)
    for start in track(steps, total=len(steps), what="tiles"):
        box = tuple(slice(first, first + edge) for first, edge in zip(start, patch, strict=True))
        tile = padded[(slice(None), *box)]
        if not tile.any():
            continue
        logits = _fold_mean(networks, tile[None], mirror_axes, dtype)[0]
        if total is None:
            total = torch.zeros((logits.shape[0], *shape), device=device)
        total[(slice(None), *box)] += logits * weights
        norm[box] += weights
    if total is None:
        total = torch.zeros((networks[0].heads, *shape), device=device)
    total /= norm.clamp_min(torch.finfo(torch.float32).tiny)
    total[0] += EMPTY_LOGIT * (norm == 0)
    return total[(slice(None), *inside)]


def _fold_mean(networks: Sequence[UNet], tile: Tensor, axes: Sequence[int], dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(), torch.autocast(tile.device.type, dtype=dtype, enabled=dtype != torch.float32):
        sums = [mirrored_logits(network, tile, axes) for network in networks]
    return torch.stack(sums).mean(0) if len(sums) > 1 else sums[0]


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
