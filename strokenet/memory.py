"""Memory of this process: what it may still take, on the machine or in its container or job, and what it keeps."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h
_UNLIMITED = 2**60  # cgroup v1 writes a huge number for "no limit"


def available_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Free memory in bytes; None where the system does not tell (it does on Linux).

    The smallest of MemAvailable and what every memory cgroup of the process leaves (containers, SLURM).
    """
    free = [*_machine(proc), *_cgroups(proc, cgroups)]
    return max(0, min(free)) if free else None


def peak_bytes() -> int | None:
    """The most memory that this process has held so far; None where the system does not tell."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def keep_freed_memory() -> bool:
    """Lets glibc keep what is freed for what is asked for next; whether it could be told. For commands, not libraries.

    By default every feature map of a large tile is mapped anew, and the system clears its tens of thousands of pages
    one fault at a time. Without that a forward of 64x96x64 voxels on one core takes 3.8 s by torch's own layers and not
    5.3, by the inference form 3.2 s and not 3.7; not a bit of the answer changes.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))


def _machine(proc: Path) -> list[int]:
    for line in _text(proc / "meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return [int(line.split()[1]) * 1024]
    return []


def _cgroups(proc: Path, cgroups: Path) -> list[int]:
    """What is left in the process's memory cgroups and in those above them, versions 1 and 2."""
    left = []
    for line in _text(proc / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = cgroups, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root, names = cgroups / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = root / path.strip("/")
        for level in (folder, *(above for above in folder.parents if above == root or root in above.parents)):
            left += _level(level, *names)
    return left


def _level(folder: Path, limit_name: str, used_name: str, cache_name: str) -> list[int]:
    limit, used = _text(folder / limit_name).strip(), _text(folder / used_name).strip()
    if not limit.isdecimal() or not used.isdecimal() or int(limit) >= _UNLIMITED:
        return []
    cache = [
        line.split()[1] for line in _text(folder / "memory.stat").splitlines() if line.startswith(cache_name + " ")
    ]
    return [int(limit) - int(used) + sum(map(int, cache))]  # file cache is given back when memory gets short


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
