"""strokenet synth as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from strokenet.cli import cli
from strokenet.data.dataset import read_dataset
from tests.synth.phantom import write_phantom

pytestmark = pytest.mark.usefixtures("log_as_it_was")


def test_a_cohort_is_shown_beside_table_1_and_names_the_next_command(tmp_path: Path) -> None:
    maps = write_phantom(tmp_path / "maps" / "head.nii.gz").parent
    out = tmp_path / "out"
    words = ["synth", "-o", str(out), "-n", "1", "--label-maps", str(maps), "--jobs", "1", "-q"]
    done = CliRunner(env={"COLUMNS": "300"}).invoke(cli, words, catch_exceptions=False)
    assert done.exit_code == 0
    row = next(line for line in done.stdout.splitlines() if "mean lesion, ml" in line)
    cohort = json.loads((out / "cohort.json").read_text())
    assert f"{cohort['achieved']['mean_ml']:.2f}" in row
    assert "28.61" in row
    assert f"next: strokenet plan {out} -o WORK" in done.stdout.replace("\n", "")
    assert len(read_dataset(out).cases) == 1


def test_how_many_must_be_said(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["synth", "-o", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert "-n" in done.output
    assert not (tmp_path / "out").exists()
