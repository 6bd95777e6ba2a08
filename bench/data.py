"""Training samples: ours, batchgeneratorsv2 under nnU-Net's trainer, and batchgenerators; milliseconds a sample.

On one core each, a process of one thread. "Augmentation" starts from raw patches in memory, "cut and augmentation" from
preprocessed cases on disk, by each side's own loader. The label at the coarser levels is made by the loss on our side
and left out on the other. Draws are random and each side's own: tests/peers compares them operation by operation, here
only the shape and what must be alike in any draw. On a GPU ours computes there, beside one core of the peers.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

from bench.drawn import BATCH, SEED, default_plan, write_cohort
from bench.measure import Comparison, Measurement
from bench.peers import cores, has_peer, peers_folder
from bench.remote import Job, Program, Remote, in_turn_apart, running
from bench.step import ours, peer, words
from bench.volume import SHAPE
from planner.plan import Plan, Triple
from strokenet.train.patches import draw_batch, sample_rng
from strokenet.train.run import fold_cases
from strokenet.train.spatial import initial_patch
from strokenet.workspace import Workspace

PEER, PUBLISHED = "batchgeneratorsv2", "batchgenerators"
PATCHES: tuple[Triple, ...] = ((64, 64, 64), (128, 128, 128))
QUICK: Triple = (48, 48, 48)
CASES = 3
SAMPLES = 32  # of a turn, each of a draw of its own: turned and scaled ones are dear, and a third of all
SLOW_SAMPLES, SAMPLES_ON_GPU, QUICK_SAMPLES = 8, 256, 4
ROUNDS = 7
SECONDS = 100.0  # of the rounds of a comparison
APART = 3.0  # times the standard deviation of ours, both ways at most: the draws of a few samples change it


def comparisons(quick: bool) -> list[Comparison]:
    """Each patch: augmentation alone, then from the case on disk; on a GPU both again there."""
    if not has_peer("nnunetv2"):
        print(f"data: not measured, nnU-Net is not at {peers_folder()}; run tools/peers.sh or set STROKENET_PEERS")
        return []
    rows = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for patch in (QUICK,) if quick else PATCHES:
            place = "one core" if device == "cpu" else "on the GPU, the peers on one core"
            for name, programs in (("augmentation", _augmentation), ("cut and augmentation", _whole)):
                what = f"{name}, a sample of {words(patch)}, 2 channels, {place}"
                rows.append(Comparison(what=what, run=partial(_measured, what, patch, device, programs, quick)))
    return rows


def _measured(
    what: str, patch: Triple, device: str, contenders: Callable[[Job, str], dict[str, Program]], quick: bool
) -> Measurement:
    plan = default_plan(patch)
    shape = tuple(edge // 2 for edge in SHAPE) if quick else SHAPE
    with tempfile.TemporaryDirectory() as folder:
        workspace = write_cohort(Path(folder), plan, (shape[0], shape[1], shape[2]), cases=CASES)
        _write_raw(workspace, plan)
        programs = contenders(Job(task="", folder=folder, device="cpu", threads=1), device)
        if quick:
            programs = {name: replace(program, units=QUICK_SAMPLES) for name, program in programs.items()}
        with running(programs) as remotes:
            said = compared(remotes)
            measured = in_turn_apart(
                "data", what, remotes, device=torch.device(device), repeats=2 if quick else ROUNDS, seconds=SECONDS
            )
    return replace(measured, answers=said)


def _augmentation(job: Job, device: str) -> dict[str, Program]:
    return {
        "strokenet": _own(job, "augment", device),
        PEER: peer(replace(job, task="nnunet augment"), SAMPLES),
        PUBLISHED: ours(replace(job, task="published"), SLOW_SAMPLES),
    }


def _whole(job: Job, device: str) -> dict[str, Program]:
    return {"strokenet": _own(job, "feed", device), PEER: peer(replace(job, task="nnunet loader"), SAMPLES)}


def _own(job: Job, task: str, device: str) -> Program:
    """Ours; beside a GPU with the threads of a training on this machine."""
    threads = 1 if device == "cpu" else cores()
    own = replace(job, task=task, device=device, threads=threads)
    return ours(own, SAMPLES if device == "cpu" else SAMPLES_ON_GPU)


def _write_raw(workspace: Workspace, plan: Plan) -> None:
    """A raw batch of the cohort, larger than the patch: what the augmentation is given."""
    rngs = [sample_rng(SEED, "train", 0, 0, index) for index in range(plan.batch_size)]
    cases = fold_cases(workspace, plan, "0").train
    raw = draw_batch(cases, rngs, patch=initial_patch(plan.patch), final_patch=plan.patch)
    save_file({"image": raw.image, "label": raw.label}, workspace.root / BATCH)


def compared(remotes: Mapping[str, Remote]) -> str:
    """That each side makes whole samples of one shape, in words.

    Raises:
        AssertionError: it does not.
    """
    said = {name: remote.ask_answer() for name, remote in remotes.items()}
    own = next(iter(said.values()))
    for name, of in said.items():
        for exactly in ("image_voxels", "label_voxels"):
            assert of[exactly] == own[exactly], f"{name}: {exactly} {of[exactly]:.0f}, ours {own[exactly]:.0f}"
        assert of["not_finite"] == 0, f"{name}: {of['not_finite']:.0f} voxels are not finite"
        assert of["lowest_label"] == 0, f"{name}: the lowest label is {of['lowest_label']:.0f}"
        times = of["deviation"] / own["deviation"]
        assert 1 / APART <= times <= APART, f"{name}: deviation {of['deviation']:.2f}, ours {own['deviation']:.2f}"
    return "random draws; " + ", ".join(f"deviation of {name} {of['deviation']:.2f}" for name, of in said.items())
