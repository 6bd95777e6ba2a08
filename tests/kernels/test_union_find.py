"""The argument about races in kernels/components_triton.py, on a model of its lanes.

Neither the interpreter, which runs one program after another, nor the compiler can test it, and a GPU shows few of the
orders that it may choose.
A lane is a generator that stops at every access of `parents`. Lanes go on in random order, and a load may give any
value that its address had since the launch, which is more than a GPU does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator

import numpy as np
import pytest

Access = tuple[str, int, int]  # "load" | "store" | "min", cell, value
Lane = Generator[Access, int, int]


def root(cell: int, *, shorten: bool) -> Lane:
    """_root of components_triton.py."""
    above = yield "load", cell, 0
    climbing = above != cell
    while climbing:
        further = yield "load", above, 0
        climbing = further != above
        if climbing:
            if shorten:
                yield "store", cell, further
            cell, above = above, further
    return above


def merge(cell: int, neighbours: list[int], *, again: bool) -> Lane:
    """merge_kernel with its _join; again: what atomic_min displaced is joined too."""
    joined = cell
    for other in neighbours:
        one, active = joined, True
        while active:
            roots = (yield from root(one, shorten=True)), (yield from root(other, shorten=True))
            low, high = min(roots), max(roots)
            before = (yield "min", high, low) if low != high else high
            one, other, active = low, before, again and before != high
        joined = one
    return joined


def count(cell: int, *, shorten: bool) -> Lane:
    """count_kernel: finds the root and points to it."""
    found = yield from root(cell, shorten=shorten)
    yield "store", cell, found
    return found


def launch(lanes: list[Lane], parents: list[int], rng: np.random.Generator, stale: float) -> list[int]:
    """Runs a kernel's lanes to their ends; stale: how often a load gives any earlier value."""
    history = [[parent] for parent in parents]
    waiting = [(lane, access) for lane in lanes if (access := next(lane, None))]
    while waiting:
        lane, (access, cell, value) = waiting.pop(rng.integers(len(waiting)))
        values = history[cell]
        answer = values[rng.integers(len(values))] if access == "load" and rng.random() < stale else values[-1]
        if access != "load":
            assert value <= cell  # a parent never comes after its child: there is no circle
            values.append(value if access == "store" else min(answer, value))
        with contextlib.suppress(StopIteration):
            waiting.append((lane, lane.send(answer)))
    return [values[-1] for values in history]


def roots_are_found(seed: int, *, again: bool = True, shorten_in_count: bool = False) -> bool:
    """Whether every cell of a random graph, chain or full block ends at its component's first cell."""
    rng = np.random.default_rng(seed)
    cells = int(rng.choice([2, 3, 5, 8, 20, 40]))
    kind, stale = rng.integers(3), rng.choice([0.0, 0.5])
    graphs = (
        lambda cell: [other for other in range(cell) if rng.random() < 2 / cells],
        lambda cell: [cell - 1] * (cell > 0),
        lambda cell: [*range(max(cell - 4, 0), cell)],
    )
    neighbours = [graphs[kind](cell) for cell in range(cells)]
    first = list(range(cells))
    for cell, earlier in enumerate(neighbours):
        for other in earlier:
            one, two = first[cell], first[other]
            first = [min(one, two) if f in (one, two) else f for f in first]
    parents = launch([merge(c, n, again=again) for c, n in enumerate(neighbours)], list(range(cells)), rng, stale)
    return launch([count(c, shorten=shorten_in_count) for c in range(cells)], parents, rng, stale) == first


def test_any_order_of_the_lanes_gives_the_same_roots() -> None:
    assert all(roots_are_found(seed) for seed in range(2000))


@pytest.mark.parametrize("broken", [{"again": False}, {"shorten_in_count": True}])
def test_the_model_sees_what_the_kernels_guard_against(broken: dict[str, bool]) -> None:
    assert not all(roots_are_found(seed, **broken) for seed in range(2000))
