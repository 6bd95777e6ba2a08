"""The whole method on real scans, in a short form: proves geometry, pairing and learning, not accuracy."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import nibabel
import numpy as np
import pytest
from click.testing import CliRunner

from strokenet.cli import cli

pytestmark = pytest.mark.real

Scans = Mapping[str, tuple[Sequence[Path], Path]]


def raw_dataset(root: Path, channels: Sequence[str], cases: Scans) -> Path:
    """An nnU-Net v2 raw folder of copies: case -> (its channels' files, its label)."""
    for folder in ("imagesTr", "labelsTr"):
        (root / folder).mkdir(parents=True)
    for case, (images, label) in cases.items():
        for channel, image in enumerate(images):
            shutil.copy(image, root / "imagesTr" / f"{case}_{channel:04d}.nii.gz")
        shutil.copy(label, root / "labelsTr" / f"{case}.nii.gz")
    description = {
        "channel_names": {str(index): name for index, name in enumerate(channels)},
        "labels": {"background": 0, "lesion": 1},
        "numTraining": len(cases),
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(description))
    return root


def isles(data: Path) -> Scans:
    """Two strokes, DWI and ADC (ISLES'22)."""
    cases = {}
    for subject in ("sub-strokecase0001", "sub-strokecase0002"):
        stem = data / "isles22" / subject / f"{subject}_ses-0001"
        cases[subject] = ([Path(f"{stem}_dwi.nii.gz"), Path(f"{stem}_adc.nii.gz")], Path(f"{stem}_msk.nii.gz"))
    return cases


def multiple_sclerosis(data: Path) -> Scans:
    """One head, T1 and FLAIR (open_ms, patient 7)."""
    folder = data / "open_ms" / "cross_sectional" / "patient07"
    return {"patient07": ([folder / "T1.nii.gz", folder / "FLAIR.nii.gz"], folder / "lesion.nii.gz")}


def run(*arguments: object) -> str:
    """A command of strokenet that must succeed; its stdout."""
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def scores_after_training(dataset: Path, tmp_path: Path, *, epochs: int, iterations: int, features: int) -> list[float]:
    """plan, preprocess, train, infer, evaluate through the command line; the Dice of every training case."""
    work, out = tmp_path / "work", tmp_path / "out"
    run("plan", dataset, "-o", work, "--gpu-memory", 0.1, "--jobs", 1)
    plan = json.loads((work / "plan.json").read_text())
    plan["network"]["features"] = [features * 2**level for level in range(len(plan["network"]["features"]))]
    (work / "plan.json").write_text(json.dumps(plan))  # a narrow network: this test has seconds, not minutes
    run("preprocess", work, "--jobs", 1)
    run(
        *("train", work, "--fold", "all", "--epochs", epochs, "--iters-per-epoch", iterations, "--val-iters", 1),
        *("--augment", "none"),
    )
    run("infer", work, dataset / "imagesTr", "-o", out, "--tta", "none")
    run("evaluate", out, dataset / "labelsTr", "-o", tmp_path / "scores.json")
    for label in (dataset / "labelsTr").iterdir():
        mask, scan = nibabel.load(out / label.name), nibabel.load(label)
        assert mask.shape == scan.shape
        assert np.array_equal(mask.affine, scan.affine)  # back on the grid that was given
        assert mask.get_data_dtype() == np.uint8
    return [case["dice"] for case in json.loads((tmp_path / "scores.json").read_text())["cases"]]


def test_two_real_strokes_are_learned(real_data: Path, tmp_path: Path) -> None:
    dataset = raw_dataset(tmp_path / "Dataset702_ISLES", ("DWI", "ADC"), isles(real_data))
    dice = scores_after_training(dataset, tmp_path, epochs=12, iterations=25, features=16)
    assert len(dice) == 2
    assert max(dice) > 0.3  # seconds of training; the full runs reach 0.75 and 0.95 in a quarter of an hour
    assert min(dice) > 0.02


def test_a_real_t1_and_flair_pair_runs_through(real_data: Path, tmp_path: Path) -> None:
    dataset = raw_dataset(tmp_path / "Dataset701_MS", ("T1", "FLAIR"), multiple_sclerosis(real_data))
    dice = scores_after_training(dataset, tmp_path, epochs=3, iterations=10, features=8)
    assert len(dice) == 1
    losses = [
        float(row["train_loss"])
        for row in csv.DictReader((tmp_path / "work/fold_all/log.csv").read_text().splitlines())
    ]
    assert losses[-1] < losses[0] - 0.1  # it learns; 37 lesions of 1.3 ml in all need more than seconds
