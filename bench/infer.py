"""Whole commands on one case, files to files: `strokenet infer` and nnUNetv2_predict, same weights, same scan.

The peer runs as its users run it, from the environment of tools/peers.sh: .venv-peers beside the project, or the folder
that STROKENET_PEERS names. Its CPU threads are set to the number of cores, because it limits them by itself. Each
command is timed by the wall clock from its start to its end, with imports, reading and writing; memory is that of its
largest process. The answers are compared before anything is timed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.ceilings import forward_flops, measure_ceilings
from bench.measure import Measurement
from bench.model import Pair, pair
from bench.volume import stripped_head, write_volume
from strokenet.data.case import read_case
from strokenet.data.nifti import read_volume
from strokenet.data.overlap import dice
from strokenet.infer.sliding_window import tile_grid
from strokenet.model.device import choose_device, choose_inference_dtype
from strokenet.preprocess.preprocess import preprocess
from strokenet.workspace import Workspace

ROOT = Path(__file__).resolve().parents[1]
DICE, VOLUME, VOXELS = 0.995, 0.01, 10  # of ours with the peer's mask: at least, within, and of `exact` at most


@dataclass(frozen=True, kw_only=True)
class Command:
    """One contender. out: the mask that it writes, removed before each run. environment: beside this process's."""

    words: Sequence[str]
    out: Path
    environment: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What one run of a command took."""

    seconds: float
    peak_gb: float


def run() -> list[Measurement]:
    """Without mirroring, in the arithmetic that `auto` takes and as nnU-Net rounds, and with full mirroring."""
    if peers() is None:
        print(f"infer: not measured, nnU-Net is not at {_peers_folder()}; run tools/peers.sh or set STROKENET_PEERS")
        return []
    with tempfile.TemporaryDirectory() as folder:
        return [_compare(case, way, Path(folder)) for case in _cases(Path(folder)) for way in WAYS]


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to ask. exact: our mask must be the peer's but for ties. mirrors: forwards of a tile."""

    name: str
    options: tuple[str, ...]
    mirrors: int = 1
    exact: bool = False
    rounds: int = 5


WAYS = (
    Way(name="no mirroring", options=("--tta", "none")),
    Way(
        name="no mirroring, float32, exact",
        options=("--tta", "none", "--precision", "fp32", "--semantics", "exact"),
        exact=True,
    ),
    Way(name="full mirroring", options=("--tta", "full"), mirrors=8, rounds=1),
)


def _cases(folder: Path) -> list[Pair]:
    """The real T1+FLAIR case where it is at hand, else the drawn head."""
    real = Path(os.environ.get("STROKENET_TEST_DATA", ROOT.parent / "shared" / "data"))
    scans = real / "open_ms" / "cross_sectional" / "patient07"
    if scans.is_dir():
        return [pair("patient07", {name: scans / f"{name}.nii.gz" for name in ("T1", "FLAIR")})]
    return [pair("drawn", {"T1": write_volume(folder / "drawn.nii.gz", stripped_head()[0])})]


def _compare(case: Pair, way: Way, folder: Path) -> Measurement:
    """A warm-up of each whose masks are compared, then both in turn."""
    commands = {"strokenet infer": _ours(case, way, folder), "nnUNetv2_predict": _peers(case, way, folder)}
    for command in commands.values():
        ran(command)
    answers = _agreement(*(command.out for command in commands.values()), exact=way.exact)
    runs: dict[str, list[Ran]] = {contender: [] for contender in commands}
    for _ in range(way.rounds):
        for contender, command in commands.items():
            runs[contender].append(ran(command))
    return Measurement(
        suite="infer",
        what=f"{case.name}, {way.name}",
        times_ms={contender: tuple(1000 * r.seconds for r in of) for contender, of in runs.items()},
        answers=answers,
        floor_ms=1000 * _floor_seconds(case, way),
        peaks_gb={contender: max(r.peak_gb for r in of) for contender, of in runs.items()},
    )


def _floor_seconds(case: Pair, way: Way) -> float:
    """What the convolutions of all tiles would take at the speed of a matrix product of the same type."""
    plan = Workspace(case.imported).read_plan()
    image = preprocess(read_case(case.name, dict(zip(plan.channels, case.images, strict=True))), plan).image
    d, h, w = (max(size, edge) for size, edge in zip(image.shape[1:], plan.patch, strict=True))
    forwards = way.mirrors * len(tile_grid((d, h, w), plan.patch))
    device = choose_device("auto")
    dtype = torch.float32 if way.exact else choose_inference_dtype("auto", device)
    edge, copied = (8192, 2**33) if device.type == "cuda" else (2048, 2**28)
    return forwards * forward_flops(plan) / measure_ceilings(dtype, device, edge=edge, copied=copied).flops


def _ours(case: Pair, way: Way, folder: Path) -> Command:
    device = "auto" if torch.cuda.is_available() else "cpu"
    out = folder / "ours"
    words = (sys.executable, "-m", "strokenet", "infer", str(case.imported), str(case.images[0].parent), "-o", str(out))
    return Command(words=(*words, "--device", device, *way.options), out=out / f"{case.name}.nii.gz", environment={})


def _peers(case: Pair, way: Way, folder: Path) -> Command:
    program = peers()
    assert program is not None
    device, out = "cuda" if torch.cuda.is_available() else "cpu", folder / "peer"
    words = (str(program), "-i", str(case.images[0].parent), "-o", str(out), "-m", str(case.exported), "-f", "0")
    mirroring = () if way.mirrors > 1 else ("--disable_tta",)
    places = {name: str(folder) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    cores = str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    return Command(
        words=(*words, "-device", device, *mirroring),
        out=out / f"{case.name}.nii.gz",
        environment=places | {"nnUNet_def_n_proc": cores},
    )


def ran(command: Command) -> Ran:
    """Runs a command that must leave its mask.

    Raises:
        RuntimeError: it failed, or left none.
    """
    shutil.rmtree(command.out.parent, ignore_errors=True)
    with tempfile.TemporaryFile() as said:
        began = time.perf_counter()
        process = subprocess.Popen(command.words, stdout=said, stderr=said, env=os.environ | dict(command.environment))
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        words = said.read().decode(errors="replace")
    if process.returncode or not command.out.is_file():
        raise RuntimeError(f"{' '.join(command.words)} ended with {process.returncode}:\n{words[-2000:]}")
    return Ran(seconds=seconds, peak_gb=usage.ru_maxrss / 2**20)


def _agreement(ours: Path, theirs: Path, *, exact: bool) -> str:
    """How far our mask is from the peer's, in words.

    Raises:
        AssertionError: further than it may be.
    """
    a, b = (read_volume(path).array > 0 for path in (ours, theirs))
    apart, overlap = int((a != b).sum()), dice(a, b)
    volume = abs(int(a.sum()) - int(b.sum())) / max(int(b.sum()), 1)
    assert b.any(), "the peer's mask is empty: nothing is compared"
    assert apart <= VOXELS if exact else (overlap >= DICE and volume <= VOLUME), (apart, overlap, volume)
    return f"Dice with the peer's mask {overlap:.4f}, volume {volume:.2%} apart, {apart} of {b.sum()} voxels differ"


def _peers_folder() -> Path:
    return Path(os.environ.get("STROKENET_PEERS", ROOT / ".venv-peers"))


def peers() -> Path | None:
    """nnU-Net's command; None where it is not installed."""
    program = _peers_folder() / "bin" / "nnUNetv2_predict_from_modelfolder"
    return program if program.is_file() else None
