"""The network's convolutions: as inference runs them, on channels_last_3d, and torch's own layer on contiguous maps.

Neither has a bias: the inference form drops it before a norm (strokenet/model/inference.py), which is no merit of the
convolution. Answers are compared with float32 of the same rounded numbers; the floor is a matrix product's speed.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from bench.ceilings import ceilings, module_flops
from bench.measure import Comparison, Measurement, in_turn
from strokenet.model.device import choose_dtype, onednn_computes
from strokenet.model.inference import OneDnnConvolution

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}  # of |y - exact| / (1 + |exact|)
TF32 = 5e-3  # the same for float32 on a GPU, which rounds factors to 11 bits


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One convolution, 3x3x3, or transposed 2x2x2 of stride 2. edge: voxels of its input along each axis."""

    inputs: int
    outputs: int
    edge: int
    stride: int = 1
    transposed: bool = False

    def __str__(self) -> str:
        kind = (
            "transposed 2x2x2" if self.transposed else "3x3x3" + (f" stride {self.stride}" if self.stride > 1 else "")
        )
        return f"{kind}, {self.inputs} to {self.outputs} at {self.edge}^3"

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """Of the input (N, C, D, H, W)."""
        return (1, self.inputs, self.edge, self.edge, self.edge)

    def module(self) -> nn.Conv3d | nn.ConvTranspose3d:
        """Torch's layer, its weights drawn so that the answers are of deviation about 1."""
        if self.transposed:
            made: nn.Conv3d | nn.ConvTranspose3d = nn.ConvTranspose3d(self.inputs, self.outputs, 2, 2, bias=False)
        else:
            made = nn.Conv3d(self.inputs, self.outputs, 3, self.stride, 1, bias=False)
        products = self.inputs * (1 if self.transposed else 27)
        nn.init.normal_(made.weight, std=products**-0.5)
        return made.requires_grad_(False)


LAYERS = (
    Layer(inputs=2, outputs=32, edge=96),
    Layer(inputs=32, outputs=32, edge=96),
    Layer(inputs=64, outputs=64, edge=48),
    Layer(inputs=320, outputs=320, edge=6),
    Layer(inputs=32, outputs=64, edge=96, stride=2),
    Layer(inputs=64, outputs=32, edge=48, transposed=True),
)


def comparisons(quick: bool) -> list[Comparison]:
    """Every layer in the arithmetic that inference takes here, and in float32. quick: half the edge, 3 repeats."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layers = [replace(layer, edge=layer.edge // 2) for layer in LAYERS] if quick else LAYERS
    types = dict.fromkeys((choose_dtype("auto", device), torch.float32))
    return [
        Comparison(what=_what(layer, dtype), run=partial(one, layer, dtype, device, repeats=3 if quick else 7))
        for layer in layers
        for dtype in types
    ]


def _what(layer: Layer, dtype: torch.dtype) -> str:
    return f"{layer}, {str(dtype).removeprefix('torch.')}"


@torch.inference_mode()
def one(layer: Layer, dtype: torch.dtype, device: torch.device, *, repeats: int) -> Measurement:
    """One layer, after the error of ours is known.

    Raises:
        AssertionError: it is too large.
    """
    torch.manual_seed(0)
    stock = layer.module().to(device, dtype)
    x = torch.randn(layer.shape).to(device, dtype)
    rows_of_channels = x.to(memory_format=torch.channels_last_3d)
    ours = _inference_form(stock, dtype, device)
    largest = _largest_error(ours(rows_of_channels), stock, x)
    allowed = TF32 if device.type == "cuda" and dtype == torch.float32 else TOLERANCES[dtype]
    assert largest < allowed, f"largest error {largest:.1e}"
    calls = {"strokenet": lambda: ours(rows_of_channels), "torch, contiguous": lambda: stock(x)}
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=True):
        measured = in_turn("conv", _what(layer, dtype), calls, device=device, repeats=repeats)
    return replace(measured, answers=f"largest error {largest:.1e}", floor_ms=_floor_ms(layer, dtype, device))


def _inference_form(stock: nn.Conv3d | nn.ConvTranspose3d, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The layer as InferenceNetwork makes it."""
    ours = copy.deepcopy(stock)
    ours.weight = nn.Parameter(ours.weight.contiguous(memory_format=torch.channels_last_3d), requires_grad=False)
    if isinstance(ours, nn.Conv3d) and device.type == "cpu" and onednn_computes(dtype):
        return OneDnnConvolution(ours)
    return ours


def _largest_error(y: Tensor, stock: nn.Module, x: Tensor) -> float:
    """Of y, in the measure of TOLERANCES, against torch's layer in float32."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        exact = copy.deepcopy(stock).float()(x.float())
    return float(((y.float() - exact).abs() / (1 + exact.abs())).max())


def _floor_ms(layer: Layer, dtype: torch.dtype, device: torch.device) -> float:
    with torch.device("meta"):
        flops = module_flops(layer.module(), layer.shape)
    return 1000 * flops / ceilings(dtype, device).flops
