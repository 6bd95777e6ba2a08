"""Progress without printing: a long loop is wrapped by a Track, and the command line passes one that draws a bar."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

Item = TypeVar("Item")


class Track(Protocol):
    """Yields the items of a loop and shows how far it is."""

    def __call__(self, items: Iterable[Item], *, total: int, what: str) -> Iterator[Item]:
        """items: the loop's items. total: how many. what: one or two words for the bar, e.g. "preprocess"."""
        ...


def silent(items: Iterable[Item], *, total: int, what: str) -> Iterator[Item]:
    """The Track of library calls: shows nothing."""
    yield from items
