"""`instance_norm_act` on the GPU, for channels_last_3d: three kernels, two reads and one write of the map.

    moments    a tile of voxels after the other, for a share of one sample: its mean and its sum of squared differences
    combine    the shares of a sample (Chan 1979): mean and 1 / standard deviation, which a backward can use again
    apply      act((x - mean) * weight / deviation + bias [+ residual])

A map is rows of C values, one a voxel, S = D H W rows a sample; a program reads a tile of rows x channels, contiguous
where it spans all channels. There are as many shares as keep every multiprocessor busy, with one sample of 32 channels
too: one program a sample and channel would fill a quarter of an H100. Sums are about the mean of a share's first tile,
in float32, so their rounding grows with the tiles of a share and not with the mean.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # values of a tile: 16 a thread, in loads of 16 bytes where C is a multiple of 8
WARPS = 8
CHANNELS = 128  # of a tile, at most
SHARES = 128  # that one tile of combine reads
PROGRAMS = 4  # of moments on a multiprocessor: its registers hold as many, and all run at once


@triton.jit
def moments_kernel(x, means, squares, voxels, channels, tiles, TILE_VOXELS: tl.constexpr, TILE_CHANNELS: tl.constexpr):
    """One share: means and squares (N, shares, C) float32 from x (N, S, C); a share is `tiles` tiles of voxels."""
    share, sample = tl.program_id(0), tl.program_id(2)
    channel = tl.program_id(1) * TILE_CHANNELS + tl.arange(0, TILE_CHANNELS)
    voxel = tl.arange(0, TILE_VOXELS)
    first = share * tiles * TILE_VOXELS
    count = tl.minimum(tiles * TILE_VOXELS, voxels - first)
    start = x + (sample.to(tl.int64) * voxels + first) * channels  # a map may have more than 2^31 values
    offsets = voxel[:, None] * channels + channel[None, :]
    there = channel[None, :] < channels
    tile = tl.load(start + offsets, mask=(voxel[:, None] < count) & there, other=0.0).to(tl.float32)
    about = tl.sum(tile, 0) / tl.minimum(count, TILE_VOXELS)
    total = tl.zeros((TILE_VOXELS, TILE_CHANNELS), tl.float32)
    square = tl.zeros((TILE_VOXELS, TILE_CHANNELS), tl.float32)
    left = count
    while left > 0:  # not range: Triton's interpreter has no range of a value that is computed
        inside = (voxel[:, None] < left) & there
        tile = tl.load(start + offsets, mask=inside, other=0.0).to(tl.float32)
        distance = tl.where(inside, tile - about[None, :], 0.0)
        total += distance
        square += distance * distance
        start += TILE_VOXELS * channels
        left -= TILE_VOXELS
    shift = tl.sum(total, 0) / count
    place = (sample * tl.num_programs(0) + share) * channels + channel
    tl.store(means + place, about + shift, mask=channel < channels)
    tl.store(squares + place, tl.maximum(tl.sum(square, 0) - shift * shift * count, 0.0), mask=channel < channels)


@triton.jit
def combine_kernel(
    means, squares, mean, rstd, voxels, channels, shares, share_voxels, eps,
    TILE_SHARES: tl.constexpr, TILE_CHANNELS: tl.constexpr,
):  # fmt: skip
    """One sample: mean and rstd (N, C) float32 from its shares, about the mean of the first one."""
    sample = tl.program_id(1)
    channel = tl.program_id(0) * TILE_CHANNELS + tl.arange(0, TILE_CHANNELS)
    there = channel < channels
    start = sample * shares * channels + channel
    about = tl.load(means + start, mask=there, other=0.0)
    total = tl.zeros((TILE_SHARES, TILE_CHANNELS), tl.float32)
    square = tl.zeros((TILE_SHARES, TILE_CHANNELS), tl.float32)
    share = tl.arange(0, TILE_SHARES)
    left = shares
    while left > 0:
        inside = (share[:, None] < shares) & there[None, :]
        places = start[None, :] + share[:, None] * channels
        count = tl.minimum(share_voxels, voxels - share * share_voxels)[:, None].to(tl.float32)
        distance = tl.where(inside, tl.load(means + places, mask=inside, other=0.0) - about[None, :], 0.0)
        total += count * distance
        square += tl.load(squares + places, mask=inside, other=0.0) + count * distance * distance
        share += TILE_SHARES
        left -= TILE_SHARES
    shift = tl.sum(total, 0) / voxels
    variance = tl.maximum(tl.sum(square, 0) / voxels - shift * shift, 0.0)
    tl.store(mean + sample * channels + channel, about + shift, mask=there)
    tl.store(rstd + sample * channels + channel, 1.0 / tl.sqrt(variance + eps), mask=there)


@triton.jit
def apply_kernel(
    x, residual, out, mean, rstd, weight, bias, voxels, channels, slope,
    RESIDUAL: tl.constexpr, ACT: tl.constexpr, TILE_VOXELS: tl.constexpr, TILE_CHANNELS: tl.constexpr,
):  # fmt: skip
    """One tile of out (N, S, C), which may be x."""
    sample = tl.program_id(2)
    channel = tl.program_id(1) * TILE_CHANNELS + tl.arange(0, TILE_CHANNELS)
    there = channel < channels
    centre = tl.load(mean + sample * channels + channel, mask=there, other=0.0)
    scale = tl.load(rstd + sample * channels + channel, mask=there, other=0.0)
    scale *= tl.load(weight + channel, mask=there, other=0.0).to(tl.float32)
    shift = tl.load(bias + channel, mask=there, other=0.0).to(tl.float32)
    first = tl.program_id(0) * TILE_VOXELS
    start = (sample.to(tl.int64) * voxels + first) * channels
    voxel = tl.arange(0, TILE_VOXELS)
    offsets = voxel[:, None] * channels + channel[None, :]
    inside = (voxel[:, None] < voxels - first) & there[None, :]
    value = tl.load(x + start + offsets, mask=inside, other=0.0).to(tl.float32)
    value = (value - centre[None, :]) * scale[None, :] + shift[None, :]
    if RESIDUAL:
        value += tl.load(residual + start + offsets, mask=inside, other=0.0).to(tl.float32)
    if ACT:
        value = tl.where(value > 0, value, value * slope)
    tl.store(out + start + offsets, value.to(out.dtype.element_ty), mask=inside)


def tile_of(channels: int) -> tuple[int, int]:
    """Voxels and channels of a tile: a power of two of channels that divides them or, below 32, that covers them."""
    exact = channels & -channels
    width = min(exact if exact >= 32 else triton.next_power_of_2(channels), CHANNELS)
    return TILE // width, width


def share_tiles(voxels: int, tile_voxels: int, others: int, programs: int) -> int:
    """Tiles of a share, so that about `programs` run at a time; others: programs that a share has for its channels."""
    shares = max(1, programs // others)
    return triton.cdiv(triton.cdiv(voxels, tile_voxels), shares)  # type: ignore[no-any-return]


def row_moments_triton(x: Tensor, *, eps: float, programs: int | None = None) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(biased variance + eps) of every sample and channel: x as below -> two (N, C) float32.

    programs: how many the first kernel starts, about; None: as many as keep the GPU busy.
    """
    samples, channels = x.shape[:2]
    voxels = x[0, 0].numel()
    tile_voxels, width = tile_of(channels)
    blocks = triton.cdiv(channels, width)
    if programs is None:
        programs = PROGRAMS * torch.cuda.get_device_properties(x.device).multi_processor_count
    tiles = share_tiles(voxels, tile_voxels, samples * blocks, programs)
    shares = triton.cdiv(voxels, tiles * tile_voxels)
    means, squares = x.new_empty((2, samples, shares, channels), dtype=torch.float32)
    mean, rstd = x.new_empty((2, samples, channels), dtype=torch.float32)
    moments_kernel[(shares, blocks, samples)](
        x, means, squares, voxels, channels, tiles, tile_voxels, width, num_warps=WARPS
    )
    few = min(width, 16)
    tile_shares = min(triton.next_power_of_2(shares), SHARES)
    combine_kernel[(triton.cdiv(channels, few), samples)](
        means, squares, mean, rstd, voxels, channels, shares, tiles * tile_voxels, eps, tile_shares, few
    )
    return mean, rstd


def instance_norm_act_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    slope: float,
    residual: Tensor | None = None,
    inplace: bool = False,
    programs: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `instance_norm_act` computes, without gradients, and the mean and rstd that its backward needs.

    Args:
        x: (N, C, D, H, W) channels_last_3d, float32, bfloat16 or float16, on a GPU or under Triton's interpreter.
        programs: see `row_moments_triton`.

    Returns:
        y as x; mean and 1 / sqrt(variance + eps), (N, C) float32.
    """
    samples, channels = x.shape[:2]
    voxels = x[0, 0].numel()
    tile_voxels, width = tile_of(channels)
    out = x if inplace else torch.empty_like(x)
    weight, bias = weight.contiguous(), bias.contiguous()
    shortcut = x if residual is None else residual.contiguous(memory_format=torch.channels_last_3d)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]  # Triton starts kernels on the current GPU
        mean, rstd = row_moments_triton(x, eps=eps, programs=programs)
        apply_kernel[(triton.cdiv(voxels, tile_voxels), triton.cdiv(channels, width), samples)](
            x, shortcut, out, mean, rstd, weight, bias, voxels, channels, slope,
            residual is not None, slope != 1, tile_voxels, width, num_warps=WARPS,
        )  # fmt: skip
    return out, mean, rstd
