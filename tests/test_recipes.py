"""The README's recipes run as they are printed, on tiny drawn scans for one epoch; each stage starts from the last."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from strokenet.cli import cli
from strokenet.data.files import write_json
from strokenet.model.checkpoint import load_weights
from strokenet.workspace import Workspace
from tests.conftest import ROOT
from tests.infer.models import head, write_scan

pytestmark = pytest.mark.usefixtures("log_as_it_was")
CASES = ("p1", "p2", "p3")
SMALL = {
    "plan": ("--jobs", "1"),
    "preprocess": ("--jobs", "1"),
    "train": ("--stop-epoch", "1", "--iters-per-epoch", "2", "--val-iters", "1", "--device", "cpu"),
}
FIRST = "encoder.stages.0.0.convs.0.conv.weight"


def recipe_commands() -> list[list[str]]:
    """The words of every command in the README's section of recipes, without `strokenet` itself."""
    section = (ROOT / "README.md").read_text().partition("\n## Recipes\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("    strokenet ")]
    return [shlex.split(line, comments=True)[1:] for line in lines]


def write_raw(root: Path, channels: tuple[str, ...], shape: tuple[int, int, int], brighter_than: float) -> None:
    """An nnU-Net v2 raw folder of three heads, their brightest voxels the lesion."""
    for seed, case in enumerate(CASES):
        for channel, _ in enumerate(channels):
            write_scan(root / "imagesTr" / f"{case}_{channel:04d}.nii.gz", head(shape, 10 * seed + channel))
        label = (head(shape, 10 * seed) > brighter_than).astype(np.uint8)
        write_scan(root / "labelsTr" / f"{case}.nii.gz", label)
    description = {
        "channel_names": {str(number): name for number, name in enumerate(channels)},
        "labels": {"background": 0, "lesion": 1},
        "numTraining": len(CASES),
        "file_ending": ".nii.gz",
    }
    write_json(root / "dataset.json", description)


def weights_of(root: str) -> dict[str, Tensor]:
    workspace = Workspace(Path(root))
    return load_weights(workspace.fold("0").last, workspace.read_plan())


def furthest(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def test_the_recipes_run_and_every_stage_starts_from_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_raw(Path("ATLAS"), ("T1",), (34, 32, 32), 118)
    write_raw(Path("SITE_T1"), ("T1",), (20, 18, 16), 118)
    write_raw(Path("SITE"), ("T1", "FLAIR"), (20, 18, 16), 118)
    write_raw(Path("CORRECTED"), ("T1", "FLAIR"), (20, 18, 16), 112)
    commands = recipe_commands()
    assert [words[0] for words in commands].count("train") == 4
    for words in commands:
        done = CliRunner().invoke(cli, [*words, *SMALL.get(words[0], ())])
        assert done.exit_code == 0, f"{words}: {done.output}"
    trained, given = ([weights_of(f"{kind}{n}") for n in (2, 3, 4)] for kind in "WM")
    for before, after in zip(given, trained, strict=True):
        assert 0 < furthest(before, after) < 1e-3  # two steps of 1e-5 from there
    first = weights_of("W1")
    assert Workspace(Path("W1")).read_plan().network != Workspace(Path("W2")).read_plan().network
    assert torch.equal(given[0][FIRST], first[FIRST])
    half = trained[0][FIRST] / 2  # the paper's first convolution of two channels (V)
    torch.testing.assert_close(given[1][FIRST], torch.cat([half, half], 1), rtol=0, atol=1e-7)
    assert furthest({**given[1], FIRST: half}, {**trained[0], FIRST: half}) == 0
    assert furthest(given[2], trained[1]) == 0
