"""The workspace: names of files, order of folds, and records that come back as they were written."""

from __future__ import annotations

from pathlib import Path

import pytest

from planner.fingerprint import Fingerprint
from strokenet.data.dataset import CaseFiles, Dataset
from strokenet.data.errors import InputError
from strokenet.data.splits import Split
from strokenet.workspace import Workspace
from tests.plans import STATS, tiny_plan


def test_trained_folds_are_numbers_ascending_then_all(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    for fold in ("all", "10", "2", "0"):
        workspace.fold(fold).last.parent.mkdir()
        workspace.fold(fold).last.touch()
    workspace.fold("7").root.mkdir()  # begun, no weights yet
    for name in ("fold_x", "fold_0_old", "fold_"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "last.safetensors").touch()
    (tmp_path / "fold_5").touch()
    assert workspace.trained_folds() == ("0", "2", "10", "all")


def test_infer_reads_last_before_best(tmp_path: Path) -> None:
    fold = Workspace(tmp_path).fold("0")
    fold.root.mkdir()
    assert fold.weights is None
    fold.best.touch()
    assert fold.weights == fold.best
    fold.last.touch()
    assert fold.weights == fold.last


def test_names_are_the_documented_ones(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    files = ("dataset_file", "fingerprint_file", "plan_file", "splits_file", "preprocessed")
    assert [getattr(workspace, name).name for name in files] == [
        *("dataset.json", "fingerprint.json", "plan.json", "splits.json", "preprocessed")
    ]
    fold = workspace.fold("all")
    assert fold.root == tmp_path / "fold_all"
    assert [path.name for path in (fold.best, fold.last, fold.state, fold.previous_state, fold.log, fold.curve)] == [
        *("best.safetensors", "last.safetensors", "state.pt", "state.prev.pt", "log.csv", "progress.png")
    ]


def test_plan_and_splits_come_back(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    workspace.write_plan(tiny_plan())
    assert workspace.read_plan() == tiny_plan()
    splits = (Split(train=("a", "b"), val=("c",)), Split(train=("c",), val=("a", "b")))
    workspace.write_splits(splits)
    assert workspace.read_splits() == splits


def test_the_dataset_comes_back_and_both_folders_may_move(tmp_path: Path) -> None:
    raw = tmp_path / "one" / "raw"
    images = (raw / "imagesTr" / "a_0000.nii.gz", raw / "imagesTr" / "a_0001.nii.gz")
    dataset = Dataset(
        root=raw,
        name="raw",
        channels=("T1", "FLAIR"),
        labels={"background": 0, "lesion": 1},
        file_ending=".nii.gz",
        cases=(CaseFiles(case_id="a", images=images, label=raw / "labelsTr" / "a.nii.gz"),),
    )
    workspace = Workspace(tmp_path / "one" / "work")
    workspace.write_dataset(dataset)
    assert workspace.read_dataset() == dataset
    (tmp_path / "one").rename(tmp_path / "two")
    moved = Workspace(tmp_path / "two" / "work").read_dataset()
    assert moved.cases[0].images[0] == tmp_path / "two" / "raw" / "imagesTr" / "a_0000.nii.gz"


def test_what_is_not_there_is_said_with_the_command_that_makes_it(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    for read in (workspace.read_plan, workspace.read_dataset):
        with pytest.raises(InputError, match="run `strokenet plan DATASET -o"):
            read()
    for missing in (workspace.read_fingerprint, workspace.read_splits):
        with pytest.raises(InputError, match="not found"):
            missing()


def test_a_fold_is_answered_with_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model"
    Workspace(model).write_plan(tiny_plan())
    for inner in ("fold_0", "preprocessed"):
        (model / inner).mkdir()
    with pytest.raises(InputError, match=f"{model / 'fold_0'}: is a fold of a model; give {model}$"):
        Workspace(model / "fold_0").read_plan()
    with pytest.raises(InputError, match="run `strokenet plan DATASET -o"):
        Workspace(model / "preprocessed").read_plan()
    monkeypatch.chdir(model / "fold_0")
    with pytest.raises(InputError, match=r"is a fold of a model; give \.\.$"):
        Workspace(Path()).read_plan()


def test_a_wrong_record_names_its_file(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    for path, read in (
        (workspace.plan_file, workspace.read_plan),
        (workspace.fingerprint_file, workspace.read_fingerprint),
    ):
        path.write_text('{"surprise": 1}')
        with pytest.raises(InputError, match=f"{path.name}: "):
            read()


def test_the_fingerprint_comes_back(tmp_path: Path) -> None:
    fingerprint = Fingerprint(
        case_ids=("a", "b"),
        shapes_after_crop=((20, 21, 22), (23, 24, 25)),
        spacings=((1.0, 0.9, 1.1), (3.0, 0.5, 0.5)),
        median_relative_size=0.75,
        intensity=(STATS,),
    )
    Workspace(tmp_path).write_fingerprint(fingerprint)
    assert Workspace(tmp_path).read_fingerprint() == fingerprint
