"""Models of nnU-Net v2 that cannot be kept, are damaged or are of another kind: one line, and nothing written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from strokenet.data.errors import InputError
from strokenet.nnunet.importing import import_nnunet
from tests.nnunet.hostile import refused
from tests.nnunet.v2_folders import write_folder


def arch(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(plans: dict[str, Any]) -> None:
        plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"][key] = value

    return change


def configured(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(plans: dict[str, Any]) -> None:
        plans["configurations"]["3d_fullres"][key] = value

    return change


def network_called(name: Any) -> Callable[[dict[str, Any]], None]:
    def change(plans: dict[str, Any]) -> None:
        plans["configurations"]["3d_fullres"]["architecture"]["network_class_name"] = name

    return change


def without(*keys: str) -> Callable[[dict[str, Any]], None]:
    def change(plans: dict[str, Any]) -> None:
        *path, last = keys
        for key in path:
            plans = plans[key]
        del plans[last]

    return change


HACK = "no_resampling_hack"
BAD_PLANS: list[tuple[str, Callable[[dict[str, Any]], None], str]] = [
    ("network", network_called("my.package.SwinUNETR"), "network 'my.package.SwinUNETR' is not supported"),
    ("network-list", network_called([1]), "cannot be read"),
    ("dropout", arch("dropout_op", "torch.nn.Dropout3d"), "dropout_op is 'torch.nn.Dropout3d', not nnU-Net's own"),
    ("slope", arch("nonlin_kwargs", {"negative_slope": 0.2}), "nonlin_kwargs is"),
    ("block", arch("block", "BottleneckD"), "block is 'BottleneckD'"),
    ("no-nonlin", without("configurations", "3d_fullres", "architecture", "arch_kwargs", "nonlin"), "has no nonlin"),
    ("stages", arch("n_stages", 10**12), "stages"),
    ("strides", arch("strides", "abc"), "stride"),
    ("kernel", arch("kernel_sizes", [[2, 3, 3]] * 3), "kernel (2, 3, 3); allowed: 1, 3, 5, 7"),
    ("features", arch("features_per_stage", [4, 8]), "network strides has 3 entries for 2 stages"),
    ("2d", configured("patch_size", [16, 16]), "has patch [16, 16]; only 3D models are supported"),
    ("cascade", configured("previous_stage", "3d_lowres"), "second stage of a cascade"),
    ("scheme", configured("normalization_schemes", ["Mine", "Mine"]), "normalisation 'Mine' is not nnU-Net's own"),
    ("spacing", configured("spacing", [1, 1, -1]), "spacing"),
    ("spacing-text", configured("spacing", "1 1 1"), "spacing"),
    ("patch", configured("patch_size", [15, 16, 16]), "no multiple of the strides'"),
    ("loop", configured("inherits_from", "3d_fullres"), "inherits from itself"),
    ("no-spacing", without("configurations", "3d_fullres", "spacing"), "3d_fullres has no 'spacing'"),
    ("no-transpose", without("transpose_forward"), "has no 'transpose_forward'"),
    ("no-configurations", without("configurations"), "configurations: a JSON object is needed"),
    ("no-configuration", without("configurations", "3d_fullres"), "configuration '3d_fullres' is missing"),
    ("same-grid", configured("resampling_fn_data", HACK), f"{HACK} keeps each scan's own spacing; not supported"),
    ("same-grid-seg", configured("resampling_fn_seg", HACK), f"{HACK} keeps each scan's own spacing"),
    ("same-grid-out", configured("resampling_fn_probabilities", HACK), f"{HACK} keeps each scan's own spacing"),
    ("no-intensity", without("foreground_intensity_properties_per_channel"), "foreground_intensity_properties"),
]


@pytest.mark.parametrize(("change", "message"), [pytest.param(c, m, id=i) for i, c, m in BAD_PLANS])
def test_plans_that_cannot_be_kept_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    refused(write_folder(tmp_path / "source", change_plans=change), tmp_path, message)


def entry(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        content[key] = value

    return change


def weight(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[dict[str, Any]], None]:
    return lambda content: change(content["network_weights"])


def drop(name: str) -> Callable[[dict[str, Any]], None]:
    return weight(lambda weights: [weights.pop(key) for key in list(weights) if key.endswith(name)] and None)


HEAD = "decoder.seg_layers.1.weight"
BAD_CHECKPOINTS: list[tuple[str, Callable[[dict[str, Any]], None], str]] = [
    ("no-weights", entry("network_weights", {}), "holds no parameters of a network"),
    ("weights-of-text", entry("network_weights", {"a": "b"}), "a is no tensor of real numbers"),
    ("no-trainer", entry("trainer_name", None), "has no trainer_name"),
    ("no-arguments", entry("init_args", None), "has no init_args configuration"),
    ("axes", entry("inference_allowed_mirroring_axes", (0, 7)), "is no list of axes; 0, 1, 2 are allowed"),
    *(
        (f"axes-{name}", entry("inference_allowed_mirroring_axes", axes), "is no list of axes; 0, 1, 2 are allowed")
        for name, axes in {
            "tensor": torch.tensor([0, 1]),
            "of-tensors": [torch.tensor(0)],
            "truth": (True,),
            "text": "012",
            "whole": 2,
            "float": (0.0,),
            "negative": (-1,),
            "object": {0: 1},
        }.items()
    ),
    ("missing", drop(HEAD), f"1 parameters missing ({HEAD})"),
    ("unknown", weight(lambda w: w.update({"extra.weight": torch.zeros(1)})), "1 unknown (extra.weight)"),
    ("shape", weight(lambda w: w.update({HEAD: torch.zeros(5, 4, 1, 1, 1)})), "is (5, 4, 1, 1, 1)"),
    ("nan", weight(lambda w: w.update({HEAD: w[HEAD] * float("nan")})), "holds NaN"),
    (
        "copies",
        weight(lambda w: w.update({k: t + 1 for k, t in w.items() if k.startswith("decoder.encoder.stages.0")})),
        "differs from its copy",
    ),
]


@pytest.mark.parametrize(("change", "message"), [pytest.param(c, m, id=i) for i, c, m in BAD_CHECKPOINTS])
def test_checkpoints_that_do_not_fit_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    refused(write_folder(tmp_path / "source", change_checkpoint=change), tmp_path, message)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"background": 0, "whole": [1, 2], "core": 2}, "'whole' is a region [1, 2]; regions are not supported yet"),
        ({"background": 0, "lesion": 1, "ignore": 2}, "an ignore label is not supported yet"),
    ],
)
def test_regions_and_ignore_labels_are_refused(tmp_path: Path, labels: dict[str, Any], message: str) -> None:
    source = write_folder(tmp_path / "source")
    description = json.loads((source / "dataset.json").read_text())
    (source / "dataset.json").write_text(json.dumps({**description, "labels": labels}))
    refused(source, tmp_path, message)


def test_folds_of_two_configurations_are_refused(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", folds=("0", "1"))
    other = write_folder(tmp_path / "other", change_checkpoint=entry("trainer_name", "nnUNetTrainerNoMirroring"))
    os.replace(other / "fold_0" / "checkpoint_final.pth", source / "fold_1" / "checkpoint_final.pth")
    refused(source, tmp_path, "is not of nnUNetTrainer 3d_fullres as")


@pytest.mark.parametrize("name", ["plans.json", "dataset.json"])
def test_a_missing_description_is_named(tmp_path: Path, name: str) -> None:
    source = write_folder(tmp_path / "source")
    (source / name).unlink()
    refused(source, tmp_path, name)


def test_a_folder_without_folds_is_refused(tmp_path: Path) -> None:
    refused(write_folder(tmp_path / "source", folds=()), tmp_path, "no fold_K/checkpoint_final.pth")


def test_the_results_folder_below_or_above_is_named(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "results" / "Dataset001" / "nnUNetTrainer__nnUNetPlans__3d_fullres")
    refused(tmp_path / "results", tmp_path, f"give {source}")
    refused(source / "fold_0", tmp_path, f"give {source}")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_cut_checkpoint_is_refused(tmp_path: Path, share: float) -> None:
    source = write_folder(tmp_path / "source")
    file = source / "fold_0" / "checkpoint_final.pth"
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])
    refused(source, tmp_path, str(file))


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").write_text("kept")
    with pytest.raises(InputError, match="is there already; choose another -o"):
        import_nnunet(source, tmp_path / "model")
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["mine.txt"]
