"""Gradients of `instance_norm_act` on the GPU, for channels_last_3d: three kernels, four reads and one write of a map.

    sums       a tile of voxels after the other, for a share of one sample: sums of dy' and of dy' x_hat
    combine    the shares of every sample: the two means that dx needs, dweight and dbias
    apply      dx = weight rstd (dy' - mean(dy') - x_hat mean(dy' x_hat)), and dy' where a residual wants it

Shares and tiles are as in the forward (instance_norm_act_triton.py). x_hat comes from y, or from x, which then also
tells the sign of z, by the forward's own arithmetic; with a residual y tells it. Nothing is added by atomics: the same
numbers give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.instance_norm_act_triton import SHARES, WARPS, share_tiles, tile_of

PROGRAMS = 3  # of sums on a multiprocessor: its registers hold as many with tiles of half the values
SMALLEST_WEIGHT = tl.constexpr(1e-20)  # below it the norm of y cannot be undone: x_hat then counts as 0


@triton.jit
def channel_vectors(mean, rstd, weight, bias, sample, channels, channel, RECOVER: tl.constexpr):
    """Of a tile's channels: centre and scale of x_hat = (value - centre) scale; weight rstd; bias. All float32."""
    there = channel < channels
    place = sample * channels + channel
    deviation = tl.load(rstd + place, mask=there, other=0.0)
    factor = tl.load(weight + channel, mask=there, other=0.0).to(tl.float32)
    shift = tl.load(bias + channel, mask=there, other=0.0).to(tl.float32)
    if RECOVER:
        lost = tl.abs(factor) < SMALLEST_WEIGHT
        centre, scale = shift, tl.where(lost, 0.0, 1.0 / tl.where(lost, 1.0, factor))
    else:
        centre, scale = tl.load(mean + place, mask=there, other=0.0), deviation
    return centre, scale, deviation * factor, shift


@triton.jit
def undone_tile(
    towards, kept, signs, offsets, inside, centre, scale, gain, shift, slope, inverse,
    RECOVER: tl.constexpr, SIGNS: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """dy' and x_hat of a tile, float32; dy' is 0 outside. inverse: 1 / slope, read where RECOVER."""
    slopes = tl.load(towards + offsets, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(kept + offsets, mask=inside, other=0.0).to(tl.float32)
    if ACT:
        if SIGNS:
            positive = tl.load(signs + offsets, mask=inside, other=0.0).to(tl.float32) > 0
        elif RECOVER:
            positive = value > 0
        else:
            positive = (value - centre[None, :]) * gain[None, :] + shift[None, :] > 0
        slopes = tl.where(positive, slopes, slopes * slope)
        if RECOVER:
            value = tl.where(positive, value, value * inverse)
    return slopes, (value - centre[None, :]) * scale[None, :]


@triton.jit
def gradient_sums_kernel(
    towards, kept, signs, mean, rstd, weight, bias, sums, products, voxels, channels, tiles, slope, inverse,
    RECOVER: tl.constexpr, SIGNS: tl.constexpr, ACT: tl.constexpr,
    TILE_VOXELS: tl.constexpr, TILE_CHANNELS: tl.constexpr,
):  # fmt: skip
    """One share: sums of dy' and dy' x_hat, (N, shares, C) float32, from maps (N, S, C) of `tiles` tiles a share."""
    share, sample = tl.program_id(0), tl.program_id(2)
    channel = tl.program_id(1) * TILE_CHANNELS + tl.arange(0, TILE_CHANNELS)
    centre, scale, gain, shift = channel_vectors(mean, rstd, weight, bias, sample, channels, channel, RECOVER)
    voxel = tl.arange(0, TILE_VOXELS)
    offsets = voxel[:, None] * channels + channel[None, :]
    first = share * tiles * TILE_VOXELS
    left = tl.minimum(tiles * TILE_VOXELS, voxels - first)
    start = (sample.to(tl.int64) * voxels + first) * channels  # a map may have more than 2^31 values
    total = tl.zeros((TILE_VOXELS, TILE_CHANNELS), tl.float32)
    product = tl.zeros((TILE_VOXELS, TILE_CHANNELS), tl.float32)
    while left > 0:  # not range: Triton's interpreter has no range of a value that is computed
        inside = (voxel[:, None] < left) & (channel < channels)[None, :]
        slopes, x_hat = undone_tile(
            towards + start, kept + start, signs + start, offsets, inside, centre, scale, gain, shift, slope, inverse,
            RECOVER, SIGNS, ACT,
        )  # fmt: skip
        total += slopes
        product += slopes * x_hat
        start += TILE_VOXELS * channels
        left -= TILE_VOXELS
    place = (sample * tl.num_programs(0) + share) * channels + channel
    tl.store(sums + place, tl.sum(total, 0), mask=channel < channels)
    tl.store(products + place, tl.sum(product, 0), mask=channel < channels)


@triton.jit
def gradient_combine_kernel(
    sums, products, mean_sums, mean_products, dweight, dbias, samples, voxels, channels, shares,
    TILE_SHARES: tl.constexpr, TILE_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Every share of every sample: means of dy' and dy' x_hat (N, C), dweight and dbias (C,), all float32."""
    channel = tl.program_id(0) * TILE_CHANNELS + tl.arange(0, TILE_CHANNELS)
    there = channel < channels
    total = tl.zeros((TILE_CHANNELS,), tl.float32)
    product = tl.zeros((TILE_CHANNELS,), tl.float32)
    sample = samples
    while sample > 0:
        sample -= 1
        totals = tl.zeros((TILE_SHARES, TILE_CHANNELS), tl.float32)
        many = tl.zeros((TILE_SHARES, TILE_CHANNELS), tl.float32)
        share = tl.arange(0, TILE_SHARES)
        left = shares
        while left > 0:
            inside = (share[:, None] < shares) & there[None, :]
            places = (sample * shares + share[:, None]) * channels + channel[None, :]
            totals += tl.load(sums + places, mask=inside, other=0.0)
            many += tl.load(products + places, mask=inside, other=0.0)
            share += TILE_SHARES
            left -= TILE_SHARES
        of_sample, product_of_sample = tl.sum(totals, 0), tl.sum(many, 0)
        tl.store(mean_sums + sample * channels + channel, of_sample / voxels, mask=there)
        tl.store(mean_products + sample * channels + channel, product_of_sample / voxels, mask=there)
        total += of_sample
        product += product_of_sample
    tl.store(dweight + channel, product, mask=there)
    tl.store(dbias + channel, total, mask=there)


@triton.jit
def gradient_apply_kernel(
    towards, kept, signs, out, through, mean, rstd, weight, bias, mean_sums, mean_products,
    voxels, channels, slope, inverse,
    RECOVER: tl.constexpr, SIGNS: tl.constexpr, ACT: tl.constexpr, THROUGH: tl.constexpr,
    TILE_VOXELS: tl.constexpr, TILE_CHANNELS: tl.constexpr,
):  # fmt: skip
    """One tile of out (N, S, C), which is dx, and of through, which is dy'."""
    sample = tl.program_id(2)
    channel = tl.program_id(1) * TILE_CHANNELS + tl.arange(0, TILE_CHANNELS)
    there = channel < channels
    centre, scale, gain, shift = channel_vectors(mean, rstd, weight, bias, sample, channels, channel, RECOVER)
    level = tl.load(mean_sums + sample * channels + channel, mask=there, other=0.0)
    slant = tl.load(mean_products + sample * channels + channel, mask=there, other=0.0)
    first = tl.program_id(0) * TILE_VOXELS
    start = (sample.to(tl.int64) * voxels + first) * channels
    voxel = tl.arange(0, TILE_VOXELS)
    offsets = voxel[:, None] * channels + channel[None, :]
    inside = (voxel[:, None] < voxels - first) & there[None, :]
    slopes, x_hat = undone_tile(
        towards + start, kept + start, signs + start, offsets, inside, centre, scale, gain, shift, slope, inverse,
        RECOVER, SIGNS, ACT,
    )  # fmt: skip
    if THROUGH:
        tl.store(through + start + offsets, slopes.to(through.dtype.element_ty), mask=inside)
    value = (slopes - level[None, :] - x_hat * slant[None, :]) * gain[None, :]
    tl.store(out + start + offsets, value.to(out.dtype.element_ty), mask=inside)


def instance_norm_act_triton_backward(
    towards: Tensor,
    kept: Tensor,
    signs: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    *,
    slope: float,
    recover: bool,
    residual: bool,
    programs: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of `instance_norm_act`, by the formula in instance_norm_act.py.

    Args:
        towards: dy, (N, C, D, H, W) channels_last_3d, as y, on a GPU or under Triton's interpreter.
        kept: y where recover, else x; as towards.
        signs: y, where neither kept nor what follows from it tells the sign of z; else None.
        weight, bias: (C,). mean, rstd: (N, C) float32, of the forward.
        residual: whether its gradient is wanted.
        programs: how many the first kernel starts, about; None: as many as keep the GPU busy.

    Returns:
        dx as towards; dweight and dbias, (C,) float32; the gradient of the residual as towards, or None.
    """
    samples, channels = kept.shape[:2]
    voxels = kept[0, 0].numel()
    tile_voxels, width = tile_of(channels)
    blocks = triton.cdiv(channels, width)
    gradient = torch.empty_like(kept)
    through = torch.empty_like(kept) if residual and slope != 1 else None
    maps = (towards, kept, kept if signs is None else signs)
    vectors = (mean, rstd, weight.contiguous(), bias.contiguous())
    slopes = (slope, 1 / slope if recover else 1.0)
    kinds = (recover, signs is not None, slope != 1)
    with torch.cuda.device_of(kept):  # type: ignore[no-untyped-call]  # Triton starts kernels on the current GPU
        if programs is None:
            programs = PROGRAMS * torch.cuda.get_device_properties(kept.device).multi_processor_count
        half = tile_voxels // 2
        tiles = share_tiles(voxels, half, samples * blocks, programs)
        shares = triton.cdiv(voxels, tiles * half)
        sums, products = kept.new_empty((2, samples, shares, channels), dtype=torch.float32)
        means = kept.new_empty((2, samples, channels), dtype=torch.float32)
        dweight, dbias = kept.new_empty((2, channels), dtype=torch.float32)
        gradient_sums_kernel[(shares, blocks, samples)](
            *maps, *vectors, sums, products, voxels, channels, tiles, *slopes,
            *kinds, half, width, num_warps=WARPS,
        )  # fmt: skip
        few = min(width, 16)
        tile_shares = min(triton.next_power_of_2(shares), SHARES)
        gradient_combine_kernel[(triton.cdiv(channels, few),)](
            sums, products, *means, dweight, dbias, samples, voxels, channels, shares, tile_shares, few
        )
        gradient_apply_kernel[(triton.cdiv(voxels, tile_voxels), blocks, samples)](
            *maps, gradient, gradient if through is None else through, *vectors, *means, voxels, channels, *slopes,
            *kinds, through is not None, tile_voxels, width, num_warps=WARPS,
        )  # fmt: skip
    return gradient, dweight, dbias, towards if residual and slope == 1 else through
