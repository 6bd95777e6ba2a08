"""An image and its label at the places of an affine map, as in sampling.py: the form of CPUs.

grid_sample of a volume takes one voxel after the other on a CPU. Where a sample is scaled and not turned, the map is
separable, and each axis is interpolated by itself. Where it is turned, the patch is made tile by tile: of the box in
which a tile looks, the planes, one below the other as they lie in memory, are taken for one tall image; grid_sample of
an image computes many voxels at once, in the plane before the place and in the plane behind it.

Most labels are those of all eight voxels around the place: of the others alone the scores are computed.
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
from strokenet.train.axes import interpolate, select
from strokenet.train.patches import OUTSIDE_LABEL
from strokenet.train.sampling import likeliest, shape_of

TILE: Triple = (32, 32, 32)  # voxels at a time: larger tiles cost fewer calls, smaller ones stay in a core's cache
UNDECIDED = -2  # in place of a label where the corners of a cube differ
_ROUNDING = 1e-3  # voxels, more than float32 errs in a place
_INT8_HEADS = 100  # so many labels at most leave room in int8 for what `_agreed` computes
_Box = tuple[slice, slice, slice]


def sample_on_cpu(
    image: Tensor, label: Tensor, matrix: NDArray[np.float64], heads: int, out: Tensor, out_label: Tensor
) -> None:
    """See sample_by_grid for the arguments; no edge of the raw patch is below 2 voxels, out_label is contiguous."""
    agreed = _agreed(label.to(torch.int8) if heads <= _INT8_HEADS else label, heads)
    if matrix[~np.eye(3, dtype=bool)].any():
        _sample_by_tiles(image, agreed, matrix, out, out_label)
    else:
        _sample_by_axes(image, agreed, matrix.diagonal().tolist(), out, out_label)
    undecided = np.flatnonzero(out_label.numpy() == UNDECIDED)
    voxels = torch.from_numpy(np.stack(np.unravel_index(undecided, out_label.shape)))
    out_label.view(-1)[undecided] = _decided(label, matrix, shape_of(out_label), voxels, heads)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Axis:
    """The places on an axis of the raw patch, n of them. source: the voxels among which they lie.

    near: (n,) int64, the voxel of the source before the place. part: (n,) float32, the way from there to the next one,
    0 .. 1. coverage: (n,) float32, 0 .. 1, how much of the voxel around the place lies in the raw patch.
    """

    source: slice
    near: Tensor
    part: Tensor
    coverage: Tensor


def _sample_by_axes(image: Tensor, agreed: Tensor, steps: Sequence[float], out: Tensor, out_label: Tensor) -> None:
    """steps: raw voxels for one of the patch, along d, h, w. The image goes plane by plane, which stay in the cache."""
    axes = [_axis(*along) for along in zip(steps, out_label.shape, agreed.shape, strict=True)]
    d, h, w = axes
    source = image[(slice(None), *(axis.source for axis in axes))]
    for plane, near, part in zip(out.unbind(1), d.near.tolist(), d.part.tolist(), strict=True):
        rows = torch.lerp(source[:, near], source[:, near + 1], part)  # (C, h, w)
        rows = interpolate(rows, 1, h.near, h.near + 1, h.part)
        plane.copy_(interpolate(rows, 2, w.near, w.near + 1, w.part))
    labels = agreed[d.source, h.source, w.source].contiguous()
    for number, axis in enumerate(axes):
        labels = select(labels, number, axis.near)
    out_label.copy_(labels)
    covered = d.coverage[:, None, None] * h.coverage[:, None] * w.coverage
    if covered.min() < 1:
        _leave(out, out_label, covered)


def _axis(step: float, edge: int, size: int) -> _Axis:
    """`edge` places, `step` voxels apart, about the middle of an axis of `size` voxels."""
    places = step * (torch.arange(edge, dtype=torch.float64) - (edge - 1) / 2) + (size - 1) / 2
    near = places.floor().clamp_(0, size - 2)
    first, last = int(near[0]), int(near[-1])
    return _Axis(
        source=slice(first, last + 2),
        near=near.long() - first,
        part=(places - near).clamp_(0, 1).float(),
        coverage=_coverage(places, size).float(),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Tile:
    """A box of the patch, (d, h, w) voxels. source: the box of the raw patch in which they look.

    All else is (d, h, w) float32. plane: the plane of the source before the place, whole. part: the way from there to
    the next one, 0 .. 1. row, column: of the place in its plane. coverage: 0 .. 1, how much of the voxel around the
    place lies in the raw patch; None where all does.
    """

    box: _Box
    source: _Box
    plane: Tensor
    part: Tensor
    row: Tensor
    column: Tensor
    coverage: Tensor | None


def _sample_by_tiles(
    image: Tensor, agreed: Tensor, matrix: NDArray[np.float64], out: Tensor, out_label: Tensor
) -> None:
    for tile in _tiles(matrix, shape_of(out_label), shape_of(agreed)):
        target, target_label = out[(slice(None), *tile.box)], out_label[tile.box]
        _sample_image(image[(slice(None), *tile.source)].contiguous(), tile, target)
        _sample_label(agreed[tile.source].contiguous(), tile, target_label)
        if tile.coverage is not None:
            _leave(target, target_label, tile.coverage)


def _tiles(matrix: NDArray[np.float64], patch: Triple, raw: Triple) -> Iterator[_Tile]:
    """Every voxel of the patch once."""
    d, h, w = (torch.arange(min(step, edge), dtype=torch.float64) for step, edge in zip(TILE, patch, strict=True))
    ways = [  # of every voxel of a tile from its first one, in raw voxels
        (of_d * d[:, None, None] + of_h * h[:, None] + of_w * w).float() for of_d, of_h, of_w in matrix.tolist()
    ]
    for box, source, first, leaves in _boxes(matrix, patch, raw):
        own = tuple(slice(part.stop - part.start) for part in box)
        places = [way[own] + begin for way, begin in zip(ways, first, strict=True)]
        yield _tile(box, source, places, raw, leaves=leaves)


def _boxes(
    matrix: NDArray[np.float64], patch: Triple, raw: Triple
) -> Iterator[tuple[_Box, _Box, tuple[float, ...], bool]]:
    """The tiles: the box; the box of the raw patch between whose voxels its places lie, two voxels at least on an axis;
    the place of its first voxel, counted in that; and whether any place lies beyond the raw patch's outer voxels.
    """
    starts = np.array(list(itertools.product(*(range(0, edge, step) for edge, step in zip(patch, TILE, strict=True)))))
    stops, last = np.minimum(starts + TILE, patch), np.array(raw) - 1
    middles = (starts + stops - np.array(patch)) / 2 @ matrix.T + last / 2
    reaches = (stops - starts - 1) / 2 @ np.abs(matrix.T)
    low, high = middles - reaches - _ROUNDING, middles + reaches + _ROUNDING
    first = np.clip(np.floor(low), 0, last - 1).astype(int)
    end = np.clip(np.floor(high) + 2, first + 2, last + 1).astype(int)
    origins = (starts - (np.array(patch) - 1) / 2) @ matrix.T + last / 2 - first
    leaves = ((low < 0) | (high > last)).any(1)
    for *box, begin, stop, origin, out in zip(starts, stops, first, end, origins, leaves, strict=True):
        yield _box(*box), _box(begin, stop), tuple(origin.tolist()), bool(out)


def _box(start: NDArray[np.integer], stop: NDArray[np.integer]) -> _Box:
    d, h, w = (slice(first, end) for first, end in zip(start.tolist(), stop.tolist(), strict=True))
    return d, h, w


def _tile(box: _Box, source: _Box, places: Sequence[Tensor], raw: Triple, *, leaves: bool) -> _Tile:
    """places: z, y and x in voxels of the source, (d, h, w) each, overwritten. leaves: whether any lies beyond raw."""
    sizes, coverage = [part.stop - part.start for part in source], None
    if leaves:
        coverage = torch.ones_like(places[0])
        for place, begin, size, of_source in zip(places, source, raw, sizes, strict=True):
            coverage.mul_(_coverage(place + begin.start, size))
            place.clamp_(0, of_source - 1)
    z, row, column = places
    plane = z.floor().clamp_max_(sizes[0] - 2)
    return _Tile(box=box, source=source, plane=plane, part=z.sub_(plane), row=row, column=column, coverage=coverage)


def _sample_image(source: Tensor, tile: _Tile, out: Tensor) -> None:
    """source: (C, d', h', w'), contiguous. out: (C, d, h, w), written."""
    _, depth, height, width = source.shape
    rows = (depth - 1) * height
    grid = torch.empty(2, *tile.row.shape)  # -1 .. 1 from outer edge to edge, column and row of the tall image
    torch.add(torch.tensor(1 / width - 1), tile.column, alpha=2 / width, out=grid[0])
    torch.add(torch.tensor(1 / rows - 1), tile.row, alpha=2 / rows, out=grid[1]).add_(
        tile.plane, alpha=2 * height / rows
    )
    places = grid.flatten(1).T[None, None]  # (1, 1, n, 2), a view: grid_sample reads each axis in one row
    before, behind = (
        F.grid_sample(planes.flatten(1, 2)[None], places, align_corners=False).view(out.shape)
        for planes in (source[:, :-1], source[:, 1:])
    )
    torch.lerp(before, behind, tile.part, out=out)


def _sample_label(agreed: Tensor, tile: _Tile, out: Tensor) -> None:
    """agreed: (d', h', w'), contiguous, of the source. out: (d, h, w), written.

    float32 may round a place on into the next cube: nearly all of its weight lies on the face that both cubes share.
    """
    lowest, highest = agreed.aminmax()
    if lowest == highest:
        out.fill_(lowest)
        return
    _, height, width = agreed.shape
    cube = torch.add(tile.column, tile.row.floor(), alpha=width).add_(tile.plane, alpha=height * width).int()
    out.copy_(agreed.flatten().index_select(0, cube.flatten()).view(out.shape))


def _coverage(places: Tensor, size: int | Tensor) -> Tensor:
    """0 .. 1, how much of the voxel around a place lies on an axis of `size` voxels."""
    return (places + 1).clamp_(0, 1).mul_((size - places).clamp_(0, 1))


def _leave(image: Tensor, label: Tensor, coverage: Tensor) -> None:
    """What lies beyond the raw patch: the image fades, the label is open where it fades and -1 where nothing is left.

    image: (C, d, h, w), label and coverage: (d, h, w). Image and label are changed.
    """
    image.mul_(coverage)
    label.masked_fill_(coverage < 1, UNDECIDED).masked_fill_(coverage == 0, OUTSIDE_LABEL)


def _agreed(label: Tensor, heads: int) -> Tensor:
    """Of the cube of eight voxels that begins at a voxel the one label that all have, -2 where they differ.

    (D, H, W) integers, -1 .. heads - 1, to the same. After the last voxel of a row comes the next row, as memory has
    it: a place on that voxel has no share in it.
    """
    _, height, width = label.shape
    low = high = label.flatten()
    agreed = torch.full_like(low, UNDECIDED)
    for step in (1, width, height * width):  # to the next corner along each axis
        low, high = torch.minimum(low[:-step], low[step:]), torch.maximum(high[:-step], high[step:])
    differ = high.sub_(low).clamp_max_(1)  # arithmetic, because a CPU fills by a mask far more slowly
    torch.sub(low, differ, alpha=heads + 1, out=agreed[: len(low)]).clamp_min_(UNDECIDED)
    return agreed.view(label.shape)


def _decided(label: Tensor, matrix: NDArray[np.float64], patch: Triple, voxels: Tensor, heads: int) -> Tensor:
    """The likeliest label of some voxels of the patch, as in sample_labels. voxels: (3, m) -> (m,)."""
    size, middle = torch.tensor(label.shape)[:, None], (torch.tensor(patch)[:, None] - 1) / 2
    places = torch.from_numpy(matrix) @ (voxels - middle).double() + (size - 1) / 2  # (3, m)
    coverage = _coverage(places, size).prod(0)
    whole = places.floor().clamp_(min=0).minimum(size - 2)
    rounded = places.round() > whole  # halves to even, as grid_sample does
    parts, coverage = (places - whole).clamp_(0, 1).float(), coverage.float()
    label = label.contiguous()
    strides = torch.tensor(label.stride())[:, None]
    first = (whole.long() * strides).sum(0)
    shifts = (torch.cartesian_prod(*[torch.arange(2)] * 3).T * strides).sum(0)  # of the eight corners
    corners = label.flatten().index_select(0, (first + shifts[:, None]).flatten()).view(8, -1)  # (8, m)
    weights, closest = coverage[None], torch.zeros_like(first)
    for part, far in zip(parts, rounded, strict=True):
        weights = torch.stack([weights * (1 - part), weights * part], 1).flatten(0, 1)  # (k, m) -> (2 k, m)
        closest = 2 * closest + far
    nearest = corners.gather(0, closest[None])[0].masked_fill(coverage < 0.5, OUTSIDE_LABEL)
    inside = torch.stack([((corners == value) * weights).sum(0) for value in range(heads)])  # (K, m)
    return likeliest(inside, nearest)
