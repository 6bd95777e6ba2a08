"""`instance_norm_act` on the CPU, for channels_last_3d: torch's channels-last kernels, block by block.

A map is rows of C values, one a voxel. Forward: the moments of a sample, then its norm, residual and activation.
Backward: two sums a channel, then the gradient of x. Each part of rows goes through all steps before the next one is
read, so that a map is read from memory once a pass and not once a step.

Of 16-bit and of small maps torch's own kernel for batch norm does the backward in one call. It adds float32 numbers one
after the other. Of 96^3 voxels whose dy has a mean of 0.3 (3) of its standard deviation the mean of dx then errs by
7e-6 (2e-3) of its norm, while rounding to bfloat16 costs every value 1.7e-3. In float32 dx itself would err by 2.5e-3
where the mean is 3; torch's contiguous layer errs by 3e-6 there, the parts here by 1e-7.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 1024  # of a block whose sums are kept apart
BLOCK_VALUES = 1 << 18  # what one call works on: fewer cost calls, more fall out of the cache
GRADIENT_VALUES = 1 << 19  # the same of the backward
PLAIN_ROWS = 4096  # of a map that torch's kernel adds up itself
ADDED_ROWS = 512  # that float32 sums of the backward are of: dweight errs by 6e-8, by those of 4096 rows by 4e-6
WIDE_ROWS = 16  # that are read as one, and so added up apart
SMALLEST_WEIGHT = 1e-20  # below it the norm of y cannot be undone: x_hat then counts as 0


def instance_norm_act_operator(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    slope: float,
    residual: Tensor | None = None,
    inplace: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `instance_norm_act` computes, without gradients, and the mean and rstd that its backward needs.

    float32, bfloat16 or float16 in and out; sums in float32, their combination in float64. As in torch's layers, every
    step of a 16-bit map is rounded to its type.

    Args:
        x: (N, C, D, H, W) channels_last_3d, on the CPU.

    Returns:
        y as x; mean and 1 / sqrt(variance + eps), (N, C) float32.
    """
    out = x if inplace else torch.empty_like(x)
    weight, bias = weight.float(), bias.float()
    shortcut = None if residual is None else rows_of(residual.contiguous(memory_format=torch.channels_last_3d))
    moments = []
    for sample, (rows, result) in enumerate(zip(rows_of(x), rows_of(out), strict=True)):
        mean, variance = row_moments(rows)
        added = None if shortcut is None else shortcut[sample]
        _normalise(rows, mean, variance, weight, bias, eps=eps, slope=slope, residual=added, out=result)
        moments.append((mean, variance))
    means, variances = (torch.stack(parts) for parts in zip(*moments, strict=True))
    return out, means, variances.add_(eps).rsqrt_()


def rows_of(x: Tensor) -> Tensor:
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


def instance_norm_act_operator_backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of `instance_norm_act`, by the formula in instance_norm_act.py.

    Args:
        towards: dy, (N, C, D, H, W) channels_last_3d, as y.
        kept: y where recover, else x; as towards.
        signs: y, where the activation is not undone from kept; None: no activation, or kept is y.
        weight, bias: (C,). mean, rstd: (N, C) float32, of the forward.
        residual: whether its gradient is wanted.

    Returns:
        dx as towards; dweight and dbias, (C,) float32; the gradient of the residual as towards, or None.
    """
    through, out = towards, torch.empty_like(kept)
    if slope != 1:  # dy' is written where dx will be, unless it is wanted itself
        through = torch.empty_like(kept) if residual else out
    plain = kept.dtype != torch.float32 or kept[0, 0].numel() <= PLAIN_ROWS
    weight, bias = weight.float(), bias.float()
    maps = [rows_of(each) for each in (towards, kept, kept if signs is None else signs, through, out)]
    sums = []
    for sample, (dy, held, signed, slopes, result) in enumerate(zip(*maps, strict=True)):
        rows = _Rows(
            towards=dy, kept=held, signs=signed, through=slopes, out=result, slope=slope, recover=recover,
            centre=bias if recover else mean[sample], scale=_reciprocal(weight) if recover else rstd[sample],
            gain=rstd[sample] * weight,
        )  # fmt: skip
        sums.append(_plain_gradient(rows, weight) if plain else _gradient(rows))
    dweight, dbias = torch.stack(sums).sum(0).float()
    return out, dweight, dbias, through if residual else None


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """One sample in the backward: maps (S, C) and float32 vectors (C,).

    x_hat is (features - centre) scale, features being kept with the activation undone where `recover`, else kept;
    gain is weight rstd. through: where dy' is written, or is without an activation; out: where dx is written.
    """

    towards: Tensor
    kept: Tensor
    signs: Tensor
    through: Tensor
    out: Tensor
    slope: float
    recover: bool
    centre: Tensor
    scale: Tensor
    gain: Tensor

    def features(self, part: slice, scratch: Tensor) -> Tensor:
        """Of some rows, (s, C), in scratch or in kept itself."""
        if not self.recover or self.slope == 1:
            return self.kept[part]
        undone = scratch[: part.stop - part.start]
        torch.ops.aten.leaky_relu.out(self.kept[part], 1 / self.slope, out=undone)  # LeakyReLU undoes LeakyReLU
        return undone

    def slopes(self, part: slice) -> Tensor:
        """dy' of some rows, (s, C), written to through."""
        result = self.through[part]
        if self.slope != 1:
            given = (self.towards[part], self.signs[part], self.slope, True)
            torch.ops.aten.leaky_relu_backward.grad_input(*given, grad_input=result)
        return result


def _reciprocal(weight: Tensor) -> Tensor:
    """1 / weight; 0 where that says nothing."""
    return torch.where(weight.abs() < SMALLEST_WEIGHT, 0.0, 1 / weight)


def _plain_gradient(rows: _Rows, weight: Tensor) -> Tensor:
    """Writes dx; sums of dy' x_hat and dy', (2, C) float32: by the kernel of torch's batch norm, a sample a call."""
    whole = slice(0, len(rows.kept))
    scratch = torch.empty_like(rows.kept) if rows.recover else rows.kept
    factor = rows.gain * weight if rows.recover else weight  # the kernel multiplies it by scale
    dx, product, total = torch.ops.aten.native_batch_norm_backward(
        rows.slopes(whole), rows.features(whole, scratch),
        factor, None, None, rows.centre, rows.scale, True, 0.0, [True, True, True],
    )  # fmt: skip
    rows.out.copy_(dx)
    return torch.stack((product, total))


def _gradient(rows: _Rows) -> Tensor:
    """Writes dx; sums of dy' x_hat and dy', (2, C) float64. Part by part, so that each step finds it in the cache."""
    voxels, channels = rows.kept.shape
    step = min(max(1, GRADIENT_VALUES // channels // WIDE_ROWS) * WIDE_ROWS, WIDE_ROWS * ADDED_ROWS)
    parts = [slice(start, min(start + step, voxels)) for start in range(0, voxels, step)]
    scratch = rows.kept.new_empty((min(step, voxels), channels))
    vectors = _Wide(torch.stack((torch.ones_like(rows.scale), rows.centre, rows.scale)))
    sums = sum(_part_sums(rows.slopes(part), rows.features(part, scratch), vectors) for part in parts)
    assert isinstance(sums, Tensor)
    product, total = sums / voxels
    slant = -rows.gain * product * rows.scale
    vectors = _Wide(torch.stack((-rows.gain * total - slant * rows.centre, rows.gain.double(), slant)).float())
    for part in parts:
        _write_part(rows.through[part], rows.features(part, scratch), vectors, rows.out[part])
    return sums


class _Wide:
    """Vectors (k, C) repeated for rows that are read several as one, because torch's loops work along the last axis."""

    def __init__(self, vectors: Tensor):
        self._vectors = {1: vectors, WIDE_ROWS: vectors.repeat(1, WIDE_ROWS)}

    def of(self, rows: Tensor) -> Tensor:
        """For the rows (s, C): (k, C) or, where they can be read WIDE_ROWS as one, (k, WIDE_ROWS C)."""
        return self._vectors[1 if len(rows) % WIDE_ROWS else WIDE_ROWS]


def _part_sums(slopes: Tensor, features: Tensor, vectors: _Wide) -> Tensor:
    """Of some rows (s, C): sums of dy' x_hat and dy', (2, C) float64, from float32 ones of a sixteenth of the rows."""
    ones, centre, scale = vectors.of(slopes)
    shape = (-1, len(ones))
    _, product, total = torch.ops.aten.native_batch_norm_backward(
        slopes.view(shape), features.view(shape), ones, None, None, centre, scale, True, 0.0, [False, True, True]
    )
    return torch.stack((product, total)).view(2, -1, slopes.shape[1]).sum(1, dtype=torch.float64)


def _write_part(slopes: Tensor, features: Tensor, vectors: _Wide, out: Tensor) -> None:
    """dx of some rows (s, C): constant + gain dy' + slant features."""
    constant, gain, slant = vectors.of(slopes)
    shape = (-1, len(constant))
    result = out.view(shape)
    torch.addcmul(constant, slopes.view(shape), gain, out=result)
    result.addcmul_(features.view(shape), slant)
