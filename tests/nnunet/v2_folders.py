"""Results folders of nnU-Net v2 made without nnU-Net: small, seeded, and as the peer's trainer leaves them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from planner.plan import Plan
from strokenet.model.network import build_network
from strokenet.nnunet.export import all_names, dataset_json, plans_json
from tests.plans import tiny_network, tiny_plan


def foreign_plan(**changes: Any) -> Plan:
    """A plan as nnU-Net would hold it: stored axes, no threshold, mirrored along all axes."""
    fields: dict[str, Any] = {
        "orientation": "as-stored",
        "mirror_axes": (0, 1, 2),
        "postprocess": type(tiny_plan().postprocess)(),
    }
    return tiny_plan(**(fields | changes))


def residual_network() -> Any:
    return tiny_network(kind="residual", encoder_blocks=(1, 2, 2))


def seeded_weights(plan: Plan, seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return build_network(plan).state_dict()


def checkpoint(plan: Plan, seed: int = 0) -> dict[str, Any]:
    """With the numpy numbers that the peer's trainer puts into its log and that weights_only refuses by default."""
    weights = all_names(seeded_weights(plan, seed))
    return {
        "network_weights": weights,
        "optimizer_state": {"state": {}, "param_groups": [{"lr": np.float64(0.01), "params": [0]}]},
        "grad_scaler_state": None,
        "logging": {
            "mean_fg_dice": [np.float64(0.5)],
            "train_losses": [np.float32(-0.25)],
            "epochs": [np.int64(3)],
            "dice_per_class_or_region": [[np.float64(0.5)]],
        },
        "_best_ema": np.float64(0.5),
        "current_epoch": 1,
        "init_args": {"plans": {}, "configuration": "3d_fullres", "fold": 0, "device": torch.device("cpu")},
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": plan.mirror_axes or None,
    }


def write_folder(
    root: Path,
    plan: Plan | None = None,
    *,
    folds: Sequence[str] = ("0",),
    name: str = "checkpoint_final.pth",
    change_plans: Callable[[dict[str, Any]], None] = lambda plans: None,
    change_checkpoint: Callable[[dict[str, Any]], None] = lambda content: None,
) -> Path:
    """A results folder; the two callables may spoil it."""
    plan = plan or foreign_plan()
    plans = plans_json(plan)
    del plans["strokenet"]
    change_plans(plans)
    root.mkdir(parents=True, exist_ok=True)
    (root / "plans.json").write_text(json.dumps(plans))
    (root / "dataset.json").write_text(json.dumps(dataset_json(plan)))
    for seed, fold in enumerate(folds):
        content = checkpoint(plan, seed)
        change_checkpoint(content)
        (root / f"fold_{fold}").mkdir()
        torch.save(content, root / f"fold_{fold}" / name)
    return root


def old_form(plans: dict[str, Any]) -> None:
    """The keys of v2 before `architecture` (2.0 to 2.4), and the older name of the intensities."""
    configuration = plans["configurations"]["3d_fullres"]
    shape = configuration.pop("architecture")["arch_kwargs"]
    features = shape["features_per_stage"]
    configuration |= {
        "UNet_class_name": "PlainConvUNet" if "n_conv_per_stage" in shape else "ResidualEncoderUNet",
        "UNet_base_num_features": features[0],
        "unet_max_num_features": features[-1],
        "n_conv_per_stage_encoder": shape.get("n_conv_per_stage", shape.get("n_blocks_per_stage")),
        "n_conv_per_stage_decoder": shape["n_conv_per_stage_decoder"],
        "pool_op_kernel_sizes": shape["strides"],
        "conv_kernel_sizes": shape["kernel_sizes"],
        "num_pool_per_axis": [2, 2, 2],
    }
    stats = plans.pop("foreground_intensity_properties_per_channel")
    plans["foreground_intensity_properties_by_modality"] = stats
