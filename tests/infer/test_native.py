"""infer --native: the mask of a prepared scan lies on the voxels of the scan as it was given."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest

from planner.plan import PostprocessRule
from strokenet.data.dataset import CaseFiles
from strokenet.data.errors import InputError
from strokenet.infer.config import InferConfig
from strokenet.infer.infer import infer, infer_folder, infer_one
from strokenet.prepare.cohort import prepare_cohort
from strokenet.prepare.config import PrepareConfig
from strokenet.prepare.inputs import read_inputs
from tests.infer.models import known_plan, write_model
from tests.prepare.heads import write_head

pytest.importorskip("SimpleITK", reason="needs SimpleITK: pip install 'strokenet[mri]'")
NATIVE = InferConfig(native=True, tta="none", precision="fp32", device="cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """study/p: a FLAIR in LAS order, tilted; prepared/: what prepare makes of it; model/: random weights."""
    root = tmp_path_factory.mktemp("native")
    case = write_head(root / "study" / "p", t1=False, label=False)
    done = prepare_cohort([case], root / "prepared", PrepareConfig(brain="none", bias=False))
    assert not done.failed
    plan = known_plan(
        channels=("FLAIR",), normalisation=("zscore",), spacing=(8.0, 4.0, 4.0), postprocess=PostprocessRule()
    )
    write_model(root / "model", plan)
    return root


def test_every_voxel_goes_back_to_its_place(root: Path, tmp_path: Path) -> None:
    (result,) = infer_folder(root / "model", root / "prepared" / "imagesTs", tmp_path, NATIVE)
    assert result.error is None
    prepared = nibabel.Nifti1Image.from_filename(tmp_path / "p.nii.gz")
    native = nibabel.Nifti1Image.from_filename(tmp_path / "native" / "p.nii.gz")
    given = nibabel.Nifti1Image.from_filename(root / "study" / "p" / "flair.nii.gz")
    assert native.shape == given.shape != prepared.shape
    np.testing.assert_allclose(native.affine, given.affine, atol=1e-4)
    lesion = np.argwhere(np.asanyarray(prepared.dataobj))
    assert len(lesion) > 100
    at = nibabel.affines.apply_affine(np.linalg.inv(given.affine) @ prepared.affine, lesion)
    expected = np.zeros(given.shape, np.uint8)
    expected[tuple(np.rint(at).astype(int).T)] = 1
    assert np.abs(at - np.rint(at)).max() < 1e-3
    assert (np.asanyarray(native.dataobj) == expected).all()


def test_without_simpleitk_it_is_refused_before_a_case_is_computed(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "SimpleITK", None)  # its import then fails
    with pytest.raises(InputError, match="SimpleITK is not installed; run `pip install"):
        infer_folder(root / "model", root / "prepared" / "imagesTs", tmp_path / "out", NATIVE)
    assert not (tmp_path / "out").exists()


def test_the_native_mask_goes_to_the_scan_that_is_named(root: Path, tmp_path: Path) -> None:
    scans = root / "prepared" / "imagesTs"
    (done,) = infer_folder(root / "model", scans, tmp_path / "flair", replace(NATIVE, native_scan="flair"))
    assert done.status == "ok"
    with pytest.raises(InputError, match="has no scan 'flair_2'; there are flair"):
        infer_folder(root / "model", scans, tmp_path / "other", replace(NATIVE, native_scan="flair_2"))
    assert not (tmp_path / "other").exists()  # it is known before a case is computed
    with pytest.raises(InputError, match="add --native"):
        InferConfig(native_scan="flair_2")


def test_from_inside_the_folder_the_record_is_found(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root / "prepared" / "imagesTs")
    (done,) = infer_folder(root / "model", Path("."), tmp_path, NATIVE)
    assert done.error is None
    (done,) = infer_one(root / "model", {"FLAIR": Path("p_0000.nii.gz")}, tmp_path / "one", NATIVE, case_id="p")
    assert done.error is None


def test_the_native_mask_has_the_header_of_the_scan(root: Path, tmp_path: Path) -> None:
    """Both forms and their codes: a viewer that takes the other form shows mask and scan in one place all the same."""
    study, out = tmp_path / "study" / "p", tmp_path / "prepared"
    study.mkdir(parents=True)
    image = nibabel.Nifti1Image.from_filename(root / "study" / "p" / "flair.nii.gz")
    turned = image.affine.copy()
    turned[:3, 3] += (7.0, -3.0, 2.0)
    scan = nibabel.Nifti1Image(image.get_fdata(dtype=np.float32), image.affine)
    scan.set_sform(image.affine, code=4)
    scan.set_qform(turned, code=2)
    nibabel.save(scan, study / "flair.nii.gz")
    assert not prepare_cohort(read_inputs(tmp_path / "study"), out, PrepareConfig(brain="none", bias=False)).failed
    (done,) = infer_folder(root / "model", out / "imagesTs", tmp_path / "masks", NATIVE)
    assert done.error is None
    header = nibabel.Nifti1Image.from_filename(tmp_path / "masks" / "native" / "p.nii.gz").header
    assert (int(header["sform_code"]), int(header["qform_code"])) == (4, 2)
    np.testing.assert_allclose(header.get_qform(), turned, atol=1e-4)
    np.testing.assert_allclose(header.get_sform(), image.affine, atol=1e-4)


def test_without_the_flag_nothing_native_is_written_and_an_earlier_one_goes(root: Path, tmp_path: Path) -> None:
    scans = root / "prepared" / "imagesTs"
    infer_folder(root / "model", scans, tmp_path, NATIVE)
    assert (tmp_path / "native" / "p.nii.gz").is_file()
    infer_folder(root / "model", scans, tmp_path, InferConfig(tta="none", device="cpu"))
    assert not (tmp_path / "native" / "p.nii.gz").exists()


def test_scans_that_were_never_prepared_are_refused_before_inference(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "prepared" / "imagesTs", tmp_path / "elsewhere" / "imagesTs")
    with pytest.raises(InputError, match=r"prepare.p\.json is not there"):
        infer_folder(root / "model", tmp_path / "elsewhere" / "imagesTs", tmp_path / "out", NATIVE)
    assert not (tmp_path / "out").exists()


def test_a_case_without_a_record_fails_alone(root: Path, tmp_path: Path) -> None:
    scan = root / "prepared" / "imagesTs" / "p_0000.nii.gz"
    cases = [CaseFiles(case_id=name, images=(scan,), label=None) for name in ("p", "q")]
    first, second = infer(root / "model", cases, tmp_path, NATIVE)
    assert first.status == "ok"
    assert second.status == "failed"
    assert second.error is not None
    assert "q.json" in second.error
    assert not (tmp_path / "q.nii.gz").exists()
