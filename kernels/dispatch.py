"""One place that says which implementation of an operator runs, and why.

STROKENET_KERNELS=auto (default) takes the fastest implementation that is built for the device; =reference takes the
plain one everywhere, to compare or to debug. `strokenet doctor` prints the choices.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Implementation = Literal["reference", "operator", "cc3d", "triton"]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What runs for one operator on one device, and the reason in a few words."""

    operator: str
    implementation: Implementation
    why: str


def wanted() -> Literal["auto", "reference"]:
    """The value of STROKENET_KERNELS.

    Raises:
        ValueError: another value than auto or reference.
    """
    value = os.environ.get("STROKENET_KERNELS", "auto")
    if value == "auto":
        return "auto"
    if value == "reference":
        return "reference"
    raise ValueError(f"STROKENET_KERNELS is {value!r}; allowed: auto, reference")


def choose_resample() -> Choice:
    """Which resampling runs: one matrix product an axis, or scipy's zoom as it is."""
    if wanted() == "reference":
        return Choice(operator="resample", implementation="reference", why="STROKENET_KERNELS=reference")
    return Choice(operator="resample", implementation="operator", why="one matrix product an axis, equal to scipy's")


def choose_instance_norm_act(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Choice:
    """Which instance normalisation runs for these tensors: x (N, C, D, H, W), weight and bias (C,), residual as x.

    The fast forms have no backward yet: whatever autograd has to follow takes the reference, whose backward is torch's.
    """
    implementation, why = _instance_norm_act(x, weight, bias, residual)
    return Choice(operator="instance_norm_act", implementation=implementation, why=why)


def _instance_norm_act(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> tuple[Implementation, str]:
    tensors = [x, weight, bias] if residual is None else [x, weight, bias, residual]
    if wanted() == "reference":
        return "reference", "STROKENET_KERNELS=reference"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "reference", "gradients are wanted, and torch has the backward"
    if x.ndim != 5 or x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last_3d):
        return "reference", "not channels_last_3d, the layout of the fast forms"
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return "reference", f"{x.dtype}: the fast forms compute in float32"
    if residual is not None and (residual.shape, residual.dtype) != (x.shape, x.dtype):
        return "reference", "a residual of another shape or type: torch broadcasts and promotes"
    if any(tensor.device != x.device for tensor in tensors):
        return "reference", "tensors on several devices: torch says what is wrong"
    if x.is_cpu:
        return "operator", "channels_last_3d on the CPU: torch's channels-last kernels, block by block"
    if x.is_cuda and importlib.util.find_spec("triton") is not None:
        return "triton", "channels_last_3d on the GPU: two reads and one write of the map"
    return "reference", f"no kernel for {x.device.type}"


def choices() -> tuple[Choice, ...]:
    """Every operator's choice, for `strokenet doctor`; of the norm, for a channels_last_3d map without gradients."""
    components = Choice(operator="components", implementation="cc3d", why="one labelling, a bincount and a gather")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.empty(1, 2, 2, 2, 2, device=device).to(memory_format=torch.channels_last_3d)
    return (choose_resample(), components, choose_instance_norm_act(x, x[0, :, 0, 0, 0], x[0, :, 0, 0, 0]))
