"""Instance normalisation, residual and LeakyReLU in one: what follows every convolution of the network.

    y = act((x - mean) / sqrt(variance + eps) * weight + bias [+ residual])     act(z) = z where z > 0, else slope z

mean and variance (biased) are of the D H W voxels of one sample and channel (Ulyanov 2016; Isensee 2021, Methods).

Bytes, for a map of A bytes: 2 A read, 1 A written, 1 A more with a residual. The stock layers add 2 A for the
activation and 3 A for the sum, and on channels_last_3d 4 A more: torch's instance norm copies the map to NCDHW, and the
next convolution copies it back.
A large fresh result costs a CPU a page fault every 4 kB, longer than the arithmetic: `inplace` saves it.

The fast forms read channels_last_3d as it lies in memory: rows of C values, one a voxel. Their sums are of blocks of
rows about a mean of the block (Chan 1979), so that neither many voxels nor a large mean cost digits. F.group_norm, the
fast call torch has for this layout, sums x and x^2 plainly: of 96^3 voxels with mean 10 (30) and standard deviation 1
it misses by 2e-3 (4e-2) in float32 and 2.5e-2 (0.18) in bfloat16, ours by 7e-7 (2e-6) and one rounding.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dispatch import choose_instance_norm_act

ROWS = 1024  # of a block whose sums are kept apart
BLOCK_VALUES = 1 << 18  # what one call works on: fewer cost calls, more fall out of the cache


def instance_norm_act_reference(
    x: Tensor, weight: Tensor, bias: Tensor, *, eps: float, slope: float, residual: Tensor | None = None
) -> Tensor:
    """What `instance_norm_act` computes, by torch's own layers; torch's autograd goes through it."""
    y = F.instance_norm(x, weight=weight, bias=bias, eps=eps)
    if residual is not None:
        y = y + residual
    return y if slope == 1 else F.leaky_relu_(y, slope)


def instance_norm_act_operator(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    slope: float,
    residual: Tensor | None = None,
    inplace: bool = False,
) -> Tensor:
    """What `instance_norm_act` computes, for a channels_last_3d map on the CPU, without gradients.

    float32, bfloat16 or float16 in and out; sums in float32, their combination in float64. As in torch's layers, every
    step of a 16-bit map is rounded to its type.
    """
    out = x if inplace else torch.empty_like(x)
    weight, bias = weight.float(), bias.float()
    shortcut = None if residual is None else _rows(residual.contiguous(memory_format=torch.channels_last_3d))
    for sample, (rows, result) in enumerate(zip(_rows(x), _rows(out), strict=True)):
        mean, variance = row_moments(rows)
        added = None if shortcut is None else shortcut[sample]
        _normalise(rows, mean, variance, weight, bias, eps=eps, slope=slope, residual=added, out=result)
    return out


def instance_norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    slope: float,
    residual: Tensor | None = None,
    inplace: bool = False,
) -> Tensor:
    """Normalises every channel of every sample, adds the residual and applies LeakyReLU.

    Args:
        x: (N, C, D, H, W), any floating type, layout and device; channels_last_3d without gradients is fast.
        weight, bias: (C,), of the norm.
        eps: added to the variance.
        slope: of the LeakyReLU below zero, 0 or more; 1 is no activation.
        residual: as x; added before the activation.
        inplace: whether x may be overwritten where that saves memory. Use the result: x may also be left as it is.

    Returns:
        (N, C, D, H, W), type of x; layout of x from the fast forms, contiguous from the reference.

    Raises:
        ValueError: a negative slope; one voxel a channel, which has no variance (torch's rule).
    """
    if slope < 0:
        raise ValueError(f"slope {slope}: a LeakyReLU has a slope of 0 or more")
    choice = choose_instance_norm_act(x, weight, bias, residual)
    if choice.implementation == "reference":
        return instance_norm_act_reference(x, weight, bias, eps=eps, slope=slope, residual=residual)
    if residual is not None and residual.data_ptr() == x.data_ptr():
        inplace = False  # the residual is read after the norm is written
    if choice.implementation == "operator":
        return instance_norm_act_operator(x, weight, bias, eps=eps, slope=slope, residual=residual, inplace=inplace)
    from kernels.instance_norm_act_triton import instance_norm_act_triton

    return instance_norm_act_triton(x, weight, bias, eps=eps, slope=slope, residual=residual, inplace=inplace)[0]


def _rows(x: Tensor) -> Tensor:
    """The memory of a channels_last_3d map: (N, C, D, H, W) -> (N, D H W, C), a view."""
    return x.permute(0, 2, 3, 4, 1).flatten(1, 3)


def row_moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every column: (S, C) -> two (C,) in float32, combined from blocks in float64."""
    moments = list(_block_moments(rows) if rows.dtype == torch.float32 else _block_moments_16_bit(rows))
    if len(moments) == 1 and len(moments[0][0]) == 1:
        return moments[0][1][0], moments[0][2][0]
    counts, means, variances = (torch.cat(parts).double() for parts in zip(*moments, strict=True))
    shares = (counts / len(rows))[:, None]
    mean = (shares * means).sum(0)
    variance = (shares * (variances + (means - mean).square_())).sum(0)
    return mean.float(), variance.float()


def _block_moments(rows: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Blocks of float32 rows: sizes (b,), means (b, C) and variances (b, C); several blocks a call, a thread each."""
    whole, channels = len(rows) // ROWS, rows.shape[1]
    blocks = rows[: whole * ROWS].view(whole, ROWS, channels)
    step = max(1, BLOCK_VALUES // (ROWS * channels))
    parts = [blocks[start : start + step] for start in range(0, whole, step)]
    if len(rows) % ROWS:
        parts.append(rows[whole * ROWS :][None])
    scratch = rows.new_empty(max(part.numel() for part in parts))
    for part in parts:  # (b, ROWS or the few that are left, C)
        means = part.mean(1, keepdim=True)
        centred = torch.sub(part, means, out=scratch[: part.numel()].view(part.shape))
        yield means.new_full((len(part),), part.shape[1]), means[:, 0], centred.square_().mean(1)


def _block_moments_16_bit(rows: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The same for 16-bit rows, by the kernel of torch's batch norm, which reads them without a float32 copy.

    Its sums are plain float32 ones. Of 8192 values of 11 bits (float16; bfloat16 has 8) they are exact where the values
    are alike, as in a background, and otherwise err far below a 16-bit rounding.
    """
    unused = rows.new_zeros(
        (2, rows.shape[1]), dtype=torch.float32
    )  # running statistics: they make the answers float32
    step = max(1, min(8 * ROWS, 2 * BLOCK_VALUES // rows.shape[1]))
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        mean, variance = torch.batch_norm_update_stats(part, unused[0], unused[1], 0.0)
        yield unused.new_full((1,), len(part)), mean[None], variance[None]


def _normalise(
    rows: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    slope: float,
    residual: Tensor | None,
    out: Tensor,
) -> None:
    """Writes act(norm(rows) + residual) to out, both (S, C), part by part so that each step finds it in the cache."""
    unused = weight.new_empty(0)
    step = max(1, BLOCK_VALUES // rows.shape[1])
    for start in range(0, len(rows), step):
        part, result = rows[start : start + step], out[start : start + step]
        torch.native_batch_norm(part, weight, bias, mean, variance, False, 0.0, eps, out=(result, unused, unused))
        if residual is not None:
            result += residual[start : start + step]
        if slope != 1:
            F.leaky_relu_(result, slope)
