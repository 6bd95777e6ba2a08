"""Measuring: contenders in turn in one process, so that a noisy machine is noisy for all.

Comes in: name -> call. Goes out: a Measurement; table.py prints it and keeps it with the machine it was made on.
"""

from __future__ import annotations

import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from strokenet import __version__
from strokenet.model.device import cpu_has_bf16


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One comparison. times_ms: contender -> milliseconds of each repeat; the first contender is ours.

    answers: how ours was compared with the peers' before anything was timed. floor_ms: what the arithmetic or the bytes
    alone would take by the ceilings of this machine (ceilings.py). peaks_gb: contender -> memory at its peak.
    """

    suite: str
    what: str
    times_ms: Mapping[str, tuple[float, ...]]
    answers: str = ""
    floor_ms: float | None = None
    peaks_gb: Mapping[str, float] = field(default_factory=dict)

    def median_ms(self, name: str) -> float:
        """Median of a contender."""
        return statistics.median(self.times_ms[name])


def in_turn(
    suite: str, what: str, contenders: Mapping[str, Callable[[], object]], *, repeats: int = 7, warm_up: int = 1
) -> Measurement:
    """Runs A B C, A B C ... and times every call by the wall clock; the GPU is waited for where there is one."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(warm_up + repeats):
        for name, call in contenders.items():
            began = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= warm_up:
                times[name].append(1000 * (time.perf_counter() - began))
    return Measurement(suite=suite, what=what, times_ms={name: tuple(values) for name, values in times.items()})


def in_turn_on_gpu(
    suite: str, what: str, contenders: Mapping[str, Callable[[], object]], *, repeats: int = 15, warm_up: int = 3
) -> Measurement:
    """As in_turn, by the GPU's own clock, for calls of microseconds; before each call its caches are overwritten."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    other_data = torch.empty(2**28, dtype=torch.uint8, device="cuda")  # several times the L2 cache of any card
    for turn in range(warm_up + repeats):
        for name, call in contenders.items():
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            other_data.zero_()
            began.record()
            call()
            ended.record()
            ended.synchronize()
            if turn >= warm_up:
                times[name].append(began.elapsed_time(ended))
    return Measurement(suite=suite, what=what, times_ms={name: tuple(values) for name, values in times.items()})


def machine() -> dict[str, str]:
    """What a number without it means nothing: processor, threads, GPU, versions."""
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    return {
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "instructions": _instructions(),
        "torch threads": str(torch.get_num_threads()),
        "GPU": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "strokenet": __version__,
    }


def slug(of: Mapping[str, str]) -> str:
    """The folder's name of a machine: its GPU, or its processor with cores and widest instructions."""
    name = of["GPU"]
    if name == "none":
        name = f"{of['processor']} {of['cores']} cores {of.get('instructions', '')}"
    return re.sub(r"[^a-z0-9]+", "-", name.casefold()).strip("-")


def _instructions() -> str:
    """The widest vectors that torch uses here, and bfloat16 where the processor computes in it."""
    return torch.backends.cpu.get_cpu_capability() + (" bf16" if cpu_has_bf16() else "")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
