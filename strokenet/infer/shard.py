"""Shard: the share of a cohort's cases that this process segments, where several work side by side.

Existing launchers start the processes: `--shard 2/4` says it in words, torchrun by RANK and WORLD_SIZE, srun by
SLURM_PROCID and SLURM_STEP_NUM_TASKS (not SLURM_NTASKS, which the script of a job sees too, where one process runs).
Every process takes every Nth case, so that long and short ones mix; none waits for another.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from strokenet.data.errors import InputError

Item = TypeVar("Item")

_LAUNCHERS = (  # name, rank, number of ranks, rank on this machine
    ("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Part `index` of `count`, from 0. local: place among the processes of this machine. of: who said it."""

    index: int
    count: int
    local: int = 0
    of: str = "--shard"

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise InputError(f"{self.of}: part {self.index + 1} of {self.count}; allowed: 1/N to N/N")

    def __str__(self) -> str:
        return f"{self.index + 1}/{self.count}"

    def share(self, items: Sequence[Item]) -> tuple[Item, ...]:
        """This part's items."""
        return tuple(items[self.index :: self.count])


def shard_from_words(words: str) -> Shard:
    """ "2/4" as a Shard.

    Raises:
        InputError: no I/N with 1 <= I <= N.
    """
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", words)
    if not found:
        raise InputError(f"--shard {words!r}; allowed: I/N, for example 2/4, the second of four parts")
    return Shard(index=int(found[1]) - 1, count=int(found[2]), of=f"--shard {words}")


def launched_shard(environment: Mapping[str, str] = os.environ) -> Shard | None:
    """What torchrun or srun says of this process; None where neither started it, or it is the only one.

    Raises:
        InputError: a rank that is no number or not below the number of ranks.
    """
    for name, rank, count, local in _LAUNCHERS:
        if rank not in environment or count not in environment:
            continue
        words = {key: environment.get(key, "0") for key in (rank, count, local)}
        if not all(value.isdecimal() for value in words.values()):
            raise InputError(f"{name}: {', '.join(f'{k}={v}' for k, v in words.items())}; allowed: whole numbers")
        index, parts, place = map(int, words.values())
        return Shard(index=index, count=parts, local=place, of=name) if parts > 1 else None
    return None
