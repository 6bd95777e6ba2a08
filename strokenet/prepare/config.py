"""Config: how a cohort is prepared, and the names that all files of the station share."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from strokenet.data.errors import InputError
from strokenet.prepare.bias import BiasConfig
from strokenet.prepare.register import RegisterConfig

Name = Literal["t1", "flair", "t1_2", "flair_2"]
SCANS: tuple[Name, ...] = ("t1", "flair", "t1_2", "flair_2")  # channel order of what is written; _2: the second time
CHANNEL_NAMES: dict[str, str] = {name: name.upper() for name in SCANS}
LABELS = {"background": 0, "lesion": 1}
ENDING = ".nii.gz"


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """reference: the scan whose voxels all are brought to: the FLAIR (of two times the first's), for lesions are drawn
    on it (IV.B, step 3).

    brain: "deepbet"; "none" for scans that are stripped; or a mask on the grid of one of the scans (one case).
    bias: estimate and remove it. zscore: (x - mean) / standard deviation inside the brain; off, because the plan
    normalises. label_on: the scan that the label was drawn on; None: the reference where its grid fits, else another.
    """

    reference: Name = "flair"
    brain: Path | Literal["deepbet", "none"] = "deepbet"
    bias: bool = True
    zscore: bool = False
    label_on: Name | None = None
    registration: RegisterConfig = field(default_factory=RegisterConfig)
    n4: BiasConfig = field(default_factory=BiasConfig)

    def __post_init__(self) -> None:
        if self.reference not in SCANS or self.label_on not in (*SCANS, None):
            raise InputError(f"reference {self.reference}, label_on {self.label_on}; allowed: {', '.join(SCANS)}")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values: part of every key of the cache."""
        return asdict(self) | {"brain": str(self.brain)}


def time_of(name: str) -> int:
    """1 or 2: the time at which a scan was taken."""
    return 2 if name.endswith("_2") else 1
