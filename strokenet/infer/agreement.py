"""Agreement: what each channel of a case says alone, beside what all say together (Meddahi 2024, VII.A).

Comes in: a model trained with modality dropout, a case of two or more channels and its prediction. Goes out: for a user
who asks whether one modality suffices, the Dice of each channel's own mask with the mask of all, volumes and
confidences, and the channels that are surer alone. It costs one more inference a channel, each exactly what `infer`
gives for that scan by itself: cropped to its own non-zero voxels, by the same rule for the mask.

The confidence of a mask is the mean lesion probability over its voxels, 1 - p(background) on the scan's grid. It says
how sure the network is of what it drew, not whether it is right, and nothing of what it left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from strokenet.data.case import Case
from strokenet.data.overlap import dice
from strokenet.data.track import Track, silent
from strokenet.infer.engine import Engine
from strokenet.infer.predict import Prediction, predict_case


@dataclass(frozen=True, kw_only=True)
class Alone:
    """One channel by itself.

    dice: with the mask of all channels, 1 where both are empty. lesion_volume_ml: of its mask. confidence: mean lesion
    probability over its mask, None where that is empty.
    """

    dice: float
    lesion_volume_ml: float
    confidence: float | None


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far the channels of one case agree.

    confidence: of all channels together. alone: channel -> what it says by itself. surer_alone: channels whose own
    confidence is higher than that of all; of two channels, the other one lowers it. An empty mask has none: a channel
    that finds a lesion where all together find nothing is surer, one that finds nothing never is.
    """

    confidence: float | None
    alone: dict[str, Alone]
    surer_alone: tuple[str, ...]


def agreement_of(engine: Engine, case: Case, together: Prediction, track: Track = silent) -> Agreement | None:
    """The agreement of a case's channels; None where there is nothing to ask.

    That is: not wanted, the case has one channel, or the model was trained without dropout.

    Args:
        case: with the channels that were given, as `predict` takes it. together: its prediction.

    Raises:
        InputError: the network's answer to a channel alone is not finite.
    """
    if not (engine.config.agreement and engine.model.modality_dropout and len(case.channels) > 1):
        return None
    alone = ((name, predict_case(engine, only(case, name), track)) for name in case.channels)  # one at a time
    return compare(together, alone, case.geometry.voxel_volume_mm3)


def only(case: Case, channel: str) -> Case:
    """The case with one of its channels alone."""
    index = case.channels.index(channel)
    return replace(case, channels=(channel,), image=case.image[index : index + 1])


def compare(together: Prediction, alone: Iterable[tuple[str, Prediction]], voxel_volume_mm3: float) -> Agreement:
    """The prediction of each channel alone beside that of all, on one grid; of each its numbers alone are kept."""
    lesion, sure = together.mask > 0, confidence(together)
    found = {
        name: Alone(
            dice=dice(one.mask > 0, lesion),
            lesion_volume_ml=float(np.count_nonzero(one.mask)) * voxel_volume_mm3 / 1000,
            confidence=confidence(one),
        )
        for name, one in alone
    }
    surer = [name for name, one in found.items() if one.confidence is not None and one.confidence > (sure or 0.0)]
    return Agreement(confidence=sure, alone=found, surer_alone=tuple(surer))


def confidence(prediction: Prediction) -> float | None:
    """Mean lesion probability over the mask, 0 .. 1; None where the mask is empty."""
    background = prediction.probability[0][prediction.mask > 0]  # (D, H, W) -> (n,)
    return 1.0 - float(background.mean(dtype=np.float64)) if len(background) else None


def agreement_from(values: Mapping[str, Any] | None) -> Agreement | None:
    """The Agreement of a row of results.json."""
    if values is None:
        return None
    alone = {name: Alone(**one) for name, one in values["alone"].items()}
    return Agreement(confidence=values["confidence"], alone=alone, surer_alone=tuple(values["surer_alone"]))
