"""Models of nnU-Net v1 arrive with the same answer, or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from planner.plan import PostprocessRule
from strokenet.data.errors import InputError
from strokenet.infer.infer import InferConfig, infer_folder
from strokenet.model.checkpoint import load_model
from strokenet.nnunet.foreign import ForeignModel
from strokenet.nnunet.importing import import_nnunet
from strokenet.nnunet.v1 import read_v1
from strokenet.workspace import Workspace
from tests.infer.models import write_case
from tests.nnunet.v1_folders import (
    ANISOTROPIC,
    SHAPES,
    Shape,
    numbers,
    plans,
    schemes,
    state,
    write_folder,
    write_pickle,
)

FINAL = "model_final_checkpoint.model"
# What Generic_UNet of nnunet 1.7.1 answers with the numbers of v1_folders, at two voxels; printed once with torch 2.13.
ANSWERS: dict[str, dict[tuple[int, int, int], list[float]]] = {
    "isotropic": {(3, 5, 7): [-2.157995, 1.215142], (15, 0, 8): [-0.472573, 0.509954]},
    "anisotropic": {(3, 5, 7): [-2.673092, 1.460844, 2.569996], (15, 0, 8): [-1.148617, 0.656915, 1.539254]},
    "one-conv": {(3, 5, 7): [-1.197664, -0.221282], (15, 0, 8): [-0.743106, 0.046282]},
    "three-convs": {(3, 5, 7): [1.053101, 0.954810], (15, 0, 8): [0.235268, 1.070026]},
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_network_answers_as_it_did_in_nnunet(tmp_path: Path, name: str) -> None:
    shape = SHAPES[name]
    import_nnunet(write_folder(tmp_path / "source", shape), tmp_path / "model")
    (network,) = load_model(tmp_path / "model").networks
    with torch.no_grad():
        logits = network(numbers((1, shape.channels, 16, 16, 16), 9.0))[0]
    for (d, h, w), expected in ANSWERS[name].items():
        np.testing.assert_allclose(logits[:, d, h, w], expected, atol=2e-5)


def test_the_plan_holds_what_nnunet_planned(tmp_path: Path) -> None:
    def turned(stored: dict[str, Any]) -> None:
        stored["transpose_forward"], stored["transpose_backward"] = [2, 0, 1], [1, 2, 0]
        stored["modalities"] = {1: "t1", 0: "flair"}
        stored["use_mask_for_norm"] = {0: True, 1: False}

    stage = {"current_spacing": np.array([3.0, 0.9, 1.1]), "patch_size": np.array([8, 16, 32])}
    source = write_folder(tmp_path / "source", ANISOTROPIC, stored=plans(ANISOTROPIC, **stage), change_plans=turned)
    model = read_v1(source)
    plan = model.plan
    assert (model.generation, model.trainer, model.configuration) == ("v1", "nnUNetTrainerV2", "3d_fullres")
    assert (plan.dataset, plan.planner, plan.channels) == ("Task777_Stroke", "nnU-Net v1", ("flair", "t1"))
    assert dict(plan.labels) == {"background": 0, "label1": 1, "label2": 2}
    assert (plan.transpose, plan.spacing, plan.patch) == ((2, 0, 1), (3.0, 0.9, 1.1), (8, 16, 32))
    assert (plan.median_shape, plan.batch_size, plan.batch_dice) == ((24, 22, 20), 2, False)
    assert (plan.normalisation, plan.use_mask_for_norm) == (("zscore", "zscore"), (True, False))


def test_a_usual_model_needs_no_note(tmp_path: Path) -> None:
    assert read_v1(write_folder(tmp_path / "source")).notes == ()


@pytest.mark.parametrize("missing", ["transpose_forward", "transpose_backward"])
def test_axes_are_turned_where_both_orders_are_given(tmp_path: Path, missing: str) -> None:
    def turned(stored: dict[str, Any]) -> None:
        stored["transpose_forward"], stored["transpose_backward"] = [2, 0, 1], [1, 2, 0]

    def half_turned(stored: dict[str, Any]) -> None:
        turned(stored)
        del stored[missing]

    assert read_v1(write_folder(tmp_path / "both", change_plans=turned)).plan.transpose == (2, 0, 1)
    assert read_v1(write_folder(tmp_path / "one", change_plans=half_turned)).plan.transpose == (0, 1, 2)


def test_the_plan_holds_what_v1_does_otherwise(tmp_path: Path) -> None:
    plan = read_v1(write_folder(tmp_path / "source")).plan
    assert (plan.normalise, plan.average, plan.tile_weights) == (
        "after-resampling",
        "probabilities",
        "peak-1-float32",
    )
    assert (plan.orientation, plan.semantics, plan.postprocess) == ("as-stored", "improved", PostprocessRule())


def test_the_decoder_takes_the_kernel_of_the_level_below(tmp_path: Path) -> None:
    network = read_v1(write_folder(tmp_path / "source", ANISOTROPIC)).plan.network
    assert network.kernels == ((1, 3, 3), (3, 3, 3), (3, 3, 3))
    assert network.decoder_kernels == ((3, 3, 3), (3, 3, 3))
    assert network.strides == ((1, 1, 1), (1, 2, 2), (2, 2, 2))
    assert network.features == (4, 8, 16)


def test_features_double_up_to_320(tmp_path: Path) -> None:
    shape = Shape(base=160, kernels=((1, 1, 1),) * 3, channels=1)
    model = read_v1(write_folder(tmp_path / "source", shape))
    assert model.plan.network.features == (160, 320, 320)
    assert model.weights["0"]["encoder.stages.2.0.convs.0.conv.weight"].shape[:2] == (320, 320)


@pytest.mark.parametrize("semantics", ["improved", "exact"])
def test_an_imported_model_segments(tmp_path: Path, semantics: Any) -> None:
    import_nnunet(write_folder(tmp_path / "source", ANISOTROPIC, folds=("fold_0", "fold_1")), tmp_path / "model")
    write_case(tmp_path / "scans", "case")
    config = InferConfig(semantics=semantics)
    (result,) = infer_folder(tmp_path / "model", tmp_path / "scans", tmp_path / "out", config)
    assert result.status == "ok"


def test_folds_and_the_model_of_all_cases_are_read(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", folds=("fold_0", "fold_3", "all"))
    import_nnunet(source, tmp_path / "model")
    assert Workspace(tmp_path / "model").trained_folds() == ("0", "3", "all")
    first, second = load_model(tmp_path / "model", folds=("0", "3")).networks
    assert not torch.equal(first.decoder.transpconvs[0].weight, second.decoder.transpconvs[0].weight)


def test_the_best_checkpoint_serves_where_no_fold_is_finished(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", name="model_best.model")
    assert import_nnunet(source, tmp_path / "model").checkpoint == "best"
    assert (tmp_path / "model" / "fold_0" / "best.safetensors").is_file()


def test_an_unfinished_fold_is_left_out_and_named(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", folds=("fold_0", "fold_1"))
    os.rename(source / "fold_1" / FINAL, source / "fold_1" / "model_latest.model")
    model = read_v1(source)
    assert (tuple(model.weights), model.notes) == (("0",), (f"fold 1 has no {FINAL} and was left out",))


def test_names_of_several_gpus_are_known(tmp_path: Path) -> None:
    plain = read_v1(write_folder(tmp_path / "one")).weights["0"]
    prefixed = state(lambda found: {f"module.{name}": tensor for name, tensor in found.items()})
    several = read_v1(write_folder(tmp_path / "several", change_checkpoint=prefixed)).weights["0"]
    assert several.keys() == plain.keys()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in several.items())


def test_arguments_of_several_gpus_are_known(tmp_path: Path) -> None:
    def ranked(kept: dict[str, Any]) -> None:
        plans_file, fold, *others = kept["init"]
        kept["init"] = (plans_file, fold, 0, *others)

    source = write_folder(tmp_path / "source", trainer="nnUNetTrainerV2_DDP", change_record=ranked)
    assert read_v1(source).plan.dataset == "Task777_Stroke"


def test_biases_of_the_heads_are_kept(tmp_path: Path) -> None:
    """nnUNetTrainerV2_lReLU_biasInSegOutput has them; the stock network's are zero."""
    bias = torch.tensor([0.5, -1.5])
    biased = state(lambda found: found | {"seg_outputs.0.bias": bias, "seg_outputs.1.bias": 2 * bias})
    weights = read_v1(write_folder(tmp_path / "source", change_checkpoint=biased)).weights["0"]
    assert torch.equal(weights["decoder.seg_layers.1.bias"], 2 * bias)
    assert not read_v1(write_folder(tmp_path / "stock")).weights["0"]["decoder.seg_layers.1.bias"].any()


def test_half_precision_becomes_float32(tmp_path: Path) -> None:
    halved = state(lambda found: {name: tensor.half() for name, tensor in found.items()})
    weights = read_v1(write_folder(tmp_path / "source", change_checkpoint=halved)).weights["0"]
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def two_stages(stored: dict[str, Any]) -> None:
    low, full = plans()["plans_per_stage"][0], plans()["plans_per_stage"][0]
    low["current_spacing"] = np.array([2.0, 2.0, 2.0])
    stored["plans_per_stage"] = {0: low, 1: full}


@pytest.mark.parametrize(("stage", "name", "spacing"), [(0, "3d_lowres", 2.0), (1, "3d_fullres", 1.0)])
def test_the_stage_that_was_trained_is_taken(tmp_path: Path, stage: int, name: str, spacing: float) -> None:
    model = read_v1(write_folder(tmp_path / "source", stage=stage, change_plans=two_stages))
    assert (model.configuration, model.plan.spacing) == (name, (spacing,) * 3)


def test_the_only_stage_needs_no_number(tmp_path: Path) -> None:
    assert read_v1(write_folder(tmp_path / "source", stage=None)).configuration == "3d_fullres"


def test_plans_of_2019_are_read(tmp_path: Path) -> None:
    """They name neither strides nor kernels, order of axes or convolutions; an axis with fewer pools starts late."""

    def old(stored: dict[str, Any]) -> None:
        for key in ("transpose_forward", "transpose_backward", "conv_per_stage", "preprocessor_name"):
            del stored[key]
        stage = stored["plans_per_stage"][0]
        del stage["pool_op_kernel_sizes"], stage["conv_kernel_sizes"]
        stage["num_pool_per_axis"] = [1, 2, 2]

    shape = Shape(pools=((1, 2, 2), (2, 2, 2)))
    plan = read_v1(write_folder(tmp_path / "source", shape, change_plans=old)).plan
    assert plan.network.strides == ((1, 1, 1), (1, 2, 2), (2, 2, 2))
    assert plan.network.kernels == ((3, 3, 3),) * 3
    assert (plan.transpose, plan.network.encoder_blocks) == ((0, 1, 2), (2, 2, 2))


def test_schemes_and_the_intensities_of_ct_are_kept(tmp_path: Path) -> None:
    plan = read_v1(write_folder(tmp_path / "source", change_plans=schemes("CT", "noNorm"))).plan
    assert plan.normalisation == ("ct", "none")
    statistics = plan.intensity[0]
    assert statistics is not None
    assert (statistics.mean, statistics.std, statistics.min, statistics.max) == (2.0, 0.5, 0.25, 4.0)
    assert (statistics.median, statistics.percentile_00_5, statistics.percentile_99_5) == (1.5, 0.5, 3.75)


def test_a_channel_that_is_not_normalised_has_no_mask(tmp_path: Path) -> None:
    """v1 sets the outside to 0 where it normalises, and leaves a noNorm channel as it is, mask or not."""
    plan = read_v1(write_folder(tmp_path / "source", change_plans=schemes("nonCT", "noNorm", masked=True))).plan
    assert plan.use_mask_for_norm == (True, False)


@pytest.mark.parametrize("value", [None, float("nan")])
def test_intensities_that_were_not_measured_are_none(tmp_path: Path, value: float | None) -> None:
    def unmeasured(stored: dict[str, Any]) -> None:
        properties = stored["dataset_properties"]
        if value is None:
            properties["intensityproperties"] = None
        else:
            properties["intensityproperties"][0]["mean"] = np.float64(value)

    plan = read_v1(write_folder(tmp_path / "source", change_plans=unmeasured)).plan
    assert plan.intensity[0] is None
    assert (plan.intensity[1] is None) == (value is None)


def test_channels_of_one_name_are_told_apart(tmp_path: Path) -> None:
    def same(stored: dict[str, Any]) -> None:
        stored["modalities"] = {0: "MRI", 1: "mri"}

    model = read_v1(write_folder(tmp_path / "source", change_plans=same))
    assert model.plan.channels == ("MRI 0", "mri 1")
    assert model.notes == ("several channels had one name; they are MRI 0, mri 1 now",)


def test_the_plans_inside_the_checkpoint_rule(tmp_path: Path) -> None:
    """They are what nnU-Net predicts with; plans.pkl is a copy of the file that the training was started from."""
    source = write_folder(tmp_path / "source")
    write_pickle(source / "plans.pkl", plans(current_spacing=np.array([2.0, 2.0, 2.0])))
    model = read_v1(source)
    assert model.plan.spacing == (1.0, 1.0, 1.0)
    assert model.notes == ("plans.pkl says otherwise than the checkpoints; theirs were taken, as nnU-Net does",)


def test_preprocessing_and_export_of_their_own_are_noted(tmp_path: Path) -> None:
    def other(stored: dict[str, Any]) -> None:
        stored["preprocessor_name"] = "Preprocessor3DDifferentResampling"
        stored["segmentation_export_params"] = {"force_separate_z": False, "interpolation_order": 3}

    notes = read_v1(write_folder(tmp_path / "source", change_plans=other)).notes
    assert [note.split()[0] for note in notes] == ["Preprocessor3DDifferentResampling", "segmentation_export_params"]


@pytest.mark.parametrize("value", [np.int8(-128), np.int64(-(2**63)), np.float16(2), np.float32(np.inf)])
def test_numbers_of_any_numpy_type_give_no_warning(tmp_path: Path, value: Any) -> None:
    """Warnings are errors here: numpy warns where a small type is compared with a large number."""
    source = write_folder(tmp_path / "source", change_plans=lambda stored: stored.update(base_num_features=value))
    with pytest.raises(
        InputError, match="base_num_features is no whole number|network features|plans and dataset.json ask for"
    ):
        read_v1(source)


def test_reading_writes_nothing(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert isinstance(read_v1(source), ForeignModel)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
