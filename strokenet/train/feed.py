"""The feed: from preprocessed cases to augmented batches on the training device.

A thread cuts the next patches while the network computes; augmentation runs in torch on the device ("device"), in
CPU worker processes with the batchgenerators package ("batchgenerators", the published reference), or not at all.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from planner.plan import Plan
from strokenet.preprocess.store import StoredCase
from strokenet.train.augment import augment, draw
from strokenet.train.patches import Phase, RawBatch, draw_batch, sample_rng
from strokenet.train.published import augment_published
from strokenet.train.spatial import initial_patch

Augmentation = Literal["device", "batchgenerators", "none"]
AHEAD = 2  # batches cut in advance


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """What the network sees. image: (N, C, D, H, W) float32. label: (N, D, H, W) int64. cases: the N case ids."""

    image: Tensor
    label: Tensor
    cases: tuple[str, ...]


class Feed:
    """Batches of one fold. Holds a thread, and worker processes for "batchgenerators": use it in a with block."""

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
    ):
        self._plan, self._batch_size, self._seed, self._device = plan, batch_size, seed, device
        self._cases: dict[Phase, Sequence[StoredCase]] = {"train": train, "val": val}
        self._augmentation = augmentation
        self._stack = ExitStack()

    def __enter__(self) -> Feed:
        self._thread = self._stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="cut"))
        if self._augmentation == "batchgenerators":
            workers = max(1, min(self._batch_size, (os.cpu_count() or 2) - 1))
            context = multiprocessing.get_context("spawn")
            self._pool = self._stack.enter_context(
                ProcessPoolExecutor(workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,))
            )
        return self

    def __exit__(self, *reason: object) -> None:
        self._stack.close()

    def batches(self, phase: Phase, epoch: int, steps: range) -> Generator[Batch, None, None]:
        """The batches of these steps, the same ones whenever they are asked for."""
        make: Callable[[int], RawBatch | Batch] = partial(self._prepare, phase, epoch)
        waiting: deque[tuple[int, Future[RawBatch | Batch]]] = deque()
        ahead = iter(steps)
        try:
            for _ in range(len(steps)):
                while len(waiting) <= AHEAD and (step := next(ahead, None)) is not None:
                    waiting.append((step, self._thread.submit(make, step)))
                step, future = waiting.popleft()
                yield self._finish(phase, epoch, step, future.result())
        finally:
            for _, future in waiting:
                future.cancel()

    def _prepare(self, phase: Phase, epoch: int, step: int) -> RawBatch | Batch:
        """On the thread: cut; and for "batchgenerators", have the processes augment."""
        rngs = [sample_rng(self._seed, phase, epoch, step, index) for index in range(self._batch_size)]
        final = self._plan.patch
        grown = phase == "train" and self._augmentation != "none"
        raw = draw_batch(self._cases[phase], rngs, patch=initial_patch(final) if grown else final, final_patch=final)
        if grown and self._augmentation == "batchgenerators":
            return self._published(raw, rngs)
        return raw

    def _published(self, raw: RawBatch, rngs: Sequence[np.random.Generator]) -> Batch:
        one = partial(
            augment_published,
            patch=self._plan.patch,
            mirror_axes=self._plan.mirror_axes,
            mask_channels=self._plan.use_mask_for_norm,
        )
        seeds = [int(rng.integers(2**31)) for rng in rngs]
        done = list(self._pool.map(one, raw.image.numpy(), raw.label.numpy(), seeds))
        images, labels = (np.stack(arrays) for arrays in zip(*done, strict=True))
        return Batch(image=torch.from_numpy(images), label=torch.from_numpy(labels).long(), cases=raw.cases)

    def _finish(self, phase: Phase, epoch: int, step: int, raw: RawBatch | Batch) -> Batch:
        """On the caller's thread: to the device, and augment there."""
        image, label = raw.image.to(self._device), raw.label.to(self._device)
        if isinstance(raw, RawBatch) and phase == "train" and self._augmentation == "device":
            # A Generator of its own, so that the numbers do not depend on how many the cut has used.
            rngs = [sample_rng(self._seed + 1, phase, epoch, step, index) for index in range(len(raw.cases))]
            draws = [
                draw(rng, channels=image.shape[1], patch=self._plan.patch, mirror_axes=self._plan.mirror_axes)
                for rng in rngs
            ]
            image, label = augment(
                image, label, draws, patch=self._plan.patch, mask_channels=self._plan.use_mask_for_norm
            )
        return Batch(image=image, label=label.long().clamp_min(0), cases=raw.cases)
