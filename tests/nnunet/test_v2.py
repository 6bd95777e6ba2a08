"""Models of nnU-Net v2 arrive with the same weights and plan, or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from planner.plan import PostprocessRule
from strokenet.data.errors import InputError
from strokenet.infer.infer import InferConfig, infer_folder
from strokenet.model.checkpoint import load_model
from strokenet.nnunet.importing import import_nnunet
from strokenet.workspace import Workspace
from tests.infer.models import write_case
from tests.nnunet.v2_folders import foreign_plan, old_form, residual_network, seeded_weights, write_folder


@pytest.mark.parametrize("old", [False, True], ids=["architecture", "before-architecture"])
@pytest.mark.parametrize("kind", ["plain", "residual"])
def test_a_model_arrives_with_its_plan_and_weights(tmp_path: Path, kind: str, old: bool) -> None:
    plan = foreign_plan(**({} if kind == "plain" else {"network": residual_network()}))
    change = old_form if old else lambda plans: None
    source = write_folder(tmp_path / "source", plan, folds=("0", "3"), change_plans=change)
    model = import_nnunet(source, tmp_path / "model")
    assert (model.generation, model.trainer, model.configuration) == ("v2", "nnUNetTrainer", "3d_fullres")
    loaded = load_model(tmp_path / "model")
    assert loaded.plan == plan
    assert loaded.folds == ("0", "3")
    for seed, network in enumerate(loaded.networks):
        expected = seeded_weights(plan, seed)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in network.state_dict().items())


def test_an_import_keeps_orientation_mirroring_and_the_most_probable_label(tmp_path: Path) -> None:
    import_nnunet(write_folder(tmp_path / "source"), tmp_path / "model")
    plan = Workspace(tmp_path / "model").read_plan()
    assert (plan.orientation, plan.mirror_axes, plan.postprocess) == ("as-stored", (0, 1, 2), PostprocessRule())
    assert (plan.semantics, plan.normalise, plan.average) == ("improved", "before-resampling", "logits")


def test_an_imported_model_segments(tmp_path: Path) -> None:
    import_nnunet(write_folder(tmp_path / "source"), tmp_path / "model")
    write_case(tmp_path / "scans", "case")
    (result,) = infer_folder(tmp_path / "model", tmp_path / "scans", tmp_path / "out", InferConfig())
    assert result.status == "ok"


@pytest.mark.parametrize("reader", ["NibabelIOWithReorient", "SimpleITKIOWithReorient"])
def test_a_reader_that_turns_to_ras_is_kept(tmp_path: Path, reader: str) -> None:
    def turning(plans: dict[str, Any]) -> None:
        plans["image_reader_writer"] = reader

    import_nnunet(write_folder(tmp_path / "source", change_plans=turning), tmp_path / "model")
    assert Workspace(tmp_path / "model").read_plan().orientation == "RAS"


def test_a_configuration_inherits(tmp_path: Path) -> None:
    def derived(plans: dict[str, Any]) -> None:
        plans["configurations"]["big"] = {"inherits_from": "3d_fullres", "batch_size": 5}

    def named(content: dict[str, Any]) -> None:
        content["init_args"]["configuration"] = "big"

    source = write_folder(tmp_path / "source", change_plans=derived, change_checkpoint=named)
    assert import_nnunet(source, tmp_path / "model").plan == foreign_plan(batch_size=5)


def test_compiled_and_distributed_names_are_known(tmp_path: Path) -> None:
    def prefixed(content: dict[str, Any]) -> None:
        weights = content["network_weights"]
        content["network_weights"] = {f"module._orig_mod.{name}": tensor for name, tensor in weights.items()}

    with pytest.raises(InputError):  # the order that torch makes is _orig_mod.module or module alone
        import_nnunet(write_folder(tmp_path / "wrong", change_checkpoint=prefixed), tmp_path / "never")

    def compiled(content: dict[str, Any]) -> None:
        weights = content["network_weights"]
        content["network_weights"] = {f"_orig_mod.module.{name}": tensor for name, tensor in weights.items()}

    import_nnunet(write_folder(tmp_path / "source", change_checkpoint=compiled), tmp_path / "model")
    assert load_model(tmp_path / "model").folds == ("0",)


def test_the_best_checkpoint_serves_where_no_fold_is_finished(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", name="checkpoint_best.pth")
    assert import_nnunet(source, tmp_path / "model").checkpoint == "best"
    assert (tmp_path / "model" / "fold_0" / "best.safetensors").is_file()


def test_an_unfinished_fold_is_left_out_and_named(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", folds=("0", "1"))
    (source / "fold_1" / "checkpoint_final.pth").rename(source / "fold_1" / "checkpoint_best.pth")
    model = import_nnunet(source, tmp_path / "model")
    assert (tuple(model.weights), model.notes) == (("0",), ("fold 1 has no checkpoint_final.pth and was left out",))


def test_resampling_of_its_own_is_noted(tmp_path: Path) -> None:
    def other(plans: dict[str, Any]) -> None:
        plans["configurations"]["3d_fullres"]["resampling_fn_data"] = "resample_torch_fornnunet"
        plans["configurations"]["3d_fullres"]["resampling_fn_probabilities_kwargs"] = {"order": 0}

    notes = import_nnunet(write_folder(tmp_path / "source", change_plans=other), tmp_path / "model").notes
    assert len(notes) == 2
    assert notes[0].startswith("resample_torch_fornnunet is not nnU-Net's default")


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
    ("weights-of-text", entry("network_weights", {"a": "b"}), "a is no plain tensor"),
    ("no-trainer", entry("trainer_name", None), "has no trainer_name"),
    ("no-arguments", entry("init_args", None), "has no init_args configuration"),
    ("axes", entry("inference_allowed_mirroring_axes", (0, 7)), "is no list of axes; 0, 1, 2 are allowed"),
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


def test_a_label_listed_alone_is_no_region(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source")
    description = json.loads((source / "dataset.json").read_text())
    (source / "dataset.json").write_text(json.dumps({**description, "labels": {"background": [0], "lesion": [1]}}))
    assert dict(import_nnunet(source, tmp_path / "model").plan.labels) == {"background": 0, "lesion": 1}


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
    refused(tmp_path / "results", tmp_path, f"there is one in {source}")
    refused(source / "fold_0", tmp_path, f"there is one in {source}")


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


def refused(source: Path, out: Path, message: str) -> None:
    """One line that holds `message`, and nothing written."""
    before = sorted(out.rglob("*"))
    with pytest.raises(InputError) as caught:
        import_nnunet(source, out / "model")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 4
    assert sorted(out.rglob("*")) == before
