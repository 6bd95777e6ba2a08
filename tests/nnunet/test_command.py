"""strokenet import-nnunet and export-nnunet as a user calls them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
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
    outcome = run("export-nnunet", str(tmp_path / "model"), "-o", str(tmp_path / "there"), "--json")
    written = json.loads(outcome.stdout)
    assert (written["folder"], written["folds"], len(written["notes"])) == (str(tmp_path / "there"), ["0"], 1)
    outcome = run("import-nnunet", str(tmp_path / "there"), "-o", str(tmp_path / "back"), "--json")
    facts = json.loads(outcome.stdout)
    assert facts == {
        "nnunet": "v2",
        "trainer": "nnUNetTrainer",
        "configuration": "3d_fullres",
        "network": "plain",
        "features": [4, 8, 8],
        "channels": ["T1", "FLAIR"],
        "labels": {"background": 0, "lesion": 1},
        "orientation": "RAS",
        "network_axes": ["D", "H", "W"],
        "spacing_mm": [1.0, 1.0, 1.0],
        "patch": [16, 16, 16],
        "mirror_axes": ["W"],
        "folds": ["0"],
        "checkpoint": "final",
        "mask": "probability above 0.2",
        "removed": "components up to 4 mm3",
        "semantics": "improved",
        "notes": [],
        "model": str(tmp_path / "back"),
    }
    for semantics in ("exact", "improved"):
        out = tmp_path / semantics
        command = ("infer", str(tmp_path / "back"), str(tmp_path / "scans"), "-o", str(out), "--semantics", semantics)
        assert run(*command).returncode == 0
        assert (out / "case.nii.gz").is_file()


@pytest.mark.parametrize(
    ("command", "given", "says"),
    [
        (
            "import-nnunet",
            "empty",
            "neither plans.json (nnU-Net v2) nor plans.pkl (v1); give a TRAINER__PLANS__3d_fullres folder",
        ),
        ("import-nnunet", "model.zip", "is a file; give the results folder of a trained nnU-Net, an archive unpacked"),
        ("export-nnunet", "empty", "no plan.json"),
    ],
    ids=["import a folder", "import an archive", "export"],
)
def test_what_is_no_model_ends_with_4(tmp_path: Path, command: str, given: str, says: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "model.zip").write_bytes(b"PK")
    outcome = run(command, str(tmp_path / given), "-o", str(tmp_path / "out"))
    assert outcome.returncode == 4
    assert says in outcome.stderr
    assert len(outcome.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def begun(tmp_path: Path, command: str, folds: int, *before: str) -> subprocess.Popen[str]:
    """The command at its first fold of many, on the way to new/out. before: words in front of it."""
    source = tmp_path / "source"
    write = {"import-nnunet": write_folder, "export-nnunet": write_model}[command]
    write(source)
    (file,) = (path for path in (source / "fold_0").iterdir())
    for number in range(1, folds):
        (source / f"fold_{number}").mkdir()
        os.link(file, source / f"fold_{number}" / file.name)
    words = [*before, sys.executable, "-m", "strokenet", command, str(source), "-o", str(tmp_path / "new" / "out")]
    pipe = subprocess.PIPE
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("new/.*.out/fold_*/*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    assert not (tmp_path / "new" / "out").exists(), "it was done before the signal: take more folds"
    return process


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize("command", ["import-nnunet", "export-nnunet"])
@pytest.mark.parametrize(("name", "expected"), [("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_leaves_nothing_behind(tmp_path: Path, command: str, name: str, expected: int) -> None:
    process = begun(tmp_path, command, 150)
    process.send_signal(signal.Signals[name])
    out, err = process.communicate(timeout=60)
    assert process.returncode == expected, err
    assert (out, err) == ("", "")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
def test_under_nohup_the_end_of_the_terminal_does_not_end_it(tmp_path: Path) -> None:
    process = begun(tmp_path, "import-nnunet", 40, "nohup")
    process.send_signal(signal.SIGHUP)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert len(Workspace(tmp_path / "new" / "out").trained_folds()) == 40
