"""The first weights of a run that starts from another model (Meddahi 2024, V: pretraining, then fine-tuning).

Comes in: a fresh network and the folder of a trained model, ours or an imported one. Goes out: the network with its
weights, and where they come from. Nothing is taken in part: every parameter fits, or the run does not start. And the
weights alone are taken: the schedule begins at its own --lr and momentum at zero (VI.B: 500 epochs from 1e-5). Expert
corrections (VII.C) are such a run on the corrected masks. Reinforcement learning from feedback, which VII.C proposes,
is not built: where a mask says of every voxel what is right, a reward estimated from it would say less.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from torch import Tensor

from planner.plan import Plan
from strokenet.data.errors import InputError
from strokenet.model.adapted import same_labels
from strokenet.model.checkpoint import load_weights
from strokenet.model.network import UNet
from strokenet.workspace import Workspace

_log = logging.getLogger("strokenet")

SHOWN = 5  # names of parameters in a message

InitHeads = Literal["keep", "new"]


def initialise(network: UNet, plan: Plan, source: Path, *, fold: str, heads: InitHeads) -> dict[str, str]:
    """Weights of another model with the same shapes; goes out: the fold they come from, and what became of the heads.

    The heads are kept when the label sets agree, and one lesion is one lesion whatever its name (models of nnU-Net v1
    have none); "new" leaves them at random (nnU-Net's rule).

    Raises:
        InputError: no trained model, its channels in another order, or a parameter of another shape.
    """
    model = Workspace(source)
    theirs, folds = model.read_plan(), model.trained_folds()
    if not folds:
        raise InputError(f"--init {source}: no trained fold there; give the folder of a trained model")
    chosen = fold if fold in folds else folds[0]  # the same fold has not seen our validation cases
    if chosen != fold and fold != "all":
        _log.warning(
            "--init %s: has no fold %s; fold %s is taken. If it was trained on our validation cases, their scores are "
            "not of unseen cases: train fold %s there first, or fold %s here",
            *(source, fold, chosen, fold, chosen),
        )
    file = model.fold(chosen).weights
    assert file is not None
    _compare(theirs, plan, source)
    keep = heads == "keep" and same_labels(theirs, plan)
    given, own = load_weights(file, theirs), network.state_dict()
    if not keep:
        given, own = _body(given), _body(own)
    _require_same_shapes(given, own, f"--init {source}")
    network.load_state_dict(given, strict=False)
    became = "kept" if keep else "new"
    why = "" if keep or heads == "new" else f" (its labels are {', '.join(theirs.labels)})"
    _log.info("initialised from %s, fold %s; heads %s%s", source, chosen, became, why)
    return {"init_fold": chosen, "heads": became}


def _compare(theirs: Plan, ours: Plan, source: Path) -> None:
    """Refuses the same channels in another order: they would be read as one another. Says what else the user chose."""
    there, here = ([name.casefold() for name in plan.channels] for plan in (theirs, ours))
    names = ", ".join(theirs.channels), ", ".join(ours.channels)
    if there != here and sorted(there) == sorted(here):
        raise InputError(
            f"--init {source}: its channels are {names[0]}, this plan's {names[1]}; number them in its order "
            "(dataset.json and the files' _0000, _0001), or reorder its network by `strokenet adapt`"
        )
    if there != here:
        _log.warning("--init: channels %s of the model become %s, in this order", *names)
    if (theirs.orientation, theirs.transpose) != (ours.orientation, ours.transpose):
        _log.warning(
            "--init: the model sees scans %s, turned %s; this plan %s, %s: what it knows of left and right, front and "
            "back, may be lost (`strokenet plan --orientation %s`)",
            *(theirs.orientation, theirs.transpose, ours.orientation, ours.transpose, theirs.orientation),
        )


def _body(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All but the heads."""
    return {name: tensor for name, tensor in weights.items() if ".seg_layers." not in name}


def _require_same_shapes(given: Mapping[str, Tensor], own: Mapping[str, Tensor], where: str) -> None:
    """Every parameter on either side must be on the other, with the same shape."""
    wrong = [
        f"{name} {_shape(given, name)} there, {_shape(own, name)} here"
        for name in dict.fromkeys([*own, *given])
        if _shape(given, name) != _shape(own, name)
    ]
    if wrong:
        _log.debug("%s: %s", where, "; ".join(wrong))
        more = f" and {len(wrong) - SHOWN} more (-v lists all)" if len(wrong) > SHOWN else ""
        raise InputError(
            f"{where}: {len(wrong)} parameters differ from the plan's network: {', '.join(wrong[:SHOWN])}{more}; "
            "--init needs the same network and channels; `strokenet adapt` brings one network to another's plan"
        )


def _shape(weights: Mapping[str, Tensor], name: str) -> str:
    return str(tuple(weights[name].shape)) if name in weights else "missing"
