"""strokenet import-nnunet and export-nnunet as a user calls them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from strokenet.workspace import Workspace
from tests.infer.models import write_case, write_model
from tests.nnunet.v2_folders import write_folder
from tests.test_cli import shell


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return shell("-m", "strokenet", *words)


def test_import_says_what_it_read(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", folds=("0", "1"))
    outcome = run("import-nnunet", str(source), "-o", str(tmp_path / "model"))
    assert outcome.returncode == 0, outcome.stderr
    for text in ("nnUNetTrainer", "T1, FLAIR", "1, 1, 1", "16, 16, 16", "0 background, 1 lesion", "final", "D, H, W"):
        assert text in outcome.stdout
    assert Workspace(tmp_path / "model").trained_folds() == ("0", "1")


def test_import_export_and_infer_follow_each_other(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    write_case(tmp_path / "scans", "case")
    assert run("export-nnunet", str(tmp_path / "model"), "-o", str(tmp_path / "there")).returncode == 0
    outcome = run("import-nnunet", str(tmp_path / "there"), "-o", str(tmp_path / "back"), "--json")
    facts = json.loads(outcome.stdout)
    assert (facts["trainer"], facts["channels"], facts["patch"]) == ("nnUNetTrainer", ["T1", "FLAIR"], [16, 16, 16])
    for semantics in ("exact", "improved"):
        out = tmp_path / semantics
        command = ("infer", str(tmp_path / "back"), str(tmp_path / "scans"), "-o", str(out), "--semantics", semantics)
        assert run(*command).returncode == 0
        assert (out / "case.nii.gz").is_file()


@pytest.mark.parametrize("command", ["import-nnunet", "export-nnunet"])
def test_a_folder_that_is_no_model_ends_with_4(tmp_path: Path, command: str) -> None:
    (tmp_path / "empty").mkdir()
    outcome = run(command, str(tmp_path / "empty"), "-o", str(tmp_path / "out"))
    assert outcome.returncode == 4
    assert len(outcome.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
