"""The start of a run: which cases, what is refused, and weights of another model."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from strokenet.data.errors import InputError
from strokenet.data.splits import Split
from strokenet.nnunet.importing import import_nnunet
from strokenet.preprocess.store import Store, plan_key
from strokenet.train.run import TrainConfig, fold_cases, start_run
from strokenet.train.state import load_state
from strokenet.train.train import train
from strokenet.workspace import Workspace
from tests.nnunet import v1_folders, v2_folders
from tests.plans import tiny_network, tiny_plan
from tests.train.workspaces import drawn_case, make_workspace, short, weights


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return make_workspace(tmp_path / "work")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A model to start from: fold 0 of another workspace, with other random weights."""
    workspace = make_workspace(tmp_path_factory.mktemp("source") / "source-model")
    train(workspace, short(epochs=1, seed=99))
    return workspace


def test_the_defaults_are_the_published_ones() -> None:
    config = TrainConfig()
    assert (config.epochs, config.iterations, config.val_iterations, config.lr) == (1000, 250, 50, 1e-2)
    assert (config.augment, config.init_heads, config.stop_epoch, config.batch_size) == ("device", "keep", None, None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("epochs", 0), ("iterations", 0), ("val_iterations", -1), ("batch_size", 0), ("stop_epoch", 0)),
        *(("lr", 0.0), ("lr", math.nan), ("seed", -1), ("validate_every", -1), ("max_time_minutes", math.nan)),
        *(("checkpoint_minutes", -1), ("checkpoint_minutes", math.nan)),
        *(("augment", "heavy"), ("precision", "fp8"), ("init_heads", "maybe")),
    ],
)
def test_a_setting_outside_its_range_is_named(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=name):
        TrainConfig(**{name: value})


def names(workspace: Workspace, fold: str) -> tuple[list[str], list[str]]:
    cases = fold_cases(workspace, workspace.read_plan(), fold)
    return [case.case_id for case in cases.train], [case.case_id for case in cases.val]


def test_a_fold_has_the_cases_of_the_splits(workspace: Workspace) -> None:
    assert names(workspace, "0") == (["a", "b"], ["c"])
    assert names(workspace, "1") == (["a", "c"], ["b"])
    assert names(workspace, "all") == (["a", "b", "c"], ["a", "b", "c"])


@pytest.mark.parametrize("fold", ["2", "-1", "00", "²", "every", "", "../0"])
def test_a_fold_that_does_not_exist_is_refused_with_the_allowed_ones(workspace: Workspace, fold: str) -> None:
    with pytest.raises(InputError, match=f"fold {re.escape(fold)} does not exist; allowed: 0, 1, all$"):
        fold_cases(workspace, workspace.read_plan(), fold)


def test_a_dataset_of_one_subject_trains_on_all(workspace: Workspace) -> None:
    workspace.write_splits([])
    with pytest.raises(InputError, match="work: one subject, so there are no folds; use --fold all$"):
        train(workspace, short())
    assert train(workspace, short(fold="all", epochs=1)).folder.root.name == "fold_all"


def test_an_empty_side_of_a_fold_is_refused(workspace: Workspace) -> None:
    workspace.write_splits([Split(train=("a",), val=())])
    with pytest.raises(InputError, match="fold 0 has no case to val"):
        train(workspace, short())


def test_cases_of_another_plan_are_refused(workspace: Workspace) -> None:
    workspace.write_plan(tiny_plan(spacing=(1.0, 1.0, 1.5)))
    with pytest.raises(InputError, match="a: preprocessed by another plan; run preprocess again"):
        train(workspace, short())


def test_a_case_that_is_not_preprocessed_is_named(workspace: Workspace) -> None:
    shutil.rmtree(Store(workspace.preprocessed).folder("c"))
    with pytest.raises(InputError, match="c: not preprocessed"):
        train(workspace, short())


def test_a_run_that_is_there_is_not_overwritten(workspace: Workspace) -> None:
    train(workspace, short(epochs=1))
    content = workspace.fold("0").last.read_bytes()
    with pytest.raises(InputError, match="fold_0: a run is there; --resume continues it, or remove the folder"):
        train(workspace, short())
    assert workspace.fold("0").last.read_bytes() == content
    for path in (workspace.fold("0").state, workspace.fold("0").previous_state):
        path.unlink(missing_ok=True)
    for resume in (False, True):
        with pytest.raises(InputError, match="fold_0: holds a trained model without the state"):
            train(workspace, short(resume=resume))


def test_a_finished_run_resumed_stays_as_it_is_and_says_so(
    workspace: Workspace, caplog: pytest.LogCaptureFixture
) -> None:
    train(workspace, short(epochs=1))
    content = workspace.fold("0").last.read_bytes()
    caplog.set_level("INFO")
    result = train(workspace, short(epochs=1, resume=True))
    assert result.finished
    assert len(result.history) == 1
    assert "fold_0: is finished after 1 epochs, nothing to do" in caplog.text
    assert "resuming" not in caplog.text
    assert workspace.fold("0").last.read_bytes() == content


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 2}, r"--epochs was 3, is 2 \(a schedule can only become longer; --stop-epoch ends it early\)"),
        ({"iterations": 4}, "--iters-per-epoch was 3, is 4"),
        ({"val_iterations": 4}, "--val-iters was 2, is 4"),
        ({"lr": 0.1, "seed": 8}, "--lr was 0.01, is 0.1, --seed was 7, is 8"),
        ({"batch_size": 3}, "--batch-size was the plan's, is 3"),
        ({"augment": "none"}, "--augment was device, is none"),
    ],
)
def test_a_resume_with_other_settings_is_refused_by_name(
    workspace: Workspace, changes: dict[str, Any], message: str
) -> None:
    train(workspace, short(stop_epoch=1))
    with pytest.raises(
        InputError, match=f"cannot resume with other settings: {message}; repeat the options, plan and cases"
    ):
        train(workspace, short(resume=True, **changes))
    train(workspace, short(resume=True, stop_epoch=2, validate_every=2, max_time_minutes=60, precision="fp32"))


def test_a_resume_with_another_plan_or_other_cases_is_refused(workspace: Workspace) -> None:
    train(workspace, short(stop_epoch=1))
    plan = workspace.read_plan()
    workspace.write_plan(replace(plan, batch_size=4))
    with pytest.raises(
        InputError, match="other settings: the plan changed; repeat .* or remove the folder to start again$"
    ):
        train(workspace, short(resume=True))
    workspace.write_plan(plan)
    workspace.write_splits([Split(train=("a", "c"), val=("b",))])
    with pytest.raises(InputError, match="other settings: the cases changed;"):
        train(workspace, short(resume=True))


def test_a_rule_fitted_meanwhile_does_not_hinder_a_resume(workspace: Workspace) -> None:
    train(workspace, short(stop_epoch=1))
    plan = workspace.read_plan()
    workspace.write_plan(replace(plan, postprocess=replace(plan.postprocess, threshold=0.35)))
    assert len(train(workspace, short(resume=True, stop_epoch=2)).history) == 2


def start(workspace: Workspace, **changes: Any) -> dict[str, torch.Tensor]:
    plan = workspace.read_plan()
    run = start_run(workspace, plan, short(**changes), fold_cases(workspace, plan, "0"))
    return run.network.state_dict()


def split_heads(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    heads = {name: tensor for name, tensor in tensors.items() if ".seg_layers." in name}
    return heads, {name: tensor for name, tensor in tensors.items() if name not in heads}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_init_keeps_the_heads_when_the_labels_agree(workspace: Workspace, source: Workspace) -> None:
    assert equal(start(workspace, init=source.root), weights(source.fold("0").last))


def test_init_heads_new_is_the_peers_rule(workspace: Workspace, source: Workspace) -> None:
    heads, body = split_heads(start(workspace, init=source.root, init_heads="new"))
    given_heads, given_body = split_heads(weights(source.fold("0").last))
    fresh_heads, fresh_body = split_heads(start(workspace))
    assert equal(body, given_body)
    assert not equal(body, fresh_body)
    assert equal(heads, fresh_heads)
    assert not equal(heads, given_heads)


@pytest.mark.parametrize("labels", [{"background": 0, "core": 1, "rim": 2}, {"background": 0, "lesion": 1, "rim": 2}])
def test_init_takes_new_heads_where_the_labels_differ(
    tmp_path: Path, source: Workspace, labels: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    workspace = make_workspace(tmp_path, tiny_plan(labels=labels, postprocess=replace_rule()))
    heads, body = split_heads(start(workspace, init=source.root))
    assert equal(body, split_heads(weights(source.fold("0").last))[1])
    assert equal(heads, split_heads(start(workspace))[0])
    assert "heads new (its labels are background, lesion)" in caplog.text


def test_init_keeps_the_heads_of_one_lesion_under_another_name(tmp_path: Path, source: Workspace) -> None:
    """Models of nnU-Net v1 do not say what their labels are called."""
    workspace = make_workspace(tmp_path, tiny_plan(labels={"background": 0, "core": 1}))
    assert equal(start(workspace, init=source.root), weights(source.fold("0").last))


def replace_rule() -> Any:
    return type(tiny_plan().postprocess)()


def test_what_a_run_started_from_is_recorded(workspace: Workspace, source: Workspace) -> None:
    train(workspace, short(epochs=2, stop_epoch=1, init=source.root))
    state = load_state(workspace.fold("0"))
    assert state is not None
    assert (state.settings["init"], state.settings["heads"]) == ("source-model", "kept")
    with safe_open(workspace.fold("0").last, "pt") as file:
        note = json.loads(file.metadata()["strokenet"])
    assert note == {"epoch": "1", "init": "source-model", "heads": "kept", "modality_dropout": "0.0"}
    with pytest.raises(InputError, match="--init-heads was keep, is new"):
        train(workspace, short(epochs=2, resume=True, init=source.root, init_heads="new"))
    with pytest.raises(InputError, match="--init was source-model, is work"):
        train(workspace, short(epochs=2, resume=True, init=workspace.root))
    train(workspace, short(epochs=2, resume=True))  # the weights are in the state: it need not be said again


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"network": tiny_network(features=(4, 12, 8))},
            r"\d+ parameters differ .*encoder\.stages\.1\.0\.convs\.0\.conv\.weight \(8, 4, 3, 3, 3\) there, "
            r"\(12, 4, 3, 3, 3\) here.* and \d+ more \(-v lists all\); --init needs .*strokenet adapt",
        ),
        (
            {"network": tiny_network(decoder_convs=(1, 2))},
            r"decoder\.stages\.0\.convs\.1\.conv\.weight missing there, \(8, 8, 3, 3, 3\) here",
        ),
    ],
)
def test_init_from_a_network_of_another_shape_is_refused_with_a_list(
    tmp_path: Path, source: Workspace, changes: dict[str, Any], message: str
) -> None:
    workspace = make_workspace(tmp_path, tiny_plan(**changes))
    with pytest.raises(InputError, match=message):
        start(workspace, init=source.root)


def test_init_from_another_number_of_channels_is_refused_with_both_shapes(tmp_path: Path, source: Workspace) -> None:
    plan = tiny_plan()
    fields = {n: getattr(plan, n)[:1] for n in ("channels", "normalisation", "use_mask_for_norm", "intensity")}
    workspace = make_workspace(tmp_path)
    workspace.write_plan(replace(plan, **fields))
    for seed, case_id in enumerate("abc"):
        case = drawn_case(case_id, seed)
        key = f"{plan_key(workspace.read_plan())}-drawn"
        Store(workspace.preprocessed).write(replace(case, image=case.image[:1]), key)
    with pytest.raises(InputError, match=r"1 parameters differ .*\(4, 2, 3, 3, 3\) there, \(4, 1, 3, 3, 3\) here"):
        start(workspace, init=source.root)


def test_init_prefers_the_fold_that_has_not_seen_the_validation_cases(
    tmp_path: Path, source: Workspace, caplog: pytest.LogCaptureFixture
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(source.root, copy)
    train(Workspace(copy), short(fold="1", epochs=1, seed=5))
    workspace = make_workspace(tmp_path / "work")
    plan = workspace.read_plan()
    run = start_run(workspace, plan, short(fold="1", init=copy), fold_cases(workspace, plan, "1"))
    assert equal(run.network.state_dict(), weights(Workspace(copy).fold("1").last))
    assert "not of unseen cases" not in caplog.text
    start_run(workspace, plan, short(fold="1", init=source.root), fold_cases(workspace, plan, "1"))
    assert "has no fold 1; fold 0 is taken" in caplog.text


def test_init_from_a_workspace_that_was_not_trained_is_refused(workspace: Workspace) -> None:
    with pytest.raises(InputError, match="--init .*work: no trained fold there"):
        start(workspace, init=workspace.root)


OF_V1 = tiny_network(features=(4, 8, 16), encoder_blocks=(2, 2, 2), decoder_convs=(2, 2))  # v1_folders.ISOTROPIC


def imported(root: Path, generation: str, *channels: str) -> Path:
    """A model taken over from a results folder of nnU-Net, by its channels in its order."""
    if generation == "v2":
        v2_folders.write_folder(root / "source", v2_folders.foreign_plan(channels=channels))
    else:
        names = {"modalities": dict(enumerate(channels))}
        v1_folders.write_folder(root / "source", change_plans=lambda stored: stored.update(names))
    import_nnunet(root / "source", root / "model")
    return root / "model"


@pytest.mark.parametrize(("generation", "network"), [("v2", tiny_network()), ("v1", OF_V1)])
def test_init_from_an_import_of_equal_shapes_starts_with_its_weights(
    tmp_path: Path, generation: str, network: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """v1's one label has no name, and its channels are written small: neither is a difference."""
    model = imported(tmp_path, generation, "t1", "flair")
    started = start(make_workspace(tmp_path / "work", tiny_plan(network=network)), init=model)
    assert equal(started, weights(Workspace(model).fold("0").last))
    if generation == "v2":
        assert equal(started, v2_folders.seeded_weights(v2_folders.foreign_plan(), 0))
    else:
        trained = v1_folders.weights(v1_folders.ISOTROPIC)
        assert torch.equal(started["decoder.seg_layers.1.weight"], trained["seg_outputs.1.weight"])
        assert torch.equal(started["decoder.transpconvs.0.weight"], trained["tu.0.weight"])
        first = ("encoder.stages.0.0.convs.0.conv.weight", "conv_blocks_context.0.blocks.0.conv.weight")
        assert torch.equal(started[first[0]], trained[first[1]])
        assert not started["decoder.seg_layers.1.bias"].any()  # v1 has none
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "the model sees scans as-stored" in warning  # of the channels nothing
    assert "`strokenet plan --orientation as-stored`" in warning


@pytest.mark.parametrize(
    ("generation", "network", "message"),
    [
        (
            "v1",
            tiny_network(features=(4, 8, 16)),  # one convolution a level, not two: 5 x 4 parameters less
            r"--init .*model: 20 parameters differ from the plan's network: .*"
            r"decoder\.stages\.0\.convs\.1\.conv\.weight \(8, 8, 3, 3, 3\) there, missing here.* and 15 more "
            r"\(-v lists all\); "
            r"--init needs the same network and channels; `strokenet adapt` brings one",
        ),
        (
            "v2",
            tiny_network(features=(4, 8, 16)),
            r"encoder\.stages\.2\.0\.convs\.0\.conv\.weight \(8, 8, 3, 3, 3\) there, \(16, 8, 3, 3, 3\) here, .*"
            r"`strokenet adapt`",
        ),
    ],
    ids=["v1", "v2"],
)
def test_init_from_an_import_of_other_shapes_is_refused_with_the_keys(
    tmp_path: Path, generation: str, network: Any, message: str
) -> None:
    model = imported(tmp_path, generation, "T1", "FLAIR")
    with pytest.raises(InputError, match=message):
        start(make_workspace(tmp_path / "work", tiny_plan(network=network)), init=model)


@pytest.mark.parametrize(("generation", "network"), [("v2", tiny_network()), ("v1", OF_V1)])
def test_init_from_the_same_channels_in_another_order_is_refused_with_both_orders(
    tmp_path: Path, generation: str, network: Any
) -> None:
    """The paper's models read FLAIR first."""
    model = imported(tmp_path, generation, "flair", "t1")
    workspace = make_workspace(tmp_path / "work", tiny_plan(network=network))
    for heads in ("keep", "new"):
        with pytest.raises(InputError, match=r"its channels are flair, t1, this plan's T1, FLAIR; .*_0000.*adapt"):
            start(workspace, init=model, init_heads=heads)


def test_init_from_channels_of_other_names_starts_and_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = imported(tmp_path, "v2", "T1", "DWI")
    started = start(make_workspace(tmp_path / "work", tiny_plan(orientation="as-stored")), init=model)
    assert equal(started, weights(Workspace(model).fold("0").last))
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning == "--init: channels T1, DWI of the model become T1, FLAIR, in this order"


def test_the_seed_decides_the_weights_and_leaves_torchs_generator_alone(workspace: Workspace) -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    one = start(workspace)
    assert torch.equal(torch.rand(1), expected)
    assert equal(one, start(workspace))
    assert not equal(one, start(workspace, seed=8))
