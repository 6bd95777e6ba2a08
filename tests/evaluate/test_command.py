"""strokenet evaluate: exit codes, what is on stdout, and what is on the table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from strokenet.evaluate.evaluate import evaluate_paths
from strokenet.evaluate.tables import to_json
from strokenet.report import show_scores
from tests.evaluate.masks import blob, folder, write

NOTHING = np.zeros((9, 8, 7), np.uint8)
TWO, ONE = blob((1, 1, 1), (5, 5, 4)), blob((1, 1, 1))


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    return folder(tmp_path / "ref", {"sub-1": TWO, "sub-2": ONE, "sub-3": NOTHING})


def run(*arguments: Path | str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "strokenet", "evaluate", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_exit_0_when_every_case_was_scored_even_when_one_has_no_prediction(tmp_path: Path, reference: Path) -> None:
    prediction = folder(tmp_path / "pred", {"sub-1": TWO, "sub-3": NOTHING})
    done = run(prediction, reference, "-o", tmp_path / "scores.json")
    assert done.returncode == 0, done.stderr
    assert "no prediction for sub-2" in done.stderr
    assert "no prediction, scored as an empty mask (1): sub-2" in done.stdout
    assert json.loads((tmp_path / "scores.json").read_text())["summary"]["dice"]["n"] == 3
    assert (tmp_path / "scores.csv").read_text().count("\n") == 4


def test_exit_3_when_some_cases_failed(tmp_path: Path, reference: Path) -> None:
    prediction = folder(tmp_path / "pred", {"sub-1": TWO, "sub-2": ONE[:-1], "sub-3": NOTHING})
    done = run(prediction, reference)
    assert done.returncode == 3
    assert "failed: sub-2: prediction sub-2.nii.gz has (8, 8, 7) voxels" in done.stdout


def test_exit_4_when_no_case_could_be_scored(tmp_path: Path, reference: Path) -> None:
    prediction = folder(tmp_path / "pred", dict.fromkeys(("sub-1", "sub-2", "sub-3"), ONE[:-1]))
    done = run(prediction, reference, "--json")
    assert done.returncode == 4
    scores = json.loads(done.stdout)
    assert (scores["cases"], scores["summary"], len(scores["failures"])) == ([], {}, 3)


def test_exit_4_with_one_line_when_there_is_nothing_to_score(tmp_path: Path, reference: Path) -> None:
    done = run(folder(tmp_path / "empty", {}), reference)
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr.count("\n") == 1
    assert "no mask for any of the 3 reference cases" in done.stderr


def test_exit_2_for_a_path_that_is_not_there(tmp_path: Path, reference: Path) -> None:
    assert run(tmp_path / "nowhere", reference).returncode == 2


def test_json_on_stdout_is_the_content_of_scores_json(
    tmp_path: Path, reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prediction = folder(tmp_path / "pred", {"sub-1": ONE, "sub-2": ONE})
    evaluation = evaluate_paths(prediction, reference, out=tmp_path / "scores.json")
    show_scores(evaluation, as_json=True)
    shown = json.loads(capsys.readouterr().out)
    assert shown == json.loads((tmp_path / "scores.json").read_text()) == json.loads(json.dumps(to_json(evaluation)))


def lines_of(text: str, title: str) -> list[list[str]]:
    """The cells of the table under a title."""
    table = text[text.index(title) :].split("└")[0]
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in table.splitlines() if line.startswith("│")]


def test_the_tables_show_cases_both_conventions_and_the_difference(
    tmp_path: Path, reference: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    prediction = folder(tmp_path / "pred", {"sub-1": ONE, "sub-3": ONE})
    evaluation = evaluate_paths(prediction, reference, against=reference)
    show_scores(evaluation, as_json=False)
    out = capsys.readouterr().out
    assert lines_of(out, "Scores") == [
        ["sub-1", "0.667", f"{evaluation.cases[0].hd95_mm:.1f}", "0.10", "0.05", "1/1/0", "0.667", ""],
        ["sub-2", "0.000", "27.9", "0.05", "0.00", "0/1/0", "0.000", "no file; pred empty"],
        ["sub-3", "0.000", "27.9", "0.00", "0.05", "0/0/1", "0.000", "ref empty"],
    ]
    everyone, diseased = lines_of(out, "All cases"), lines_of(out, "Only cases whose reference has a lesion")
    assert everyone[0][:3] == ["Dice", "3", "0.222 [0.000, 0.667]"]
    assert diseased[0][:3] == ["Dice", "2", "0.333 [0.000, 0.667]"]
    assert lines_of(out, "Paired difference")[0][2].startswith("-0.778 [")
    assert "reference empty but not the prediction (1): sub-3" in out


def test_one_table_is_enough_where_every_reference_has_a_lesion(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = folder(tmp_path / "ref", {"sub-1": TWO, "sub-2": ONE})
    show_scores(evaluate_paths(reference, reference), as_json=False)
    out = capsys.readouterr().out
    assert "Only cases whose reference has a lesion" not in out
    assert "Every reference has a lesion" in out


def test_a_narrow_terminal_folds_names_and_never_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "72")
    mask = write(tmp_path / f"sub-{'long' * 12}.nii.gz", ONE)
    show_scores(evaluate_paths(mask, mask), as_json=False)
    out = capsys.readouterr().out
    assert max(len(line) for line in out.splitlines() if "│" in line) <= 72
    assert lines_of(out, "Scores")[0][1:7] == ["1.000", "0.0", "0.05", "0.05", "1/0/0", "1.000"]


def test_names_are_shown_as_they_are_without_markup_or_escapes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = folder(tmp_path / "ref", {"[red]a[-red]": ONE})
    show_scores(evaluate_paths(reference, reference), as_json=False)
    assert "[red]a[-red]" in capsys.readouterr().out
