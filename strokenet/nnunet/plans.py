"""plans.json of nnU-Net v2, read as our plan: both forms, with `architecture` (since 2.5) and without.

Comes in: the values of plans.json and dataset.json. Goes out: Plan. A network that is not PlainConvUNet or
ResidualEncoderUNet of stock blocks, 2D, a cascade, an unknown normalisation: refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from planner import plan as plans
from planner.plan import MAX_STAGES, Plan, PlanError
from strokenet.data.description import json_object, label_values, listed_channels, told_apart
from strokenet.data.errors import InputError

PLANS, DATASET = "plans.json", "dataset.json"
OWN = "strokenet"  # key of plans.json under which our export keeps what nnU-Net has no word for
OWN_FIELDS = ("planner", "semantics", "normalise", "average", "tile_weights", "postprocess")
REORIENTING = ("NibabelIOWithReorient", "SimpleITKIOWithReorient")  # the peer's readers that turn to RAS
READERS = ("SimpleITKIO", "NibabelIO", *REORIENTING)
RESAMPLE = "resample_data_or_seg_to_shape"
NETWORKS = {
    f"dynamic_network_architectures.architectures.{module}.{name}": kind
    for module, name, kind in (
        ("unet", "PlainConvUNet", "plain"),
        ("unet", "ResidualEncoderUNet", "residual"),
        ("residual_unet", "ResidualEncoderUNet", "residual"),
    )
}
OLD_NETWORKS = {"PlainConvUNet": "plain", "ResidualEncoderUNet": "residual"}
SCHEMES = {
    "ZScoreNormalization": "zscore",
    "CTNormalization": "ct",
    "NoNormalization": "none",
    "RescaleTo01Normalization": "rescale_to_0_1",
    "RGBTo01Normalization": "rgb_to_0_1",
}
PLANNERS = {
    "ExperimentPlanner": "plain",
    "nnUNetPlannerResEncM": "resenc-m",
    "nnUNetPlannerResEncL": "resenc-l",
    "nnUNetPlannerResEncXL": "resenc-xl",
}
STOCK_BLOCK: Mapping[str, tuple[Any, ...]] = {  # what the two networks are built of; anything else is another network
    "conv_op": ("torch.nn.modules.conv.Conv3d",),
    "norm_op": ("torch.nn.modules.instancenorm.InstanceNorm3d",),
    "norm_op_kwargs": ({"eps": 1e-05, "affine": True}, {"affine": True}),
    "conv_bias": (True,),
    "dropout_op": (None,),
    "dropout_op_kwargs": (None, {}),
    "nonlin": ("torch.nn.LeakyReLU", "torch.nn.modules.activation.LeakyReLU"),
    "nonlin_kwargs": ({"inplace": True}, {"inplace": False}, {}, {"inplace": True, "negative_slope": 0.01}),
    "nonlin_first": (False,),
    "deep_supervision": (True, False),
}
RESAMPLING = {
    "data": {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None},
    "seg": {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None},
    "probabilities": {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None},
}


def plan_from_json(
    stored: Mapping[str, Any],
    description: Mapping[str, Any],
    name: str,
    mirror_axes: tuple[int, ...],
    source: Path,
) -> Plan:
    """Our plan of one configuration of a plans.json. description: the values of dataset.json.

    Raises:
        InputError: a key is missing or wrong, or the configuration is not supported.
    """
    where = source / PLANS
    channels = told_apart(listed_channels(description, source / DATASET))
    labels = label_values(description, source / DATASET)
    try:
        configuration = configuration_of(stored, name, where)
        top, here = _Entries(stored, f"{where}:"), _Entries(configuration, f"{where}: {name}")
        planner = top["experiment_planner_used"]
        fields = {
            "dataset": top["dataset_name"],
            "planner": PLANNERS.get(planner, planner),
            "channels": list(channels),
            "labels": labels,
            "orientation": "RAS" if top["image_reader_writer"] in REORIENTING else "as-stored",
            "transpose": top["transpose_forward"],
            "spacing": here["spacing"],
            "median_shape": here["median_image_size_in_voxels"],
            "patch": here["patch_size"],
            "batch_size": here["batch_size"],
            "batch_dice": configuration.get("batch_dice", False),
            "normalisation": [_scheme(scheme, where) for scheme in here["normalization_schemes"]],
            "use_mask_for_norm": here["use_mask_for_norm"],
            "intensity": _intensity(top, len(channels)),
            "network": _network(here, where),
            "mirror_axes": mirror_axes,
            **_own_fields(stored, where),
        }
        return plans.from_json(fields)
    except InputError:
        raise
    except PlanError as error:
        raise InputError(f"{where}: {error}") from None
    except (TypeError, ValueError, AttributeError, LookupError, RecursionError) as error:
        raise InputError(f"{where}: cannot be read ({error!s:.150}); give the plans.json that nnU-Net wrote") from None


class _Entries(dict[str, Any]):
    """A JSON object that says what it is where an entry is missing."""

    def __init__(self, values: Mapping[str, Any], where: str):
        super().__init__(values)
        self._where = where

    def __missing__(self, key: str) -> Any:
        raise InputError(f"{self._where} has no {key!r}; give the plans.json that nnU-Net wrote")


def configuration_of(stored: Mapping[str, Any], name: str, where: Path) -> dict[str, Any]:
    """One configuration with what it inherits."""
    every = json_object(stored.get("configurations"), f"{where}: configurations")
    chain: list[str] = []
    parent: Any = name
    while parent is not None:
        if parent not in every or parent in chain:
            raise InputError(f"{where}: configuration {parent!r:.80} is missing or inherits from itself")
        chain.append(parent)
        parent = json_object(every[parent], f"{where}: {parent}").get("inherits_from")
    merged = {key: value for part in reversed(chain) for key, value in every[part].items()}
    if merged.get("previous_stage"):
        raise InputError(f"{where}: {chain[0]} is the second stage of a cascade; not supported, use 3d_fullres")
    if len(merged.get("patch_size", ())) != 3:
        raise InputError(
            f"{where}: {chain[0]} has patch {merged.get('patch_size')!s:.80}; only 3D models are supported"
        )
    return merged


def _scheme(name: Any, where: Path) -> str:
    if name not in SCHEMES:
        raise InputError(f"{where}: normalisation {name!r:.80} is not nnU-Net's own; known: {', '.join(SCHEMES)}")
    return SCHEMES[name]


def _intensity(stored: _Entries, channels: int) -> list[dict[str, Any] | None]:
    per_channel = stored.get("foreground_intensity_properties_per_channel")
    if per_channel is None:  # the name of early v2
        per_channel = stored["foreground_intensity_properties_by_modality"]
    return [per_channel[str(channel)] or None for channel in range(channels)]


def _own_fields(stored: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """What our export added, so that a model that comes back is the one that left."""
    own = json_object(stored.get(OWN, {}), f"{where}: {OWN}")
    return {name: own[name] for name in OWN_FIELDS if name in own}


def answer_notes(stored: Mapping[str, Any], configuration: Mapping[str, Any], where: Path) -> tuple[str, ...]:
    """A model with its own reader, preprocessor or resampling runs, but not with the same answer to the last digit.

    Raises:
        InputError: it was trained without resampling; each scan keeps its own spacing then.
    """
    found = []
    if (reader := stored.get("image_reader_writer")) not in READERS:
        found.append(reader)
    if (preprocessor := configuration.get("preprocessor_name", "DefaultPreprocessor")) != "DefaultPreprocessor":
        found.append(preprocessor)
    for what, usual in RESAMPLING.items():
        function = configuration.get(f"resampling_fn_{what}", RESAMPLE)
        if function == "no_resampling_hack":
            raise InputError(
                f"{where}: {function} keeps each scan's own spacing; not supported, use a model that resamples"
            )
        if function != RESAMPLE:
            found.append(function)
        elif configuration.get(f"resampling_fn_{what}_kwargs", usual) != usual:
            found.append(f"{function} with its own settings")
    shown = (name if isinstance(name, str) and name.isprintable() else repr(name) for name in found)
    names = dict.fromkeys(f"{name:.80}" for name in shown)
    return tuple(f"{name} is not nnU-Net's default; here the default runs, answers may differ" for name in names)


def _network(configuration: _Entries, where: Path) -> dict[str, Any]:
    """The network's shape, from `architecture` or from the older keys."""
    if "architecture" not in configuration:
        return _old_network(configuration, where)
    architecture = configuration["architecture"]
    name, shape = architecture["network_class_name"], dict(architecture["arch_kwargs"])
    kind = NETWORKS.get(name)
    if kind is None:
        raise InputError(f"{where}: network {name!r:.120} is not supported; only PlainConvUNet and ResidualEncoderUNet")
    stages = shape.pop("n_stages")
    blocks = shape.pop("n_conv_per_stage" if kind == "plain" else "n_blocks_per_stage")
    fields = _shape(
        kind,
        features=_each(shape.pop("features_per_stage"), stages),
        strides=shape.pop("strides"),
        kernels=shape.pop("kernel_sizes"),
        blocks=_each(blocks, stages),
        decoder=_each(shape.pop("n_conv_per_stage_decoder"), stages - 1),
    )
    if "nonlin" not in shape:
        raise InputError(f"{where}: the network has no nonlin; give the plans.json that nnU-Net wrote")
    for key, value in shape.items():
        if value not in STOCK_BLOCK.get(key, (None,)):
            raise InputError(
                f"{where}: the network's {key:.40} is {value!r:.100}, not nnU-Net's own; it is not supported"
            )
    return fields


def _old_network(configuration: _Entries, where: Path) -> dict[str, Any]:
    name = configuration["UNet_class_name"]
    if name not in OLD_NETWORKS:
        raise InputError(f"{where}: network {name!r:.120} is not supported; only {', '.join(OLD_NETWORKS)}")
    blocks = configuration["n_conv_per_stage_encoder"]
    _each(0, len(blocks))
    base, most = configuration["UNet_base_num_features"], configuration["unet_max_num_features"]
    if type(base) is not int or type(most) is not int:
        raise PlanError(f"network has {base!r:.20} to {most!r:.20} features; whole numbers are needed")
    return _shape(
        OLD_NETWORKS[name],
        features=[min(base * 2**level, most) for level in range(len(blocks))],
        strides=configuration["pool_op_kernel_sizes"],
        kernels=configuration["conv_kernel_sizes"],
        blocks=blocks,
        decoder=configuration["n_conv_per_stage_decoder"],
    )


def _shape(kind: str, *, features: Any, strides: Any, kernels: Any, blocks: Any, decoder: Any) -> dict[str, Any]:
    kernels = [_each(kernel, 3) for kernel in kernels]
    return {
        "kind": kind,
        "features": features,
        "strides": [_each(stride, 3) for stride in strides],
        "kernels": kernels,
        "encoder_blocks": blocks,
        "decoder_convs": decoder[::-1],  # the peer counts from the bottleneck
        "decoder_kernels": kernels[:-1],  # v2's decoder takes the kernel of the level whose skip it joins
    }


def _each(value: Any, count: int) -> Any:
    """A single number stands for every level or axis."""
    if not isinstance(count, int) or not 0 < count <= MAX_STAGES:
        raise PlanError(f"network has {count!r:.20} stages; allowed: 2 to {MAX_STAGES}")
    return [value] * count if isinstance(value, int) else value
