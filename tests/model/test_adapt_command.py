"""strokenet adapt as a user calls it: from a model and a workspace to a model that infers and trains on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from planner.plan import Plan
from strokenet.cli import cli
from strokenet.data.errors import InputError
from strokenet.model.adapted import AdaptConfig, adapt_model
from strokenet.model.checkpoint import load_model
from strokenet.nnunet.importing import import_nnunet
from strokenet.workspace import Workspace
from tests.infer.models import write_case, write_model
from tests.nnunet.v1_folders import Shape, write_folder
from tests.plans import STATS, tiny_network, tiny_plan
from tests.test_cli import shell
from tests.train.workspaces import make_workspace, rows

pytestmark = pytest.mark.usefixtures("log_as_it_was")
PLAIN = AdaptConfig(channels={})


def t1_plan() -> Plan:
    """A model of T1 alone, of another shape than the tiny workspace's."""
    return tiny_plan(
        channels=("T1",),
        normalisation=("zscore",),
        use_mask_for_norm=(False,),
        intensity=(STATS,),
        network=tiny_network(features=(6, 8, 10), kernels=((3, 3, 3), (1, 3, 3), (3, 3, 3)), encoder_blocks=(2, 1, 1)),
    )


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_model(tmp_path / "model", t1_plan(), folds=("0", "2"))
    return tmp_path / "model"


@pytest.fixture
def work(tmp_path: Path) -> Workspace:
    return make_workspace(tmp_path / "work")


@pytest.mark.slow
def test_adapt_then_infer_then_train(model: Path, work: Workspace, tmp_path: Path) -> None:
    out = tmp_path / "new" / "adapted"
    done = shell(
        "-m", "strokenet", "adapt", str(model), "--plan", str(work.root), "-o", str(out), "--map", "FLAIR=zero"
    )
    assert done.returncode == 0, done.stderr
    assert f"next: strokenet train {work.root} --init {out} --lr 1e-5 --epochs 500" in done.stdout
    assert "zero: ignored until it is trained" in done.stdout
    assert sorted(path.name for path in out.iterdir()) == ["adapt.json", "fold_0", "fold_2", "plan.json"]
    assert load_model(out).plan == work.read_plan()
    write_case(tmp_path / "scans", "case")
    done = shell("-m", "strokenet", "infer", str(out), str(tmp_path / "scans"), "-o", str(tmp_path / "masks"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "masks" / "case.nii.gz").is_file()
    short = ("--epochs", "1", "--iters-per-epoch", "2", "--val-iters", "1", "--lr", "1e-5", "--device", "cpu")
    done = shell("-m", "strokenet", "train", str(work.root), "--init", str(out), *short)
    assert done.returncode == 0, done.stderr
    assert "heads kept" in done.stderr
    assert len(rows(work)) == 1
    first, last = (load_model(root, folds=("0",)).networks[0].state_dict() for root in (out, work.root))
    assert max(float((first[name] - last[name]).abs().max()) for name in first) < 1e-3  # it went on from there


def test_the_report_names_every_parameter_and_is_the_json(model: Path, work: Workspace, tmp_path: Path) -> None:
    words = ["adapt", str(model), "--plan", str(work.root), "-o", str(tmp_path / "out"), "--json"]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out" / "adapt.json").read_text())
    assert json.loads(done.stdout) == report
    assert report["channels"] == {"T1": {"T1": 0.5}, "FLAIR": {"T1": 0.5}}
    assert (report["source"], report["folds"], report["heads"], report["seed"]) == ("model", ["0", "2"], "kept", 0)
    weights = load_model(tmp_path / "out").networks[0].state_dict()
    assert {row["name"]: row["taken"] + row["zero"] + row["new"] for row in report["parameters"]} == {
        name: tensor.numel() for name, tensor in weights.items()
    }
    assert sorted(report["dropped"]) == [
        f"encoder.stages.0.0.convs.1.{part}" for part in ("conv.bias", "conv.weight", "norm.bias", "norm.weight")
    ]


def test_verbose_lists_every_parameter(model: Path, work: Workspace, tmp_path: Path) -> None:
    words = ["adapt", str(model), "--plan", str(work.root), "-o"]
    name = "decoder.stages.1.convs.0.norm.bias"
    assert name not in CliRunner().invoke(cli, [*words, str(tmp_path / "a")]).stdout
    assert name in CliRunner().invoke(cli, [*words, str(tmp_path / "b"), "-v"]).stdout


def test_the_same_seed_gives_the_same_files(model: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    Workspace(target).write_plan(tiny_plan(network=tiny_network(features=(6, 12, 12), encoder_blocks=(2, 2, 1))))
    contents = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        adapt_model(model, target, tmp_path / name, AdaptConfig(channels={}, seed=seed))
        contents.append((tmp_path / name / "fold_2" / "last.safetensors").read_bytes())
    assert contents[0] == contents[1] != contents[2]


def test_a_model_of_nnunet_takes_a_second_channel_and_keeps_its_answer(tmp_path: Path) -> None:
    """The paper's models were trained by nnU-Net v1 and given a channel (Meddahi 2024, VI.A, VI.B)."""
    theirs = import_nnunet(write_folder(tmp_path / "source", Shape(channels=1)), tmp_path / "imported").plan
    twice = {name: getattr(theirs, name) * 2 for name in ("normalisation", "use_mask_for_norm", "intensity")}
    Workspace(tmp_path / "work").write_plan(replace(theirs, channels=(*theirs.channels, "T1"), **twice))
    config = AdaptConfig(channels={"T1": "zero"})
    adapt_model(tmp_path / "imported", tmp_path / "work", tmp_path / "out", config)
    (source,), (adapted,) = (load_model(tmp_path / name).networks for name in ("imported", "out"))
    flair, t1 = torch.randn(2, 1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(adapted(torch.cat([flair, t1], 1)), source(flair), rtol=0, atol=1e-5)


def test_the_best_weights_serve_where_the_last_are_gone(model: Path, work: Workspace, tmp_path: Path) -> None:
    fold = Workspace(model).fold("0")
    fold.last.rename(fold.best)
    assert adapt_model(model, work.root, tmp_path / "out", PLAIN).folds == ("0", "2")
    assert (tmp_path / "out" / "fold_0" / "last.safetensors").is_file()


def test_other_images_than_the_model_has_seen_are_warned_of(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changes = {"orientation": "as-stored", "spacing": (3.0, 0.7, 0.7), "use_mask_for_norm": (True, False)}
    Workspace(tmp_path / "target").write_plan(replace(tiny_plan(), **changes))  # type: ignore[arg-type]
    done = adapt_model(model, tmp_path / "target", tmp_path / "out", PLAIN)
    assert [line.partition(":")[0] for line in done.warnings] == ["orientation", "spacing", "normalisation"]
    assert "T1 was zscore over the whole crop, before-resampling; T1 is zscore inside the mask" in done.warnings[2]
    assert "voxels of 1 x 1 x 1 mm; the plan's are 3 x 0.7 x 0.7 mm" in done.warnings[1]
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [*done.warnings]


def test_other_labels_make_new_heads_and_are_told(model: Path, tmp_path: Path) -> None:
    labels = {"background": 0, "core": 1, "penumbra": 2}
    plan = tiny_plan(labels=labels, postprocess=replace(tiny_plan().postprocess, threshold=None))
    Workspace(tmp_path / "target").write_plan(plan)
    done = adapt_model(model, tmp_path / "target", tmp_path / "out", PLAIN)
    assert done.heads == "new"
    assert done.notes == (
        "heads are new: the model's labels are background, lesion; the plan's background, core, penumbra",
    )
    assert torch.equal(
        load_model(tmp_path / "out").networks[0].decoder.seg_layers[0].weight,  # type: ignore[union-attr, arg-type]
        load_model(tmp_path / "out").networks[1].decoder.seg_layers[0].weight,  # type: ignore[union-attr, arg-type]
    )


def _no_plan(model: Path, work: Path, out: Path) -> None:
    (work / "plan.json").unlink()


def _no_fold(model: Path, work: Path, out: Path) -> None:
    for file in model.glob("fold_*/*"):
        file.unlink()


def _no_model(model: Path, work: Path, out: Path) -> None:
    (model / "plan.json").unlink()


def _there(model: Path, work: Path, out: Path) -> None:
    out.mkdir()
    (out / "mine").touch()


def _damaged(model: Path, work: Path, out: Path) -> None:
    file = model / "fold_2" / "last.safetensors"
    file.write_bytes(file.read_bytes()[:-4])


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (_no_plan, "work: no plan.json"),
        (_no_fold, "model: no trained fold to adapt"),
        (_no_model, "model: no plan.json"),
        (_there, "out: is there already"),
        (_damaged, "fold_2/last.safetensors: weights cannot be read"),
    ],
)
def test_what_cannot_be_adapted_is_one_line_and_leaves_nothing(
    harm: Callable[[Path, Path, Path], None], message: str, model: Path, work: Workspace, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    harm(model, work.root, out)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match=message) as caught:
        adapt_model(model, work.root, out, PLAIN)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("pairs", [("FLAIR",), ("=T1",), ("FLAIR=",), ("FLAIR=T1", "flair=zero")])
def test_a_map_that_is_no_pair_is_wrong_usage(
    pairs: tuple[str, ...], model: Path, work: Workspace, tmp_path: Path
) -> None:
    words = [word for pair in pairs for word in ("--map", pair)]
    done = CliRunner().invoke(cli, ["adapt", str(model), "--plan", str(work.root), "-o", str(tmp_path / "out"), *words])
    assert done.exit_code == 2
    assert "write NEW=OLD, NEW=zero or NEW=mean" in done.output
    assert not (tmp_path / "out").exists()


def test_it_is_said_that_the_adapted_model_asks_for_all_channels(work: Workspace, tmp_path: Path) -> None:
    for name, dropout in (("plain", 0.0), ("any", 0.5)):
        write_model(tmp_path / name, dropout=dropout)
        done = adapt_model(tmp_path / name, work.root, tmp_path / f"{name}_adapted", PLAIN)
        assert any("modality dropout" in line for line in done.warnings) == bool(dropout)
        assert load_model(tmp_path / f"{name}_adapted").modality_dropout == 0
