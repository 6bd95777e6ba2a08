"""Models of nnU-Net v2 arrive with the same weights and plan, or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from planner.plan import PostprocessRule
from strokenet.data.errors import InputError
from strokenet.infer.infer import InferConfig, infer_folder
from strokenet.model.checkpoint import load_model
from strokenet.nnunet.foreign import ForeignModel
from strokenet.nnunet.importing import import_nnunet
from strokenet.nnunet.v2 import TRAINERS, read_v2
from strokenet.workspace import Workspace
from tests.infer.models import write_case
from tests.nnunet.v2_folders import foreign_plan, old_form, residual_network, seeded_weights, write_folder

Change = Callable[[dict[str, Any]], None]


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


def configured(key: str, value: Any) -> Change:
    def change(plans: dict[str, Any]) -> None:
        plans["configurations"]["3d_fullres"][key] = value

    return change


def top(key: str, value: Any) -> Change:
    def change(plans: dict[str, Any]) -> None:
        plans[key] = value

    return change


OTHER = "is not nnU-Net's default; here the default runs, answers may differ"
NOTED: list[tuple[str, Change, tuple[str, ...]]] = [
    ("nothing", top("plans_name", "ours"), ()),
    ("reader", top("image_reader_writer", "Tiff3DIO"), (f"Tiff3DIO {OTHER}",)),
    ("no-reader", top("image_reader_writer", None), (f"None {OTHER}",)),
    ("preprocessor", configured("preprocessor_name", "Ours"), (f"Ours {OTHER}",)),
    ("resampling-data", configured("resampling_fn_data", "ours"), (f"ours {OTHER}",)),
    ("resampling-seg", configured("resampling_fn_seg", "ours"), (f"ours {OTHER}",)),
    ("resampling-probabilities", configured("resampling_fn_probabilities", "ours"), (f"ours {OTHER}",)),
    (
        "settings",
        configured("resampling_fn_seg_kwargs", {"is_seg": True, "order": 0, "order_z": 0, "force_separate_z": None}),
        (f"resample_data_or_seg_to_shape with its own settings {OTHER}",),
    ),
]


@pytest.mark.parametrize(("change", "notes"), [pytest.param(c, n, id=i) for i, c, n in NOTED])
def test_what_is_not_nnunets_default_is_noted(tmp_path: Path, change: Change, notes: tuple[str, ...]) -> None:
    assert read_v2(write_folder(tmp_path / "source", change_plans=change)).notes == notes


@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO", "NibabelIOWithReorient", "SimpleITKIOWithReorient"])
def test_readers_of_scans_are_no_news(tmp_path: Path, reader: str) -> None:
    assert read_v2(write_folder(tmp_path / "source", change_plans=top("image_reader_writer", reader))).notes == ()


def trained_by(root: Path, trainer: str) -> ForeignModel:
    return read_v2(write_folder(root, change_checkpoint=lambda content: content.update(trainer_name=trainer)))


def test_trainers_of_nnunet_with_the_network_of_the_plans_are_no_news(tmp_path: Path) -> None:
    assert len(TRAINERS) > 50
    assert {name: notes for name in sorted(TRAINERS) if (notes := trained_by(tmp_path / name, name).notes)} == {}


@pytest.mark.parametrize("trainer", ["nnUNetTrainerBN", "nnUNetTrainer_ours", "nnunettrainer", "Mine"])
def test_an_unknown_trainer_is_noted(tmp_path: Path, trainer: str) -> None:
    (note,) = trained_by(tmp_path / "source", trainer).notes
    assert note.startswith(f"{trainer} is not known here: its network is taken to be the one of plans.json")


@pytest.mark.parametrize("old", [False, True], ids=["architecture", "before-architecture"])
@pytest.mark.parametrize(("value", "expected"), [(True, True), (False, False), (None, False)])
def test_batch_dice_and_masks_arrive(tmp_path: Path, old: bool, value: bool | None, expected: bool) -> None:
    """The first plans of v2 did not say batch_dice: None stands for a missing entry."""

    def change(plans: dict[str, Any]) -> None:
        configuration = plans["configurations"]["3d_fullres"]
        configuration |= {"batch_dice": value, "use_mask_for_norm": [True, False]}
        if value is None:
            del configuration["batch_dice"]
        if old:
            old_form(plans)

    plan = import_nnunet(write_folder(tmp_path / "source", change_plans=change), tmp_path / "model").plan
    assert (plan.batch_dice, plan.use_mask_for_norm) == (expected, (True, False))
    assert Workspace(tmp_path / "model").read_plan() == plan


@pytest.mark.parametrize(
    ("axes", "expected"),
    [((0, 1, 2), (0, 1, 2)), ([2, 0], (2, 0)), ((0, 1, 0, 1), (0, 1)), ((), ()), (None, ()), ((1,) * 1000, (1,))],
)
def test_axes_of_the_training_are_mirrored_once_each(tmp_path: Path, axes: Any, expected: tuple[int, ...]) -> None:
    def change(content: dict[str, Any]) -> None:
        content["inference_allowed_mirroring_axes"] = axes

    assert read_v2(write_folder(tmp_path / "source", change_checkpoint=change)).plan.mirror_axes == expected


def test_the_model_of_all_cases_is_read_beside_folds(tmp_path: Path) -> None:
    import_nnunet(write_folder(tmp_path / "source", folds=("0", "3", "all")), tmp_path / "model")
    assert Workspace(tmp_path / "model").trained_folds() == ("0", "3", "all")
    assert load_model(tmp_path / "model").folds == ("0", "3")
    (network,) = load_model(tmp_path / "model", folds=("all",)).networks
    expected = seeded_weights(foreign_plan(), 2)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in network.state_dict().items())


def test_folders_of_other_names_are_no_folds(tmp_path: Path) -> None:
    names = ("0", "1_old", "٣", "1000", "-1", "all2")
    model = import_nnunet(write_folder(tmp_path / "source", folds=names), tmp_path / "model")
    assert tuple(model.weights) == ("0",)


def test_a_label_listed_alone_is_no_region(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source")
    description = json.loads((source / "dataset.json").read_text())
    (source / "dataset.json").write_text(json.dumps({**description, "labels": {"background": [0], "lesion": [1]}}))
    assert dict(import_nnunet(source, tmp_path / "model").plan.labels) == {"background": 0, "lesion": 1}
