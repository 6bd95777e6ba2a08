"""Instance norm and LeakyReLU of the network's maps: ours on channels_last_3d, and torch's layers in both layouts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
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
MEAN, DEVIATION = 1.0, 2.0
EPS, SLOPE = 1e-5, 0.01
GROUP_NORM = "group norm, channels last"


def comparisons(quick: bool) -> list[Comparison]:
    """Full resolution, one level down and the bottleneck, float32 and bfloat16."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes = QUICK_SHAPES if quick else GPU_SHAPES if device.type == "cuda" else CPU_SHAPES
    return [
        Comparison(what=_what(shape, dtype), run=partial(one, shape, dtype, device))
        for shape in shapes
        for dtype in TOLERANCES
    ]


def _what(shape: Shape, dtype: torch.dtype) -> str:
    return f"{shape} {str(dtype).removeprefix('torch.')}"


@torch.inference_mode()
def one(shape: Shape, dtype: torch.dtype, device: torch.device) -> Measurement:
    """One map (N, C, D, H, W), after the errors of ours and of group norm, which is fast and less exact, are known.

    Raises:
        AssertionError: ours is wrong, or is not the fast form.
    """
    generator = torch.Generator().manual_seed(0)
    contiguous = (torch.randn(shape, generator=generator) * DEVIATION + MEAN).to(device, dtype)
    x = contiguous.to(memory_format=torch.channels_last_3d)
    weight = (torch.rand(shape[1], generator=generator) + 0.5).to(device)
    bias = torch.randn(shape[1], generator=generator).to(device)
    choice = choose_instance_norm_act(x, weight, bias)
    assert choice.implementation != "reference", choice.why
    calls = _contenders(x, contiguous, weight, bias)
    errors = {name: largest_error(calls[name](), x, weight, bias) for name in ("strokenet", GROUP_NORM)}
    assert errors["strokenet"] < TOLERANCES[dtype], f"largest error {errors['strokenet']:.1e}"
    found = ", ".join(f"{name} {value:.1e}" for name, value in errors.items())
    answers = f"{choice.implementation}; largest errors: {found}"
    return replace(in_turn("norm", _what(shape, dtype), calls, device=device), answers=answers, floor_ms=_floor_ms(x))


def _floor_ms(x: Tensor) -> float | None:
    """Reading the map once and writing it once, by the copy of this machine; None where a cache may hold the map."""
    if x.nbytes < OUT_OF_CACHE:
        return None
    return 1000 * 2 * x.nbytes / ceilings(torch.float32, x.device).bytes


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
