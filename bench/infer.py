"""Whole commands on one case, files to files: `strokenet infer`, nnUNetv2_predict and MONAI, same weights, same scan.

nnU-Net runs as its users run it, from the environment of tools/peers.sh: .venv-peers beside the project, or the folder
that STROKENET_PEERS names. Its CPU threads are set to the number of cores, because it limits them by itself. MONAI is a
library: monai_infer.py is the command that it lacks. Each command is timed by the wall clock from its start to its end,
with imports, reading and writing; memory is that of the machine, of the command's largest process. The answers are
compared before anything is timed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from bench import started
from bench.ceilings import ceilings, forward_flops
from bench.measure import Comparison, Measurement, model_of
from bench.model import Pair, pair
from bench.peers import OF_HERE, PLACES, ROOT, cores, has_peer, peers_folder, peers_python
from bench.remote import Job, Program, in_turn_apart, running
from bench.step import kind
from bench.volume import SHAPE, in_slices, stripped_head, write_volume
from strokenet.data.case import read_case
from strokenet.data.nifti import read_volume
from strokenet.data.overlap import dice
from strokenet.infer.sliding_window import tile_grid
from strokenet.model.device import choose_device, choose_dtype
from strokenet.preprocess.preprocess import preprocess
from strokenet.workspace import Workspace

OURS_WARM, NNUNET_WARM = "strokenet", "nnU-Net's predictor"
OURS, NNUNET, MONAI = "strokenet infer", "nnUNetv2_predict", "MONAI sliding window"
DICE, VOLUME, VOXELS = 0.995, 0.01, 10  # of ours with nnU-Net's mask: at least, within, and of `exact` at most
DICE_MONAI = 0.95  # at least: its tiles lie on another grid and under another bell
ROUNDS, AFFORDABLE_SECONDS = 5, 400


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


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to ask. exact: our mask must be the peer's but for ties. mirrors: forwards of a tile."""

    name: str
    options: tuple[str, ...]
    mirrors: int = 1
    exact: bool = False


PLAIN = Way(name="no mirroring", options=("--tta", "none"))
EXACT = Way(
    name="no mirroring, float32, exact",
    options=("--tta", "none", "--precision", "fp32", "--semantics", "exact"),
    exact=True,
)
MIRRORED = Way(name="full mirroring", options=("--tta", "full"), mirrors=8)
SLICES_MM = 3


def comparisons(quick: bool) -> list[Comparison]:
    """The real case, the drawn head, and the same head in thick slices, which has to be resampled.

    `exact` on the CPU only, because nnU-Net computes in float16 on a GPU; the drawn head is mirrored on a GPU only,
    because two CPU cores would need half an hour. quick: a small head, once.
    """
    if peers() is None:
        print(f"infer: not measured, nnU-Net is not at {peers_folder()}; run tools/peers.sh or set STROKENET_PEERS")
        return []
    if quick:
        return [_comparison("small drawn head", _small, PLAIN, rounds=0), _warm("small drawn head", _small, PLAIN, 1)]
    real, drawn = ((PLAIN, MIRRORED),) * 2 if torch.cuda.is_available() else ((PLAIN, EXACT, MIRRORED), (PLAIN,))
    rows = [_comparison("patient07", _patient, way) for way in real if _scans().is_dir()]
    rows += [_comparison(f"drawn head {'x'.join(map(str, SHAPE))}", _drawn, way) for way in drawn]
    rows.append(_comparison(f"drawn head in slices of {SLICES_MM} mm", _thick, PLAIN))
    if torch.cuda.is_available():
        return [*rows, _warm(f"drawn head {'x'.join(map(str, SHAPE))}", _drawn, MIRRORED)]
    return [*rows, *([_warm("patient07", _patient, PLAIN)] if _scans().is_dir() else ())]


def _comparison(name: str, make: Callable[[Path], Pair], way: Way, rounds: int = ROUNDS) -> Comparison:
    what = f"{name}, {way.name}"
    return Comparison(what=what, run=partial(_measured, what, make, way, rounds))


def _warm(name: str, make: Callable[[Path], Pair], way: Way, rounds: int = ROUNDS) -> Comparison:
    what = f"{name}, {way.name}, warm, from file to mask"
    return Comparison(what=what, run=partial(_measured_warm, what, make, way, rounds))


def _scans() -> Path:
    """The real T1+FLAIR case, where it is at hand."""
    data = Path(os.environ.get("STROKENET_TEST_DATA", ROOT.parent / "shared" / "data"))
    return data / "open_ms" / "cross_sectional" / "patient07"


def _patient(folder: Path) -> Pair:
    return pair("patient07", {name: _scans() / f"{name}.nii.gz" for name in ("T1", "FLAIR")})


def _drawn(folder: Path) -> Pair:
    return pair("drawn", {"T1": write_volume(folder / "drawn.nii.gz", stripped_head()[0])})


def _thick(folder: Path) -> Pair:
    """The drawn head's model, for voxels of 1 mm, and the head in thick slices."""
    slices, path = in_slices(stripped_head()[0], SLICES_MM), folder / "thick" / "thick_0000.nii.gz"
    return replace(_drawn(folder), name="thick", images=(write_volume(path, slices, (1.0, 1.0, float(SLICES_MM))),))


def _small(folder: Path) -> Pair:
    return pair("small", {"T1": write_volume(folder / "small.nii.gz", stripped_head((99, 117, 95))[0])})


def _measured(what: str, make: Callable[[Path], Pair], way: Way, rounds: int) -> Measurement:
    """A run of each whose masks are compared, then all in turn, as many rounds as are affordable.

    Where not one more is, the runs that were compared are the ones that were timed.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        case = make(folder)
        commands = _commands(case, way, folder)
        runs = {contender: [ran(command)] for contender, command in commands.items()}
        answers = _answers({contender: command.out for contender, command in commands.items()}, exact=way.exact)
        left = affordable(sum(first.seconds for (first,) in runs.values()), rounds)
        if left:
            runs = {contender: [] for contender in commands}
        for _ in range(left):
            for contender, command in commands.items():
                runs[contender].append(ran(command))
        return Measurement(
            suite="infer",
            what=what,
            times_ms={contender: tuple(1000 * r.seconds for r in of) for contender, of in runs.items()},
            on=model_of(choose_device("auto")),
            answers=answers,
            floor_ms=1000 * _floor_seconds(case, way),
            peaks_gb={contender: max(r.peak_gb for r in of) for contender, of in runs.items()},
        )


def _measured_warm(what: str, make: Callable[[Path], Pair], way: Way, rounds: int) -> Measurement:
    """Programs that have their model loaded (warm.py), in turn; the masks of the first turns are compared."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        case = make(folder)
        masks = {OURS_WARM: folder / "ours" / "case.nii.gz", NNUNET_WARM: folder / "nnunet" / "case.nii.gz"}
        programs = {
            OURS_WARM: Program(
                python=sys.executable,
                module="bench.warm",
                job=_warm_job("ours", case, way, folder, masks[OURS_WARM], case.imported),
                environment=OF_HERE,
            ),
            NNUNET_WARM: Program(
                python=str(peers_python()),
                module="bench.warm",
                job=_warm_job("nnunet", case, way, folder, masks[NNUNET_WARM], case.exported),
                environment=OF_HERE | dict.fromkeys(PLACES, str(folder)) | {"nnUNet_def_n_proc": str(cores())},
            ),
        }
        with running(programs) as remotes:
            for remote in remotes.values():
                remote.ask_turn()
            answers = _answers(masks, exact=way.exact)
            measured = in_turn_apart(
                "infer",
                what,
                remotes,
                device=torch.device(kind()),
                repeats=rounds,
                seconds=AFFORDABLE_SECONDS,
                warm_up=0,
            )
        return replace(measured, answers=answers, floor_ms=1000 * _floor_seconds(case, way))


def _warm_job(task: str, case: Pair, way: Way, folder: Path, out: Path, model: Path) -> Job:
    settings = {
        "images": [str(path) for path in case.images],
        "out": str(out),
        "model": str(model),
        "mirror": way.mirrors > 1,
    }
    return Job(task=task, folder=str(folder), device=kind(), threads=cores(), settings=settings)


def affordable(round_seconds: float, rounds: int) -> int:
    """How many rounds, `rounds` at most, fit into what one comparison may take beside the round that was."""
    return max(0, min(rounds, int(AFFORDABLE_SECONDS / round_seconds) - 1))


def _commands(case: Pair, way: Way, folder: Path) -> dict[str, Command]:
    """The contenders, ours first. MONAI's sums are not nnU-Net's, so that it is none of `exact`."""
    commands = {OURS: _ours(case, way, folder), NNUNET: _nnunet(case, way, folder)}
    if not way.exact and has_monai():
        commands[MONAI] = _monai(case, way, folder)
    return commands


def _floor_seconds(case: Pair, way: Way) -> float:
    """What the convolutions of all tiles would take at the speed of a matrix product of the same type."""
    plan = Workspace(case.imported).read_plan()
    image = preprocess(read_case(case.name, dict(zip(plan.channels, case.images, strict=True))), plan).image
    d, h, w = (max(size, edge) for size, edge in zip(image.shape[1:], plan.patch, strict=True))
    forwards = way.mirrors * len(tile_grid((d, h, w), plan.patch))
    device = choose_device("auto")
    dtype = torch.float32 if way.exact else choose_dtype("auto", device)
    return forwards * forward_flops(plan) / ceilings(dtype, device).flops


def _ours(case: Pair, way: Way, folder: Path) -> Command:
    device = "auto" if torch.cuda.is_available() else "cpu"
    out = folder / "ours"
    words = (sys.executable, "-m", "strokenet", "infer", str(case.imported), str(case.images[0].parent), "-o", str(out))
    return Command(
        words=(*words, "--device", device, *way.options), out=out / f"{case.name}.nii.gz", environment=OF_HERE
    )


def _nnunet(case: Pair, way: Way, folder: Path) -> Command:
    program = peers()
    assert program is not None
    device, out = kind(), folder / "nnunet"
    words = (str(program), "-i", str(case.images[0].parent), "-o", str(out), "-m", str(case.exported), "-f", "0")
    mirroring = () if way.mirrors > 1 else ("--disable_tta",)
    return Command(
        words=(*words, "-device", device, *mirroring),
        out=out / f"{case.name}.nii.gz",
        environment=dict.fromkeys(PLACES, str(folder)) | {"nnUNet_def_n_proc": str(cores())},
    )


def _monai(case: Pair, way: Way, folder: Path) -> Command:
    device, out = kind(), folder / "monai"
    words = (str(peers_python()), "-m", "bench.monai_infer", str(case.imported))
    options = ("--device", device, *(("--mirror",) if way.mirrors > 1 else ()))
    return Command(
        words=(*words, str(case.images[0].parent), str(out), *options),
        out=out / f"{case.name}.nii.gz",
        environment=OF_HERE,
    )


def ran(command: Command) -> Ran:
    """Runs a command that must leave its mask.

    Raises:
        RuntimeError: it failed, or left none.
    """
    shutil.rmtree(command.out.parent, ignore_errors=True)
    with tempfile.NamedTemporaryFile("r") as peak_kb, tempfile.TemporaryFile() as said:
        words = (sys.executable, "-S", started.__file__, peak_kb.name, *command.words)
        began = time.perf_counter()
        done = subprocess.run(words, stdout=said, stderr=said, env=os.environ | dict(command.environment))
        seconds = time.perf_counter() - began
        if done.returncode or not command.out.is_file():
            said.seek(0)
            heard = said.read().decode(errors="replace")[-2000:]
            raise RuntimeError(f"{' '.join(command.words)} ended with {done.returncode}:\n{heard}")
        return Ran(seconds=seconds, peak_gb=int(peak_kb.read()) / 2**20)


def _answers(masks: Mapping[str, Path], *, exact: bool) -> str:
    """How far our mask is from the peers', in words. masks: contender -> file.

    Raises:
        AssertionError: further than it may be.
    """
    ours, *peers_masks = (read_volume(path).array > 0 for path in masks.values())
    words = []
    for name, mask in zip(list(masks)[1:], peers_masks, strict=True):
        assert mask.any(), f"{name}: its mask is empty, nothing is compared"
        apart, overlap = int((ours != mask).sum()), dice(ours, mask)
        volume = abs(int(ours.sum()) - int(mask.sum())) / int(mask.sum())
        words.append(
            f"with {name}: Dice {overlap:.4f}, volume {volume:.2%} apart, {apart} of {mask.sum()} voxels differ"
        )
        alike = overlap >= DICE_MONAI if name == MONAI else overlap >= DICE and volume <= VOLUME
        assert apart <= VOXELS if exact else alike, words[-1]
    return "; ".join(words)


def peers() -> Path | None:
    """nnU-Net's command; None where it is not installed."""
    program = peers_folder() / "bin" / "nnUNetv2_predict_from_modelfolder"
    return program if program.is_file() else None


def has_monai() -> bool:
    """Whether the peers' environment has MONAI."""
    return has_peer("monai")
