"""Measuring: contenders in turn in one process, so that a noisy machine is noisy for all.

Comes in: name -> call. Goes out: a Measurement; table.py prints it and keeps it with the machine it was made on. A
suite is a list of Comparisons, which say what they are before anything is computed, so that what is kept already need
not be measured again.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from strokenet import __version__
from strokenet.model.device import cpu_has_bf16

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One comparison. times_ms: contender -> milliseconds of each repeat; the first contender is ours.

    on: the model of the processor or the GPU on which ours computed. answers: how ours was compared with the peers'
    before anything was timed. floor_ms: what the arithmetic or the bytes alone would take by the ceilings of this
    machine (ceilings.py). peaks_gb: contender -> memory at its peak, GB: of a command (infer) all of its largest
    process; of a call on a GPU what it takes beyond what was there before it, by torch's allocator, so that nothing is
    said of CuPy. Of a call on the CPU nothing is said: one process holds all contenders, and what one has returned to
    the allocator the next one takes. A contender in a process of its own (remote.py) has all of that process's memory,
    on a GPU what torch's allocator has held in it. parts_ms: contender -> part of its work -> median, if known.
    """

    suite: str
    what: str
    times_ms: Mapping[str, tuple[float, ...]]
    on: str = ""
    answers: str = ""
    floor_ms: float | None = None
    peaks_gb: Mapping[str, float] = field(default_factory=dict)
    parts_ms: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def median_ms(self, name: str) -> float:
        """Median of a contender."""
        return statistics.median(self.times_ms[name])


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A row that can be measured. what: of the Measurement that `run` gives, and the key under which it is kept."""

    what: str
    run: Callable[[], Measurement]


KINDS = CPU_FLOAT32, CPU_BF16, GPU = "a CPU in float32", "a CPU with bfloat16", "a GPU"  # of machines


@dataclass(frozen=True)
class Suite:
    """What belongs together, under the name that `python -m bench` takes.

    comparisons: what it measures, by whether it has to be quick. kinds: of machines on which its numbers say something.
    whole: it times what a user waits for, not a part of it: the README has its rows, not only where they are.
    """

    comparisons: Callable[[bool], Sequence[Comparison]]
    kinds: tuple[str, ...] = KINDS
    whole: bool = False


def in_turn(
    suite: str,
    what: str,
    contenders: Mapping[str, Callable[[], object]],
    *,
    device: torch.device = CPU,
    repeats: int = 7,
    warm_up: int = 1,
) -> Measurement:
    """Runs A B C, A B C ... and times every call by the wall clock; device: where ours computes, and is waited for."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    peaks: dict[str, float] = {}
    for turn in range(warm_up + repeats):
        for name, call in contenders.items():
            before = _start_of_peak(device)
            began = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            took = 1000 * (time.perf_counter() - began)
            if turn >= warm_up:
                times[name].append(took)
                peaks |= _peak(name, before, device)
    return _measured(suite, what, device, times, peaks)


def in_turn_on_gpu(
    suite: str, what: str, contenders: Mapping[str, Callable[[], object]], *, repeats: int = 15, warm_up: int = 3
) -> Measurement:
    """As in_turn, by the GPU's own clock, for calls of microseconds; before each call its caches are overwritten."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    peaks: dict[str, float] = {}
    gpu = torch.device("cuda")
    other_data = torch.empty(2**28, dtype=torch.uint8, device=gpu)  # several times the L2 cache of any card
    for turn in range(warm_up + repeats):
        for name, call in contenders.items():
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            before = _start_of_peak(gpu)
            other_data.zero_()
            began.record()
            call()
            ended.record()
            ended.synchronize()
            if turn >= warm_up:
                times[name].append(began.elapsed_time(ended))
                peaks |= _peak(name, before, gpu)
    return _measured(suite, what, gpu, times, peaks)


def _start_of_peak(device: torch.device) -> int:
    """Bytes that torch holds on a GPU before a call, from which its peak is counted; 0 on the CPU."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _peak(name: str, before: int, device: torch.device) -> dict[str, float]:
    """What the call since has taken at its peak, GB; nothing on the CPU."""
    return {name: (torch.cuda.max_memory_allocated() - before) / 2**30} if device.type == "cuda" else {}


def _measured(
    suite: str, what: str, device: torch.device, times: Mapping[str, Sequence[float]], peaks: Mapping[str, float]
) -> Measurement:
    times_ms = {name: tuple(values) for name, values in times.items()}
    return Measurement(suite=suite, what=what, on=model_of(device), times_ms=times_ms, peaks_gb=peaks)


def model_of(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()


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


def digest_of_code() -> str:
    """Every source that is measured, names and contents: with another one a kept number says nothing.

    Not the commit: one that changes the README would make all numbers old, and a changed file without one would not.
    """
    root = Path(__file__).resolve().parents[1]
    files = sorted(path for room in ("planner", "kernels", "strokenet") for path in (root / room).rglob("*.py"))
    lines = (f"{path.relative_to(root)} {path.read_text()}" for path in files)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


def kind_of(of: Mapping[str, str]) -> str:
    """Of a machine: CPU_FLOAT32, CPU_BF16 or GPU."""
    if of["GPU"] != "none":
        return GPU
    return CPU_BF16 if "bf16" in of.get("instructions", "").split() else CPU_FLOAT32


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
