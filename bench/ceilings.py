"""Ceilings: the most arithmetic and the most bytes a second that this machine gives, measured before all else.

A matrix product stands for arithmetic, a copy for memory. A row's floor is its work divided by them: no code of the
same arithmetic can be faster, and the fraction of the floor says how much is left. The product is repeated for seconds,
as long as what is compared with it: a core with AVX-512 gave 127 GFLOP/s at its best, 86 in the median of six seconds.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from planner.plan import Plan
from strokenet.model.network import build_network

SUSTAINED, PRODUCT_ROUNDS = 2.0, 3


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """flops: operations a second of a product in the type asked for (a multiplication and an addition are two).

    bytes: read and written a second by a copy.
    """

    flops: float
    bytes: float


def measure_ceilings(dtype: torch.dtype, device: torch.device, *, edge: int, copied: int, repeats: int = 5) -> Ceilings:
    """The best of some repeats, of the product rounds of SUSTAINED seconds.

    edge: of the square matrices. copied: bytes of the tensor that is copied.
    """
    a, b = (torch.randn(edge, edge, device=device).to(dtype) for _ in range(2))
    source = torch.ones(copied // 4, device=device)
    target = torch.empty_like(source)
    product = min(_mean(lambda: torch.mm(a, b), SUSTAINED) for _ in range(PRODUCT_ROUNDS))
    copy = _shortest(lambda: target.copy_(source), repeats)
    return Ceilings(flops=2 * edge**3 / product, bytes=2 * copied / copy)


@functools.cache
def ceilings(dtype: torch.dtype, device: torch.device) -> Ceilings:
    """Those of this process's machine, measured and printed when they are first asked for."""
    edge, copied = (8192, 2**33) if device.type == "cuda" else (2048, 2**28)
    found = measure_ceilings(dtype, device, edge=edge, copied=copied)
    name = str(dtype).removeprefix("torch.")
    print(f"ceilings of {device}: {name} product {found.flops / 1e9:.0f} GFLOP/s, copy {found.bytes / 1e9:.1f} GB/s")
    return found


def forward_flops(plan: Plan) -> int:
    """Operations of the plan's network on one patch, without computing it."""
    with torch.device("meta"):
        return module_flops(build_network(plan), (1, len(plan.channels), *plan.patch))


def module_flops(module: nn.Module, shape: Sequence[int]) -> int:
    """Operations of a module on an input of this shape, both on the device "meta", where nothing is computed."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module.eval()(torch.empty(*shape, device="meta"))
    return int(counter.get_total_flops())


def _mean(call: Callable[[], object], seconds: float) -> float:
    """Seconds of a call when it is repeated for that long."""
    began, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - began < seconds:
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        count += 1
    return (time.perf_counter() - began) / count


def _shortest(call: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of some calls, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times[1:])
