"""Cases on the training device: what fits its memory lies there, the rest is read from disk a patch at a time.

Comes in: a fold's preprocessed cases and a budget in bytes. Goes out: a Source, from which the feed cuts patches at the
spots that patches.py draws on the CPU; neither the draws nor the values depend on where a case lies, but that a
resident image is rounded to bfloat16: at most 1 part in 256, what the network's first layer does under bf16 too. On the
z-scores of a FLAIR its error is 0.0017 (root mean square), that of int8 with a scale a channel 0.016: not worth a byte.
A resident patch never sees the host: one slice of the case, padded and widened to float32 in the cut. A streamed one
goes from the memory map into pinned memory and from there to the device. On a CPU the memory map serves and nothing is
copied.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from planner.memory import feature_map_voxels
from planner.plan import Plan, Triple
from planner.rules import BUDGETS, REFERENCE_BATCH
from planner.topology import Topology
from strokenet.data.errors import InputError
from strokenet.data.track import Track, silent
from strokenet.preprocess.store import StoredCase
from strokenet.train.patches import OUTSIDE_LABEL, Spot, cut, empty, overlap
from strokenet.train.spatial import initial_patch

_log = logging.getLogger("strokenet")

IMAGE_DTYPE = torch.bfloat16
SHARE = 0.8  # of what the network leaves free; the rest: cuDNN's workspaces, whole validation volumes, fragments
BATCHES_AHEAD = 8  # on the device at once: ready, at work, and the network's own
COPYING_THREADS = 4  # that read cases from disk at the start


@dataclass(frozen=True, kw_only=True, eq=False)
class ResidentCase:
    """A case on the device. image: (C, D, H, W) bfloat16. label: (D, H, W) int8, or int16 beyond label 127."""

    image: Tensor
    label: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Holding:
    """Which of a fold's cases the device is to hold.

    cases: those. streamed: number of the others. label_dtype: of the held labels. predicted_bytes: what they will take,
    from the shapes alone. budget_bytes: what they may.
    """

    cases: tuple[StoredCase, ...]
    streamed: int
    label_dtype: torch.dtype
    predicted_bytes: int
    budget_bytes: int

    def line(self, device: torch.device) -> str:
        """One line for the log."""
        return (
            f"cases on {device}: {len(self.cases)} of {len(self.cases) + self.streamed}, "
            f"{self.predicted_bytes / 1e9:.2f} GB of {self.budget_bytes / 1e9:.2f} GB; {self.streamed} streamed"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """Where patches are cut from, and the device they are cut to. resident: case id -> the case on that device."""

    device: torch.device
    resident: Mapping[str, ResidentCase] = field(default_factory=dict)

    def streams(self, cases: Iterable[StoredCase]) -> bool:
        """Whether some of these cases must come from disk to another device."""
        return self.device.type != "cpu" and any(case.case_id not in self.resident for case in cases)

    def patches(self, spots: Sequence[Spot], patch: Triple) -> tuple[Tensor, Tensor]:
        """A patch at every spot: image (N, C, *patch) float32, 0 outside; label (N, *patch) int16, -1 outside."""
        image, label = self.empty(len(spots), spots[0].case.image.shape[0], patch)
        for index, spot in enumerate(spots):
            self.cut(spot, image[index], label[index])
        return image, label

    def empty(self, samples: int, channels: int, patch: Triple) -> tuple[Tensor, Tensor]:
        """Tensors of that many patches on the device, not filled."""
        image, label = (samples, channels, *patch), (samples, *patch)
        if self.device.type == "cpu":
            return empty(image, np.float32), empty(label, np.int16)
        return (
            torch.empty(image, dtype=torch.float32, device=self.device),
            torch.empty(label, dtype=torch.int16, device=self.device),
        )

    def cut(self, spot: Spot, image: Tensor, label: Tensor) -> None:
        """One patch, of the tensors' edges. image: (C, d, h, w) float32, label: (d, h, w) int16; changed in place."""
        held = self.resident.get(spot.case.case_id)
        if held is not None:
            cut_tensor(held.image, spot.start, image, 0)
            cut_tensor(held.label, spot.start, label, OUTSIDE_LABEL)
        elif self.device.type == "cpu":
            cut(spot.case.image, spot.start, image.numpy(), 0)
            cut(spot.case.label, spot.start, label.numpy(), OUTSIDE_LABEL)
        else:
            self._stream(spot, image, label)

    def _stream(self, spot: Spot, image: Tensor, label: Tensor) -> None:
        pinned = self.device.type == "cuda"
        for array, out, fill in ((spot.case.image, image, 0), (spot.case.label, label, OUTSIDE_LABEL)):
            host = torch.empty(out.shape, dtype=out.dtype, pin_memory=pinned)
            cut(array, spot.start, host.numpy(), fill)
            out.copy_(host, non_blocking=pinned)  # torch keeps pinned memory until the copy is done


def fold_source(
    cases: Iterable[StoredCase],
    plan: Plan,
    *,
    asked_gb: float | None,
    batch_size: int,
    dtype: torch.dtype,
    device: torch.device,
    track: Track = silent,
) -> Source:
    """The source of a fold's patches: as many cases on the device as `budget` gives them room, said in one line.

    Raises:
        InputError: asked_gb is more than the device has.
    """
    if device.type == "cpu":
        return Source(device=device)
    room = budget(asked_gb, plan, batch_size=batch_size, dtype=dtype, device=device)
    holding = choose(cases, heads=plan.heads, budget_bytes=room)
    _log.info(holding.line(device))
    return Source(device=device, resident=hold(holding, device, track))


def choose(cases: Iterable[StoredCase], *, heads: int, budget_bytes: int) -> Holding:
    """The smallest cases first, as many as the budget takes: a patch costs the same from each.

    A case that is there twice, to train and to validate, is held once.
    """
    label_dtype = torch.int8 if heads <= 128 else torch.int16  # labels are 0 .. heads - 1, and -1
    once = {case.case_id: case for case in cases}
    chosen, taken = [], 0
    for case in sorted(once.values(), key=lambda case: case.label.size):
        needed = resident_bytes(case, label_dtype)
        if taken + needed > budget_bytes:
            break
        chosen.append(case)
        taken += needed
    return Holding(
        cases=tuple(chosen),
        streamed=len(once) - len(chosen),
        label_dtype=label_dtype,
        predicted_bytes=taken,
        budget_bytes=budget_bytes,
    )


def resident_bytes(case: StoredCase, label_dtype: torch.dtype) -> int:
    """What a case takes on the device."""
    return case.image.size * IMAGE_DTYPE.itemsize + case.label.size * label_dtype.itemsize


def hold(holding: Holding, device: torch.device, track: Track = silent) -> dict[str, ResidentCase]:
    """Copies the cases to the device, all images into one block of memory and all labels into another.

    Raises:
        InputError: the device has no such blocks.
    """
    if not holding.cases:
        return {}
    views = _blocks(holding, device)
    with ThreadPoolExecutor(COPYING_THREADS, thread_name_prefix="resident") as threads:
        try:
            for _ in track(threads.map(_copy, holding.cases, views), total=len(views), what=f"cases to {device}"):
                pass
        except BaseException:  # Ctrl-C does not wait for the cases that no thread has begun
            threads.shutdown(wait=False, cancel_futures=True)
            raise
    return {case.case_id: view for case, view in zip(holding.cases, views, strict=True)}


def budget(asked_gb: float | None, plan: Plan, *, batch_size: int, dtype: torch.dtype, device: torch.device) -> int:
    """Bytes of the device that cases may take.

    Args:
        asked_gb: what the user gives them, in 10^9 bytes; None: 80 % of what the network leaves free (`needed`).
        dtype: of the network's arithmetic.

    Returns:
        without asked_gb 0 on everything but a CUDA device: no other tells what is free.
    """
    if asked_gb is not None:
        return int(asked_gb * 1e9)
    if device.type != "cuda":
        return 0
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(0, int(SHARE * (free - needed(plan, batch_size=batch_size, dtype=dtype))))


def needed(plan: Plan, *, batch_size: int, dtype: torch.dtype) -> int:
    """Bytes that a training takes beside its cases: the network by nnU-Net's measure, and the feed.

    The planner's budget says 8 GB for 560 million feature-map voxels a sample at batch 2 in 16 bits (Isensee 2021,
    Methods); 32 bits are counted twice. The feed holds batches ahead and, of one batch, the raw patches with an
    indicator a label (spatial.sample_labels).
    """
    reference = BUDGETS["plain"]
    voxel = reference.gpu_memory_gb * 1e9 / reference.voxels / REFERENCE_BATCH * dtype.itemsize / 2
    network = plan.network
    shape = Topology(strides=network.strides, kernels=network.kernels, patch=plan.patch)
    wider = max(f / usual for f, usual in zip(network.features, shape.features, strict=True))
    maps = feature_map_voxels(
        shape,
        kind=network.kind,
        encoder_blocks=network.encoder_blocks,
        decoder_convs=network.decoder_convs,
        labels=plan.heads,
    )
    channels = len(plan.channels)
    ahead = BATCHES_AHEAD * (4 * channels + 8) * math.prod(plan.patch)  # float32 image, int64 label
    raw = 2 * (4 * channels + 4 * plan.heads + 2) * math.prod(initial_patch(plan.patch))
    return int(batch_size * (voxel * max(1.0, wider) * maps + ahead + raw))


def cut_tensor(array: Tensor, start: Triple, out: Tensor, fill: int) -> None:
    """`patches.cut` for tensors of one device, any dtype into any: (..., D, H, W) into (..., d, h, w), in place."""
    source, target = overlap(start, out.shape[-3:], array.shape[-3:])
    inner = out[target]
    if inner.numel() < out.numel():
        out.fill_(fill)
    inner.copy_(array[source])


def _blocks(holding: Holding, device: torch.device) -> list[ResidentCase]:
    """A view for every case into two blocks: no gaps, so that what is predicted is what is taken."""
    sizes = [(case.image.size, case.label.size) for case in holding.cases]
    try:
        image = torch.empty(sum(size for size, _ in sizes), dtype=IMAGE_DTYPE, device=device)
        label = torch.empty(sum(size for _, size in sizes), dtype=holding.label_dtype, device=device)
    except torch.OutOfMemoryError:
        raise InputError(
            f"{len(sizes)} cases of {holding.predicted_bytes / 1e9:.1f} GB do not fit the memory of {device}; give "
            "them less with --resident-gb, or 0 to stream them"
        ) from None
    images = torch.split(image, [size for size, _ in sizes])
    labels = torch.split(label, [size for _, size in sizes])
    return [
        ResidentCase(image=i.view(case.image.shape), label=k.view(case.label.shape))
        for case, i, k in zip(holding.cases, images, labels, strict=True)
    ]


def _copy(case: StoredCase, held: ResidentCase) -> None:
    """Rounded on the CPU, a channel at a time, so that half of the bytes travel."""
    for channel, out in zip(case.image, held.image, strict=True):
        out.copy_(torch.from_numpy(np.array(channel)).to(IMAGE_DTYPE))
    out = torch.from_numpy(np.array(case.label)).to(held.label.dtype)
    held.label.copy_(out)
