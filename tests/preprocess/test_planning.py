"""Planning a workspace: what it writes, and what it must not replace."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest

from strokenet.data.errors import InputError
from strokenet.preprocess.jobs import CasesFailed
from strokenet.preprocess.planning import PlanConfig, plan_workspace, preprocess_workspace
from strokenet.preprocess.store import Store
from strokenet.workspace import Workspace

CONFIG = PlanConfig(gpu_memory_gb=0.1, jobs=1)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Two heads of 24^3 voxels with a lesion each."""
    root = tmp_path / "Dataset001_Heads"
    for folder in ("imagesTr", "labelsTr"):
        (root / folder).mkdir(parents=True)
    for index, case in enumerate("ab"):
        rng = np.random.default_rng(index)
        label = np.zeros((24, 24, 24), np.uint8)
        label[8:12, 8:13, 9:14] = 1
        image = rng.normal(100, 5, label.shape).astype(np.float32) + 40 * label
        for path, array in ((f"imagesTr/{case}_0000.nii.gz", image), (f"labelsTr/{case}.nii.gz", label)):
            nifti = nibabel.Nifti1Image(array, np.eye(4))
            nifti.set_sform(np.eye(4), code=1)
            nibabel.save(nifti, root / path)
    description = {
        "channel_names": {"0": "T1"},
        "labels": {"background": 0, "lesion": 1},
        "numTraining": 2,
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(description))
    return root


def test_a_workspace_is_planned_and_preprocessed_and_may_be_planned_again(dataset: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    planned = plan_workspace(dataset, work, CONFIG)
    assert Workspace(work).read_plan() == planned.plan
    assert [len(split.val) for split in planned.splits] == [1, 1]
    assert preprocess_workspace(work, jobs=1).made == ("a", "b")
    assert preprocess_workspace(work, jobs=1).kept == ("a", "b")
    assert plan_workspace(dataset, work, CONFIG).plan == planned.plan


def test_a_raw_datasets_description_is_never_replaced(dataset: Path, tmp_path: Path) -> None:
    before = (dataset / "dataset.json").read_bytes()
    with pytest.raises(InputError, match="holds a dataset.json that is no workspace's; give another folder"):
        plan_workspace(dataset, dataset, CONFIG)
    other = tmp_path / "other"
    other.mkdir()
    (other / "dataset.json").write_bytes(before)
    with pytest.raises(InputError, match="holds a dataset.json that is no workspace's"):
        plan_workspace(dataset, other, CONFIG)
    assert (dataset / "dataset.json").read_bytes() == before
    assert [path.name for path in other.iterdir()] == ["dataset.json"]


@pytest.mark.parametrize("left", ["last.safetensors", "state.pt"])
def test_the_plan_of_a_trained_model_is_never_replaced(dataset: Path, tmp_path: Path, left: str) -> None:
    work = tmp_path / "work"
    plan_workspace(dataset, work, CONFIG)
    (work / "fold_0").mkdir()
    (work / "fold_0" / left).write_bytes(b"weights")
    before = (work / "plan.json").read_bytes()
    with pytest.raises(InputError, match="a model was trained here by its plan; choose another -o"):
        plan_workspace(dataset, work, PlanConfig(gpu_memory_gb=0.2, jobs=1))
    assert (work / "plan.json").read_bytes() == before


def test_a_bad_case_leaves_the_others_and_says_how_many(dataset: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    plan_workspace(dataset, work, CONFIG)
    (dataset / "labelsTr" / "b.nii.gz").write_bytes(b"no scan at all, but more than twenty bytes")
    with pytest.raises(CasesFailed, match="1 of 2 cases failed: b: ") as caught:
        preprocess_workspace(work, jobs=1)
    assert caught.value.exit_code == 3  # the command's: some cases failed
    assert Store(Workspace(work).preprocessed).case_ids() == ("a",)
