"""The demo in its shortest form: every station runs, and what it leaves is what it says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from strokenet.data.errors import InputError
from strokenet.demo import DemoConfig, DemoOutcome, run_demo
from strokenet.infer.infer import InferConfig, infer_folder
from strokenet.report import show_demo
from strokenet.workspace import Workspace


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> DemoOutcome:
    """The second demo in one folder: nothing of the first one may be left."""
    root = tmp_path_factory.mktemp("demo") / "out"
    (root / "workspace").mkdir(parents=True)
    (root / "demo.json").write_text("{}")
    (root / "workspace" / "plan.json").write_text("what an earlier demo left")
    return run_demo(root, DemoConfig(minutes=0.5, seed=1, train=6, held_out=2))


def test_half_a_minute_of_training_is_better_than_none(outcome: DemoOutcome) -> None:
    """A network that has learned nothing marks all or nothing: below 0.1 on these heads."""
    assert outcome.evaluation.summary.all_cases["dice"].mean > 0.2


def test_every_station_leaves_its_files(outcome: DemoOutcome) -> None:
    workspace = Workspace(outcome.root / "workspace")
    assert workspace.trained_folds() == ("all",)
    assert sorted(path.name for path in (outcome.root / "predictions").glob("*.nii.gz")) == [
        "test_000.nii.gz",
        "test_001.nii.gz",
    ]
    scores = json.loads((outcome.root / "scores.json").read_text())
    assert [case["case"] for case in scores["cases"]] == ["test_000", "test_001"]
    assert scores["summary"]["dice"]["n"] == 2
    assert scores["against"]["cases"][0]["dice"] == outcome.evaluation.comparison.cases[0].dice  # type: ignore[union-attr]
    assert outcome.steps >= 1


def test_pictures_show_something(outcome: DemoOutcome) -> None:
    assert [picture.name for picture in outcome.pictures] == ["dice.png", "test_000.png", "test_001.png"]
    for picture in outcome.pictures:
        pixels = np.asarray(Image.open(picture).convert("RGB"))
        assert pixels.std() > 10


def test_the_threshold_was_fitted_and_scored_as_the_model_was(outcome: DemoOutcome) -> None:
    assert outcome.channel in ("T1", "FLAIR")
    assert 0 < outcome.threshold.dice < 0.7
    comparison = outcome.evaluation.comparison
    assert comparison is not None
    assert not any(score.missing_prediction for score in comparison.cases)


def test_the_workspace_is_a_model(outcome: DemoOutcome, tmp_path: Path) -> None:
    results = infer_folder(
        outcome.root / "workspace", outcome.root / "dataset" / "imagesTs", tmp_path, InferConfig(tta="none")
    )
    assert [result.status for result in results] == ["ok", "ok"]


def test_the_end_names_both_scores(outcome: DemoOutcome, capsys: pytest.CaptureFixture[str]) -> None:
    show_demo(outcome, as_json=False)
    text = capsys.readouterr().out
    assert "held-out Dice" in text
    assert "best single threshold" in text
    show_demo(outcome, as_json=True)
    assert json.loads(capsys.readouterr().out)["demo"]["steps"] == outcome.steps


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("all of it")
    with pytest.raises(InputError, match="is not empty and holds no earlier demo"):
        run_demo(tmp_path, DemoConfig())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
