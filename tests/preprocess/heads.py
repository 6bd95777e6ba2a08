"""A small head that the tests of this room share: two channels, a ventricle of zeros, two lesions."""

from __future__ import annotations

from typing import cast

import numpy as np

from planner.plan import Plan
from strokenet.data.case import Case
from strokenet.data.geometry import Geometry
from strokenet.data.nifti import Header
from tests.plans import STATS, tiny_plan

CHANNELS = ("T1", "FLAIR")
LABELS = {"background": 0, "core": 1, "rim": 2}


def head(spacing: tuple[float, float, float] = (2.0, 1.0, 1.5), *, labelled: bool = True) -> Case:
    """14 x 18 x 12 voxels of formulas, no random numbers: what nnU-Net made of it is written in the tests."""
    d, h, w = np.indices((14, 18, 12))
    brain = ((d - 6.5) / 6) ** 2 + ((h - 9.5) / 7) ** 2 + ((w - 5) / 4.5) ** 2 < 1
    brain &= (d - 6) ** 2 + (h - 9) ** 2 + (w - 5) ** 2 >= 4
    t1 = np.where(brain, 100 + 5 * d - 3 * h + 20 * np.sin(w), 0)
    flair = np.where(brain, 60 + 8 * np.cos(d) + 4 * w, 0)
    label = np.zeros(brain.shape, np.int16)
    label[5:8, 4:7, 3:7], label[8:10, 10:13, 5:6], label[0, 9, 5] = 1, 2, 1  # the last one lies outside the brain
    affine = np.eye(4)[[2, 1, 0, 3]] @ np.diag([*spacing, 1.0])  # d, h, w run along z, y, x
    return Case(
        case_id="head",
        channels=CHANNELS,
        image=np.stack([t1, flair]).astype(np.float32),
        label=label if labelled else None,
        geometry=Geometry(shape=brain.shape, spacing=spacing, affine=affine),
        header=cast(Header, None),
    )


def head_plan(**changes: object) -> Plan:
    """A plan for the head: as stored, T1 normalised inside the brain, FLAIR over the crop."""
    fields: dict[str, object] = {
        "channels": CHANNELS,
        "labels": LABELS,
        "orientation": "as-stored",
        "transpose": (2, 0, 1),
        "spacing": (1.1, 1.5, 1.3),
        "use_mask_for_norm": (True, False),
        "intensity": (STATS, STATS),
        "postprocess": type(tiny_plan().postprocess)(),
    }
    return tiny_plan(**(fields | changes))
