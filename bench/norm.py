"""Instance norm and LeakyReLU of the network's maps: ours on channels_last_3d, and torch's layers in both layouts.

Alone, as in inference, and with the gradients of map, weight and bias, as in training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.ceilings import ceilings
from bench.measure import Comparison, Measurement, in_turn
from kernels.dispatch import choose_instance_norm_act
from kernels.instance_norm_act import instance_norm_act, instance_norm_act_reference

Shape = tuple[int, int, int, int, int]

CPU_SHAPES: tuple[Shape, ...] = ((1, 32, 96, 96, 96), (1, 64, 48, 48, 48), (1, 320, 6, 6, 6))
GPU_SHAPES: tuple[Shape, ...] = ((1, 32, 128, 128, 128), (2, 32, 128, 128, 128), (2, 64, 64, 64, 64), (2, 320, 8, 8, 8))
QUICK_SHAPES: tuple[Shape, ...] = ((1, 32, 48, 48, 48), (1, 320, 6, 6, 6))
OUT_OF_CACHE = 10**8  # bytes: more than the last cache of a common processor or GPU
TOLERANCES = {torch.float32: 5e-5, torch.bfloat16: 8e-3}  # of |y - exact| / (1 + |exact|)
GRADIENT_TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # of |dx - exact| in the norm of exact
NEAR_0 = 1e-5
MEAN, DEVIATION = 1.0, 2.0
EPS, SLOPE = 1e-5, 0.01
GROUP_NORM = "group norm, channels last"
WITH_GRADIENTS = ", with gradients"


def comparisons(quick: bool) -> list[Comparison]:
    """Full resolution, one level down and the bottleneck, float32 and bfloat16, without gradients and with them."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes = QUICK_SHAPES if quick else GPU_SHAPES if device.type == "cuda" else CPU_SHAPES
    return [
        Comparison(what=_what(shape, dtype) + suffix, run=partial(run, shape, dtype, device))
        for suffix, run in (("", one), (WITH_GRADIENTS, one_with_gradients))
        for shape in shapes
        for dtype in TOLERANCES
    ]


def _what(shape: Shape, dtype: torch.dtype) -> str:
    return f"{shape} {str(dtype).removeprefix('torch.')}"


@dataclass(frozen=True, kw_only=True, eq=False)
class _Maps:
    """What is normed: one map (N, C, D, H, W) in both layouts, weight and bias (C,)."""

    contiguous: Tensor
    x: Tensor
    weight: Tensor
    bias: Tensor


def _maps(shape: Shape, dtype: torch.dtype, device: torch.device) -> _Maps:
    """The same at every call.

    Raises:
        AssertionError: what would run of ours is not the fast form.
    """
    generator = torch.Generator().manual_seed(0)
    contiguous = (torch.randn(shape, generator=generator) * DEVIATION + MEAN).to(device, dtype)
    x = contiguous.to(memory_format=torch.channels_last_3d)
    weight = (torch.rand(shape[1], generator=generator) + 0.5).to(device)
    bias = torch.randn(shape[1], generator=generator).to(device)
    choice = choose_instance_norm_act(x, weight, bias)
    assert choice.implementation != "reference", choice.why
    return _Maps(contiguous=contiguous, x=x, weight=weight, bias=bias)


@torch.inference_mode()
def one(shape: Shape, dtype: torch.dtype, device: torch.device) -> Measurement:
    """One map (N, C, D, H, W), after the errors of ours and of group norm, which is fast and less exact, are known.

    Raises:
        AssertionError: ours is wrong, or is not the fast form.
    """
    maps = _maps(shape, dtype, device)
    x, weight, bias = maps.x, maps.weight, maps.bias
    calls = _contenders(x, maps.contiguous, weight, bias)
    errors = {name: largest_error(calls[name](), x, weight, bias) for name in ("strokenet", GROUP_NORM)}
    assert errors["strokenet"] < TOLERANCES[dtype], f"largest error {errors['strokenet']:.1e}"
    found = ", ".join(f"{name} {value:.1e}" for name, value in errors.items())
    answers = f"{choose_instance_norm_act(x, weight, bias).implementation}; largest errors: {found}"
    measured = in_turn("norm", _what(shape, dtype), calls, device=device)
    return replace(measured, answers=answers, floor_ms=_floor_ms(x, passes=2))


def _floor_ms(x: Tensor, *, passes: int) -> float | None:
    """Reading or writing so many maps, by the copy of this machine; None where a cache may hold the map."""
    if x.nbytes < OUT_OF_CACHE:
        return None
    return 1000 * passes * x.nbytes / ceilings(torch.float32, x.device).bytes


def _contenders(x: Tensor, contiguous: Tensor, weight: Tensor, bias: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The calls; ours in place normalises its own copy again and again, which changes no time."""
    own = x.clone()
    alike = weight.to(x.dtype), bias.to(x.dtype)  # as the layers of a network of this type hold them

    def stock(features: Tensor) -> Tensor:
        return instance_norm_act_reference(features, *alike, eps=EPS, slope=SLOPE)

    calls: dict[str, Callable[[], Tensor]] = {
        "strokenet, in place": lambda: instance_norm_act(own, weight, bias, eps=EPS, slope=SLOPE, inplace=True),
        "strokenet": lambda: instance_norm_act(x, weight, bias, eps=EPS, slope=SLOPE),
        "torch, contiguous": lambda: stock(contiguous),
        "torch, channels last": lambda: stock(x),
        GROUP_NORM: lambda: F.leaky_relu_(F.group_norm(x, x.shape[1], *alike, EPS), SLOPE),
    }
    if x.is_cuda:
        compiled = torch.compile(stock)
        calls["torch.compile, contiguous"] = lambda: compiled(contiguous)
        calls["torch.compile, channels last"] = lambda: compiled(x)
    return calls


def one_with_gradients(shape: Shape, dtype: torch.dtype, device: torch.device) -> Measurement:
    """One map forward and backward, after the error of dx, of ours and of group norm, is known.

    The floor is x, dy and y read once, y and dx written once.

    Raises:
        AssertionError: ours is wrong, or is not the fast form.
    """
    maps = _maps(shape, dtype, device)
    generator = torch.Generator().manual_seed(1)
    towards = torch.randn(shape, generator=generator).to(device, dtype)
    calls = _contenders_with_gradients(maps, towards)
    expected, told = exact_gradient(maps, towards)
    errors = {name: _gradient_error(calls[name]()[0], expected, told) for name in ("strokenet", GROUP_NORM)}
    assert errors["strokenet"] < GRADIENT_TOLERANCES[dtype], f"error {errors['strokenet']:.1e}"
    found = ", ".join(f"{name} {value:.1e}" for name, value in errors.items())
    form = choose_instance_norm_act(maps.x, maps.weight, maps.bias).implementation
    measured = in_turn("norm", _what(shape, dtype) + WITH_GRADIENTS, calls, device=device)
    answers = f"{form}; errors of dx in its norm: {found}"
    return replace(measured, answers=answers, floor_ms=_floor_ms(maps.x, passes=5))


def _contenders_with_gradients(maps: _Maps, towards: Tensor) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """The calls, each to the gradients of map, weight and bias; towards: that of the answer, contiguous."""
    rows = towards.to(memory_format=torch.channels_last_3d)
    own = [maps.x.clone(), maps.weight.clone().requires_grad_(), maps.bias.clone().requires_grad_()]
    ours = _leaves(maps.x, maps.weight, maps.bias)
    alike = maps.weight.to(maps.x.dtype), maps.bias.to(maps.x.dtype)
    first, last = _leaves(maps.contiguous, *alike), _leaves(maps.x, *alike)

    def in_place() -> tuple[Tensor, ...]:
        """Of no leaf, which may not be overwritten: dx is computed, and not asked for."""
        y = instance_norm_act(own[0].detach(), *own[1:], eps=EPS, slope=SLOPE, inplace=True, recover=True)
        return torch.autograd.grad(y, own[1:], rows)

    def stock(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return instance_norm_act_reference(x, weight, bias, eps=EPS, slope=SLOPE)

    def group(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.leaky_relu_(F.group_norm(x, x.shape[1], weight, bias, EPS), SLOPE)

    grad = torch.autograd.grad
    calls: dict[str, Callable[[], tuple[Tensor, ...]]] = {
        "strokenet, in place": in_place,
        "strokenet": lambda: grad(instance_norm_act(*ours, eps=EPS, slope=SLOPE), ours, rows),
        "torch, contiguous": lambda: grad(stock(*first), first, towards),
        "torch, channels last": lambda: grad(stock(*last), last, rows),
        GROUP_NORM: lambda: grad(group(*last), last, rows),
    }
    if towards.is_cuda:
        compiled = torch.compile(stock)
        calls["torch.compile, contiguous"] = lambda: grad(compiled(*first), first, towards)
        calls["torch.compile, channels last"] = lambda: grad(compiled(*last), last, rows)
    return calls


def _leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def exact_gradient(maps: _Maps, towards: Tensor) -> tuple[Tensor, Tensor]:
    """Of the map, by torch's layer in float64; where y is not so near 0 that a rounding may decide on its slope.

    Both (N, C, D, H, W), where the map is; computed 8 channels at a time, to save memory.
    """
    parts, told = [], []
    for first in range(0, maps.x.shape[1], 8):
        of = slice(first, first + 8)
        x = maps.contiguous[:, of].double().contiguous().requires_grad_()
        y = instance_norm_act_reference(x, maps.weight[of].double(), maps.bias[of].double(), eps=EPS, slope=SLOPE)
        parts.append(torch.autograd.grad(y, x, towards[:, of].double())[0])
        told.append(y.detach().abs() > NEAR_0)
    return torch.cat(parts, 1), torch.cat(told, 1)


def _gradient_error(found: Tensor, expected: Tensor, told: Tensor) -> float:
    return float((found.double() - expected)[told].norm() / expected.norm())


def largest_error(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> float:
    """Of y, in the measure of TOLERANCES, against torch's layer in float64; 8 channels at a time, to save memory."""
    worst = 0.0
    for first in range(0, x.shape[1], 8):
        of = slice(first, first + 8)
        exact = instance_norm_act_reference(
            x[:, of].double().contiguous(), weight[of].double(), bias[of].double(), eps=EPS, slope=SLOPE
        )
        worst = max(worst, float(((y[:, of].double() - exact).abs() / (1 + exact.abs())).max()))
    return worst
