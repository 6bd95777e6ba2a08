"""The infer suite without its commands: what it compares, how often, and what is refused; and MONAI's own command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest

from bench import infer
from bench.infer import MONAI, NNUNET, OURS, Command, Way
from bench.model import Pair
from bench.peers import OF_HERE, peers_python
from bench.volume import in_slices, stripped_head, write_volume
from planner.plan import PostprocessRule
from strokenet.data.nifti import read_volume
from strokenet.data.overlap import dice
from strokenet.infer.config import InferConfig
from strokenet.infer.infer import infer_folder
from tests.infer.models import write_model
from tests.plans import tiny_plan


def write_mask(path: Path, voxels: int) -> Path:
    """A file with so many voxels of lesion."""
    mask = np.zeros(1000, np.uint8)
    mask[:voxels] = 1
    return write_volume(path, mask.reshape(10, 10, 10))


def masks(folder: Path, **voxels: int) -> dict[str, Path]:
    names = {"ours": OURS, "nnunet": NNUNET, "monai": MONAI}
    return {names[name]: write_mask(folder / f"{name}.nii.gz", count) for name, count in voxels.items()}


def test_masks_that_agree_are_described(tmp_path: Path) -> None:
    said = infer._answers(masks(tmp_path, ours=500, nnunet=501, monai=505), exact=False)
    assert said.startswith(f"with {NNUNET}: Dice 0.9990, volume 0.20% apart, 1 of 501 voxels differ; with {MONAI}: ")


@pytest.mark.parametrize(
    ("voxels", "exact"),
    [
        ({"ours": 500, "nnunet": 507}, False),  # Dice 0.993
        ({"ours": 500, "nnunet": 500, "monai": 560}, False),  # Dice 0.943
        ({"ours": 500, "nnunet": 511}, True),
        ({"ours": 0, "nnunet": 0}, False),
    ],
)
def test_masks_that_do_not_are_refused(tmp_path: Path, voxels: dict[str, int], exact: bool) -> None:
    with pytest.raises(AssertionError):
        infer._answers(masks(tmp_path, **voxels), exact=exact)


def test_rounds_are_five_where_they_are_affordable() -> None:
    assert infer.affordable(10, infer.ROUNDS) == 5
    assert infer.affordable(100, infer.ROUNDS) == 3
    assert infer.affordable(300, infer.ROUNDS) == 0  # the runs that were compared are then the ones timed
    assert infer.affordable(10, 0) == 0


def test_without_nnunet_nothing_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STROKENET_PEERS", str(tmp_path))
    assert infer.comparisons(quick=False) == []
    assert not infer.has_monai()


def test_the_drawn_head_and_one_that_has_to_be_resampled_are_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(infer, "peers", lambda: tmp_path)
    monkeypatch.setenv("STROKENET_TEST_DATA", str(tmp_path))
    what = [comparison.what for comparison in infer.comparisons(quick=False)]
    assert what[0] == "drawn head 197x233x189, no mirroring"
    assert what[-1] == "drawn head in slices of 3 mm, no mirroring"
    assert [one.what for one in infer.comparisons(quick=True)] == [
        "small drawn head, no mirroring",
        "small drawn head, no mirroring, warm, from file to mask",
    ]


def fake_command(folder: Path, name: str) -> Command:
    """Copies a mask, and says so in a file."""
    out = folder / name / "case.nii.gz"
    script = "import os, pathlib, shutil, sys; pathlib.Path(sys.argv[2]).parent.mkdir(); shutil.copy(*sys.argv[1:3]);"
    script += "open(sys.argv[3], 'a').write(sys.argv[4])"
    words = (sys.executable, "-c", script, str(folder / "mask.nii.gz"), str(out), str(folder / "order"), name[0])
    return Command(words=words, out=out, environment={})


@pytest.mark.parametrize(("rounds", "order", "times"), [(2, "onononono"[:6], 2), (0, "on", 1)])
def test_commands_run_in_turn_and_the_compared_run_counts_only_alone(
    rounds: int, order: str, times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_mask(tmp_path / "mask.nii.gz", 100)
    commands = {OURS: fake_command(tmp_path, "o"), NNUNET: fake_command(tmp_path, "n")}
    monkeypatch.setattr(infer, "_commands", lambda *_: commands)
    monkeypatch.setattr(infer, "_floor_seconds", lambda *_: 0.5)
    case = Pair(name="case", images=(), exported=tmp_path, imported=tmp_path)
    measured = infer._measured("case, plain", lambda _: case, infer.PLAIN, rounds)
    assert (tmp_path / "order").read_text() == order
    assert {len(of) for of in measured.times_ms.values()} == {times}
    assert measured.floor_ms == 500.0
    assert all(peak > 0.001 for peak in measured.peaks_gb.values())


def test_a_command_that_fails_or_leaves_no_mask_is_an_error(tmp_path: Path) -> None:
    for words in (("import sys; print('why'); sys.exit(3)", "ended with 3:\nwhy"), ("print('nothing')", "nothing")):
        command = Command(words=(sys.executable, "-c", words[0]), out=tmp_path / "o" / "m.nii.gz", environment={})
        with pytest.raises(RuntimeError, match=words[1]):
            infer.ran(command)


def test_the_peak_of_a_command_is_its_own_and_not_the_bench_s(tmp_path: Path) -> None:
    held = np.ones(100_000_000, np.float32)  # 0.4 GB
    write_mask(tmp_path / "mask.nii.gz", 100)
    assert infer.ran(fake_command(tmp_path, "o")).peak_gb < 0.2
    assert held.nbytes == 400_000_000


def test_thick_slices_are_means(tmp_path: Path) -> None:
    head, _ = stripped_head((20, 24, 19))
    thick = in_slices(head, 3)
    assert thick.shape == (20, 24, 6)
    np.testing.assert_allclose(thick[..., 1], head[..., 3:6].mean(2), rtol=1e-6)
    image = nibabel.load(write_volume(tmp_path / "thick.nii.gz", thick, (1.0, 1.0, 3.0)))
    assert image.header.get_zooms() == (1.0, 1.0, 3.0)


def monai_python() -> Path:
    """The interpreter of tools/peers.sh, where it has MONAI."""
    if not infer.has_monai():
        pytest.skip("no MONAI: run tools/peers.sh or set STROKENET_PEERS")
    return peers_python()


def test_monai_segments_as_ours_plain_and_mirrored(tmp_path: Path) -> None:
    """On a grid that both lay alike: two tiles along the first axis, which share its middle third.

    There MONAI's bell is centred half a voxel lower; elsewhere the two differ by rounding.
    """
    python = monai_python()
    rule = PostprocessRule(threshold=0.34)
    write_model(tmp_path / "model", tiny_plan(mirror_axes=(0, 1, 2), postprocess=rule))
    for channel in range(2):
        noise = np.random.default_rng(channel).uniform(1, 9, size=(16, 16, 24)).astype(np.float32)
        write_volume(tmp_path / "scans" / f"x_{channel:04d}.nii.gz", noise)
    script = "import sys; from bench.monai_infer import main; model, scans, none, full = sys.argv[1:];"
    script += "main([model, scans, none], standalone_mode=False);"
    script += "main([model, scans, full, '--mirror'], standalone_mode=False)"
    words = (python, "-c", script, *(str(tmp_path / name) for name in ("model", "scans", "monai none", "monai full")))
    done = subprocess.run(words, env=os.environ | OF_HERE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for tta in ("none", "full"):
        config = InferConfig(tta=tta, device="cpu")
        infer_folder(tmp_path / "model", tmp_path / "scans", tmp_path / tta, config)
        ours, theirs = (read_volume(tmp_path / name / "x.nii.gz").array > 0 for name in (tta, f"monai {tta}"))
        assert 0.2 < ours.mean() < 0.8
        assert dice(ours, theirs) > 0.95
        assert np.count_nonzero(ours[:8] != theirs[:8]) + np.count_nonzero(ours[16:] != theirs[16:]) <= 2


def test_monais_command_is_asked_to_mirror(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(infer, "has_monai", lambda: True)
    monkeypatch.setattr(infer, "peers", lambda: tmp_path)
    case = Pair(name="x", images=(tmp_path / "x_0000.nii.gz",), exported=tmp_path / "e", imported=tmp_path / "i")

    def contenders(way: Way) -> dict[str, bool]:
        return {name: "--mirror" in command.words for name, command in infer._commands(case, way, tmp_path).items()}

    assert contenders(infer.PLAIN) == {OURS: False, NNUNET: False, MONAI: False}
    assert contenders(infer.MIRRORED) == {OURS: False, NNUNET: False, MONAI: True}
    assert contenders(infer.EXACT) == {OURS: False, NNUNET: False}
