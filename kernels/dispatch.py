"""One place that says which implementation of an operator runs, and why.

STROKENET_KERNELS=auto (default) takes the fastest implementation that is built for the device; =reference takes the
plain one everywhere, to compare or to debug. `strokenet doctor` prints the choices.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

Implementation = Literal["reference", "operator", "cc3d"]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What runs for one operator on one device, and the reason in a few words."""

    operator: str
    implementation: Implementation
    why: str


def wanted() -> Literal["auto", "reference"]:
    """The value of STROKENET_KERNELS.

    Raises:
        ValueError: another value than auto or reference.
    """
    value = os.environ.get("STROKENET_KERNELS", "auto")
    if value == "auto":
        return "auto"
    if value == "reference":
        return "reference"
    raise ValueError(f"STROKENET_KERNELS is {value!r}; allowed: auto, reference")


def choose_resample() -> Choice:
    """Which resampling runs: one matrix product an axis, or scipy's zoom as it is."""
    if wanted() == "reference":
        return Choice(operator="resample", implementation="reference", why="STROKENET_KERNELS=reference")
    return Choice(operator="resample", implementation="operator", why="one matrix product an axis, equal to scipy's")


def choices() -> tuple[Choice, ...]:
    """Every operator's choice, for `strokenet doctor`."""
    components = Choice(operator="components", implementation="cc3d", why="one labelling, a bincount and a gather")
    return (choose_resample(), components)
