"""Free memory from files like those of Linux (bare machine, containers, no such files), and memory that is kept."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from strokenet.memory import available_bytes

GB = 10**9


@pytest.fixture
def system(tmp_path: Path) -> tuple[Path, Path]:
    """A machine with 8 GB available, in no cgroup."""
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 16000000 kB\nMemFree: 1 kB\nMemAvailable:    7812500 kB\n")
    cgroups.mkdir()
    return proc, cgroups


def _write(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text + "\n")


def test_a_bare_machine_offers_what_is_available(system: tuple[Path, Path]) -> None:
    assert available_bytes(*system) == 8 * GB


def test_a_container_offers_its_limit_without_what_is_used(system: tuple[Path, Path]) -> None:
    proc, cgroups = system
    (proc / "self" / "cgroup").write_text("0::/\n")
    _write(cgroups, {"memory.max": str(4 * GB), "memory.current": str(3 * GB), "memory.stat": f"inactive_file {GB}"})
    assert available_bytes(proc, cgroups) == 2 * GB  # file cache counts as free


def test_the_tightest_level_of_nested_groups_counts(system: tuple[Path, Path]) -> None:
    proc, cgroups = system
    (proc / "self" / "cgroup").write_text("0::/job/step\n")
    _write(cgroups / "job", {"memory.max": str(3 * GB), "memory.current": str(GB)})
    _write(cgroups / "job" / "step", {"memory.max": "max", "memory.current": "5"})
    assert available_bytes(proc, cgroups) == 2 * GB


def test_version_1_groups_are_read_and_their_huge_number_means_no_limit(system: tuple[Path, Path]) -> None:
    proc, cgroups = system
    (proc / "self" / "cgroup").write_text("7:cpu:/slurm\n5:memory:/slurm\n")
    files = {"memory.usage_in_bytes": str(GB), "memory.stat": "total_inactive_file 0"}
    _write(cgroups / "memory" / "slurm", {"memory.limit_in_bytes": str(6 * GB), **files})
    _write(cgroups / "memory", {"memory.limit_in_bytes": "9223372036854771712", **files})
    assert available_bytes(proc, cgroups) == 5 * GB


def test_a_system_that_tells_nothing_is_unknown(tmp_path: Path) -> None:
    assert available_bytes(tmp_path, tmp_path) is None


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc, on Linux, can be told")
def test_freed_memory_is_kept_and_not_mapped_anew() -> None:
    """Pages that the system has to clear again, of 64 MB asked for ten times: all each time, or next to none."""
    script = """
import resource, sys, torch
from strokenet.memory import keep_freed_memory
assert sys.argv[1] == "default" or keep_freed_memory()
for _ in range(20):
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    words = [sys.executable, "-c", script]
    default, kept = (int(subprocess.check_output([*words, way], text=True)) for way in ("default", "kept"))
    if default < 100_000:
        pytest.skip(f"this C library keeps it by itself ({default} pages)")
    assert kept < default / 4
