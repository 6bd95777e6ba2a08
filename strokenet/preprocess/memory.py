"""Memory that this process may still take: what is free on the machine, or in the container or job, if that is less."""

from __future__ import annotations

from pathlib import Path

_UNLIMITED = 2**60  # cgroup v1 writes a huge number for "no limit"


def available_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Free memory in bytes; None where the system does not tell (it does on Linux).

    The smallest of MemAvailable and what every memory cgroup of the process leaves (containers, SLURM).
    """
    free = [*_machine(proc), *_cgroups(proc, cgroups)]
    return max(0, min(free)) if free else None


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
