"""Predict: one case through a model, in memory: preprocess -> sliding window -> restore -> postprocess.

Comes in: a Model and a Case, or its images (paths, nibabel images, arrays with an affine). Goes out: a Prediction on
the scan's own grid. All of it is computed where the network is: the scan goes to a GPU once, the mask comes back, and
the probabilities when they are asked for. Nothing is written:

    model = load_model(Path("WORK"))
    found = predict_images(model, {"T1": "t1.nii.gz", "FLAIR": (array, affine)}, InferConfig())
    found.mask_ijk  # in the axis order of the array given
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.components import label_components
from planner.plan import Plan, PostprocessRule
from strokenet.data.case import Case, case_from_images, with_channels
from strokenet.data.errors import InputError
from strokenet.data.track import Track, silent
from strokenet.infer.brain_box import brain_logits
from strokenet.infer.config import InferConfig, mask_rule
from strokenet.infer.engine import Engine
from strokenet.infer.memory import free_bytes, peak_memory_bytes
from strokenet.infer.postprocess import common_field, postprocess
from strokenet.infer.restore import place_back, place_back_probability, resample_logits
from strokenet.infer.sliding_window import WindowRules
from strokenet.model.checkpoint import Model
from strokenet.preprocess.normalise import blank_channels
from strokenet.preprocess.preprocess import Origin, Prepared, preprocess, turned_image

Image = TypeVar("Image")
_log = logging.getLogger("strokenet")


@dataclass(frozen=True, kw_only=True, eq=False)
class Prediction:
    """What a network finds in a case.

    mask: (D, H, W) uint8 on the scan's grid. lesion_sizes: voxels of each lesion (26-connected, of any label), in the
    raster order of their first voxels. cropped: probabilities (K, *box) float32 in the box of `origin`, background
    first, where they were computed.
    """

    mask: NDArray[np.uint8]
    lesion_sizes: tuple[int, ...]
    cropped: Tensor
    origin: Origin

    @cached_property
    def probability(self) -> NDArray[np.float32]:
        """(K, D, H, W) float32 on the scan's grid, background first."""
        return np.asarray(place_back_probability(self.cropped, self.origin).cpu().numpy())

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
    _announce_memory(case, engine)
    return engine.within_memory(lambda: _predict_case(engine, case, track))


def _predict_case(engine: Engine, case: Case, track: Track) -> Prediction:
    plan, config = engine.model.plan, engine.config
    prepared = preprocess(completed(case, engine.model), plan, engine.place)
    if config.crop == "brain":
        answer = brain_logits(engine, case, prepared.image, prepared.origin, track).to(engine.place)
    else:
        answer = engine.logits(prepared.image, track).to(engine.place)
    # NaN is above no threshold: the mask would be empty and look like an answer
    if not torch.isfinite(answer).all():
        raise InputError(f"{case.case_id}: the network's answer holds NaN or infinity; try --precision fp32")
    rule = mask_rule(plan, config)
    scores, probability = _on_scan(answer, engine.rules, plan, prepared.origin)
    decisive = scores if rule.threshold is None and not config.probabilities else probability
    mask = postprocess(decisive, rule, case.geometry.voxel_volume_mm3, _field(case, rule, prepared, answer.device))
    found = Prediction(
        mask=place_back(mask, prepared.origin).cpu().numpy(),
        lesion_sizes=tuple(label_components(mask)[1][1:].tolist()),
        cropped=probability,
        origin=prepared.origin,
    )
    if config.probabilities:
        _ = found.probability  # here, where memory that runs out is dealt with, and not in the thread that writes
    return found


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


def _field(case: Case, rule: PostprocessRule, prepared: Prepared, device: torch.device) -> Tensor | None:
    """`field_of_view` of the given channels, of what lies in the crop; a hole of a channel does. (*box) bool."""
    if rule.common_field:
        origin = prepared.origin
        return common_field(turned_image(case.image, origin.turn, device)[:, *origin.box.slices])
    return prepared.inside.to(device) if rule.scanned_only else None


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


def _announce_memory(case: Case, engine: Engine) -> None:
    peak = peak_memory_bytes(engine.model.plan, case.geometry, engine.rung.batch)
    free = free_bytes(engine.rung.device)
    _log.info("%s: %s voxels, about %.1f GB at peak", case.case_id, case.geometry.shape, peak / 1e9)
    if free is not None and peak > free:
        _log.warning("%s: about %.1f GB may be needed, %.1f GB are free", case.case_id, peak / 1e9, free / 1e9)


def _on_scan(answer: Tensor, rules: WindowRules, plan: Plan, origin: Origin) -> tuple[Tensor, Tensor]:
    """The network's answer (K, *network) on the crop's own grid: what the most probable label is read from, and
    probabilities, both (K, *box) float32.

    nnU-Net reads the label from the resampled logits, unless it is asked for probabilities. Two labels need one map,
    the difference of their logits, except in the exact form, where each is rounded by itself.
    """
    if rules.average == "probabilities":
        probability = resample_logits(answer, plan, origin)
        return probability, probability
    if rules.exact:
        rounded = resample_logits(answer, plan, origin, exact=True).float()
        return rounded, rounded.softmax(0)
    if len(answer) != 2:
        logits = resample_logits(answer, plan, origin)
        return logits, logits.softmax(0)
    lesion = resample_logits(answer[1:] - answer[:1], plan, origin)[0].sigmoid()
    probability = torch.stack([1 - lesion, lesion])
    return probability, probability
