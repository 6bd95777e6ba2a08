"""Connected components on the GPU: union-find over cells, on the device from the map to the mask.

    bits     the voxels of a cell that are above the threshold, as the bits of a byte
    parents  for each cell with a voxel an earlier cell of its component, or itself: a tree a component, whose root
             is the component's first cell
    sizes    voxels of the component, at its root

A cell is a block of 2x2x2 voxels for connectivity 26 and one voxel for 6 and 18 (the block idea: Allegretti, Bolelli,
Grana, IEEE TPDS 2020). Blocks are exact for 26 because all voxels of a block touch each other, and because two
neighbouring blocks are joined exactly where one has a voxel on the face, edge or corner towards the other, and the
other one too: any two such voxels touch, and no others do. For 6 and 18 the first half is not true of a block.

Four launches: pack (map to bits), merge (join with the 13 earlier neighbours), count (roots and sizes), paint (mask).
Bytes of n float32 voxels, few of them lesion, connectivity 26: 4 n read, n written, 1 n for bits and sizes; 52 MB for
197 x 233 x 189, 12 us at 4.3 TB/s (calculated).

Races. Programs of a launch run in any order, and loads may see an old value of `parents`. That is harmless: a cell's
parent is at all times a smaller cell of the same component, and every value that it ever had stays joined to it, by
links of smaller cells and by pairs that a program has still to join. A join ends only when atomic_min, which is never
stale, says that the larger of the two was a root until now; when not, what it pointed to is joined in turn, and pairs
of ever smaller cells come to an end. In merge a climb also shortens its path by plain stores, of ancestors alone, which
the same argument covers. In count nothing but roots is stored, so that afterwards each cell points to its root; a path
shortened there could replace a root. tests/kernels/test_union_find.py runs a model of it in random orders.

Compiled with one warp a program wherever there is a loop, so that the test of a loop is a vote of 32 threads and not a
barrier. Nothing here waits for the device: a CUDA graph can capture a call, after one call outside that compiles.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# Arguments of kernels are pointers and blocks, for which Triton has no types.

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

MERGE = 32  # cells of a program; one warp, one cell a thread: fewest threads that wait for the longest climb
COUNT = 128  # cells (or voxels) of a program of one warp that sums before it adds
WIDE = 128  # cells of a program without loops: four warps
LARGEST = 2**31 - 1024  # voxels: an index past the end, in the last program, is an int32 too
MAP_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.uint8)

_SHAPE = ["threshold", "smallest", "depth", "height", "width", "cells", "voxels"]  # one build for all shapes


@triton.jit
def _corner(cell, height, width, EDGE: tl.constexpr):
    """Coordinates of the first voxel of a cell."""
    rows = tl.cdiv(height, EDGE)
    columns = tl.cdiv(width, EDGE)
    return cell // (rows * columns) * EDGE, cell // columns % rows * EDGE, cell % columns * EDGE


@triton.jit
def _voxel(z, y, x, depth, height, width):
    """Index of a voxel, and whether the volume has it (z, y, x >= 0)."""
    return (z * height + y) * width + x, (z < depth) & (y < height) & (x < width)


@triton.jit
def _popcount(byte):
    """Number of ones among the 8 lowest bits."""
    pairs = byte - ((byte >> 1) & 0x55)
    fours = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return (fours + (fours >> 4)) & 0x0F


@triton.jit
def _root(parents, cell, active, SHORTEN: tl.constexpr):
    """The root above each cell that is active. SHORTEN: each cell on the way then points one step further up."""
    above = tl.load(parents + cell, mask=active, other=0, cache_modifier=".cg")
    climbing = active & (above != cell)
    while tl.max(climbing.to(tl.int32), 0) > 0:
        further = tl.load(parents + above, mask=climbing, other=0, cache_modifier=".cg")
        climbing = climbing & (further != above)
        if SHORTEN:
            tl.store(parents + cell, further, mask=climbing)
        cell = tl.where(climbing, above, cell)
        above = tl.where(climbing, further, above)
    return above


@triton.jit
def _join(parents, one, other, active):
    """Joins the trees of two cells where active; gives a cell above both there, and `one` elsewhere."""
    while tl.max(active.to(tl.int32), 0) > 0:
        one_root = _root(parents, one, active, SHORTEN=True)
        other_root = _root(parents, other, active, SHORTEN=True)
        low = tl.minimum(one_root, other_root)
        high = tl.maximum(one_root, other_root)
        apart = active & (low != high)
        before = tl.atomic_min(parents + high, low, mask=apart, sem="relaxed")
        before = tl.where(apart, before, high)  # without its mask the answer of an atomic is undefined
        one = tl.where(active, low, one)
        other = tl.where(active, before, other)
        active = apart & (before != high)
    return one


@triton.jit(do_not_specialize=_SHAPE)
def pack_kernel(
    values,
    background,
    threshold,
    bits,
    parents,
    sizes,
    depth,
    height,
    width,
    cells,
    PAIR: tl.constexpr,
    EDGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Map to bits: value > threshold, or (PAIR) value - background > threshold; every cell becomes its own root.

    values, background (D, H, W) of MAP_TYPES -> bits uint8, parents int32 (set where bits is not 0), sizes int32 0.
    """
    cell = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = cell < cells
    z, y, x = _corner(cell, height, width, EDGE)
    found = tl.zeros((BLOCK,), tl.int32)
    for bit in tl.static_range(EDGE * EDGE * EDGE):  # 4 dz + 2 dy + dx
        voxel, exists = _voxel(z + bit // 4, y + bit // 2 % 2, x + bit % 2, depth, height, width)
        value = tl.load(values + voxel, mask=exists, other=0).to(tl.float32)
        if PAIR:
            value -= tl.load(background + voxel, mask=exists, other=0).to(tl.float32)
        found |= tl.where(exists & (value > threshold), 1 << bit, 0)
    tl.store(bits + cell, found.to(tl.uint8), mask=inside)
    tl.store(parents + cell, cell, mask=inside & (found != 0))
    tl.store(sizes + cell, tl.zeros((BLOCK,), tl.int32), mask=inside)


@triton.jit(do_not_specialize=_SHAPE)
def merge_kernel(bits, parents, height, width, cells, REACH: tl.constexpr, EDGE: tl.constexpr, BLOCK: tl.constexpr):
    """Joins each cell with those of its 13 earlier neighbours that touch it.

    REACH: in how many axes a neighbour may lie apart, 1, 2, 3 for connectivity 6, 18, 26. parents is changed.
    """
    cell = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    own = tl.load(bits + cell, mask=cell < cells, other=0).to(tl.int32)
    if tl.max(own, 0) > 0:
        rows = tl.cdiv(height, EDGE)
        columns = tl.cdiv(width, EDGE)
        z = cell // (rows * columns)
        y = cell // columns % rows
        x = cell % columns
        joined = cell
        for step in range(13):
            dz = step // 9 - 1
            dy = step // 3 % 3 - 1
            dx = step % 3 - 1
            if dz * dz + dy * dy + dx * dx <= REACH:
                near = cell + (dz * rows + dy) * columns + dx
                touch = (z + dz >= 0) & (y + dy >= 0) & (y + dy < rows) & (x + dx >= 0) & (x + dx < columns)
                if EDGE == 2:  # a byte each for the bits of the half before, of the whole and of the half after
                    facing = 0xF0FF0F >> (8 + 8 * dz) & 0xCCFF33 >> (8 + 8 * dy) & 0xAAFF55 >> (8 + 8 * dx) & 0xFF
                    faced = 0xF0FF0F >> (8 - 8 * dz) & 0xCCFF33 >> (8 - 8 * dy) & 0xAAFF55 >> (8 - 8 * dx) & 0xFF
                else:
                    facing = 1
                    faced = 1
                touch = touch & (own & facing != 0)
                theirs = tl.load(bits + near, mask=touch, other=0).to(tl.int32)
                touch = touch & (theirs & faced != 0)
                joined = _join(parents, joined, near, touch)


@triton.jit(do_not_specialize=_SHAPE)
def count_kernel(
    bits,
    parents,
    sizes,
    firsts,
    depth,
    height,
    width,
    cells,
    FIRSTS: tl.constexpr,
    EDGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Points every cell to its root and adds its voxels to the root's size.

    FIRSTS: firsts (cells,) int32 also takes, at the root, the index of the component's first voxel in raster order.
    The cells under the program's lowest root are summed first: in a component as large as the volume every program
    would otherwise add each of its cells at one address.
    """
    cell = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    own = tl.load(bits + cell, mask=cell < cells, other=0).to(tl.int32)
    if tl.max(own, 0) > 0:
        here = own != 0
        root = _root(parents, cell, here, SHORTEN=False)
        tl.store(parents + cell, root, mask=here)
        voxels = _popcount(own)
        lowest = tl.min(tl.where(here, root, 0x7FFFFFFF), 0)
        shared = here & (root == lowest)
        alone = here & (root != lowest)
        tl.atomic_add(sizes + lowest, tl.sum(tl.where(shared, voxels, 0), 0), sem="relaxed")
        tl.atomic_add(sizes + root, voxels, mask=alone, sem="relaxed")
        if FIRSTS:
            bit = _popcount((own & -own) - 1)  # the lowest one: voxels and bits have the same order
            z, y, x = _corner(cell, height, width, EDGE)
            first, _ = _voxel(z + bit // 4, y + bit // 2 % 2, x + bit % 2, depth, height, width)
            tl.atomic_min(firsts + lowest, tl.min(tl.where(shared, first, 0x7FFFFFFF), 0), sem="relaxed")
            tl.atomic_min(firsts + root, first, mask=alone, sem="relaxed")


@triton.jit(do_not_specialize=_SHAPE)
def paint_kernel(
    bits,
    parents,
    numbers,
    smallest,
    out,
    depth,
    height,
    width,
    cells,
    NUMBERS: tl.constexpr,
    EDGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes each voxel of a component: 1 where the number at its root is at least smallest; NUMBERS: that number.

    out (D, H, W), uint8 or int32; 0 in the background.
    """
    cell = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    own = tl.load(bits + cell, mask=cell < cells, other=0).to(tl.int32)
    root = tl.load(parents + cell, mask=own != 0, other=0)
    number = tl.load(numbers + root, mask=own != 0, other=0)
    value = number if NUMBERS else (number >= smallest).to(tl.int32)
    z, y, x = _corner(cell, height, width, EDGE)
    for bit in tl.static_range(EDGE * EDGE * EDGE):
        voxel, exists = _voxel(z + bit // 4, y + bit // 2 % 2, x + bit % 2, depth, height, width)
        painted = tl.where((own >> bit) & 1 != 0, value, 0)
        tl.store(out + voxel, painted.to(out.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=_SHAPE)
def flag_kernel(sizes, firsts, flags, cells, BLOCK: tl.constexpr):
    """flags (voxels,) uint8 becomes 1 at the first voxel of each component."""
    cell = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_root = tl.load(sizes + cell, mask=cell < cells, other=0) > 0
    first = tl.load(firsts + cell, mask=is_root, other=0)
    tl.store(flags + first, tl.full((BLOCK,), 1, tl.uint8), mask=is_root)


@triton.jit(do_not_specialize=_SHAPE)
def number_kernel(sizes, firsts, ranks, sizes_by_label, cells, BLOCK: tl.constexpr):
    """Turns the size at each root into the component's label, the rank of its first voxel; sizes go by label."""
    cell = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    size = tl.load(sizes + cell, mask=cell < cells, other=0)
    first = tl.load(firsts + cell, mask=size > 0, other=0)
    label = tl.load(ranks + first, mask=size > 0, other=0)
    tl.store(sizes_by_label + label, size, mask=size > 0)
    tl.store(sizes + cell, label, mask=size > 0)


@triton.jit(do_not_specialize=_SHAPE)
def table_kernel(labels, lower, upper, sums, height, width, voxels, BLOCK: tl.constexpr):
    """Bounding boxes and sums of coordinates, label after label of the program's voxels, summed before they are added.

    labels (voxels,) int32 -> lower (n + 1, 3) int32, upper (n + 1, 3) int32 inclusive, sums (n + 1, 3) int64.
    """
    voxel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    label = tl.load(labels + voxel, mask=voxel < voxels, other=0)
    z = voxel // (height * width)
    y = voxel // width % height
    x = voxel % width
    current = tl.max(label, 0)
    while current > 0:
        own = label == current
        _add_axis(lower, upper, sums, current * 3, z, own)
        _add_axis(lower, upper, sums, current * 3 + 1, y, own)
        _add_axis(lower, upper, sums, current * 3 + 2, x, own)
        label = tl.where(own, 0, label)
        current = tl.max(label, 0)


@triton.jit
def _add_axis(lower, upper, sums, place, coordinate, own):
    tl.atomic_min(lower + place, tl.min(tl.where(own, coordinate, 0x7FFFFFFF), 0), sem="relaxed")
    tl.atomic_max(upper + place, tl.max(tl.where(own, coordinate, -1), 0), sem="relaxed")
    tl.atomic_add(sums + place, tl.sum(tl.where(own, coordinate, 0).to(tl.int64), 0), sem="relaxed")


@dataclass(frozen=True, kw_only=True, eq=False)
class Forest:
    """The components of a map, one tree each: the arrays of the module's docstring, one entry a cell.

    shape: of the map, (D, H, W). edge: voxels along a cell, 2 or 1. firsts: at a root the index of the component's
    first voxel in raster order; None where nobody asked for it.
    """

    shape: tuple[int, int, int]
    edge: int
    bits: Tensor
    parents: Tensor
    sizes: Tensor
    firsts: Tensor | None

    @property
    def cells(self) -> int:
        """Number of cells."""
        return self.bits.numel()


def grow(
    values: Tensor, *, threshold: float, connectivity: int, background: Tensor | None = None, firsts: bool = False
) -> Forest:
    """Threshold, labelling and sizes, on the device of values and without waiting for it.

    Args:
        values: (D, H, W) of MAP_TYPES. threshold: strict, rounded to float32 once; compared in float32.
        background: same shape, type and device; then values - background is compared.
        connectivity: 6, 18 or 26. firsts: keep the first voxel of each component.

    Raises:
        ValueError: not three axes, another type, background unlike values, or more than LARGEST voxels.
    """
    _check(values, background)
    depth, height, width = values.shape
    edge, reach = (2, 3) if connectivity == 26 else (1, 1 if connectivity == 6 else 2)
    cells = triton.cdiv(depth, edge) * triton.cdiv(height, edge) * triton.cdiv(width, edge)
    values = values.contiguous()
    other = values if background is None else background.contiguous()
    bits = values.new_empty(cells, dtype=torch.uint8)
    parents, sizes = (values.new_empty(cells, dtype=torch.int32) for _ in range(2))
    first = values.new_full((cells if firsts else 0,), 2**31 - 1, dtype=torch.int32)
    limit = float(np.float32(threshold))
    shape = (depth, height, width)
    with torch.cuda.device_of(values):
        pack_kernel[(triton.cdiv(cells, WIDE),)](
            *(values, other, limit, bits, parents, sizes, *shape, cells),
            PAIR=background is not None, EDGE=edge, BLOCK=WIDE, num_warps=4,
        )  # fmt: skip
        merge_kernel[(triton.cdiv(cells, MERGE),)](
            bits, parents, height, width, cells, REACH=reach, EDGE=edge, BLOCK=MERGE, num_warps=1
        )
        count_kernel[(triton.cdiv(cells, COUNT),)](
            *(bits, parents, sizes, first, *shape, cells), FIRSTS=firsts, EDGE=edge, BLOCK=COUNT, num_warps=1
        )
    return Forest(shape=shape, edge=edge, bits=bits, parents=parents, sizes=sizes, firsts=first if firsts else None)


def _check(values: Tensor, background: Tensor | None) -> None:
    if values.ndim != 3 or values.dtype not in MAP_TYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in MAP_TYPES)
        raise ValueError(f"a map of shape {tuple(values.shape)} and {values.dtype}; allowed: (D, H, W) of {allowed}")
    if values.numel() > LARGEST:
        raise ValueError(f"{values.numel()} voxels; at most {LARGEST} can be labelled on the GPU, use the CPU")
    if background is not None and not (
        background.shape == values.shape and background.dtype == values.dtype and background.device == values.device
    ):
        raise ValueError("the background's map must have the shape, type and device of the lesion's")


def paint(forest: Forest, numbers: Tensor, *, smallest: int | None) -> Tensor:
    """The map of a number that each root has, numbers (cells,) int32: (D, H, W).

    smallest: uint8, 1 where the number is at least this (at most 2^31 - 1); None: the number itself, int32.
    """
    dtype = torch.int32 if smallest is None else torch.uint8
    out = torch.empty(forest.shape, dtype=dtype, device=numbers.device)
    with torch.cuda.device_of(out):
        paint_kernel[(triton.cdiv(forest.cells, WIDE),)](
            *(forest.bits, forest.parents, numbers, 0 if smallest is None else smallest, out, *forest.shape),
            forest.cells, NUMBERS=smallest is None, EDGE=forest.edge, BLOCK=WIDE, num_warps=4,
        )  # fmt: skip
    return out


def keep_large_triton(
    values: Tensor, *, threshold: float, smallest: int, connectivity: int, background: Tensor | None = None
) -> Tensor:
    """The components of at least `smallest` voxels above the threshold; arguments as in grow. (D, H, W) uint8.

    Four launches, no synchronisation, no allocation but torch's: usable in a CUDA graph.
    """
    forest = grow(values, threshold=threshold, connectivity=connectivity, background=background)
    return paint(forest, forest.sizes, smallest=min(smallest, 2**31 - 1))


def largest_k_triton(mask: Tensor, k: int, connectivity: int) -> Tensor:
    """The k largest components, of equals those whose first voxel comes first. (D, H, W) uint8 0/1 -> the same.

    No synchronisation: one sort key a cell (size, then first voxel) and torch.topk.
    """
    forest = grow(mask, threshold=0, connectivity=connectivity, firsts=True)
    assert forest.firsts is not None
    keys = (forest.sizes.long() << 32) - forest.firsts
    chosen = keys.topk(min(k, forest.cells)).indices  # more than there are: cells that are no root, which nobody asks
    return paint(forest, torch.zeros_like(forest.sizes).index_fill_(0, chosen, 1), smallest=1)


def label_triton(mask: Tensor, connectivity: int) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers the components in raster order of their first voxels, without synchronisation.

    Args:
        mask: (D, H, W) uint8, 0 or 1, not empty. connectivity: 6, 18 or 26.

    Returns:
        labels (D, H, W) int32; sizes by label (cells + 1,) int32, 0 for the background and above count; count, int32 of
        no axes, on the device: to know it on the host is a synchronisation, which is the caller's.
    """
    forest = grow(mask, threshold=0, connectivity=connectivity, firsts=True)
    flags = torch.zeros(mask.numel(), dtype=torch.uint8, device=mask.device)
    sizes_by_label = torch.zeros(forest.cells + 1, dtype=torch.int32, device=mask.device)
    grid = (triton.cdiv(forest.cells, WIDE),)
    with torch.cuda.device_of(mask):
        flag_kernel[grid](forest.sizes, forest.firsts, flags, forest.cells, BLOCK=WIDE, num_warps=4)
        ranks = flags.cumsum(0, dtype=torch.int32)
        number_kernel[grid](forest.sizes, forest.firsts, ranks, sizes_by_label, forest.cells, BLOCK=WIDE, num_warps=4)
    return paint(forest, forest.sizes, smallest=None), sizes_by_label, ranks[-1]


def table_triton(labels: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Bounding boxes and sums of coordinates of labels 1 .. count, without synchronisation.

    labels (D, H, W) int32 -> first voxel (count, 3) int32, last voxel (count, 3) int32, sums (count, 3) int64.
    """
    _, height, width = labels.shape
    lower = torch.full((count + 1, 3), 2**31 - 1, dtype=torch.int32, device=labels.device)
    upper = torch.full((count + 1, 3), -1, dtype=torch.int32, device=labels.device)
    sums = torch.zeros((count + 1, 3), dtype=torch.int64, device=labels.device)
    with torch.cuda.device_of(labels):
        table_kernel[(triton.cdiv(labels.numel(), COUNT),)](
            labels.contiguous(), lower, upper, sums, height, width, labels.numel(), BLOCK=COUNT, num_warps=1
        )
    return lower[1:], upper[1:], sums[1:]
