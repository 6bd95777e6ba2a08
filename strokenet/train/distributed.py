"""Several processes, one training: each computes a share of every batch (DistributedDataParallel over gloo or nccl).

Comes in: what torchrun or srun says of this process (infer/shard.py). Goes out: Ranks, which the training asks for its
share of a batch, for sums over all, and for what all must decide together. N ranks see the very samples that one
process would see and end with its weights, but for the order in which float32 numbers are summed. One process is the
trivial case: it touches nothing of torch.distributed.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from strokenet.data.errors import InputError, ToldElsewhere
from strokenet.infer.shard import Shard
from strokenet.model.device import choose_device
from strokenet.train.loss import Part

Item = TypeVar("Item")

MEET_SECONDS = 300  # for all processes to start; the import of torch from a slow disk takes one
WAIT_MINUTES = 30  # for a rank that is late: it validates a larger volume, or writes a checkpoint
_PLACE = ("MASTER_ADDR", "MASTER_PORT")  # where the processes meet: torchrun sets both


class RankLost(InputError):
    """Another process is gone, or did not answer for WAIT_MINUTES: this one cannot go on without it."""

    exit_code = 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Groups:
    """Two ways to all ranks. device: for tensors where the network is. words: for numbers and objects of the CPU.

    They are two so that a decision does not queue behind gradients, and needs no GPU.
    """

    device: dist.ProcessGroup
    words: dist.ProcessGroup


@dataclass(frozen=True, kw_only=True, eq=False)
class Ranks:
    """This process among those that train together.

    rank: 0 .. world - 1; rank 0 writes and speaks. local: its place among the `neighbours`, the ranks of its machine.
    groups: None where it is alone. Every method but first, share, part and rounds is called by all ranks in the same
    order: the first ones wait there for the last.
    """

    rank: int = 0
    world: int = 1
    local: int = 0
    neighbours: int = 1
    groups: Groups | None = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self.groups is None

    def share(self, batch_size: int) -> range:
        """Indices of this rank's samples in the batch: a run of them, the earlier ranks one more (nnU-Net's rule).

        Raises:
            InputError: more ranks than samples.
        """
        each, more = divmod(batch_size, self.world)
        if not each:
            raise InputError(
                f"{self.world} processes for a batch of {batch_size}; allowed: one a patch; start {batch_size} at most "
                "(--nproc-per-node), or take a larger --batch-size"
            )
        start = self.rank * each + min(self.rank, more)
        return range(start, start + each + (self.rank < more))

    def part(self, batch_size: int) -> Part:
        """What the loss needs to know of the share."""
        weight = len(self.share(batch_size)) * self.world / batch_size
        return Part(weight=weight, total=self._total_with_gradient)

    def rounds(self, items: Sequence[Item]) -> tuple[Item | None, ...]:
        """Every world-th item from the rank's own on, and None at the end where others have one more."""
        own = items[self.rank :: self.world]
        return (*own, *[None] * (-(-len(items) // self.world) - len(own)))

    def wrap(self, network: nn.Module) -> nn.Module:
        """The network; of several ranks one whose backward leaves the mean gradient on all, sent while it computes.

        network: the same parameters on every rank, and each that requires a gradient gets one in every step.
        """
        if self.groups is None:
            return network
        return DistributedDataParallel(network, process_group=self.groups.device, gradient_as_bucket_view=True)

    def total(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, without gradient. A tensor on the CPU costs no GPU anything."""
        if self.groups is None:
            return tensor
        tensor = tensor.clone()
        dist.all_reduce(tensor, group=self.groups.words if tensor.device.type == "cpu" else self.groups.device)
        return tensor

    def mean(self, tensor: Tensor) -> Tensor:
        """Mean over the ranks, without gradient: of their losses, the loss of the batch. NaN where one has it."""
        return tensor if self.groups is None else self.total(tensor) / self.world

    def most(self, *numbers: float) -> tuple[float, ...]:
        """The largest of each number over the ranks."""
        if self.groups is None:
            return numbers
        values = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self.groups.words)
        return tuple(values.tolist())

    def gathered(self, item: Item) -> list[Item]:
        """Every rank's item, in their order; small and picklable."""
        if self.groups is None:
            return [item]
        items: list[Any] = [None] * self.world
        dist.all_gather_object(items, item, group=self.groups.words)
        return items

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that fails on all ranks where it fails on one, in the words of the first that failed."""
        if self.groups is None:
            yield
            return
        failure: InputError | OSError | None = None
        try:
            yield
        except (InputError, OSError) as error:
            failure = error
        lines = self.gathered(None if failure is None else str(failure))
        worst = next((rank for rank, line in enumerate(lines) if line is not None), None)
        if worst is None:
            return
        if failure is not None and worst == self.rank == 0:
            raise failure
        raise self.error(f"rank {worst}: {lines[worst]}") from failure

    def require_same(self, facts: Mapping[str, str]) -> None:
        """Refuses ranks that do not train the same from the same point.

        Raises:
            InputError: a fact is another on one of them.
        """
        ours, *others = self.gathered((socket.gethostname(), dict(facts)))
        for rank, (host, theirs) in enumerate(others, start=1):
            wrong = [name for name, value in ours[1].items() if theirs.get(name) != value]
            if wrong:
                what = ", ".join(f"{name} {theirs.get(name)} there, {ours[1][name]} on rank 0" for name in wrong)
                raise self.error(
                    f"rank {rank} on {host} differs: {what}; start all ranks with the same options, and with a "
                    "workspace in a folder that all machines share"
                )

    def error(self, line: str) -> InputError:
        """What all ranks end with at the same point: rank 0 says it, the others are silent."""
        return InputError(line) if self.first else ToldElsewhere(line)

    def _total_with_gradient(self, tensor: Tensor) -> Tensor:
        return tensor if self.groups is None else _Sum.apply(tensor, self.groups.device, self.world)  # type: ignore[no-untyped-call]


ALONE = Ranks()


class _Sum(torch.autograd.Function):
    """Sum over the ranks. All compute the same from it: their gradients of it are equal, and sum to world times one."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup, world: int) -> Tensor:
        ctx.world = world
        total = tensor.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0] * ctx.world, None, None


def restarted(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun started this process again, because one of the ranks was lost (--max-restarts).

    Where the rank was on another machine, or a whole machine was lost, this is not told here.
    """
    return environment.get("TORCHELASTIC_RESTART_COUNT", "0") not in ("", "0")


@contextmanager
def joined(launched: Shard | None, device: str) -> Iterator[Ranks]:
    """The ranks of one training, from their meeting to their parting. launched: None for a process alone.

    device: the word of --device; "auto" and "cuda" give every rank of a machine a GPU of its own.

    Raises:
        InputError: they cannot meet, or not compute together.
        RankLost: one of the others ended before its time.
    """
    if launched is None:
        yield ALONE
        return
    _meet(launched)
    try:
        ranks = _ranks(launched, device)
        yield ranks
        ranks.most(0)  # nobody leaves while another may still need it
    except RuntimeError as error:
        if not _says_that_a_rank_is_lost(error):
            raise
        raise RankLost(
            f"rank {launched.index}: another of the {launched.count} processes is gone or hangs; see what it said; the "
            "last checkpoint is whole: start again with --resume (torchrun --max-restarts N does so by itself)"
        ) from error
    finally:
        dist.destroy_process_group()


def _meet(launched: Shard) -> None:
    """torch's default process group; the longest wait of it is for the last one to start."""
    missing = [name for name in _PLACE if not os.environ.get(name)]
    if missing:
        raise InputError(
            f"{launched.of}: {launched.count} processes, but {' and '.join(missing)} does not say where they meet; set "
            f"{' and '.join(_PLACE)} (torchrun does), or start separate trainings one by one"
        )
    host, port = (os.environ[name] for name in _PLACE)
    wait = timedelta(seconds=MEET_SECONDS)
    rank, world = launched.index, launched.count
    try:
        store, _, _ = next(rendezvous("env://", rank, world, timeout=wait))
        store.set_timeout(wait)
        store = _own_part(store, rank, world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=wait)
    except (RuntimeError, ValueError, OSError) as error:  # torch's own errors of the network are RuntimeErrors
        line = " ".join(str(error).split())[:200]
        raise InputError(
            f"{launched.of}: rank {rank} could not meet all {world} processes at {host}:{port} ({line}); start as many "
            "as announced, and let the machines reach this port"
        ) from error


def _own_part(store: Store, rank: int, world: int) -> Store:
    """A part of the store in which nobody has written yet.

    torchrun (2.13) keeps its store when it starts the ranks again: they would read addresses of those that are gone,
    and the number of restarts may differ between machines. So rank 0 draws a word, and tells it to each rank in answer
    to one that this rank has drawn: no earlier rank 0 can have heard it.
    """
    drawn = secrets.token_hex(8)
    if rank:
        store.set(f"drawn by {rank}", drawn)
        word = store.get(f"answer to {drawn}").decode()
        store.set(f"{word} heard by {rank}", "")
        return PrefixStore(word, store)
    limit = time.monotonic() + MEET_SECONDS
    while waiting := [other for other in range(1, world) if not store.check([f"{drawn} heard by {other}"])]:
        if time.monotonic() > limit:
            raise TimeoutError(f"no answer from rank {waiting[0]}")
        for other in waiting:
            if store.check([f"drawn by {other}"]):
                store.set(f"answer to {store.get(f'drawn by {other}').decode()}", drawn)
        time.sleep(0.02)
    return PrefixStore(drawn, store)


def _ranks(launched: Shard, device: str) -> Ranks:
    """Ranks that have met: their devices chosen and checked, their groups made."""
    wait = timedelta(minutes=WAIT_MINUTES)
    words = dist.new_group(backend="gloo", timeout=wait)
    ranks = Ranks(
        rank=launched.index, world=launched.count, local=launched.local, groups=Groups(device=words, words=words)
    )
    with ranks.together():
        chosen = choose_device(device, local=launched.local)
        if chosen.type not in ("cpu", "cuda"):
            raise InputError(f"--device {chosen.type}: several processes train on cpu or cuda; start one alone")
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)  # nccl takes the current one
    host = socket.gethostname()
    places = ranks.gathered((host, chosen.type, _gpu_name(chosen)))
    if wrong := _cannot_compute_together(places):
        raise ranks.error(wrong)
    by_nccl = chosen.type == "cuda" and dist.is_nccl_available()
    beside = dist.new_group(backend="nccl" if by_nccl else "gloo", timeout=wait)
    neighbours = sum(there == host for there, _, _ in places)
    return replace(ranks, neighbours=neighbours, groups=Groups(device=beside, words=words))


def _gpu_name(device: torch.device) -> str:
    """What no two GPUs share, whatever numbers a launcher shows them under; empty for a CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def _cannot_compute_together(places: Sequence[tuple[str, str, str]]) -> str | None:
    """Why not, or None. places: host, kind of device and GPU of every rank."""
    kinds = sorted({kind for _, kind, _ in places})
    if len(kinds) > 1:
        where = ", ".join(f"{host} has {kind}" for host, kind, _ in dict.fromkeys(places))
        return f"--device: the ranks would compute on {' and '.join(kinds)} ({where}); give --device {kinds[0]} to all"
    gpus = [place for place in places if place[2]]
    for host, _, _ in (place for place in gpus if gpus.count(place) > 1):
        own = len({place for place in gpus if place[0] == host})
        return f"{host}: several ranks share a GPU; start {own} there (--nproc-per-node {own}), or give --device cpu"
    return None


def _says_that_a_rank_is_lost(error: RuntimeError) -> bool:
    """torch has classes for nccl and the store; gloo says it in words alone, which name its file."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)
