"""One line of the comparison with the live peer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Row:
    """check: the station. on: what both sides worked on. difference: the largest seen, in `unit`; NaN is never met.

    tolerance: what was promised. cause: why it cannot be met here, where that is known; the difference must then stay
    within `bound`. note: what else was seen.
    """

    check: str
    on: str
    difference: float
    tolerance: float
    unit: str
    note: str = ""
    cause: str = ""
    bound: float = 0.0

    @property
    def verdict(self) -> Literal["equal", "within", "not met", "FAILED"]:
        """`not met` is a difference with a known cause and within its bound; FAILED one without."""
        if self.difference == 0:
            return "equal"
        if self.difference <= self.tolerance:
            return "within"
        return "not met" if self.cause and self.difference <= self.bound else "FAILED"

    @property
    def passed(self) -> bool:
        return self.verdict != "FAILED"
