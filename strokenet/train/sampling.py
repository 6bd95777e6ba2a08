"""An image and its label at the places of an affine map: linear for the image, the likeliest label for the label.

Comes in: one raw sample and the matrix that leads from a voxel of the patch to its place in the raw patch, both counted
from their centres. Goes out: the patch. Two forms of one answer. By grid: torch's grid_sample of a volume, on a GPU one
kernel. By planes: on a CPU that takes one voxel after the other, while grid_sample of an image computes eight at once;
so the planes of the volume, one below the other as they lie in memory, are taken for one tall image, which is sampled
at a place in the plane before it and in the plane behind it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from planner.plan import Triple
from strokenet.train.patches import OUTSIDE_LABEL

TIE = 1e-4  # head start of the nearest label: decides ties, far below any real difference of scores
TILE: Triple = (16, 32, 32)  # voxels at a time: larger tiles cost fewer calls, smaller ones look into fewer planes
UNDECIDED = -2  # in place of a label where the corners of a cube differ
_Box = tuple[slice, slice, slice]


def sample_by_grid(
    image: Tensor, label: Tensor, matrix: NDArray[np.float64], heads: int, out: Tensor, out_label: Tensor
) -> None:
    """The form of GPUs. Nothing is read back, so that nobody waits.

    Args:
        image: (C, D', H', W') float32. label: (D', H', W') integers, -1 .. heads - 1. matrix: (3, 3), axes d, h, w.
        out: (C, D, H, W), to be written: linear, 0 beyond the raw patch. out_label: (D, H, W), -1 beyond it.
    """
    grid = sampling_grid(matrix, _triple(out_label), _triple(label), image.device)
    out.copy_(_at(image, grid, "bilinear"))
    out_label.copy_(sample_labels(label, grid, heads))


def sampling_grid(matrix: NDArray[np.float64], patch: Triple, raw: Triple, device: torch.device) -> Tensor:
    """Where each voxel looks in the raw patch: (D, H, W, 3) float32, -1 .. 1 from outer edge to edge, w h d."""
    axes = [torch.arange(edge, dtype=torch.float32, device=device) - (edge - 1) / 2 for edge in patch]
    grid = torch.empty(*patch, 3, device=device)
    for axis, (size, steps) in enumerate(zip(raw, matrix.tolist(), strict=True)):
        d, h, w = (values * (2 / size * step) for values, step in zip(axes, steps, strict=True))
        torch.add(d[:, None, None] + h[:, None], w, out=grid[..., 2 - axis])
    return grid


def sample_labels(label: Tensor, grid: Tensor, heads: int) -> Tensor:
    """The likeliest label at every place of the grid: each label's indicator is interpolated, the largest wins.

    A tie goes to the nearest voxel's label where that is among the tied, else to the smallest. Beyond the raw patch
    lies label -1.

    Args:
        label: (D', H', W'), -1 .. heads - 1. grid: (D, H, W, 3).

    Returns:
        (D, H, W), type of the label.
    """
    values = torch.arange(heads, device=label.device).view(-1, 1, 1, 1)
    inside = _at((label == values).float(), grid, "bilinear")  # (K, D, H, W)
    shifted = (label[None] - OUTSIDE_LABEL).float()  # so that what grid_sample pads with is -1
    nearest = _at(shifted, grid, "nearest")[0].to(label.dtype) + OUTSIDE_LABEL
    return _likeliest(inside, nearest)


def sample_by_planes(
    image: Tensor, label: Tensor, matrix: NDArray[np.float64], heads: int, out: Tensor, out_label: Tensor
) -> None:
    """The form of CPUs. See sample_by_grid; no edge of the raw patch below 2 voxels.

    Most labels are those of all eight voxels around the place: of the others alone the scores are computed.
    """
    agreed = _agreed(label.to(torch.int8) if heads < 100 else label)
    for tile in _tiles(matrix, _triple(out_label), _triple(label)):
        target, target_label = out[(slice(None), *tile.box)], out_label[tile.box]
        source = image[(slice(None), *tile.source)].contiguous()
        before, behind = (_in_tall_image(planes, tile.grid) for planes in (source[:, :-1], source[:, 1:]))
        torch.lerp(before.view(target.shape), behind.view(target.shape), tile.part, out=target)
        target_label.copy_(agreed.index_select(0, tile.cube.flatten()).view(target_label.shape))
        if tile.coverage is not None:
            target.mul_(tile.coverage)
            target_label.masked_fill_(tile.coverage < 1, UNDECIDED).masked_fill_(tile.coverage == 0, OUTSIDE_LABEL)
    undecided = (out_label == UNDECIDED).nonzero()
    out_label[tuple(undecided.T)] = _decided(label, matrix, _triple(out_label), undecided, heads)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Tile:
    """A box of n voxels of the patch. source: the box of the raw patch in which they look.

    grid: (2, n) float32, column and row in the source's planes one below the other, as grid_sample counts. part:
    (d, h, w), the way from the plane before the place to the one behind it. cube: (d, h, w) int32, the voxel of the
    flat raw patch at which the cube around the place begins. coverage: (d, h, w), 0 .. 1, how much of the voxel around
    the place lies in the raw patch; None where all does.
    """

    box: _Box
    source: _Box
    grid: Tensor
    part: Tensor
    cube: Tensor
    coverage: Tensor | None


def _tiles(matrix: NDArray[np.float64], patch: Triple, raw: Triple) -> Iterator[_Tile]:
    """Every voxel of the patch once."""
    leaves = bool((np.abs(matrix) @ (np.array(patch) - 1) > np.array(raw) - 1 + 1e-6).any())
    lines = [_lines(steps, patch, size) for steps, size in zip(matrix.tolist(), raw, strict=True)]
    for box, source in _boxes(matrix, patch, raw):
        d, h, w = box
        places = [  # in the source: what the plane adds, and what each voxel of the plane
            in_plane[h, w] + (of_d[d] - begin.start)[:, None, None]
            for (of_d, in_plane), begin in zip(lines, source, strict=True)
        ]
        yield _tile(box, source, places, raw, leaves=leaves)


def _boxes(matrix: NDArray[np.float64], patch: Triple, raw: Triple) -> Iterator[tuple[_Box, _Box]]:
    """The tiles, and of each the box of the raw patch between whose voxels its places lie: two voxels at least."""
    starts = np.array(list(itertools.product(*(range(0, edge, step) for edge, step in zip(patch, TILE, strict=True)))))
    stops = np.minimum(starts + TILE, patch)
    middles = (starts + stops - np.array(patch)) / 2 @ matrix.T + (np.array(raw) - 1) / 2
    reaches = (stops - starts - 1) / 2 @ np.abs(matrix.T) + 1e-3  # more than float32 errs in a place
    first = np.clip(np.floor(middles - reaches), 0, np.array(raw) - 2).astype(int)
    end = np.clip(np.floor(middles + reaches) + 2, first + 2, raw).astype(int)
    for box, source in zip(zip(starts, stops, strict=True), zip(first, end, strict=True), strict=True):
        yield _box(*box), _box(*source)


def _box(start: NDArray[np.integer], stop: NDArray[np.integer]) -> _Box:
    d, h, w = (slice(first, end) for first, end in zip(start.tolist(), stop.tolist(), strict=True))
    return d, h, w


def _lines(steps: Sequence[float], patch: Triple, size: int) -> tuple[Tensor, Tensor]:
    """The places on one axis of the raw patch, of `size` voxels, in two summands: (D,) and (H, W) float32."""
    axes = [torch.arange(edge, dtype=torch.float64) - (edge - 1) / 2 for edge in patch]
    d, h, w = (step * axis for step, axis in zip(steps, axes, strict=True))
    return (d + (size - 1) / 2).float(), (h[:, None] + w).float()


def _tile(box: _Box, source: _Box, places: Sequence[Tensor], raw: Triple, *, leaves: bool) -> _Tile:
    """places: z, y and x in voxels of the source, (d, h, w) each, overwritten."""
    z, y, x = places
    depth, height, width = (part.stop - part.start for part in source)
    coverage = None
    if leaves:
        coverage = torch.ones_like(z)
        for place, begin, size in zip(places, source, raw, strict=True):
            coverage.mul_((place + (begin.start + 1)).clamp_(0, 1)).mul_((size - begin.start - place).clamp_(0, 1))
    plane = z.floor().clamp_(0, depth - 2)
    part = z.sub_(plane).clamp_(0, 1)
    y.clamp_(0, height - 1)
    x.clamp_(0, width - 1)
    first = (source[0].start * raw[1] + source[1].start) * raw[2] + source[2].start
    cube = x.int().add_(y.int(), alpha=raw[2]).add_(plane.int(), alpha=raw[1] * raw[2]).add_(first)
    row = plane.mul_(height).add_(y)
    half_voxel = 1 / torch.tensor([[width], [(depth - 1) * height]])
    grid = torch.stack([x.flatten(), row.flatten()]).mul_(2 * half_voxel).add_(half_voxel - 1)  # -1 .. 1, edge to edge
    return _Tile(box=box, source=source, grid=grid, cube=cube, part=part, coverage=coverage)


def _agreed(label: Tensor) -> Tensor:
    """Of the cube of eight voxels that begins at a voxel the one label that all have, -2 where they differ.

    (D, H, W) integers -> (D H W,). After the last voxel of a row comes the next row, as memory has it: a place on that
    voxel has no share in it.
    """
    _, height, width = label.shape
    low = high = label.flatten()
    agreed = torch.full_like(low, UNDECIDED)
    for step in (1, width, height * width):  # to the next corner along each axis
        low, high = torch.minimum(low[:-step], low[step:]), torch.maximum(high[:-step], high[step:])
    agreed[: len(low)] = low.masked_fill_(low != high, UNDECIDED)
    return agreed


def _decided(label: Tensor, matrix: NDArray[np.float64], patch: Triple, voxels: Tensor, heads: int) -> Tensor:
    """The likeliest label of some voxels of the patch, as in sample_labels. voxels: (m, 3) -> (m,)."""
    size = torch.tensor(label.shape)
    places = (voxels - (torch.tensor(patch) - 1) / 2).double() @ torch.from_numpy(matrix.T) + (size - 1) / 2
    coverage = ((places + 1).clamp(0, 1) * (size - places).clamp(0, 1)).prod(1)  # as _Tile.coverage
    whole = places.floor().clamp_(min=0).minimum(size - 2)
    rounded = places.round() > whole  # halves to even, as grid_sample does
    parts, coverage = (places - whole).clamp_(0, 1).float(), coverage.float()
    label = label.contiguous()
    strides = torch.tensor(label.stride())
    first = (whole.long() * strides).sum(1)
    shifts = (torch.cartesian_prod(*[torch.arange(2)] * 3) * strides).sum(1)  # of the eight corners
    corners = label.flatten()[first + shifts[:, None]]  # (8, m)
    weights, closest = coverage[None], torch.zeros_like(first)
    for part, far in zip(parts.T, rounded.T, strict=True):
        weights = torch.stack([weights * (1 - part), weights * part], 1).flatten(0, 1)  # (k, m) -> (2 k, m)
        closest = 2 * closest + far
    nearest = corners.gather(0, closest[None])[0].masked_fill(coverage < 0.5, OUTSIDE_LABEL)
    inside = torch.stack([((corners == value) * weights).sum(0) for value in range(heads)])  # (K, m)
    return _likeliest(inside, nearest)


def _likeliest(inside: Tensor, nearest: Tensor) -> Tensor:
    """The label of the largest score. inside: (K, ...), scores of 0 .. K - 1. nearest: labels. (...) -> (...)."""
    label = torch.full_like(nearest, OUTSIDE_LABEL)
    best = (1 - inside.sum(0)).add_(nearest == OUTSIDE_LABEL, alpha=TIE)
    for value, score in enumerate(inside):
        score.add_(nearest == value, alpha=TIE)
        label.masked_fill_(score > best, value)
        best = torch.maximum(best, score)
    return label


def _at(volumes: Tensor, grid: Tensor, mode: str) -> Tensor:
    """(C, D', H', W') at the places of the grid (D, H, W, 3): (C, D, H, W), 0 beyond."""
    return F.grid_sample(volumes[None], grid[None], mode=mode, padding_mode="zeros", align_corners=False)[0]


def _in_tall_image(planes: Tensor, grid: Tensor) -> Tensor:
    """Planes (C, d, h, w), one below the other, at n places (2, n), linear: (C, n)."""
    places = grid.T[None, None]  # (2, n) -> (1, 1, n, 2), a view: grid_sample reads each axis in one row
    image = planes.flatten(1, 2)[None]  # (C, d, h, w) -> (1, C, d h, w), a view
    return F.grid_sample(image, places, align_corners=False)[0, :, 0]


def _triple(label: Tensor) -> Triple:
    d, h, w = label.shape
    return (d, h, w)
