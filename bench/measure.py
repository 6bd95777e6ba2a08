"""Measuring: contenders in turn in one process, so that a noisy machine is noisy for all; medians and ratios.

Comes in: name -> call. Goes out: a Measurement, printed as a table and kept as JSON with the machine it was made on.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from strokenet import __version__

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One comparison. times_ms: contender -> milliseconds of each repeat; the first contender is ours."""

    suite: str
    what: str
    times_ms: Mapping[str, tuple[float, ...]]

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
        "torch threads": str(torch.get_num_threads()),
        "GPU": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "strokenet": __version__,
    }


def report(measurements: list[Measurement]) -> None:
    """A table on stdout: the median of each contender, and how many times as long as ours it takes."""
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    for m in measurements:
        ours = next(iter(m.times_ms))
        print(f"\n{m.suite}: {m.what}")
        for name, values in m.times_ms.items():
            ratio = m.median_ms(name) / m.median_ms(ours)
            scale, unit = (1, "ms") if m.median_ms(name) >= 1 else (1000, "us")
            median, low, high = (scale * time for time in (m.median_ms(name), min(values), max(values)))
            print(f"  {name:<34} {median:9.1f} {unit}   {low:9.1f} .. {high:.1f}   x {ratio:.2f}")


def save(suite: str, measurements: list[Measurement], folder: Path = RESULTS) -> Path:
    """Keeps a suite's measurements as bench/results/SUITE.DEVICE.json."""
    device = "gpu" if torch.cuda.is_available() else "cpu"
    path = folder / f"{suite}.{device}.json"
    content = {"machine": machine(), "measurements": [asdict(m) for m in measurements]}
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
