"""Predict: one case through a model, in memory: preprocess -> sliding window -> restore -> postprocess.

Comes in: a Model and a Case, or its images (paths, nibabel images, arrays with an affine). Goes out: a Prediction on
the scan's own grid. Nothing is written:

    model = load_model(Path("WORK"))
    found = predict_images(model, {"T1": "t1.nii.gz", "FLAIR": (array, affine)}, InferConfig())
    found.mask_ijk  # in the axis order of the array given
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from planner.plan import Plan, PostprocessRule
from strokenet.data.case import Case, case_from_images, with_channels
from strokenet.data.errors import InputError
from strokenet.data.track import Track, silent
from strokenet.infer.brain_box import brain_logits
from strokenet.infer.config import InferConfig, mask_rule
from strokenet.infer.engine import Engine
from strokenet.infer.memory import peak_memory_bytes
from strokenet.infer.postprocess import field_of_view, lesion_probability, postprocess, softmax
from strokenet.infer.restore import place_back, place_back_probability, resample_logits
from strokenet.infer.sliding_window import WindowRules
from strokenet.model.checkpoint import Model
from strokenet.preprocess.memory import available_bytes
from strokenet.preprocess.normalise import blank_channels
from strokenet.preprocess.preprocess import Origin, preprocess

Image = TypeVar("Image")
_log = logging.getLogger("strokenet")


@dataclass(frozen=True, kw_only=True, eq=False)
class Prediction:
    """mask: (D, H, W) uint8 on the scan's grid. probability: (K, D, H, W) float32 there, background first."""

    mask: NDArray[np.uint8]
    probability: NDArray[np.float32]

    @property
    def mask_ijk(self) -> NDArray[np.uint8]:
        """The mask in nibabel's axis order, a view: (D, H, W) -> (i, j, k)."""
        return self.mask.transpose(2, 1, 0)


def predict_images(
    model: Model, images: Mapping[str, Any], config: InferConfig, track: Track = silent, case_id: str = "case"
) -> Prediction:
    """Mask and probability of one case in memory; nothing is written.

    Args:
        images: channel name -> path, nibabel image, or (array (i, j, k), affine (4, 4)) in nibabel's axis order.
            Names are compared without regard to case, their order does not matter. Some of the channels are enough
            for a model trained with modality dropout.

    Raises:
        InputError: a channel is missing or unknown, or an image cannot be used.
    """
    given = in_channel_order(images, model.plan, subsets=model.modality_dropout > 0)
    return predict(model, case_from_images(case_id, given), config, track)


def predict(model: Model, case: Case, config: InferConfig, track: Track = silent) -> Prediction:
    """`predict_case` with an engine of its own; many cases are faster with one engine for all."""
    return predict_case(Engine(model, config), case, track)


def predict_case(engine: Engine, case: Case, track: Track = silent) -> Prediction:
    """Mask and probability of one case, on its own grid. The stations by name, in order.

    Of a model trained with modality dropout the case may lack channels.

    Raises:
        InputError: the case does not fit the plan, or the network's answer is not finite.
    """
    plan, config = engine.model.plan, engine.config
    _announce_memory(case, plan)
    prepared = preprocess(completed(case, engine.model), plan)
    image = torch.from_numpy(prepared.image)
    if config.crop == "brain":
        answer = brain_logits(engine, case, image, prepared.origin, track)
    else:
        answer = engine.logits(image, track)
    # NaN is above no threshold: the mask would be empty and look like an answer
    if not all(torch.isfinite(part).all() for part in answer):
        raise InputError(f"{case.case_id}: the network's answer holds NaN or infinity; try --precision fp32")
    rule = mask_rule(plan, config)
    scores, probability = _on_scan(answer.cpu().numpy(), engine.rules, plan, prepared.origin)
    decisive = scores if rule.threshold is None and not config.probabilities else probability
    mask = postprocess(decisive, rule, case.geometry.voxel_volume_mm3, _field(case, rule, prepared.origin))
    return Prediction(
        mask=place_back(mask, prepared.origin), probability=place_back_probability(probability, prepared.origin)
    )


def completed(case: Case, model: Model) -> Case:
    """The case with zeros for the channels it lacks, where the model was trained to do without (train/dropout.py).

    Zeros do not move the crop to the non-zero voxels, and are 0 after normalisation: what training put there, too.

    Raises:
        InputError: a channel is absent whose normalisation does not leave zeros at 0.
    """
    plan = model.plan
    absent = [name for name in plan.channels if name not in case.channels]
    if not (absent and model.modality_dropout and case.channels and set(case.channels) < set(plan.channels)):
        return case  # preprocess compares the channels
    needed = [name for name in absent if name not in blank_channels(plan)]
    if needed:
        raise InputError(
            f"{case.case_id}: lacks {', '.join(needed)}, which this model cannot do without: zeros are not 0 after its "
            "normalisation; give it"
        )
    return with_channels(case, plan.channels)


def _field(case: Case, rule: PostprocessRule, origin: Origin) -> NDArray[np.bool_] | None:
    """The field of view of the given channels on the crop, where the rule asks for one. (*box) bool."""
    field = field_of_view(case.image, rule)
    return None if field is None else np.asarray(origin.turn.apply(field)[origin.box.slices], dtype=bool)


def in_channel_order(images: Mapping[str, Image], plan: Plan, *, subsets: bool = False) -> dict[str, Image]:
    """The images under the plan's names and in its order; names are compared without regard to case.

    subsets: some of the channels will do (a model trained with modality dropout).

    Raises:
        InputError: a channel of the model is missing, given twice, or one is given that it does not have.
    """
    given = {name.casefold(): image for name, image in images.items()}
    missing = [name for name in plan.channels if name.casefold() not in given]
    unknown = [name for name in images if name.casefold() not in {channel.casefold() for channel in plan.channels}]
    if (missing and not (subsets and given)) or unknown or len(given) < len(images):
        how = "one or more of them" if subsets else "each once"
        raise InputError(
            f"the model reads {', '.join(plan.channels)}, {how}; given: {', '.join(images) or 'none'}; "
            f"missing: {', '.join(missing) or 'none'}, unknown: {', '.join(unknown) or 'none'}"
        )
    return {name: given[name.casefold()] for name in plan.channels if name.casefold() in given}


def _announce_memory(case: Case, plan: Plan) -> None:
    peak, free = peak_memory_bytes(plan, case.geometry), available_bytes()
    _log.info("%s: %s voxels, about %.1f GB at peak", case.case_id, case.geometry.shape, peak / 1e9)
    if free is not None and peak > free:
        _log.warning("%s: about %.1f GB may be needed, %.1f GB are free", case.case_id, peak / 1e9, free / 1e9)


def _on_scan(
    answer: NDArray[Any], rules: WindowRules, plan: Plan, origin: Origin
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The network's answer (K, *network) on the crop's own grid: what the most probable label is read from, and
    probabilities, both (K, *box) float32.

    nnU-Net reads the label from the resampled logits, unless it is asked for probabilities. Two labels need one map,
    the difference of their logits, except in the exact form, where each is rounded by itself.
    """
    if rules.average == "probabilities":
        probability = resample_logits(answer, plan, origin)
        return probability, probability
    if rules.exact:
        rounded = resample_logits(answer, plan, origin, exact=True).astype(np.float32)
        return rounded, softmax(rounded)
    if len(answer) != 2:
        logits = resample_logits(answer, plan, origin)
        return logits, softmax(logits)
    lesion = lesion_probability(resample_logits(answer[1:] - answer[:1], plan, origin)[0])
    probability = np.stack([1 - lesion, lesion])
    return probability, probability
