"""Brain masks: one piece, checked weights, and a real head against a mask of other hands."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from strokenet.data.errors import InputError
from strokenet.data.geometry import Geometry, turn_to_ras, turned
from strokenet.data.nifti import read_volume
from strokenet.prepare.brain import check_sha256, make_brain, weights_folder
from strokenet.prepare.itk import resample_mask
from tests.prepare.heads import dice
from tests.prepare.starts import read_itk_text, read_scan

GRID = Geometry(shape=(12, 12, 12), spacing=(2.0, 1.0, 5.0), affine=np.diag([2.0, 1.0, 5.0, 1.0]))


def test_the_largest_piece_is_kept_and_its_holes_are_filled() -> None:
    mask = np.zeros((12, 12, 12), bool)
    mask[1:8, 1:8, 1:8] = True
    mask[4, 4, 4] = False  # a hole
    mask[10, 10, 10] = True  # another piece
    brain = make_brain(mask, GRID, "given")
    assert brain.mask.sum() == 7**3
    assert brain.volume_ml == pytest.approx(343 * 10 / 1000)


def test_an_empty_mask_is_refused() -> None:
    with pytest.raises(InputError, match="no brain found"):
        make_brain(np.zeros((12, 12, 12), bool), GRID, "given")


def test_other_weights_are_never_loaded(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(b"abc")  # its sha256 is a published test vector
    check_sha256(path, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
    with pytest.raises(InputError, match="sha256 ba7816bf8f01 is not 0000"):
        check_sha256(path, "0" * 64)
    with pytest.raises(InputError, match="cannot be read"):
        check_sha256(tmp_path / "none.pt", "0" * 64)


def test_a_missing_package_is_one_line_with_the_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'pip install "strokenet\[mri\]"'):
        weights_folder()


@pytest.mark.slow
@pytest.mark.real
def test_a_real_head_agrees_with_the_published_brain_mask(real_data: Path) -> None:
    pytest.importorskip("SimpleITK", reason="needs SimpleITK: pip install 'strokenet[mri]'")
    try:
        weights_folder()
    except InputError as error:
        pytest.skip(str(error))
    folder = real_data / "open_ms" / "longitudinal" / "patient12"
    scan = read_scan(folder / "study1_FLAIR.nii.gz")
    assert 1000 < scan.brain.sum() * scan.geometry.voxel_volume_mm3 / 1000 < 1800
    volume = read_volume(folder / "brainmask_common_space.nii.gz")
    turn = turn_to_ras(volume.geometry)
    common = turned(volume.geometry, turn)
    to_study = read_itk_text(folder / "study1_FLAIR_to_common_space.txt")  # common world -> study world
    found = resample_mask(scan.brain, scan.geometry, common, to_study)
    assert dice(found, turn.apply(volume.array)) > 0.93
