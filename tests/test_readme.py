"""The README's Python example runs as it is printed, and its table of nnU-Net is the one that was measured."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

from tests.conftest import ROOT
from tests.infer.models import write_case, write_model
from tests.peers.table import RESULTS, readme_table


def example() -> str:
    """The indented block that begins with `from pathlib`."""
    lines = (ROOT / "README.md").read_text().splitlines()
    start = lines.index("    from pathlib import Path")
    end = next(n for n in range(start, len(lines)) if lines[n] and not lines[n].startswith("    "))
    return textwrap.dedent("\n".join(lines[start:end]))


def test_the_python_example_runs(tmp_path: Path) -> None:
    write_model(tmp_path / "WORK")
    t1, flair = write_case(tmp_path, "x")
    t1.rename(tmp_path / "t1.nii.gz")
    flair.rename(tmp_path / "flair.nii.gz")
    done = subprocess.run(
        [sys.executable, "-c", example()], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    voxels, shape = done.stdout.split(maxsplit=1)
    assert voxels.isdecimal()
    assert shape.startswith("(2, ")


def test_the_comparison_with_nnunet_is_the_one_that_was_measured() -> None:
    table = readme_table(json.loads(RESULTS.read_text()))
    assert table in (ROOT / "README.md").read_text()
    assert "FAILED" not in table
