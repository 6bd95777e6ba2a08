"""Our side of step, data and epoch, and the batchgenerators package, which strokenet can augment with, too.

python -m bench.our_train JOB      started by the suites (remote.py)
"""

from __future__ import annotations

import csv
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from bench.drawn import BATCH, WEIGHTS
from bench.our_step import Switches, our_step
from bench.phases import timed_steps, wait_for
from bench.remote import Contender, Job, Turn, describe, epoch_turn, serve
from strokenet.memory import keep_freed_memory
from strokenet.model.device import choose_device
from strokenet.train.augment import augment, draw
from strokenet.train.feed import Batch, Feed
from strokenet.train.loss import deep_supervision_loss, dice_ce
from strokenet.train.published import augment_published
from strokenet.train.run import TrainConfig, fold_cases
from strokenet.train.train import train
from strokenet.workspace import Workspace

Item = TypeVar("Item")
EPOCHS = 1000  # of the schedule: no run here comes to its end


def _step(job: Job) -> Contender:
    """Steps on one batch. answer: the float32 loss of the weights so far, of all levels and of the finest alone."""
    workspace, device = Workspace(Path(job.folder)), choose_device(job.device)
    torch.backends.cudnn.benchmark = True  # as train() sets it
    plan = workspace.read_plan()
    drawn = load_file(workspace.root / BATCH)
    image, label = drawn["image"].to(device), drawn["label"].long().to(device)
    network, step = our_step(
        workspace,
        plan,
        load_file(workspace.root / WEIGHTS),
        Batch(image=image, label=label, cases=("drawn",) * len(image)),
        device=job.device,
        switches=Switches(**job.settings),
    )

    @torch.no_grad()
    def answer() -> dict[str, float]:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            levels = network.forward_levels(image)
        return {
            "loss": float(deep_supervision_loss(levels, label, batch_dice=plan.batch_dice)),
            "loss_without_deep_supervision": float(dice_ce(levels[0], label, batch_dice=plan.batch_dice)),
        }

    return Contender(answer=answer, turn=timed_steps(step, device))


def _augment(job: Job) -> Contender:
    """Samples of the raw batch, augmented together as the feed does."""
    keep_freed_memory()  # as the command does
    plan, device = Workspace(Path(job.folder)).read_plan(), choose_device(job.device)
    raw = load_file(Path(job.folder) / BATCH)
    image, label = raw["image"].to(device), raw["label"].to(device)
    rng = np.random.default_rng(0)

    def one() -> tuple[Tensor, Tensor]:
        draws = [draw(rng, channels=image.shape[1], patch=plan.patch, mirror_axes=plan.mirror_axes) for _ in image]
        return augment(image, label, draws, patch=plan.patch, heads=plan.heads, mask_channels=plan.use_mask_for_norm)

    return _samples(lambda count: (one() for _ in range(count)), device, len(image))


def _feed(job: Job) -> Contender:
    """Samples of the cohort through the feed: place, cut, augment, ready on the device."""
    keep_freed_memory()  # as the command does
    workspace, device = Workspace(Path(job.folder)), choose_device(job.device)
    plan = workspace.read_plan()
    cases = fold_cases(workspace, plan, "0")
    feed = Feed(
        plan,
        train=cases.train,
        val=cases.val,
        batch_size=plan.batch_size,
        seed=0,
        augmentation="device",
        device=device,
    )
    feed.__enter__()  # its threads end with the process
    turns = itertools.count()

    def batches(count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """An epoch of its own, so that no batch is made while another contender has its turn."""
        for batch in feed.batches("train", next(turns), range(count)):
            yield batch.image, batch.label

    return _samples(batches, device, plan.batch_size)


def _samples(
    batches: Callable[[int], Iterable[tuple[Tensor, Tensor]]], device: torch.device, batch_size: int
) -> Contender:
    """Times so many batches, a sample each. answer: of one batch (drawn)."""

    def turn(count: int) -> Turn:
        needed = math.ceil(count / batch_size)
        wait_for(device)
        began = time.perf_counter()
        for _ in batches(needed):
            pass
        wait_for(device)
        return Turn(ms=1000 * (time.perf_counter() - began) / (needed * batch_size))

    def answer() -> dict[str, float]:
        ((image, label),) = batches(1)
        return describe(image, label)

    return Contender(answer=answer, turn=turn)


def _published(job: Job) -> Contender:
    """Samples of the raw batch by the batchgenerators package; each is copied before its clock starts."""
    plan = Workspace(Path(job.folder)).read_plan()
    raw = load_file(Path(job.folder) / BATCH)
    images, labels = raw["image"].numpy(), raw["label"].numpy()
    seeds = iter(range(2**31))

    def sample() -> tuple[NDArray[np.float32], NDArray[np.int16], float]:
        seed = next(seeds)
        image, label = (of[seed % len(images)].copy() for of in (images, labels))
        began = time.perf_counter()
        made = augment_published(
            image,
            label,
            seed,
            patch=plan.patch,
            mirror_axes=plan.mirror_axes,
            mask_channels=plan.use_mask_for_norm,
        )
        return *made, time.perf_counter() - began

    def answer() -> dict[str, float]:
        made = [sample()[:2] for _ in range(len(images))]
        return describe(*(torch.from_numpy(np.stack(of)) for of in zip(*made, strict=True)))

    return Contender(answer=answer, turn=lambda count: Turn(ms=1000 * sum(sample()[2] for _ in range(count)) / count))


class _Pausing:
    """A Track that lets the run begin an epoch only when a turn asks for one, and adds up what it waits for batches."""

    def __init__(self) -> None:
        self.may_begin, self.has_ended = threading.Semaphore(0), threading.Semaphore(0)
        self.waited_seconds = 0.0

    def __call__(self, items: Iterable[Item], *, total: int, what: str) -> Iterator[Item]:
        """The loop over epochs is the one of EPOCHS items; those within an epoch are over batches."""
        if total != EPOCHS:
            yield from self._timed(iter(items))
            return
        for item in items:
            self.may_begin.acquire()
            yield item
            self.has_ended.release()  # with its checkpoint, as far as the run waits for that

    def _timed(self, items: Iterator[Item]) -> Iterator[Item]:
        while True:
            began = time.perf_counter()
            try:
                item = next(items)
            except StopIteration:
                return
            self.waited_seconds += time.perf_counter() - began
            yield item


def _epoch(job: Job) -> Contender:
    """Epochs of one run of `strokenet train`, which waits between them on its own thread."""
    keep_freed_memory()  # as the command does
    workspace = Workspace(Path(job.folder))
    config = TrainConfig(epochs=EPOCHS, device=job.device, **job.settings)
    pausing, failures = _Pausing(), list[BaseException]()
    log, done = workspace.fold(config.fold).log, 0

    def run() -> None:
        try:
            train(workspace, config, pausing)
        except BaseException as error:
            failures.append(error)

    threading.Thread(target=run, daemon=True).start()

    def turn(count: int) -> Turn:
        nonlocal done
        waited, began = pausing.waited_seconds, time.perf_counter()
        for _ in range(count):
            pausing.may_begin.release()
            while not pausing.has_ended.acquire(timeout=0.5):
                if failures:
                    raise failures[0]
        wall, done = time.perf_counter() - began, done + count
        seconds = _seconds(log, done)[-count:]
        return epoch_turn(seconds, pausing.waited_seconds - waited, wall)

    return Contender(answer=dict, turn=turn)


def _seconds(log: Path, epochs: int) -> list[float]:
    """The column of log.csv, once it has a row for each epoch: it may be written beside the run.

    Raises:
        RuntimeError: it has none for long.
    """
    for _ in range(300):
        if log.is_file() and len(rows := list(csv.DictReader(log.read_text().splitlines()))) >= epochs:
            return [float(row["seconds"]) for row in rows]
        time.sleep(0.1)
    raise RuntimeError(f"{log}: no row of epoch {epochs}")


if __name__ == "__main__":
    serve({"step": _step, "augment": _augment, "published": _published, "feed": _feed, "epoch": _epoch})
