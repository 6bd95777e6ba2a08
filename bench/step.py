"""A training step on dummy data: ours, nnU-Net's trainer (eager; compiled on a GPU) and MONAI's DynUNet.

Each in a process of its own (remote.py), with the same weights, batch and threads, in turn. The losses of the first
weights are compared in float32 before anything is timed. The floor is three forwards (backward is two) at the speed of
a matrix product. A second row switches our optimisations off, one at a time.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch

from bench.ceilings import ceilings, forward_flops
from bench.drawn import default_plan, write_step
from bench.measure import Comparison, Measurement
from bench.our_step import Switches, our_dtype, switched_off
from bench.peers import OF_HERE, PLACES, cores, has_peer, peers_folder, peers_python
from bench.remote import Job, Program, Remote, in_turn_apart, running
from planner.plan import Plan, Triple

OURS, EAGER, COMPILED, MONAI = "strokenet", "nnU-Net", "nnU-Net, compiled", "MONAI DynUNet"
PATCHES: Mapping[str, Triple] = {"cpu": (64, 64, 64), "cuda": (128, 128, 128)}
QUICK: Triple = (32, 32, 32)
APART = 1e-5  # of the losses, in float32
STEPS = {"cpu": 1, "cuda": 10}  # of a turn, back to back
ROUNDS = {"cpu": 7, "cuda": 9}
SECONDS = 180.0  # of the rounds of a comparison
FINER = 3  # times the rounds and seconds where the differences are a few percent: ours beside ours


def comparisons(quick: bool) -> list[Comparison]:
    """The step beside the peers', and ours without each optimisation, where one does something on this machine."""
    if not has_peer("nnunetv2"):
        print(f"step: not measured, nnU-Net is not at {peers_folder()}; run tools/peers.sh or set STROKENET_PEERS")
        return []
    device = kind()
    plan = default_plan(QUICK if quick else PATCHES[device])
    rounds = 2 if quick else ROUNDS[device]
    what = f"batch {plan.batch_size}, {words(plan.patch)}, {len(plan.channels)} channels"
    rows = [Comparison(what=what, run=partial(_beside_the_peers, what, plan, device, rounds))]
    if any(switched_off(torch.device(device))):
        what = f"{what}, optimisations off one by one"
        rows.append(
            Comparison(what=what, run=partial(_one_by_one, what, plan, device, rounds * (1 if quick else FINER)))
        )
    return rows


def kind() -> str:
    """Where a training computes here: "cuda" or "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def threads(device: str) -> int:
    """Torch's, on both sides: all cores on a CPU; one beside a GPU, as nnU-Net's command has it."""
    return cores() if device == "cpu" else 1


def words(patch: Triple) -> str:
    """64x64x64."""
    return "x".join(map(str, patch))


def ours(job: Job, units: int = 1) -> Program:
    """A contender of our program."""
    return Program(python=sys.executable, module="bench.our_train", job=job, units=units, environment=OF_HERE)


def peer(job: Job, units: int = 1, **environment: str) -> Program:
    """A contender of the peers' program; nnU-Net's folders are one beside the job's."""
    places = dict.fromkeys(PLACES, str(Path(job.folder) / "nnunet"))
    return Program(
        python=str(peers_python()),
        module="bench.peer_train",
        job=job,
        units=units,
        environment=OF_HERE | places | environment,
    )


def _beside_the_peers(what: str, plan: Plan, device: str, rounds: int) -> Measurement:
    with tempfile.TemporaryDirectory() as folder:
        write_step(Path(folder), plan)
        job = Job(task="step", folder=folder, device=device, threads=threads(device), settings=asdict(Switches()))
        theirs = partial(replace, job, settings={})
        programs = {
            OURS: ours(job, STEPS[device]),
            EAGER: peer(theirs(task="nnunet step"), STEPS[device], nnUNet_compile="0"),
        }
        if device == "cuda":
            programs[COMPILED] = peer(theirs(task="nnunet step"), STEPS[device], nnUNet_compile="1")
        if has_peer("monai"):
            programs[MONAI] = peer(theirs(task="monai step"), STEPS[device])
        return _measured(what, plan, programs, device, rounds)


def _one_by_one(what: str, plan: Plan, device: str, rounds: int) -> Measurement:
    with tempfile.TemporaryDirectory() as folder:
        write_step(Path(folder), plan)
        job = Job(task="step", folder=folder, device=device, threads=threads(device), settings=asdict(Switches()))
        programs = {OURS: ours(job, STEPS[device])}
        for name, switches in switched_off(torch.device(device)):
            programs[f"without {name}"] = ours(replace(job, settings=asdict(switches)), STEPS[device])
        return _measured(what, plan, programs, device, rounds, seconds=FINER * SECONDS)


def _measured(
    what: str, plan: Plan, programs: Mapping[str, Program], device: str, rounds: int, *, seconds: float = SECONDS
) -> Measurement:
    with running(programs) as remotes:
        said = compared(remotes)
        measured = in_turn_apart(
            "step", what, remotes, device=torch.device(device), repeats=rounds, seconds=seconds, warm_up=2
        )
        after = {name: next(iter(remote.ask_answer().values())) for name, remote in remotes.items()}
    trained = ", ".join(f"{name} {loss:.2f}" for name, loss in after.items())
    return replace(measured, answers=f"{said}; after all steps {trained}", floor_ms=_floor_ms(plan, device))


def compared(remotes: Mapping[str, Remote]) -> str:
    """How far each loss is from ours with the same weights and batch, in words.

    Raises:
        AssertionError: further than APART.
    """
    (_, own), *others = ((name, remote.ask_answer()) for name, remote in remotes.items())
    apart = {name: max(abs(own[loss] - value) for loss, value in losses.items()) for name, losses in others}
    for name, distance in apart.items():
        assert distance <= APART, f"{name}: its loss of the same weights and batch is {distance:.1e} from ours"
    first = f"loss {own['loss']:.2f} with the first weights"
    return f"{first}; apart: " + ", ".join(f"{name} {distance:.0e}" for name, distance in apart.items())


def _floor_ms(plan: Plan, device: str) -> float:
    """Forward and backward at the ceiling of a matrix product in the step's arithmetic."""
    there = torch.device(device)
    flops = 3 * plan.batch_size * forward_flops(plan)
    return 1000 * flops / ceilings(our_dtype(there), there).flops
