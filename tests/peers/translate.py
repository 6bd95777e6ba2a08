"""A plan of ours in the peer's words, for every station that the peer runs from a plans.json.

Written without strokenet's export, which the comparison would otherwise test against itself. What the peer's planners
write for every dataset (LAYERS, RESAMPLING) is compared with the planners in plans.py, and used by the other stations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from planner.plan import NetworkPlan, Plan

SCHEMES = {
    "zscore": "ZScoreNormalization",
    "ct": "CTNormalization",
    "none": "NoNormalization",
    "rescale_to_0_1": "RescaleTo01Normalization",
    "rgb_to_0_1": "RGBTo01Normalization",
}
NETWORKS = {"plain": "PlainConvUNet", "residual": "ResidualEncoderUNet"}
LAYERS: Mapping[str, Any] = {
    "conv_op": "torch.nn.modules.conv.Conv3d",
    "conv_bias": True,
    "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
    "norm_op_kwargs": {"eps": 1e-5, "affine": True},
    "dropout_op": None,
    "dropout_op_kwargs": None,
    "nonlin": "torch.nn.LeakyReLU",
    "nonlin_kwargs": {"inplace": True},
}
TO_IMPORT = ("conv_op", "norm_op", "dropout_op", "nonlin")
RESAMPLER = "resample_data_or_seg_to_shape"
RESAMPLING: Mapping[str, Any] = {
    "resampling_fn_data": RESAMPLER,
    "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None},
    "resampling_fn_seg": RESAMPLER,
    "resampling_fn_seg_kwargs": {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None},
    "resampling_fn_probabilities": RESAMPLER,
    "resampling_fn_probabilities_kwargs": {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None},
}


def peer_architecture(network: NetworkPlan) -> dict[str, Any]:
    """The `architecture` of a configuration."""
    blocks = "n_conv_per_stage" if network.kind == "plain" else "n_blocks_per_stage"
    return {
        "network_class_name": f"dynamic_network_architectures.architectures.unet.{NETWORKS[network.kind]}",
        "arch_kwargs": {
            "n_stages": network.stages,
            "features_per_stage": list(network.features),
            "kernel_sizes": [list(kernel) for kernel in network.kernels],
            "strides": [list(stride) for stride in network.strides],
            blocks: list(network.encoder_blocks),
            "n_conv_per_stage_decoder": list(network.decoder_convs[::-1]),  # the peer's starts at the bottleneck
            **LAYERS,
        },
        "_kw_requires_import": list(TO_IMPORT),
    }


def peer_plans(plan: Plan) -> dict[str, Any]:
    """The plans.json that makes the peer do what the plan says; its one configuration is 3d_fullres."""
    configuration = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": plan.batch_size,
        "patch_size": list(plan.patch),
        "median_image_size_in_voxels": list(plan.median_shape),
        "spacing": list(plan.spacing),
        "normalization_schemes": [SCHEMES[name] for name in plan.normalisation],
        "use_mask_for_norm": list(plan.use_mask_for_norm),
        **RESAMPLING,
        "architecture": peer_architecture(plan.network),
        "batch_dice": plan.batch_dice,
    }
    return {
        "dataset_name": plan.dataset,
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": list(plan.transpose),
        "transpose_backward": [plan.transpose.index(axis) for axis in range(3)],
        "configurations": {"3d_fullres": configuration},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {
            str(channel): asdict(stats) for channel, stats in enumerate(plan.intensity) if stats is not None
        },
    }
