"""strokenet prepare as a user calls it: a folder of patients, one case, and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from strokenet.cli import cli
from strokenet.data.errors import InputError
from tests.prepare.heads import write_head

pytestmark = pytest.mark.usefixtures("log_as_it_was")
pytest.importorskip("SimpleITK", reason="needs SimpleITK: pip install 'strokenet[mri]'")


def test_a_folder_of_patients_becomes_a_raw_dataset(tmp_path: Path) -> None:
    write_head(tmp_path / "study" / "p1", flair=False, label=False)
    (tmp_path / "study" / "p2").mkdir()
    (tmp_path / "study" / "p2" / "t1.nii.gz").write_bytes(b"no scan")
    out = tmp_path / "out"
    words = ["prepare", str(tmp_path / "study"), "-o", str(out), "--brain", "none", "--no-bias"]
    first = CliRunner(env={"COLUMNS": "200"}).invoke(cli, words)
    assert first.exit_code == 3
    assert "p1" in first.stdout
    assert "failed: p2: read: " in first.stdout
    assert f"strokenet infer MODEL {out}/imagesTs" in first.stdout.replace("\n", "")
    again = CliRunner().invoke(cli, [*words, "--json"])
    rows = {row["case"]: row for row in json.loads(again.stdout)["cases"]}
    assert rows["p1"]["status"] == "ok"
    assert (out / rows["p1"]["images"][0]).is_file()
    assert (rows["p2"]["status"], rows["p2"]["step"]) == ("failed", "read")


def test_one_case_is_named_like_its_patient_where_its_file_is_named_like_a_scan(tmp_path: Path) -> None:
    files = write_head(tmp_path / "p", flair=False, label=False)
    out = tmp_path / "out"
    done = CliRunner().invoke(
        cli, ["prepare", "--t1", str(files.t1), "-o", str(out), "--brain", "none", "--no-bias", "--zscore"]
    )
    assert done.exit_code == 0
    assert (out / "imagesTs" / "p_0000.nii.gz").is_file()
    assert (out / "qc" / "p.png").is_file()


def test_a_second_time_needs_a_first(tmp_path: Path) -> None:
    files = write_head(tmp_path / "p", flair=False, label=False)
    done = CliRunner().invoke(cli, ["prepare", "--t1-2", str(files.t1), "-o", str(tmp_path / "out")])
    assert isinstance(done.exception, InputError)
    assert "neither t1 nor flair is given" in str(done.exception)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("study", "--t1", "study/t1.nii.gz"),
        ("study", "--case", "x"),
        ("study", "--label", "study/t1.nii.gz"),
        ("--label", "study/t1.nii.gz"),
    ],
)
def test_either_a_source_or_one_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "t1.nii.gz").touch()
    done = CliRunner().invoke(cli, ["prepare", *words, "-o", "out"])
    assert done.exit_code == 2
    assert "either SOURCE or one case" in done.output
    assert not (tmp_path / "out").exists()


def test_an_empty_folder_is_refused_and_nothing_made(tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    done = CliRunner().invoke(cli, ["prepare", str(tmp_path / "study"), "-o", str(tmp_path / "out")])
    assert isinstance(done.exception, InputError)
    assert "holds no case" in str(done.exception)
    assert not (tmp_path / "out").exists()
