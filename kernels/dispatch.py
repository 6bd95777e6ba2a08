"""One place that says which implementation of an operator runs, and why.

STROKENET_KERNELS=auto (default) takes the fastest implementation that is built for the device; =reference takes the
plain one everywhere, to compare or to debug. `strokenet doctor` prints the choices.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # arrays must not wait for torch to be imported
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

    With and without gradients: the fast forms have their own.
    """
    implementation, why = _instance_norm_act(x, weight, bias, residual)
    return Choice(operator="instance_norm_act", implementation=implementation, why=why)


def _instance_norm_act(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> tuple[Implementation, str]:
    import torch  # not by an array's way to its choice

    tensors = [x, weight, bias] if residual is None else [x, weight, bias, residual]
    if torch.compiler.is_compiling():
        return "reference", "torch.compile fuses torch's layers, and cannot look into ours"
    if wanted() == "reference":
        return "reference", "STROKENET_KERNELS=reference"
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
    if x.is_cuda and not missing_for_triton():
        return "triton", "channels_last_3d on the GPU: two reads and one write of the map"
    return "reference", missing_for_triton() if x.is_cuda else f"no kernel for {x.device.type}"


def choose_components(device: str) -> Choice:
    """What labels the components of a map: union-find on the GPU where the map is there, cc3d elsewhere.

    device: the type of a torch device; arrays are on "cpu".
    """
    if device != "cuda":
        return _components("cc3d", "one labelling of the foreground's box, a count and a gather")
    if wanted() == "reference":
        return _components("cc3d", "STROKENET_KERNELS=reference")
    missing = missing_for_triton()
    if missing:
        return _components("cc3d", missing)
    return _components("triton", "union-find where the map is, nothing copied or waited for")


@functools.cache
def missing_for_triton() -> str:
    """What Triton lacks here to run a kernel on a GPU, "" for nothing; it is not imported.

    At its first launch it compiles a small C file against Python's headers (triton/runtime/build.py).
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "triton finds no C compiler: install gcc, or set CC"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "triton finds no Python.h: install Python's headers"
    return ""


def _components(implementation: Implementation, why: str) -> Choice:
    return Choice(operator="components", implementation=implementation, why=why)


def choices() -> tuple[Choice, ...]:
    """Every operator's choice on this machine, for `strokenet doctor`; of the norm, for a channels_last_3d map."""
    import torch  # not by an array's way to its choice

    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.empty(1, 2, 2, 2, 2, device=device).to(memory_format=torch.channels_last_3d)
    norm = choose_instance_norm_act(x, x[0, :, 0, 0, 0], x[0, :, 0, 0, 0])
    return (choose_resample(), choose_components(device), norm)
