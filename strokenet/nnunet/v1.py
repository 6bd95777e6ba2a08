"""nnU-Net v1: a results folder in our terms.

    SOURCE/plans.pkl  fold_K/model_final_checkpoint.model  fold_K/model_final_checkpoint.model.pkl  (or all/ ...)

*.model holds the parameters; *.model.pkl the trainer's name, its arguments and the plans that v1 predicts with.
Generic_UNet is our plain network but for three things: the last convolution of a stack is named apart (bottleneck and
decoder), transposed convolutions and heads have no bias, and the decoder takes the kernel of the level below.
What v1 does otherwise at inference becomes the plan's `normalise`, `average` and `tile_weights`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from planner.plan import Plan
from strokenet.data.description import json_object, label_values
from strokenet.data.errors import InputError
from strokenet.data.files import read_json
from strokenet.model.checkpoint import expected_shapes
from strokenet.nnunet.checkpoints import load_checkpoint
from strokenet.nnunet.foreign import (
    CheckpointKind,
    ForeignModel,
    checked_weights,
    checkpoints,
    parameters,
    renamed_note,
)
from strokenet.nnunet.pickles import load_pickle
from strokenet.nnunet.v1_plans import (
    Trained,
    answer_notes,
    channels,
    dictionary,
    entry,
    foreground_count,
    is_full_resolution,
    listed,
    plan_of,
    text,
    whole,
)
from strokenet.preprocess.resample import separate_axis

PLANS, DATASET, DEBUG, POSTPROCESSING = "plans.pkl", "dataset.json", "debug.json", "postprocessing.json"
WRONG_SLICES = (
    "back to scans finer than these plans nnU-Net v1 takes nearest slices along a wrong axis; here it is the right "
    "one, answers differ on such scans"
)
MOST_NAME = 200  # characters of a dataset's name
FILES: dict[CheckpointKind, str] = {"final": "model_final_checkpoint.model", "best": "model_best.model"}
# Trainers of nnunet 1.7.1 by what follows "nnUNetTrainer"; a "_copy1" at the end changes nothing.
_MIRRORING = """
    CE V2 V2_2epochs V2_5epochs V2_5epochs_CEnoDS V2_5epochs_noDS V2_Adam V2_Adam_ReduceOnPlateau
    V2_Adam_nnUNetTrainerlr V2_DA2 V2_DA3 V2_DA5 V2_DDP V2_DP V2_ForceBD V2_ForceSD V2_Loss_CE V2_Loss_CEGDL
    V2_Loss_Dice V2_Loss_DiceCE_noSmooth V2_Loss_DiceTopK10 V2_Loss_Dice_LR1en3 V2_Loss_Dice_squared
    V2_Loss_DicewithBG V2_Loss_DicewithBG_LR1en3 V2_Loss_MCC V2_Loss_MCCnoBG V2_Loss_TopK10 V2_Ranger_lr1en2
    V2_Ranger_lr3en3 V2_Ranger_lr3en4 V2_SGD_ReduceOnPlateau V2_SGD_fixedSchedule V2_SGD_fixedSchedule2
    V2_SGD_lr1en1 V2_SGD_lr1en3 V2_SegLoss_Focal V2_allConv3x3 V2_cycleAtEnd V2_cycleAtEnd2 V2_fp16 V2_fp32
    V2_fullEvals V2_graduallyTransitionFromCEToDice V2_independentScalePerAxis V2_insaneDA
    V2_lReLU_biasInSegOutput V2_momentum09 V2_momentum095 V2_momentum098 V2_momentum09in2D V2_noDeepSupervision
    V2_reduceMomentumDuringTraining V2_resample33 V2_warmup
"""
MIRRORING = frozenset(("", *_MIRRORING.split()))
UNMIRRORED = frozenset(("NoDA", "V2_noDataAugmentation", "V2_noMirroring"))
# These have the stock network's parameters, by name and shape, but compute something else with them.
_OTHERWISE = """
    V2_GN V2_GeLU V2_LReLU_slope_2en1 V2_Mish V2_ReLU V2_ReLU_biasInSegOutput V2_ReLU_convReLUIN V2_lReLU_convReLUIN
    V2BraTSRegions V2BraTSRegions_DA3 V2BraTSRegions_DA3_BD V2BraTSRegions_DDP V2BraTSRegions_Dice
"""
OTHERWISE = frozenset(_OTHERWISE.split())
_FOLD = re.compile(r"fold_([0-9]{1,3})|(all)")
_DO_MIRROR = re.compile(r"'do_mirror': (True|False)\b")
_MIRROR_AXES = re.compile(r"'mirror_axes': [\[(]([012, ]*)[\])]")
_N = r"(\d{1,3})"
_BLOCK = rf"blocks\.{_N}\.(conv|instnorm)\.(weight|bias)"
_ENCODER = re.compile(rf"conv_blocks_context\.{_N}\.{_BLOCK}")
_BOTTLENECK = re.compile(rf"conv_blocks_context\.{_N}\.([01])\.{_BLOCK}")
_DECODER = re.compile(rf"conv_blocks_localization\.{_N}\.([01])\.{_BLOCK}")
_UP, _HEAD = re.compile(rf"tu\.{_N}\.weight"), re.compile(rf"seg_outputs\.{_N}\.(weight|bias)")
_BIASES = re.compile(r"decoder\.(transpconvs|seg_layers)\.\d+\.bias")


def read_v1(source: Path) -> ForeignModel:
    """A trained 3D model of nnU-Net v1. Nothing is written.

    Raises:
        InputError: a file is missing, damaged or unsafe, or the model is of a kind that is not supported.
    """
    beside = dictionary(load_pickle(source / PLANS), str(source / PLANS))
    folds = {m[1] or m[2]: path for path in sorted(source.iterdir()) if (m := _FOLD.fullmatch(path.name))}
    kind, files, left_out = checkpoints(source, folds, FILES)
    records = {fold: file.with_name(f"{file.name}.pkl") for fold, file in files.items()}
    trained = {fold: _trained(record) for fold, record in records.items()}
    (first, where), *_ = zip(trained.values(), records.values(), strict=True)
    axes, unsure = _mirror_axes(files, first)
    plan, notes = _plan(source, first, axes, where)
    for fold, other in trained.items():
        if other.trainer != first.trainer or _plan(source, other, axes, records[fold])[0] != plan:
            raise InputError(f"{records[fold]}: trainer or plans are not those of {where}; import each alone")
    if _plan(source, replace(first, plans=beside), axes, source / PLANS)[0] != plan:
        notes += (f"{PLANS} says otherwise than the checkpoints; theirs were taken, as nnU-Net does",)
    return ForeignModel(
        generation="v1",
        trainer=first.trainer,
        configuration="3d_fullres" if is_full_resolution(first.plans, first.stage) else "3d_lowres",
        plan=plan,
        weights={fold: _weights(file, plan, first.trainer) for fold, file in files.items()},
        checkpoint=kind,
        notes=left_out + notes + unsure + _postprocessing_note(source / POSTPROCESSING),
    )


def own_names(state: Mapping[str, Tensor], plan: Plan, trainer: str, where: Path) -> dict[str, Tensor]:
    """Parameters of Generic_UNet under our names; the biases that v1 does not have are zero.

    Raises:
        InputError: a parameter that Generic_UNet does not have.
    """
    apart = plan.network.encoder_blocks[-1] - 1  # convolutions of a stack before its last one
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        own = _own_name(name.removeprefix("module."), apart)
        if own is None or own in found:
            raise InputError(
                f"{where}: {name!r:.120} is no parameter of nnU-Net v1's Generic_UNet; the network of {trainer} "
                "is not supported"
            )
        found[own] = tensor
    shapes = expected_shapes(plan)
    return {n: torch.zeros(shape) for n, shape in shapes.items() if _BIASES.fullmatch(n)} | found


def _weights(file: Path, plan: Plan, trainer: str) -> dict[str, Tensor]:
    """One fold's parameters, float32, checked against the plan."""
    weights = own_names(parameters(load_checkpoint(file).get("state_dict"), file), plan, trainer, file)
    entrance = weights.get("encoder.stages.0.0.convs.0.conv.weight")
    if entrance is not None and entrance.shape[1:2] == (len(plan.channels) + plan.heads - 1,):
        raise InputError(f"{file}: also reads a label map, as the second stage of a cascade does; use 3d_fullres")
    return checked_weights(str(file), weights, plan)


def _own_name(name: str, apart: int) -> str | None:
    """Our name of a parameter; None where Generic_UNet has none of this name."""
    if match := _ENCODER.fullmatch(name):
        return _block("encoder.stages.{}.0", match[1], int(match[2]), match[3], match[4])
    if match := _BOTTLENECK.fullmatch(name):
        return _block("encoder.stages.{}.0", match[1], int(match[3]) + apart * int(match[2]), match[4], match[5])
    if match := _DECODER.fullmatch(name):
        return _block("decoder.stages.{}", match[1], int(match[3]) + apart * int(match[2]), match[4], match[5])
    if match := _UP.fullmatch(name):
        return f"decoder.transpconvs.{match[1]}.weight"
    if match := _HEAD.fullmatch(name):
        return f"decoder.seg_layers.{match[1]}.{match[2]}"
    return None


def _block(stack: str, level: str, number: int, part: str, kind: str) -> str:
    return f"{stack.format(level)}.convs.{number}.{'conv' if part == 'conv' else 'norm'}.{kind}"


def _trained(record: Path) -> Trained:
    """What *.model.pkl says of the training; trainers of other networks are refused."""
    content, where = load_pickle(record), str(record)
    trainer = text(entry(content, "name", where), f"{where}: name")
    arguments = listed(entry(content, "init", where), f"{where}: init")
    if len(arguments) > 2 and isinstance(arguments[2], int):
        del arguments[2]  # the rank that trainers of several GPUs insert
    if len(arguments) < 6:
        raise InputError(f"{where}: init has {len(arguments)} arguments; give the files that nnU-Net v1 wrote")
    folder, batch_dice, stage = arguments[3:6]
    if "Cascade" in trainer:
        raise InputError(f"{where}: {trainer} is the second stage of a cascade; not supported, use 3d_fullres")
    if _stock_name(trainer) in OTHERWISE:
        raise InputError(f"{where}: {trainer} builds another network (activation, norm or regions); not supported")
    return Trained(
        trainer=trainer,
        stage=None if stage is None else whole(stage, f"{where}: stage"),
        batch_dice=batch_dice is True,
        dataset=_last_part(folder) if isinstance(folder, str) else "",
        plans=dictionary(entry(content, "plans", where), f"{where}: plans"),
    )


def _plan(source: Path, trained: Trained, axes: tuple[int, ...], where: Path) -> tuple[Plan, tuple[str, ...]]:
    """The plan, and what is to be said about it."""
    notes = answer_notes(trained.plans, str(where))
    labels = _labels(source / DATASET, foreground_count(trained.plans, str(where)))
    plan = plan_of(trained, labels, axes, str(where))
    notes += renamed_note(channels(trained.plans, str(where)), plan)
    if plan.transpose != (0, 1, 2) and separate_axis(plan.spacing, plan.spacing) is not None:
        notes += (WRONG_SLICES,)
    return plan, notes


def _labels(file: Path, count: int) -> dict[str, int]:
    """Names from a dataset.json that somebody has put beside, v1's (value -> name) or v2's; else label1 .. labelN."""
    if not file.is_file():
        return {"background": 0} | {f"label{value}": value for value in range(1, count + 1)}
    description = json_object(read_json(file), str(file))
    labels = json_object(description.get("labels"), f"{file}: labels")
    if all(value.isdecimal() for value in labels):
        if not all(isinstance(name, str) for name in labels.values()):
            raise InputError(f'{file}: labels are to be named by texts, as in "1": "lesion"')
        labels = {"background" if not value.strip("0") else name: value for value, name in labels.items()}
    found = label_values({"labels": labels}, file)
    if len(found) != count + 1:
        raise InputError(f"{file}: {len(found) - 1} labels, the model has {count}; give its own or remove the file")
    return found


def _mirror_axes(files: Mapping[str, Path], trained: Trained) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The axes that training mirrored along: as each fold's debug.json says, else as its trainer is known to do."""
    name = _stock_name(trained.trainer)
    note = f"{trained.trainer} is not known here: its network is taken to be nnU-Net's own"
    known = name in MIRRORING or name in UNMIRRORED
    recorded = [axes for file in files.values() if (axes := _recorded_axes(file.with_name(DEBUG))) is not None]
    if recorded:
        return tuple(sorted(set.intersection(*recorded))), () if known else (note,)
    if known:
        return (0, 1, 2) if name in MIRRORING else (), ()
    return (), (f"{note}; no {DEBUG} says how it mirrored, so nothing is mirrored at inference",)


def _recorded_axes(file: Path) -> set[int] | None:
    """From the text of the augmentation's parameters, None where it does not say. Regions show here too."""
    if not file.is_file():
        return None
    written = json_object(read_json(file), str(file))
    if written.get("regions_class_order", "None") != "None":
        raise InputError(f"{file}: the model was trained on regions, which are not supported yet")
    parameters = str(written.get("data_aug_params"))
    mirrored, axes = _DO_MIRROR.search(parameters), _MIRROR_AXES.search(parameters)
    if mirrored is None or axes is None:
        return None
    return {int(axis) for axis in re.findall("[012]", axes[1])} if mirrored[1] == "True" else set()


def _postprocessing_note(file: Path) -> tuple[str, ...]:
    """v1 removes what its own validation found best to remove: all but the largest component of some labels."""
    if not file.is_file() or not json_object(read_json(file), str(file)).get("for_which_classes"):
        return ()
    return (
        f"{file.name} keeps the largest component alone of some labels, as nnU-Net v1 would; here nothing is removed",
    )


def _stock_name(trainer: str) -> str | None:
    """The name without nnUNetTrainer and _copyN; None for one that begins otherwise."""
    match = re.fullmatch(r"nnUNetTrainer(.*?)(_copy\d)?", trainer)
    return match[1] if match else None


def _last_part(folder: str) -> str:
    """The name of a folder of whatever system the model was trained on, empty where it cannot be printed."""
    parts = [part for part in re.split(r"[/\\]", folder) if part]
    return parts[-1][:MOST_NAME] if parts and parts[-1].isprintable() else ""
