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

Gradients, with x_hat = (x - mean) / sqrt(variance + eps), dy' = dy (1 where z > 0, else slope), means over the voxels:

    dx = weight / sqrt(variance + eps) (dy' - mean(dy') - x_hat mean(dy' x_hat))          dresidual = dy'
    dweight = sum(dy' x_hat)        dbias = sum(dy')                                      sums over samples too

Bytes: 4 A read and 1 A written. One map is kept for them, either of two:

    y   where it can be undone: x_hat = (z - bias) / weight, z = y where y > 0, else y / slope. The next convolution
        keeps y for its own gradient, so that the norm keeps nothing, and may write y over x. Not with a residual, which
        is lost in the sum, nor where slope or weight is near 0.
    x   always right. For the sign of z y too with a residual, and on the CPU; that again is the next convolution's.

What y costs in bfloat16: x_hat recovered from it errs by 1.6e-3 (root mean square) where weight is 1 and bias 0, as an
x_hat kept in bfloat16 does; by 2.6e-3 of weights between 0.5 and 1.5 and normal biases; by 2.9e-2 where bias is 16
weights. dx, rounded itself, errs by 1.8e-3 of its norm and not 1.7e-3 where dy has a mean of 0.3 and follows x.

`recoverable` says where y is enough: |weight| at least a sixteenth of |bias|, and not near 0. On the CPU it is asked at
every call. On a GPU the answer would have to be waited for, once a norm and step, and no CUDA graph could hold the
step: x is kept there unless the caller, who has looked before, says `recover` (UNet.choose_kept_maps does).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.dispatch import Implementation, choose_instance_norm_act
from kernels.instance_norm_act_operator import instance_norm_act_operator, instance_norm_act_operator_backward

SMALLEST_SLOPE = 1e-3  # that an activation can be undone with; float16 keeps too few digits of a smaller multiple
SMALLEST_SHARE = 1 / 16  # of |bias| that |weight| has where x_hat can be recovered
SMALLEST_WEIGHT = 1e-3  # that x_hat can be recovered with; below it float16 keeps too few digits of slope weight x_hat


def instance_norm_act_reference(
    x: Tensor, weight: Tensor, bias: Tensor, *, eps: float, slope: float, residual: Tensor | None = None
) -> Tensor:
    """What `instance_norm_act` computes, by torch's own layers; torch's autograd goes through it."""
    y = F.instance_norm(x, weight=weight, bias=bias, eps=eps)
    if residual is not None:
        y = y + residual
    return y if slope == 1 else F.leaky_relu_(y, slope)


def instance_norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    slope: float,
    residual: Tensor | None = None,
    inplace: bool = False,
    recover: bool | None = None,
) -> Tensor:
    """Normalises every channel of every sample, adds the residual and applies LeakyReLU.

    Args:
        x: (N, C, D, H, W), any floating type, layout and device; channels_last_3d is fast.
        weight, bias: (C,), of the norm.
        eps: added to the variance.
        slope: of the LeakyReLU below zero, 0 or more; 1 is no activation.
        residual: as x; added before the activation.
        inplace: whether x may be overwritten where that saves memory. Use the result: x may also be left as it is. Not
            for an x whose value the gradient of an earlier operation needs; a convolution's does not need its answer.
        recover: whether the gradients recover x_hat from y instead of keeping x (see above), where residual and slope
            allow it; None: on the CPU where `recoverable`, on a GPU not. A weight that has gone to 0 since the caller
            looked loses its gradient, and x what comes through it; nothing becomes infinite.

    Returns:
        (N, C, D, H, W), type of x; layout of x from the fast forms, contiguous from the reference.

    Raises:
        ValueError: a negative slope; one voxel a channel, which has no variance (torch's rule).
    """
    if slope < 0:
        raise ValueError(f"slope {slope}: a LeakyReLU has a slope of 0 or more")
    implementation = choose_instance_norm_act(x, weight, bias, residual).implementation
    if implementation == "reference":
        return instance_norm_act_reference(x, weight, bias, eps=eps, slope=slope, residual=residual)
    if residual is not None and residual.data_ptr() == x.data_ptr():
        inplace = False  # the residual is read after the norm is written
    given = [x, weight, bias] if residual is None else [x, weight, bias, residual]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        recover = residual is None and slope >= SMALLEST_SLOPE and _recovers(recover, weight, bias)
        inplace = inplace and recover and not (x.is_leaf and x.requires_grad) and x._base is None
        form = Form(implementation=implementation, eps=eps, slope=slope, inplace=inplace, recover=recover)
        return InstanceNormAct.apply(x, weight, bias, residual, form)  # type: ignore[no-any-return, no-untyped-call]
    return _forward(implementation, x, weight, bias, eps=eps, slope=slope, residual=residual, inplace=inplace)[0]


def recoverable(weight: Tensor, bias: Tensor) -> Tensor:
    """Whether y is enough to recover x_hat in every channel: weight, bias (C,) -> one bool, on their device."""
    smallest = (SMALLEST_SHARE * bias.detach().abs()).clamp_(min=SMALLEST_WEIGHT)
    return (weight.detach().abs() >= smallest).all()


def _recovers(asked: bool | None, weight: Tensor, bias: Tensor) -> bool:
    if asked is not None:
        return asked
    return weight.is_cpu and bool(recoverable(weight, bias))


@dataclass(frozen=True, kw_only=True)
class Form:
    """How a norm that wants gradients is computed: by which fast form, and whether it keeps y (`recover`) or x."""

    implementation: Implementation
    eps: float
    slope: float
    inplace: bool
    recover: bool


class InstanceNormAct(torch.autograd.Function):
    """`instance_norm_act` by a fast form, with its gradients; these have none of their own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, form: Form) -> Tensor:
        """y (N, C, D, H, W); see `instance_norm_act`. Keeps one map, or x and y with a residual, and (N, C) moments."""
        y, mean, rstd = _forward(
            form.implementation,
            x, weight, bias, eps=form.eps, slope=form.slope, residual=residual, inplace=form.inplace,
        )  # fmt: skip
        if form.inplace:
            ctx.mark_dirty(x)
        signs = None
        if not form.recover and form.slope != 1 and (residual is not None or form.implementation == "operator"):
            signs = y
        ctx.save_for_backward(y if form.recover else x, signs, weight, bias, mean, rstd)
        ctx.form = form
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, towards: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight, bias and residual from that of y."""
        form: Form = ctx.form
        kept, signs, weight, bias, mean, rstd = ctx.saved_tensors
        towards = towards.contiguous(memory_format=torch.channels_last_3d)
        dx, dweight, dbias, through = _backward(
            form.implementation,
            towards, kept, signs, weight, bias, mean, rstd,
            slope=form.slope, recover=form.recover, residual=ctx.needs_input_grad[3],
        )  # fmt: skip
        return dx, dweight.to(weight.dtype), dbias.to(bias.dtype), through, None


def _forward(implementation: str, *given: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean and rstd by a fast form."""
    if implementation == "operator":
        return instance_norm_act_operator(*given, **options)
    from kernels.instance_norm_act_triton import instance_norm_act_triton

    return instance_norm_act_triton(*given, **options)


def _backward(implementation: str, *given: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dx, dweight, dbias and the gradient of the residual by a fast form."""
    if implementation == "operator":
        return instance_norm_act_operator_backward(*given, **options)
    from kernels.instance_norm_act_backward_triton import instance_norm_act_triton_backward

    return instance_norm_act_triton_backward(*given, **options)
