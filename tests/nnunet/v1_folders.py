"""Results folders of nnU-Net v1 made without nnU-Net: small, and as its trainer leaves them.

The names and shapes here are those of v1's Generic_UNet (tests/peers/v1.py compares them with the class); the numbers
follow a formula, so that what the class answers with them can be kept as a constant.
"""

from __future__ import annotations

import collections
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Change = Callable[[dict[str, Any]], None]


def unchanged(content: dict[str, Any]) -> None:
    """Spoils nothing."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A Generic_UNet. pools[l]: stride into level l + 1; kernels[l] of level l; convs: of a stack."""

    pools: tuple[tuple[int, int, int], ...] = ((2, 2, 2), (2, 2, 2))
    kernels: tuple[tuple[int, int, int], ...] = ((3, 3, 3),) * 3
    convs: int = 2
    base: int = 4
    channels: int = 2
    classes: int = 2

    @property
    def features(self) -> list[int]:
        return [min(self.base * 2**level, 320) for level in range(len(self.kernels))]


ISOTROPIC = Shape()
ANISOTROPIC = Shape(pools=((1, 2, 2), (2, 2, 2)), kernels=((1, 3, 3), (3, 3, 3), (3, 3, 3)), classes=3)
ONE_CONV, THREE_CONVS = Shape(convs=1), Shape(convs=3, channels=1)
SHAPES = {"isotropic": ISOTROPIC, "anisotropic": ANISOTROPIC, "one-conv": ONE_CONV, "three-convs": THREE_CONVS}


def parameters(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter, in the class's own order: decoder, encoder, transposed convolutions, heads."""
    found: dict[str, tuple[int, ...]] = {}
    features, pools, last = shape.features, shape.pools, len(shape.pools)

    def stack(prefix: str, inputs: int, outputs: int, kernel: tuple[int, ...], count: int) -> None:
        for number in range(count):
            block = f"{prefix}.blocks.{number}"
            found[f"{block}.conv.weight"] = (outputs, outputs if number else inputs, *kernel)
            found[f"{block}.conv.bias"] = found[f"{block}.instnorm.weight"] = (outputs,)
            found[f"{block}.instnorm.bias"] = (outputs,)

    def divided(prefix: str, inputs: int, outputs: int, kernel: tuple[int, ...]) -> None:
        stack(f"{prefix}.0", inputs, outputs, kernel, max(shape.convs - 1, 1))
        stack(f"{prefix}.1", outputs, outputs, kernel, 1)

    for up in range(last):
        here = features[last - 1 - up]
        divided(f"conv_blocks_localization.{up}", 2 * here, here, shape.kernels[last - up])
    for level in range(last):
        inputs = features[level - 1] if level else shape.channels
        stack(f"conv_blocks_context.{level}", inputs, features[level], shape.kernels[level], shape.convs)
    divided(f"conv_blocks_context.{last}", features[last - 1], features[last], shape.kernels[last])
    for up in range(last):
        found[f"tu.{up}.weight"] = (features[last - up], features[last - 1 - up], *pools[last - 1 - up])
    for up in range(last):
        found[f"seg_outputs.{up}.weight"] = (shape.classes, features[last - 1 - up], 1, 1, 1)
    return found


def numbers(shape: Sequence[int], seed: float) -> Tensor:
    """A tensor between -1 and 1 that looks random and is the same everywhere."""
    count = torch.arange(1, int(np.prod(shape)) + 1, dtype=torch.float64)
    return torch.sin(seed + 12.9898 * count).mul(43758.5453).frac().float().reshape(tuple(shape))


def weights(shape: Shape, seed: int = 0) -> dict[str, Tensor]:
    """Every parameter by its formula, convolutions scaled by their fan-in, norms about 1 and 0."""
    found = {}
    for place, (name, size) in enumerate(parameters(shape).items()):
        drawn = numbers(size, seed + 0.1 * place)
        if name.endswith("instnorm.weight"):
            drawn = 1 + 0.3 * drawn
        elif len(size) > 1:
            drawn = drawn * (3 / np.prod(size[1:])) ** 0.5
        found[name] = drawn
    return found


def plans(shape: Shape = ISOTROPIC, **stage: Any) -> dict[str, Any]:
    """What v1's planner writes, with arrays and ordered dictionaries where it has them; `stage` replaces entries."""
    count = shape.channels
    values = {
        "batch_size": 2,
        "num_pool_per_axis": [2, 2, 2],
        "patch_size": np.array([16, 16, 16]),
        "median_patient_size_in_voxels": np.array([24, 22, 20]),
        "current_spacing": np.array([1.0, 1.0, 1.0]),
        "original_spacing": np.array([1.0, 1.0, 1.0]),
        "do_dummy_2D_data_aug": False,
        "pool_op_kernel_sizes": [list(pool) for pool in shape.pools],
        "conv_kernel_sizes": [list(kernel) for kernel in shape.kernels],
    } | stage
    statistics = {"median": 1.5, "mean": np.float64(2.0), "sd": np.float32(0.5), "mn": 0.25, "mx": np.float64(4)}
    statistics |= {"percentile_99_5": np.float64(3.75), "percentile_00_5": 0.5}
    return {
        "num_stages": 1,
        "num_modalities": count,
        "modalities": dict(enumerate(("flair", "t1", "t2")[:count])),
        "normalization_schemes": collections.OrderedDict((channel, "nonCT") for channel in range(count)),
        "dataset_properties": {
            "all_sizes": [(24, 22, 20)],
            "all_spacings": [np.array([1.0, 1.0, 1.0])],
            "all_classes": list(range(1, shape.classes)),
            "intensityproperties": collections.OrderedDict(
                (channel, collections.OrderedDict(statistics, local_props={"case": dict(statistics)}))
                for channel in range(count)
            ),
            "size_reductions": collections.OrderedDict(case=np.float64(1.0)),
        },
        "num_classes": shape.classes - 1,
        "all_classes": list(range(1, shape.classes)),
        "base_num_features": shape.base,
        "use_mask_for_norm": collections.OrderedDict((channel, False) for channel in range(count)),
        "keep_only_largest_region": None,
        "min_region_size_per_class": None,
        "min_size_per_class": None,
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "data_identifier": "nnUNetData_plans_v2.1",
        "plans_per_stage": {0: values},
        "preprocessor_name": "GenericPreprocessor",
        "conv_per_stage": shape.convs,
    }


def record(stored: Mapping[str, Any], trainer: str = "nnUNetTrainerV2", stage: int | None = 0) -> dict[str, Any]:
    """The value of *.model.pkl. The arguments are those of nnUNetTrainer, in order."""
    folder = "/data/nnUNet_preprocessed/Task777_Stroke"
    arguments = (f"{folder}/plans_3D.pkl", 0, "/data/results", folder, False, stage, True, False, True)
    return collections.OrderedDict(init=arguments, name=trainer, plans=dict(stored)) | {"class": f"<class '{trainer}'>"}


def checkpoint(shape: Shape, seed: int = 0) -> dict[str, Any]:
    """The value of *.model: losses are numpy's scalars, as the trainer collects them."""
    losses = [np.float32(-0.5), np.float32(-0.6)]
    return {
        "epoch": 2,
        "state_dict": collections.OrderedDict(weights(shape, seed)),
        "optimizer_state_dict": {"state": {}, "param_groups": [{"lr": 0.01, "momentum": 0.99, "params": [0]}]},
        "lr_scheduler_state_dict": None,
        "plot_stuff": (losses, losses, [], [np.float64(0.25), np.float64(0.5)]),
        "best_stuff": (1, np.float64(-0.55), np.float64(0.4)),
        "amp_grad_scaler": {"scale": 65536.0, "growth_factor": 2.0},
    }


def write_folder(
    root: Path,
    shape: Shape = ISOTROPIC,
    *,
    stored: Mapping[str, Any] | None = None,
    folds: Sequence[str] = ("fold_0",),
    name: str = "model_final_checkpoint.model",
    trainer: str = "nnUNetTrainerV2",
    stage: int | None = 0,
    change_plans: Change = unchanged,
    change_record: Change = unchanged,
    change_checkpoint: Change = unchanged,
) -> Path:
    """A results folder; the three callables may spoil it."""
    stored = dict(stored or plans(shape))
    change_plans(stored)
    root.mkdir(parents=True, exist_ok=True)
    write_pickle(root / "plans.pkl", stored)
    for seed, fold in enumerate(folds):
        kept, content = record(stored, trainer, stage), checkpoint(shape, seed)
        change_record(kept)
        change_checkpoint(content)
        (root / fold).mkdir()
        write_pickle(root / fold / f"{name}.pkl", kept)
        torch.save(content, root / fold / name)
    return root


def write_pickle(path: Path, value: Any) -> None:
    """As numpy 1 wrote it, whose arrays name numpy.core."""
    path.write_bytes(pickle.dumps(value, protocol=2).replace(b"cnumpy._core.", b"cnumpy.core."))


def state(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Change:
    """A change of the parameters."""

    def changed(content: dict[str, Any]) -> None:
        content["state_dict"] = change(dict(content["state_dict"]))

    return changed


def schemes(*names: str, masked: bool = False) -> Change:
    """A change of the normalisation, and whether every channel has a mask."""

    def change(stored: dict[str, Any]) -> None:
        stored["normalization_schemes"] = dict(enumerate(names))
        stored["use_mask_for_norm"] = dict.fromkeys(range(len(names)), masked)

    return change
