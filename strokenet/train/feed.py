"""The feed: from preprocessed cases to augmented batches on the training device.

Threads prepare the next batches whole while the network computes: draw, cut on the device or copy to it (resident.py),
augment, drop channels. Augmentation is drawn before the cut: a sample that is neither turned nor scaled, 64 % of them,
needs the network's patch alone and not the raw one, which holds 4 times its voxels.
Augmentation runs in torch on the device ("device"), in CPU worker processes with the batchgenerators package
("batchgenerators", the published reference), or not at all ("none"); modality dropout follows any of them. The loop
only takes what is ready, so that the time it waits here is the time in which the network had nothing to do.
"""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from planner.plan import Plan, Triple
from strokenet.data.errors import InputError
from strokenet.preprocess.jobs import worker_count
from strokenet.preprocess.store import StoredCase
from strokenet.train.augment import draw, intensities
from strokenet.train.dropout import drop_channels
from strokenet.train.patches import Phase, Spot, Stream, cut_batch, draw_spots, is_forced, sample_rng
from strokenet.train.published import augment_published
from strokenet.train.resident import Source
from strokenet.train.spatial import SpatialDraw, initial_patch, seen_box, transform_sample

_log = logging.getLogger("strokenet")

Augmentation = Literal["device", "batchgenerators", "none"]
MAX_WORKERS = 12  # the peer's number of augmentation processes
COPIES = 8  # float32 copies of a raw sample that a worker holds at its peak (splines run in float64)
STREAMING_THREADS = 4  # that copy patches to a GPU which does not hold every case: 14 ms for 205^3 of two channels
SPARE = 2  # batches ready in advance, beside those that the threads are at


class WorkersLost(InputError):
    """A worker process is gone, and with it all of them. The batches before this one were whole."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """What the network sees. image: (N, C, D, H, W) float32. label: (N, D, H, W) int64. cases: the N case ids."""

    image: Tensor
    label: Tensor
    cases: tuple[str, ...]


class Feed:
    """Batches of one fold. Holds threads, and worker processes for "batchgenerators": use it in a with block.

    share: indices of the samples in the batch that are wanted here, None for all. neighbours: processes of this machine
    that hold a feed each, and share its cores.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        train: Sequence[StoredCase],
        val: Sequence[StoredCase],
        batch_size: int,
        seed: int,
        augmentation: Augmentation,
        device: torch.device,
        modality_dropout: float = 0.0,
        share: range | None = None,
        neighbours: int = 1,
        source: Source | None = None,
    ):
        """source: where patches come from, on the same device; None: every case from its memory map."""
        self._plan, self._batch_size, self._seed, self._device = plan, batch_size, seed, device
        self._share, self._neighbours = range(batch_size) if share is None else share, neighbours
        self._cases: dict[Phase, Sequence[StoredCase]] = {"train": train, "val": val}
        self._augmentation, self._modality_dropout = augmentation, modality_dropout
        self._stream = (
            torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        )
        self._source = source or Source(device=device)
        self._stack = ExitStack()
        self._thread_count = STREAMING_THREADS if self._source.streams((*train, *val)) else 1

    def __enter__(self) -> Feed:
        if self._augmentation == "batchgenerators":
            workers = worker_count(None, MAX_WORKERS * self._neighbours, COPIES * _raw_bytes(self._plan))
            workers = max(1, workers // self._neighbours)
            self._pool = self._stack.enter_context(
                ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker)
            )
            self._thread_count = math.ceil(workers / len(self._share))  # so that every worker has a sample
        # Each with as many torch threads as the network has: with one, libgomp takes the cores for its own and spins at
        # every barrier, and on a CPU that others use too a step took three times as long and more.
        self._threads = self._stack.enter_context(ThreadPoolExecutor(self._thread_count, thread_name_prefix="feed"))
        return self

    def __exit__(self, *reason: object) -> None:
        self._stack.close()

    def batches(self, phase: Phase, epoch: int, steps: range) -> Generator[Batch, None, None]:
        """The batches of these steps, the same ones whenever they are asked for.

        Raises:
            InputError: a worker process of "batchgenerators" failed (WorkersLost: was killed).
        """
        waiting: deque[Future[Batch]] = deque()
        ahead = iter(steps)
        try:
            for _ in range(len(steps)):
                while len(waiting) < self._thread_count + SPARE and (step := next(ahead, None)) is not None:
                    waiting.append(self._threads.submit(self._batch, phase, epoch, step))
                batch = waiting.popleft().result()
                if self._stream is not None:  # its memory belongs to the feed's stream: not to be reused too early
                    batch.image.record_stream(torch.cuda.current_stream(self._device))
                    batch.label.record_stream(torch.cuda.current_stream(self._device))
                yield batch
        finally:
            for future in waiting:
                future.cancel()

    def _batch(self, phase: Phase, epoch: int, step: int) -> Batch:
        """One batch, on a thread: every sample from its own Generator, used for the spot first and then to augment."""
        rngs = self._rngs(phase, epoch, step)
        how = self._augmentation if phase == "train" else "none"
        final = self._plan.patch
        patch = final if how == "none" else initial_patch(final)
        forced = [is_forced(index, self._batch_size) for index in self._share]
        spots = draw_spots(self._cases[phase], rngs, patch=patch, final_patch=final, forced=forced)
        with self._beside_the_network():
            if how == "device":
                image, label = self._on_device(spots, rngs)
            elif how == "batchgenerators":
                image, label = (tensor.to(self._device, non_blocking=True) for tensor in self._by_workers(spots, rngs))
            else:
                image, label = self._source.patches(spots, final)
            if phase == "train" and self._modality_dropout:
                drop_channels(image, self._rngs("dropout", epoch, step), self._modality_dropout)
            label = label.long().clamp_min(0)
        return Batch(image=image, label=label, cases=tuple(spot.case.case_id for spot in spots))

    def _rngs(self, stream: Stream, epoch: int, step: int) -> list[np.random.Generator]:
        return [sample_rng(self._seed, stream, epoch, step, index) for index in self._share]

    def _on_device(self, spots: Sequence[Spot], rngs: Sequence[np.random.Generator]) -> tuple[Tensor, Tensor]:
        plan = self._plan
        channels = len(plan.channels)
        draws = [draw(rng, channels=channels, patch=plan.patch, mirror_axes=plan.mirror_axes) for rng in rngs]
        image, label = final_patches(
            self._source, spots, [draw.spatial for draw in draws], patch=plan.patch, heads=plan.heads
        )
        return intensities(image, label, draws, patch=plan.patch, mask_channels=plan.use_mask_for_norm)

    def _by_workers(self, spots: Sequence[Spot], rngs: Sequence[np.random.Generator]) -> tuple[Tensor, Tensor]:
        """The samples augmented in the worker processes: image (N, C, D, H, W), label (N, D, H, W)."""
        raw = cut_batch(spots, initial_patch(self._plan.patch))
        one = partial(
            augment_published,
            patch=self._plan.patch,
            mirror_axes=self._plan.mirror_axes,
            mask_channels=self._plan.use_mask_for_norm,
        )
        seeds = [int(rng.integers(2**31)) for rng in rngs]
        samples = zip(raw.image.numpy(), raw.label.numpy(), seeds, strict=True)
        try:
            jobs = [self._pool.submit(one, *sample) for sample in samples]
            done = [_outcome(job, case_id) for job, case_id in zip(jobs, raw.cases, strict=True)]
        except BrokenProcessPool:
            raise WorkersLost(
                f"{', '.join(raw.cases)}: a worker of --augment batchgenerators was killed, most likely for lack of "
                "memory; close other programs and --resume, or start again with --augment device"
            ) from None
        images, labels = (torch.from_numpy(np.stack(arrays)) for arrays in zip(*done, strict=True))
        return images, labels

    @contextmanager
    def _beside_the_network(self) -> Iterator[None]:
        """On a GPU: work on a stream of its own, finished at the end of the block. On a CPU: nothing to do."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield
        self._stream.synchronize()


def final_patches(
    source: Source, spots: Sequence[Spot], moves: Sequence[SpatialDraw | None], *, patch: Triple, heads: int
) -> tuple[Tensor, Tensor]:
    """What `transform` makes of the raw patches, of which only the box in which a sample looks is cut.

    Args:
        spots: of the raw patches, one a sample. moves: None for a plain cut. patch: (D, H, W) of the result.
        heads: number of labels.

    Returns:
        image (N, C, D, H, W) float32, 0 outside; label (N, D, H, W) int16, -1 outside; on the source's device.
    """
    raw = initial_patch(patch)
    image, label = source.empty(len(spots), spots[0].case.image.shape[0], patch)
    for spot, move, *target in zip(spots, moves, image, label, strict=True):
        box = seen_box(move, patch, raw)
        seen = spot.centred(raw, box)
        if move is None:
            source.cut(seen, *target)
        else:
            (big,), (big_label,) = source.patches([seen], box)
            transform_sample(big, big_label, move, heads, *target)
    return image, label


def _outcome(job: Future[tuple[np.ndarray, np.ndarray]], case_id: str) -> tuple[np.ndarray, np.ndarray]:
    """What a worker made of one sample; what it raised comes with the name of the case, its traceback in the log."""
    try:
        return job.result()
    except BrokenProcessPool:
        raise
    except Exception as error:
        _log.error("%s: augmentation failed in a worker", case_id, exc_info=error)
        line = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"{case_id}: --augment batchgenerators failed ({line}); use --augment device") from error


def _raw_bytes(plan: Plan) -> int:
    """Of one raw sample as float32 channels."""
    return 4 * len(plan.channels) * math.prod(initial_patch(plan.patch))


def _start_worker() -> None:
    """One torch thread. Ctrl-C, and what torchrun sends to its group of processes, are the parent's matter.

    When the parent is gone, so is the worker.
    """
    torch.set_num_threads(1)
    if hasattr(os, "setsid"):  # not on Windows
        os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
