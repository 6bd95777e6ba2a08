"""A model adapted to another plan: `strokenet adapt`. The networks change in adapt.py; here are the folders.

Comes in: a trained model, ours or imported, and a folder with the target's plan.json. Goes out: a model folder with the
target's plan, every trained fold in its shape, and adapt.json, which says what each parameter is made of. `infer` takes
it at once, and `train --init` goes on from it. It is written whole or not at all.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from planner.plan import Plan
from strokenet.data.errors import InputError
from strokenet.data.files import new_folder, write_json
from strokenet.model.adapt import Fate, adapt_weights, channel_shares, fresh_weights
from strokenet.model.checkpoint import load_weights, save_weights, trained_dropout
from strokenet.workspace import Workspace

_log = logging.getLogger("strokenet")

REPORT = "adapt.json"


@dataclass(frozen=True, kw_only=True)
class AdaptConfig:
    """channels: target channel -> a source channel, "mean" or "zero" (`--map`). seed: of the numbers that are new."""

    channels: Mapping[str, str]
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Adaptation:
    """What an adaptation did.

    channels: target channel -> the shares that it takes of source channels; none is zero. lost_channels: those that no
    target channel takes. fates: one a parameter of the target. dropped: parameters of the source that nobody took.
    notes: in what the two plans differ, as lines; warnings: those of them that may cost accuracy.
    """

    source: Path
    plan: Plan
    folds: tuple[str, ...]
    seed: int
    channels: Mapping[str, Mapping[str, float]]
    lost_channels: tuple[str, ...]
    heads: str
    fates: tuple[Fate, ...]
    dropped: tuple[str, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]


def adapt_model(source: Path, target: Path, out: Path, config: AdaptConfig) -> Adaptation:
    """Writes `out`: every trained fold of the model `source` in the shape of the plan of the folder `target`.

    Raises:
        InputError: no plan or no trained fold, weights that do not fit their plan, a channel that cannot be mapped, or
            `out` is there already.
    """
    model = Workspace(source)
    theirs, ours, folds = model.read_plan(), Workspace(target).read_plan(), model.trained_folds()
    if not folds:
        raise InputError(f"{source}: no trained fold to adapt; give the folder of a trained model")
    shares = channel_shares(theirs.channels, ours.channels, config.channels)
    fresh, keep = fresh_weights(ours, config.seed), same_labels(theirs, ours)
    dropout = trained_dropout(source, folds)
    with new_folder(out) as folder:
        for fold in folds:
            file = model.fold(fold).weights
            assert file is not None
            done = adapt_weights(load_weights(file, theirs), fresh, shares, keep_heads=keep)
            note = {"adapted_from": source.resolve().name, "fold": fold}
            save_weights(Workspace(folder).fold(fold).last, done.weights, note=note)
        adaptation = Adaptation(
            source=source,
            plan=ours,
            folds=folds,
            seed=config.seed,
            channels=_named(theirs, ours, shares),
            lost_channels=tuple(n for n, row in zip(theirs.channels, shares, strict=True) if not row.any()),
            heads="kept" if keep else "new",
            fates=done.fates,
            dropped=done.dropped,
            warnings=_warnings(theirs, ours, shares, dropout),
            notes=_notes(theirs, ours),
        )
        Workspace(folder).write_plan(ours)
        write_json(folder / REPORT, to_json(adaptation))
    for warning in adaptation.warnings:
        _log.warning("%s", warning)
    return adaptation


def same_labels(source: Plan, target: Plan) -> bool:
    """Whether heads can be kept: the label sets agree, or both plans have one lesion, whatever its name."""
    return dict(source.labels) == dict(target.labels) or source.heads == target.heads == 2


def to_json(adaptation: Adaptation) -> dict[str, Any]:
    """What adapt.json holds: every parameter of the target and of the source by name."""
    return {
        "source": adaptation.source.resolve().name,
        "folds": list(adaptation.folds),
        "seed": adaptation.seed,
        "channels": {name: dict(taken) for name, taken in adaptation.channels.items()},
        "lost_channels": list(adaptation.lost_channels),
        "heads": adaptation.heads,
        "parameters": [asdict(fate) | {"words": list(fate.words)} for fate in adaptation.fates],
        "dropped": list(adaptation.dropped),
        "warnings": list(adaptation.warnings),
        "notes": list(adaptation.notes),
    }


def _named(theirs: Plan, ours: Plan, shares: Tensor) -> dict[str, dict[str, float]]:
    """Target channel -> {source channel: share}."""
    return {
        new: {old: round(float(share), 6) for old, share in zip(theirs.channels, column, strict=True) if share}
        for new, column in zip(ours.channels, shares.T, strict=True)
    }


def _warnings(theirs: Plan, ours: Plan, shares: Tensor, dropout: float) -> tuple[str, ...]:
    """Where the adapted network will see other images than it has learned from, and what it no longer claims."""
    lines = []
    if (theirs.orientation, theirs.transpose) != (ours.orientation, ours.transpose):
        lines.append(
            f"orientation: the model has seen scans {theirs.orientation}, turned {theirs.transpose}; the plan shows "
            f"them {ours.orientation}, {ours.transpose}: what it knows of left and right, front and back, may be lost"
        )
    if theirs.spacing != ours.spacing:
        mm = [" x ".join(f"{edge:g}" for edge in plan.spacing) for plan in (theirs, ours)]
        lines.append(f"spacing: the model has seen voxels of {mm[0]} mm; the plan's are {mm[1]} mm")
    lines += [
        f"normalisation: channel {old} was {_normalisation(theirs, m)}; {new} is {_normalisation(ours, n)}"
        for m, old in enumerate(theirs.channels)
        for n, new in enumerate(ours.channels)
        if shares[m, n] and _normalisation(theirs, m) != _normalisation(ours, n)
    ]
    if dropout:
        lines.append(
            "modality dropout: the model segments any of its channels; the adapted one asks for all, until it is "
            "trained with --modality-dropout again"
        )
    return tuple(lines)


def _normalisation(plan: Plan, channel: int) -> str:
    where = "inside the mask" if plan.use_mask_for_norm[channel] else "over the whole crop"
    return f"{plan.normalisation[channel]} {where}, {plan.normalise}"


def _notes(theirs: Plan, ours: Plan) -> tuple[str, ...]:
    """What differs between the networks as a whole; the parameters' own fates are listed one by one."""
    there, here = theirs.network, ours.network
    lines = []
    if there.kind != here.kind:
        lines.append(f"the encoder is {here.kind}, was {there.kind}: but for the first convolution it is new")
    if here.stages > there.stages:
        level = there.stages - 1
        lines.append(f"levels from {there.stages} on are new; level {level} was the deepest, and its decoder is new")
    if here.stages < there.stages:
        lines.append(f"levels from {here.stages} on are dropped; level {here.stages - 1} is the deepest now")
    levels = enumerate(zip(there.strides, here.strides, strict=False))
    strides = [f"level {level} {list(now)}, was {list(was)}" for level, (was, now) in levels if was != now]
    if strides:
        lines.append(f"strides: {'; '.join(strides)}")
    if not same_labels(theirs, ours):
        labels = ", ".join(theirs.labels), ", ".join(ours.labels)
        lines.append(f"heads are new: the model's labels are {labels[0]}; the plan's {labels[1]}")
    return tuple(lines)
