"""The folder of a semi-synthetic cohort: layout, determinism, and that it appears whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from strokenet.data.dataset import read_dataset
from strokenet.data.errors import InputError
from strokenet.data.nifti import read_volume
from strokenet.prepare.inputs import read_inputs
from strokenet.preprocess.jobs import CasesFailed
from strokenet.synth.synth import SynthCohort, SynthConfig, recipes, synthesise
from tests.synth.phantom import write_mask_mni, write_phantom


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    write_phantom(folder / "maps" / "head.nii.gz")
    write_mask_mni(folder / "masks" / "left.nii.gz", (-30.0, 0.0, 25.0), 10.0)
    write_mask_mni(folder / "masks" / "stem.nii.gz", (0.0, -30.0, -30.0), 6.0)
    return folder


def config(sources: Path, **given: object) -> SynthConfig:
    fields = {"cases": 2, "style": "clinic", "label_maps": sources / "maps", "lesions": sources / "masks", **given}
    return SynthConfig(**fields)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def clinic(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> SynthCohort:
    return synthesise(tmp_path_factory.mktemp("out") / "clinic", config(sources), jobs=1)


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_clinic_cohort_is_what_prepare_takes_with_its_truth_beside(clinic: SynthCohort) -> None:
    cases = read_inputs(clinic.root / "patients")
    assert [case.case_id for case in cases] == ["clinic_0000", "clinic_0001"]
    assert all(case.t1 and case.flair and case.label for case in cases)
    truth = json.loads((clinic.root / "truth" / "clinic_0000.json").read_text())
    assert (truth["transform"]["from"], truth["transform"]["to"]) == ("flair", "t1")
    assert np.array(truth["transform"]["matrix"]).shape == (4, 4)
    for name in ("t1", "flair"):
        scan = read_volume(clinic.root / "patients" / "clinic_0000" / f"{name}.nii.gz")
        brain = read_volume(clinic.root / "truth" / f"clinic_0000_{name}_brain.nii.gz")
        np.testing.assert_allclose(scan.geometry.affine, brain.geometry.affine)
        bias = read_volume(clinic.root / "truth" / f"clinic_0000_{name}_bias.nii.gz")
        assert bias.array.mean() == pytest.approx(1, abs=1e-4)


def test_the_achieved_values_are_those_of_the_labels_on_disk(clinic: SynthCohort) -> None:
    volumes = []
    for case in ("clinic_0000", "clinic_0001"):
        label = read_volume(clinic.root / "patients" / case / "label.nii.gz")
        assert set(np.unique(label.array)) == {0, 1}
        volumes.append(float(label.array.sum()) * 3 * 0.7 * 0.7 / 1000)
    written = json.loads((clinic.root / "cohort.json").read_text())
    assert clinic.achieved.median_ml == pytest.approx(np.median(volumes), rel=1e-4)
    assert written["achieved"]["mean_ml"] == pytest.approx(np.mean(volumes), rel=1e-4)
    assert str(clinic.root.parent) not in (clinic.root / "cohort.json").read_text()


def test_a_case_does_not_depend_on_the_size_of_the_cohort_nor_on_the_workers(
    clinic: SynthCohort, sources: Path, tmp_path: Path
) -> None:
    synthesise(tmp_path / "three", config(sources, cases=3), jobs=2)
    before, after = contents(clinic.root), contents(tmp_path / "three")
    assert len(before) == 2 * 8 + 1
    assert all(after[name] == content for name, content in before.items() if name != "cohort.json")


def test_an_atlas_cohort_is_an_nnunet_raw_folder(tmp_path: Path) -> None:
    cohort = synthesise(tmp_path / "atlas", SynthConfig(cases=1), jobs=1)
    dataset = read_dataset(cohort.root)
    assert dataset.channels == ("T1",)
    assert dataset.labels == {"background": 0, "lesion": 1}
    (case,) = dataset.cases
    assert case.label is not None
    image, label = read_volume(case.images[0]), read_volume(case.label)
    assert image.geometry.shape == (189, 233, 197)
    assert (image.array[label.array > 0] > 0).all()
    assert label.array.sum() / 1000 == pytest.approx(cohort.rows[0].volume_ml)
    assert cohort.rows[0].volume_ml == pytest.approx(cohort.rows[0].burden.total_ml, rel=0.15)


def test_a_folder_that_holds_something_is_refused_and_left_alone(sources: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is there already"):
        synthesise(tmp_path, config(sources))
    assert contents(tmp_path) == {"notes.txt": b"mine"}


def test_a_broken_source_leaves_no_half_cohort(sources: Path, tmp_path: Path) -> None:
    broken = tmp_path / "maps" / "broken.nii.gz"
    broken.parent.mkdir()
    broken.write_bytes(b"no scan")
    with pytest.raises(CasesFailed, match="clinic_0000"):
        synthesise(tmp_path / "out", config(sources, label_maps=broken.parent), jobs=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["maps"]


def test_folders_without_a_scan_are_refused(sources: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no FreeSurfer label map"):
        recipes(config(sources, label_maps=tmp_path))
    with pytest.raises(InputError, match="holds no lesion mask"):
        recipes(config(sources, lesions=tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"cases": 0}, "at least 1 and 0"),
        ({"seed": -1}, "at least 1 and 0"),
        ({"style": "oil"}, "allowed: atlas, clinic"),
        ({"domain": "ct"}, "allowed: natural, random"),
    ],
)
def test_impossible_cohorts_are_refused(wrong: dict[str, object], message: str, sources: Path) -> None:
    with pytest.raises(InputError, match=message):
        config(sources, **wrong)


def test_recipes_name_their_files_in_order_whatever_the_folder_lists(sources: Path) -> None:
    (first, *_rest) = recipes(config(sources))
    assert [path.name for path in first.masks] == ["left.nii.gz", "stem.nii.gz"]
    assert [path.name for path in first.label_maps] == ["head.nii.gz"]
