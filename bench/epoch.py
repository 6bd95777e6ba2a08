"""A whole epoch with data, validation patches and what is written: `strokenet train` and nnU-Net's trainer.

Both on the same preprocessed voxels, each in its own files, with its own loaders and worker processes. The time is what
each side's log says of its epochs, without the writing after it, as nnU-Net's own benchmark trainers count; the wait
for batches is measured where the loop takes them. On a GPU nnU-Net is compiled, which is its default there.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from bench.drawn import default_plan, write_cohort
from bench.measure import Comparison, Measurement
from bench.peers import has_peer, peers_folder
from bench.remote import Job, in_turn_apart, running
from bench.step import kind, ours, peer, threads, words
from bench.volume import SHAPE
from planner.plan import Triple


@dataclass(frozen=True, kw_only=True)
class Size:
    """iterations, val_iterations: of an epoch. shape: of a scan, (i, j, k). rounds: at most."""

    patch: Triple
    iterations: int
    val_iterations: int
    shape: Triple = SHAPE
    cases: int = 5
    rounds: int = 5


SIZES = {
    "cpu": Size(patch=(64, 64, 64), iterations=6, val_iterations=2, rounds=3),
    "cuda": Size(patch=(128, 128, 128), iterations=250, val_iterations=50),
}
QUICK = Size(patch=(32, 32, 32), iterations=6, val_iterations=2, shape=(99, 117, 95), cases=3, rounds=2)
SECONDS = 330.0  # of the rounds of a comparison


def comparisons(quick: bool) -> list[Comparison]:
    """One: a full epoch on a GPU, a short one on a CPU, which its name says."""
    if not has_peer("nnunetv2"):
        print(f"epoch: not measured, nnU-Net is not at {peers_folder()}; run tools/peers.sh or set STROKENET_PEERS")
        return []
    device = kind()
    size = QUICK if quick else SIZES[device]
    what = f"{size.iterations} + {size.val_iterations} iterations, batch 2, {words(size.patch)}, 2 channels"
    return [Comparison(what=what, run=partial(_measured, what, size, device))]


def _measured(what: str, size: Size, device: str) -> Measurement:
    settings = {"iterations": size.iterations, "val_iterations": size.val_iterations}
    with tempfile.TemporaryDirectory() as folder:
        write_cohort(Path(folder), default_plan(size.patch), size.shape, cases=size.cases)
        job = Job(task="epoch", folder=folder, device=device, threads=threads(device), settings=settings)
        programs = {"strokenet": ours(job), "nnU-Net": peer(replace(job, task="nnunet epoch"))}
        with running(programs) as remotes:
            measured = in_turn_apart(
                "epoch", what, remotes, device=torch.device(device), repeats=size.rounds, seconds=SECONDS
            )
    return replace(measured, answers=_fastest(measured))


def _fastest(measured: Measurement) -> str:
    """The fastest epoch of each, which nnU-Net's benchmark trainers report, and the share that was waiting."""
    of = []
    for name, times in measured.times_ms.items():
        waiting = measured.parts_ms[name]["data wait"] / measured.median_ms(name)
        of.append(f"{name} {min(times) / 1000:.1f} s, {waiting:.1%} waiting")
    rounds = min(len(times) for times in measured.times_ms.values())
    return f"fastest of {rounds}: " + "; ".join(of)
