"""What every form of instance_norm_act is held to: tables of maps and tolerances, the formula and its gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

EPS = 1e-5

# Largest |y - exact| / (1 + |exact| + |residual|), exact in float64 from the same rounded x. A 16-bit y is rounded by
# the norm, the sum and the activation, 2^-9 (bfloat16) or 2^-12 (float16) each; Triton's interpreter cuts bfloat16 off.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}

# The same of every gradient in the measure of `gradient_errors`.
GRADIENT_TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A map (N, C, D, H, W): normal values, in `background` of its voxels, the first ones, the constant `level`."""

    shape: tuple[int, int, int, int, int]
    mean: float = 0.5
    deviation: float = 2.0
    background: float = 0.0
    level: float = -0.3
    slope: float = 0.01
    residual: bool = False
    tolerance: float | None = None  # of float32, where it is not the tables'
    weights: tuple[float, ...] = ()  # of the first channels; the others are between 0.5 and 1.5


CASES = {
    "63 voxels": Case(shape=(1, 32, 7, 3, 3)),
    "100 voxels, 3 samples, residual": Case(shape=(3, 48, 4, 5, 5), residual=True),
    "101 voxels in a line": Case(shape=(2, 3, 101, 1, 1), slope=0.2),
    "1009 voxels, 1 channel": Case(shape=(2, 1, 1, 1009, 1)),
    "two voxels": Case(shape=(1, 32, 1, 1, 2)),
    "the bottleneck": Case(shape=(1, 320, 6, 6, 6)),
    "several blocks": Case(shape=(1, 96, 17, 13, 11), residual=True),
    "several blocks of few channels": Case(shape=(2, 5, 17, 19, 11), slope=1.0, residual=True),
    "no activation": Case(shape=(1, 32, 5, 7, 9), slope=1.0),
    "ReLU": Case(shape=(1, 40, 5, 7, 9), slope=0.0),
    "30 channels": Case(shape=(1, 30, 4, 5, 5)),
    "100 channels": Case(shape=(1, 100, 5, 6, 7)),
    "weights near 0 and below": Case(shape=(2, 32, 7, 3, 3), weights=(0.0, 1e-30, 1e-6, -1e-3, -0.7, -1.3)),
    "the same with a residual": Case(shape=(2, 32, 7, 3, 3), weights=(0.0, 1e-30, -0.7), residual=True),
    "constant": Case(shape=(1, 32, 13, 11, 17), background=1.0),
    "mostly background": Case(shape=(2, 32, 13, 11, 17), background=0.8),
    "small values": Case(shape=(1, 32, 5, 7, 9), mean=1e-4, deviation=1e-3),
    "mean 30": Case(shape=(2, 32, 13, 11, 17), mean=30.0, deviation=1.0),
    "mean 1000": Case(shape=(2, 32, 13, 11, 17), mean=1000.0, deviation=1.0, tolerance=5e-4),
    "an outlier first": Case(shape=(1, 32, 13, 11, 17), mean=1000.0, background=1e-9, level=0.0),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """The tensors of a case: x (N, C, D, H, W) channels_last_3d, weight and bias (C,) float32, residual as x."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    residual: Tensor | None


def problem(case: Case, dtype: torch.dtype, device: torch.device | str = "cpu") -> Problem:
    """The tensors of a case, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.shape, generator=generator) * case.deviation + case.mean
    voxels = x[0, 0].numel()
    if case.background:
        x.flatten(2)[:, :, : max(1, round(case.background * voxels))] = case.level
    residual = torch.randn(case.shape, generator=generator) if case.residual else None
    weight = torch.rand(case.shape[1], generator=generator) + 0.5
    weight[: len(case.weights)] = torch.tensor(case.weights)
    return Problem(
        x=_laid_out(x, dtype, device),
        weight=weight.to(device),
        bias=torch.randn(case.shape[1], generator=generator).to(device),
        residual=None if residual is None else _laid_out(residual, dtype, device),
    )


def _laid_out(x: Tensor, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """x with its channels last in memory, also where a single channel leaves that open."""
    rows = x.permute(0, 2, 3, 4, 1).to(device, dtype).contiguous()
    return rows.permute(0, 4, 1, 2, 3)


def exact(given: Problem, slope: float, positive: Tensor | None = None) -> Tensor:
    """The formula in float64; autograd can follow it. positive: where the activation is 1, if not by its own sign."""
    x, weight, bias = given.x.double(), given.weight.double(), given.bias.double()
    axes = (2, 3, 4)
    centred = x - x.mean(axes, keepdim=True)
    y = centred / (centred.square().mean(axes, keepdim=True) + EPS).sqrt()
    y = y * weight[:, None, None, None] + bias[:, None, None, None]
    if given.residual is not None:
        y = y + given.residual.double()
    return torch.where(y > 0 if positive is None else positive, y, slope * y)


def error(y: Tensor, given: Problem, case: Case) -> float:
    """The largest error of y in the measure of TOLERANCES."""
    expected = exact(given, case.slope).detach()
    scale = 1 + expected.abs() + (0 if given.residual is None else given.residual.double().abs())
    return float(((y.double() - expected).abs() / scale).max())


def tolerance(case: Case, dtype: torch.dtype, table: Mapping[torch.dtype, float] = TOLERANCES) -> float:
    """What error, or with GRADIENT_TOLERANCES every one of gradient_errors, may be at most."""
    return case.tolerance if case.tolerance is not None and dtype == torch.float32 else table[dtype]


def towards(given: Problem) -> Tensor:
    """A gradient of y, as x, that depends on x, so that no term of the gradient of x is small."""
    generator = torch.Generator().manual_seed(1)
    x = given.x.float()
    scaled = (x - x.mean((2, 3, 4), keepdim=True)) / (x.std((2, 3, 4), keepdim=True) + 1e-3)
    noise = torch.randn(x.shape, generator=generator).to(x.device)
    return (0.3 + 0.5 * scaled + noise).to(given.x)  # laid out as x


def leaves(given: Problem) -> Problem:
    """The same tensors, in the same memory, whose gradients are wanted."""
    x, weight, bias = (each.detach().requires_grad_() for each in (given.x, given.weight, given.bias))
    residual = None if given.residual is None else given.residual.detach().requires_grad_()
    return Problem(x=x, weight=weight, bias=bias, residual=residual)


def gradients(y: Tensor, of: Problem, direction: Tensor) -> dict[str, Tensor]:
    """By autograd, those of every tensor of the problem, by name."""
    tensors = {"x": of.x, "weight": of.weight, "bias": of.bias}
    if of.residual is not None:
        tensors["residual"] = of.residual
    return dict(zip(tensors, torch.autograd.grad(y, list(tensors.values()), direction), strict=True))


def gradient_errors(found: Mapping[str, Tensor], y: Tensor, given: Problem, slope: float) -> dict[str, float]:
    """The largest error of every gradient that `towards` gives, against float64 on the piece that y took.

    In shares of what is added up: of |dx| + |weight| rstd rms(dy') (1 + |x_hat|), of sum(|dy'| (1 + |x_hat|)), of
    sum(|dy'|), of |dy|. The slope is taken by the sign of y: of two answers beside 0, an allowed error apart, each has
    its own slope. A y that float16 has rounded to 0 says nothing: of its voxel either slope is right.
    """
    of, direction, axes = leaves(given), towards(given), (2, 3, 4)
    expected = gradients(exact(of, slope, y.detach() > 0), of, direction.double())
    through = direction.double() * torch.where(y.detach() > 0, 1.0, slope)
    x = given.x.double()
    rstd = (x.var(axes, correction=0, keepdim=True) + EPS).rsqrt()
    x_hat = (x - x.mean(axes, keepdim=True)) * rstd
    gain = given.weight.double().abs()[:, None, None, None] * rstd
    rms = through.square().mean(axes, keepdim=True).sqrt()
    scales = {
        "x": expected["x"].double().abs() + gain * (1 + x_hat.abs()) * rms,
        "weight": (through.abs() * (1 + x_hat.abs())).sum((0, *axes)),
        "bias": through.abs().sum((0, *axes)),
        "residual": direction.double().abs(),
    }
    tiny = torch.finfo(torch.float64).tiny  # a channel of weight 0 has no dx: 0 of 0
    told = (y.detach() != 0) | (slope == 0)
    errors = {}
    for name in expected:
        off = (found[name].double() - expected[name].double()).abs() / (scales[name] + tiny)
        errors[name] = float((off[told] if off.ndim == 5 else off).max())
    return errors
