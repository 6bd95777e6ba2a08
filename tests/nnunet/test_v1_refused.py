"""Models of nnU-Net v1 that cannot be kept, are damaged or would run something: one line, and nothing written."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.nnunet.hostile import Touch, refused
from tests.nnunet.v1_folders import Change, plans, schemes, state, write_folder, write_pickle

FINAL = "model_final_checkpoint.model"


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"0": "background", "1": "core", "2": "penumbra"}, "2 labels, the model has 1; give its own or remove"),
        ({"0": "background"}, "number them from 0 without a gap, two or more"),
        ({"background": 0, "whole": [1, 2]}, "regions are not supported yet"),
        ([1], "labels: a JSON object is needed"),
    ],
)
def test_a_dataset_json_of_another_dataset_is_refused(tmp_path: Path, labels: Any, message: str) -> None:
    source = write_folder(tmp_path / "source")
    (source / "dataset.json").write_text(json.dumps({"labels": labels}))
    refused(source, tmp_path, message)


def stage(key: str, value: Any) -> Change:
    def change(stored: dict[str, Any]) -> None:
        stored["plans_per_stage"][0][key] = value

    return change


def entry(key: str, value: Any) -> Change:
    def change(content: dict[str, Any]) -> None:
        content[key] = value

    return change


def without(*keys: Any) -> Change:
    def change(content: dict[str, Any]) -> None:
        *path, last = keys
        for key in path:
            content = content[key]
        del content[last]

    return change


def endless() -> list[Any]:
    """A list that holds itself."""
    nested: list[Any] = []
    nested.append(nested)
    return nested


def doubling(depth: int = 60) -> list[Any]:
    """A small pickle of 2^60 entries."""
    nested: list[Any] = [1, 1]
    for _ in range(depth):
        nested = [nested, nested]
    return nested


BAD_PLANS: list[tuple[str, Change, str]] = [
    *((f"no-{key}", without(key), f"has no {key!r}") for key in ("plans_per_stage", "num_classes", "modalities")),
    *((f"no-{key}", without(key), f"has no {key!r}") for key in ("normalization_schemes", "use_mask_for_norm")),
    *((f"no-{key}", without(key), f"has no {key!r}") for key in ("base_num_features", "dataset_properties")),
    *(
        (f"no-{key}", without("plans_per_stage", 0, key), f"has no {key!r}")
        for key in ("patch_size", "current_spacing", "batch_size", "median_patient_size_in_voxels")
    ),
    ("no-stage", entry("plans_per_stage", {1: {}}), "plans_per_stage has no 0"),
    ("stages", entry("plans_per_stage", [1]), "plans_per_stage is a list; a dictionary"),
    ("classes", entry("num_classes", 10**6), "num_classes is 1000000; allowed: 1 to 255"),
    ("classes-text", entry("num_classes", "1"), "num_classes is no whole number"),
    ("classes-digits", entry("num_classes", 10**5000), "num_classes is no whole number"),
    ("modality", entry("modalities", {0: "T1\n", 1: "T2"}), "modality is a str; a name of printable text"),
    ("modality-gap", entry("modalities", {0: "T1", 2: "T2"}), "modalities has no 1"),
    ("no-modality", entry("modalities", {}), "0 modalities; allowed: 1 to 64"),
    ("ct2", schemes("CT2", "nonCT"), "normalization_schemes has 'CT2', which is not supported; known: nonCT, CT"),
    ("ct-unmeasured", lambda p: (schemes("CT", "CT")(p), without("dataset_properties")(p)), "no 'dataset_properties'"),
    ("mask", entry("use_mask_for_norm", {0: 1, 1: 0}), "use_mask_for_norm holds a int; True or False"),
    ("2d", stage("patch_size", np.array([16, 16])), "the patch has 2 axes; only 3D models are supported"),
    ("patch", stage("patch_size", np.array([15, 16, 16])), "no multiple of the strides'"),
    ("patch-flat", stage("patch_size", np.array(16)), "; a list of 256 entries at most is needed"),
    ("patch-huge", stage("patch_size", np.zeros(10**6)), "; a list of 256 entries at most is needed"),
    ("spacing", stage("current_spacing", np.array([1.0, np.nan, 1.0])), "allowed: 0.001 to 1000"),
    ("spacing-text", stage("current_spacing", ["1", "1", "1"]), "current_spacing is no whole number"),
    ("spacing-few", stage("current_spacing", [1.0, 1.0]), "spacing"),
    ("kernel", stage("conv_kernel_sizes", [[5, 3, 3]] * 3), "conv_kernel_sizes has [5, 3, 3]; allowed: 1 and 3"),
    ("kernel-short", stage("conv_kernel_sizes", [[3, 3]] * 3), "conv_kernel_sizes has 2 numbers; 3 are needed"),
    ("kernels-few", stage("conv_kernel_sizes", [[3, 3, 3]] * 2), "network kernels has 2 entries for 3 stages"),
    ("pools", stage("pool_op_kernel_sizes", [[2, 2, 2]] * 13), "pool_op_kernel_sizes is a list; a list of 12"),
    ("features", entry("base_num_features", 0), "network features (0, 0, 0); allowed"),
    ("convs", entry("conv_per_stage", 99), "99 convolutions at one level"),
    ("transpose", entry("transpose_forward", [0, 0, 1]), "transpose (0, 0, 1); a permutation"),
    ("endless", stage("patch_size", endless()), "the patch has 1 axes"),
    ("endless-pools", stage("pool_op_kernel_sizes", endless()), "pool_op_kernel_sizes is no whole number"),
    ("doubling", stage("pool_op_kernel_sizes", doubling()), "pool_op_kernel_sizes is no whole number"),
    ("doubling-name", entry("preprocessor_name", doubling()), "preprocessor_name is a list"),
    ("same-grid", entry("preprocessor_name", "PreprocessorFor3D_NoResampling"), "keeps each scan's own spacing"),
    ("intensity", lambda p: p["dataset_properties"]["intensityproperties"].pop(1), "intensityproperties has no 1"),
]


@pytest.mark.parametrize(("change", "message"), [pytest.param(c, m, id=i) for i, c, m in BAD_PLANS])
def test_plans_that_cannot_be_kept_are_refused(tmp_path: Path, change: Change, message: str) -> None:
    refused(write_folder(tmp_path / "source", change_plans=change), tmp_path, message, f"{FINAL}.pkl")


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([0, 0, 0], "num_pool_per_axis is [0, 0, 0]; allowed: 0 to 11"),
        ([12, 1, 1], "num_pool_per_axis is [12, 1, 1]; allowed: 0 to 11"),
        ([-1, 2, 2], "num_pool_per_axis is [-1, 2, 2]; allowed: 0 to 11"),
        ([2, 2], "num_pool_per_axis has 2 numbers; 3 are needed"),
    ],
)
def test_plans_of_2019_with_wrong_pools_are_refused(tmp_path: Path, counts: list[int], message: str) -> None:
    def old(stored: dict[str, Any]) -> None:
        values = stored["plans_per_stage"][0]
        del values["pool_op_kernel_sizes"]
        values["num_pool_per_axis"] = counts

    refused(write_folder(tmp_path / "source", change_plans=old), tmp_path, message)


BAD_RECORDS: list[tuple[str, Change, str]] = [
    *((f"no-{key}", without(key), f"has no {key!r}") for key in ("name", "init", "plans")),
    ("name", entry("name", ["x"]), "name is a list; a name of printable text"),
    ("init", entry("init", 5), "init is a int; a list"),
    ("init-short", entry("init", ("plans.pkl", 0)), "init has 2 arguments"),
    ("stage", entry("init", ("p", 0, "o", "d", True, "1")), "stage is no whole number"),
    ("plans", entry("plans", 3), "plans is a int; a dictionary"),
    ("cascade", entry("name", "nnUNetTrainerV2CascadeFullRes"), "is the second stage of a cascade"),
    ("relu", entry("name", "nnUNetTrainerV2_ReLU"), "builds another network (activation, norm or regions)"),
    ("regions", entry("name", "nnUNetTrainerV2BraTSRegions"), "builds another network"),
]


@pytest.mark.parametrize(("change", "message"), [pytest.param(c, m, id=i) for i, c, m in BAD_RECORDS])
def test_records_that_cannot_be_used_are_refused(tmp_path: Path, change: Change, message: str) -> None:
    refused(write_folder(tmp_path / "source", change_record=change), tmp_path, message, f"{FINAL}.pkl")


def renamed(old: str, new: str) -> Change:
    return state(lambda found: {name.replace(old, new): tensor for name, tensor in found.items()})


def replaced(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return state(lambda found: found | {name: change(found[name])})


HEAD, ENTRANCE = "seg_outputs.1.weight", "conv_blocks_context.0.blocks.0.conv.weight"
OURS = {HEAD: "decoder.seg_layers.1.weight", ENTRANCE: "encoder.stages.0.0.convs.0.conv.weight"}
BAD_CHECKPOINTS: list[tuple[str, Change, str]] = [
    ("no-state", without("state_dict"), "holds no parameters of a network"),
    ("empty-state", entry("state_dict", {}), "holds no parameters of a network"),
    ("state-of-text", entry("state_dict", {"a": "b"}), "a is no tensor of real numbers"),
    ("resenc", renamed("conv_blocks_context", "encoder.stages"), "is no parameter of nnU-Net v1's Generic_UNet"),
    ("batch-norm", renamed("instnorm.bias", "instnorm.running_mean"), "running_mean' is no parameter"),
    ("extra", state(lambda w: w | {"extra": torch.zeros(1)}), "'extra' is no parameter"),
    ("twice", state(lambda w: w | {f"module.{HEAD}": w[HEAD]}), "is no parameter"),
    ("missing", state(lambda w: {k: t for k, t in w.items() if k != HEAD}), f"1 parameters missing ({OURS[HEAD]})"),
    ("other-classes", replaced(HEAD, lambda t: t.repeat(2, 1, 1, 1, 1)), f"{OURS[HEAD]} is (4, 4, 1, 1, 1)"),
    ("cascade", replaced(ENTRANCE, lambda t: torch.cat([t, t[:, :1]], 1)), "also reads a label map"),
    ("four-channels", replaced(ENTRANCE, lambda t: torch.cat([t, t], 1)), f"{OURS[ENTRANCE]} is (4, 4, 3, 3, 3)"),
    ("flat", replaced("tu.0.weight", lambda t: torch.zeros(())), "decoder.transpconvs.0.weight is ()"),
    (
        "huge",
        replaced("tu.0.weight", lambda t: torch.zeros(1).half().expand(10**13)),
        "a tensor that is none of",
    ),
    ("nan", replaced(HEAD, lambda t: t * float("nan")), "holds NaN"),
    ("whole", replaced(HEAD, lambda t: t.long()), "holds whole numbers"),
]


@pytest.mark.parametrize(("change", "message"), [pytest.param(c, m, id=i) for i, c, m in BAD_CHECKPOINTS])
def test_checkpoints_that_do_not_fit_are_refused(tmp_path: Path, change: Change, message: str) -> None:
    refused(write_folder(tmp_path / "source", change_checkpoint=change), tmp_path, message, FINAL)


def test_folds_of_two_trainers_or_plans_are_refused(tmp_path: Path) -> None:
    for name, other in (
        ("trainer", write_folder(tmp_path / "a", trainer="nnUNetTrainerV2_DA3")),
        ("plans", write_folder(tmp_path / "b", stored=plans(batch_size=7))),
    ):
        source = write_folder(tmp_path / name, folds=("fold_0", "fold_1"))
        os.replace(other / "fold_0" / f"{FINAL}.pkl", source / "fold_1" / f"{FINAL}.pkl")
        refused(source, tmp_path, "trainer or plans are not those of", "fold_1")


def test_a_model_of_regions_is_refused(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", trainer="MyRegions")
    (source / "fold_0" / "debug.json").write_text(json.dumps({"regions_class_order": "(1, 2, 3)"}))
    refused(source, tmp_path, "trained on regions, which are not supported yet")


FILES = ("plans.pkl", f"fold_0/{FINAL}.pkl", f"fold_0/{FINAL}")


def load_unsafely(file: Path) -> Any:
    """What a careless reader does."""
    return pickle.loads(file.read_bytes()) if file.suffix == ".pkl" else torch.load(file, weights_only=False)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("inside", [True, False])
def test_what_a_pickle_would_run_does_not_run(tmp_path: Path, name: str, inside: bool) -> None:
    source, trap = write_folder(tmp_path / "source"), Touch(tmp_path / "made")
    file = source / name
    content = {**load_unsafely(file), "zzz": trap} if inside else trap
    if file.suffix == ".pkl":
        write_pickle(file, content)
    else:
        torch.save(content, file)
    refused(source, tmp_path, str(file))
    assert not trap.path.exists()
    load_unsafely(file)
    assert trap.path.exists()  # the trap is one


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    source = write_folder(tmp_path / "source")
    (source / name).unlink()
    refused(source, tmp_path, {FILES[0]: "neither plans.json", FILES[2]: "no fold_K/"}.get(name, name))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_cut_file_is_refused(tmp_path: Path, name: str, share: float) -> None:
    source = write_folder(tmp_path / "source")
    file = source / name
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])
    refused(source, tmp_path, str(file))


@pytest.mark.parametrize("name", FILES[:2])
@pytest.mark.parametrize("value", [None, 3, [1, 2], "plans", {}, {"plans": {}}, np.arange(3)])
def test_a_pickle_of_something_else_is_refused(tmp_path: Path, name: str, value: Any) -> None:
    source = write_folder(tmp_path / "source")
    write_pickle(source / name, value)
    refused(source, tmp_path, str(source / name))
