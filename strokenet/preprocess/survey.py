"""Survey: what planning needs to know of one case, and nothing else (Isensee 2021, Methods: "dataset fingerprint").

Comes in: a case with its label. Goes out: a CaseSummary of numbers for planner/fingerprint.py. The plan's axis order is
not known yet, so that shapes and spacings are those after the orientation only.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from planner.fingerprint import CaseSummary, foreground_counts
from planner.plan import Orientation
from strokenet.data.case import Case
from strokenet.data.errors import InputError
from strokenet.preprocess.crop import nonzero_box
from strokenet.preprocess.preprocess import case_turn


def survey(case: Case, *, orientation: Orientation, draws: int) -> CaseSummary:
    """Size, spacing and lesion intensities of a case, cropped to its nonzero box.

    Args:
        case: with a label; every value above 0 is foreground.
        orientation: "RAS" turns the case first, "as-stored" does not.
        draws: random draws (with replacement) from the foreground of each channel.

    Raises:
        InputError: the case has no label.
    """
    if case.label is None:
        raise InputError(f"{case.case_id}: no label; planning needs labelled cases, add the label or leave it out")
    turn = case_turn(case.geometry, orientation)
    image = np.ascontiguousarray(turn.apply(case.image), dtype=np.float32)
    box, _ = nonzero_box(torch.from_numpy(image))
    lesion = np.asarray(turn.apply(case.label), dtype=np.int16)[box.slices] > 0
    values = tuple(channel[box.slices][lesion] for channel in image)
    return CaseSummary(
        case_id=case.case_id,
        shape_after_crop=box.shape,
        spacing=turn.permute(case.geometry.spacing),
        relative_size=math.prod(box.shape) / math.prod(case.geometry.shape),
        values=values,
        counts=foreground_counts([len(v) for v in values], draws),
    )
