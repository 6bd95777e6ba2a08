"""Export: a model of ours as a results folder that nnU-Net v2 predicts with, unchanged.

    FOLDER/plans.json  dataset.json  dataset_fingerprint.json  fold_K/checkpoint_final.pth

A workspace without weights gives the three JSON files alone. What nnU-Net has no word for (threshold, semantics ...) is
kept in plans.json under a key that it does not read, so that import(export(model)) is the model. A plan in RAS names
the peer's reader that turns to RAS.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from planner import fingerprint as fingerprints
from planner.fingerprint import Fingerprint
from planner.plan import Plan
from strokenet import __version__
from strokenet.data.errors import InputError
from strokenet.data.files import new_folder, write_bytes, write_json
from strokenet.model.checkpoint import load_weights
from strokenet.nnunet.plans import (
    DATASET,
    NETWORKS,
    OWN,
    OWN_FIELDS,
    PLANNERS,
    PLANS,
    REORIENTING,
    RESAMPLE,
    RESAMPLING,
    SCHEMES,
)
from strokenet.workspace import Workspace

CONFIGURATION = "3d_fullres"
TRAINER = "nnUNetTrainer"
CHECKPOINT = "checkpoint_final.pth"
FINGERPRINT = "dataset_fingerprint.json"
PLANS_NAMES = {
    "plain": "nnUNetPlans",
    "resenc-m": "nnUNetResEncUNetMPlans",
    "resenc-l": "nnUNetResEncUNetLPlans",
    "resenc-xl": "nnUNetResEncUNetXLPlans",
}
_LOGGED = ("mean_fg_dice", "ema_fg_dice", "dice_per_class_or_region", "train_losses", "val_losses", "lrs")


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written. files: names beside the folds. notes: where nnU-Net will answer otherwise, one line each."""

    folder: Path
    files: tuple[str, ...]
    folds: tuple[str, ...]
    notes: tuple[str, ...]


def export_nnunet(root: Path, out: Path) -> Exported:
    """Writes the model or workspace `root` as the nnU-Net results folder `out`.

    Raises:
        InputError: no plan, damaged weights, a decoder that v2 cannot build, a label called ignore, or `out` is there.
    """
    workspace = Workspace(root)
    plan = workspace.read_plan()
    _check_supported(plan, root)
    fingerprint = workspace.read_fingerprint() if workspace.fingerprint_file.is_file() else None
    stored, description = plans_json(plan, fingerprint), dataset_json(plan, fingerprint)
    folds = workspace.trained_folds()
    with new_folder(out) as folder:
        write_json(folder / PLANS, stored)
        write_json(folder / DATASET, description)
        if fingerprint is not None:
            write_json(folder / FINGERPRINT, _fingerprint_json(fingerprint))
        for fold in folds:
            file = workspace.fold(fold).weights
            assert file is not None
            checkpoint = _checkpoint(load_weights(file, plan), plan, fold, stored, description)
            content = BytesIO()  # given a file, torch tells a full disk as an internal error of its own
            torch.save(checkpoint, content)
            write_bytes(folder / f"fold_{fold}" / CHECKPOINT, content.getbuffer())
    files = (PLANS, DATASET, *([FINGERPRINT] if fingerprint is not None else []))
    return Exported(folder=out, files=files, folds=folds, notes=_notes(plan) if folds else ())


def plans_json(plan: Plan, fingerprint: Fingerprint | None = None) -> dict[str, Any]:
    """The plan as the values of nnU-Net's plans.json, in its order."""
    transpose = list(plan.transpose)
    spacing, shape = _medians(plan, fingerprint)
    return {
        "dataset_name": plan.dataset,
        "plans_name": PLANS_NAMES.get(plan.planner, "nnUNetPlans"),
        "original_median_spacing_after_transp": spacing,
        "original_median_shape_after_transp": shape,
        "image_reader_writer": REORIENTING[0] if plan.orientation == "RAS" else "SimpleITKIO",
        "transpose_forward": transpose,
        "transpose_backward": [transpose.index(axis) for axis in range(3)],
        "configurations": {CONFIGURATION: _configuration(plan)},
        "experiment_planner_used": _names(PLANNERS).get(plan.planner, plan.planner),
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {
            str(channel): {} if stats is None else asdict(stats) for channel, stats in enumerate(plan.intensity)
        },
        OWN: {"version": __version__, **{name: asdict(plan)[name] for name in OWN_FIELDS}},
    }


def dataset_json(plan: Plan, fingerprint: Fingerprint | None = None) -> dict[str, Any]:
    """The plan's channels and labels as the values of nnU-Net's dataset.json."""
    cases = {} if fingerprint is None else {"numTraining": len(fingerprint.case_ids)}
    return {
        "channel_names": {str(number): name for number, name in enumerate(plan.channels)},
        "labels": dict(plan.labels),
        **cases,
        "file_ending": ".nii.gz",
    }


def all_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every parameter under all the names that nnU-Net's network registers it by; its loader is strict."""
    named: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        twins = [name]
        for part, position in ((".conv.", 0), (".norm.", 1)):
            if part in name:
                twins.append(name.replace(part, f".all_modules.{position}."))
        if name.startswith("encoder."):
            twins += [f"decoder.{twin}" for twin in twins]
        named |= dict.fromkeys(twins, tensor)
    return named


def _checkpoint(
    weights: Mapping[str, Tensor], plan: Plan, fold: str, stored: dict[str, Any], description: dict[str, Any]
) -> dict[str, Any]:
    """What nnU-Net's predictor reads of a checkpoint; of plain types alone, so that weights_only loads it."""
    return {
        "network_weights": all_names(weights),
        "optimizer_state": None,
        "grad_scaler_state": None,
        "logging": {name: [] for name in _LOGGED},
        "_best_ema": None,
        "current_epoch": 0,
        "init_args": {
            "plans": stored,
            "configuration": CONFIGURATION,
            "fold": fold if fold == "all" else int(fold),
            "dataset_json": description,
        },
        "trainer_name": TRAINER,
        "inference_allowed_mirroring_axes": plan.mirror_axes or None,  # the peer takes the maximum of them
    }


def _configuration(plan: Plan) -> dict[str, Any]:
    return {
        "data_identifier": f"{PLANS_NAMES.get(plan.planner, 'nnUNetPlans')}_{CONFIGURATION}",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": plan.batch_size,
        "patch_size": list(plan.patch),
        "median_image_size_in_voxels": list(plan.median_shape),
        "spacing": list(plan.spacing),
        "normalization_schemes": [_names(SCHEMES)[scheme] for scheme in plan.normalisation],
        "use_mask_for_norm": list(plan.use_mask_for_norm),
        "resampling_fn_data": RESAMPLE,
        "resampling_fn_seg": RESAMPLE,
        "resampling_fn_data_kwargs": RESAMPLING["data"],
        "resampling_fn_seg_kwargs": RESAMPLING["seg"],
        "resampling_fn_probabilities": RESAMPLE,
        "resampling_fn_probabilities_kwargs": RESAMPLING["probabilities"],
        "architecture": _architecture(plan),
        "batch_dice": plan.batch_dice,
    }


def _architecture(plan: Plan) -> dict[str, Any]:
    network = plan.network
    blocks = "n_conv_per_stage" if network.kind == "plain" else "n_blocks_per_stage"
    return {
        "network_class_name": _names(NETWORKS)[network.kind],
        "arch_kwargs": {
            "n_stages": network.stages,
            "features_per_stage": list(network.features),
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": [list(kernel) for kernel in network.kernels],
            "strides": [list(stride) for stride in network.strides],
            blocks: list(network.encoder_blocks),
            "n_conv_per_stage_decoder": list(reversed(network.decoder_convs)),  # the peer counts from the bottleneck
            "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
            "norm_op_kwargs": {"eps": 1e-05, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def _names(table: Mapping[str, str]) -> dict[str, str]:
    """Our word -> the peer's; of two the first."""
    return {ours: theirs for theirs, ours in reversed(list(table.items()))}


def _medians(plan: Plan, fingerprint: Fingerprint | None) -> tuple[list[float], list[int]]:
    """Median spacing and shape of the dataset in network axes; without a fingerprint those of the plan."""
    if fingerprint is None:
        return list(plan.spacing), [round(n) for n in plan.median_shape]
    order = list(plan.transpose)
    spacing = np.median(np.array(fingerprint.spacings), 0)[order]
    shape = np.median(np.array(fingerprint.shapes_after_crop), 0)[order]
    return [float(s) for s in spacing], [round(float(n)) for n in shape]


def _fingerprint_json(fingerprint: Fingerprint) -> dict[str, Any]:
    return {key: value for key, value in fingerprints.to_json(fingerprint).items() if key != "cases"}


def _check_supported(plan: Plan, root: Path) -> None:
    if "ignore" in plan.labels:
        raise InputError(
            f'{root}: nnU-Net leaves the label "ignore" out of training and answer; rename it in plan.json'
        )
    if plan.network.decoder_kernels != plan.network.kernels[:-1]:
        raise InputError(
            f"{root}: its decoder has kernels {plan.network.decoder_kernels} beside an encoder with "
            f"{plan.network.kernels[:-1]} (an anisotropic model of nnU-Net v1); nnU-Net v2 has no such network"
        )


def _notes(plan: Plan) -> tuple[str, ...]:
    notes = []
    rule = plan.postprocess
    if rule.threshold is not None or rule.min_volume_mm3 > 0:
        notes.append(
            f"nnU-Net takes the most probable label; the threshold {rule.threshold} and the minimum of "
            f"{rule.min_volume_mm3:g} mm3 are strokenet's"
        )
    if rule.min_peak or rule.trim_below or rule.looks_at_scans:
        notes.append("nnU-Net has no rule like the plan's min_peak, trim_below, scanned_only or common_field")
    if plan.normalise == "after-resampling" or plan.average == "probabilities":
        notes.append(
            "the model is of nnU-Net v1: v2 normalises before resampling and averages logits, so it answers otherwise"
        )
    return tuple(notes)
