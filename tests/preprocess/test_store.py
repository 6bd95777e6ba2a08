"""Stored cases: what comes back, what counts as finished, and what is said of damaged files."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest

from strokenet.data.dataset import CaseFiles
from strokenet.data.errors import InputError
from strokenet.preprocess import store as S
from strokenet.preprocess.preprocess import Prepared, preprocess
from strokenet.preprocess.store import Store, case_key, plan_key
from tests.preprocess.heads import head, head_plan


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    return preprocess(head(), head_plan())


@pytest.fixture
def store(tmp_path: Path, prepared: Prepared) -> Store:
    """A store that holds the head under the key "plan-scans"."""
    store = Store(tmp_path / "preprocessed")
    store.write(prepared, "plan-scans")
    return store


def test_a_case_comes_back_as_it_was(store: Store, prepared: Prepared) -> None:
    case = store.open("head")
    assert prepared.label is not None
    np.testing.assert_array_equal(case.image, prepared.image)
    np.testing.assert_array_equal(case.label, prepared.label)
    assert (case.image.dtype, case.label.dtype) == (np.float32, np.int16)
    assert list(case.foreground) == [1, 2]
    for value, voxels in prepared.foreground.items():
        np.testing.assert_array_equal(case.foreground[value], voxels)
    assert store.case_ids() == ("head",)


def test_image_and_label_are_mapped_not_read(store: Store) -> None:
    case = store.open("head")
    assert isinstance(case.image.base, np.memmap)
    assert isinstance(case.label.base, np.memmap)
    assert not case.image.flags.writeable


def test_a_case_is_complete_for_its_own_key_only(store: Store) -> None:
    assert store.complete("head", "plan-scans")
    assert not store.complete("head", "plan-other")
    assert not store.complete("other", "plan-scans")


@pytest.mark.parametrize("name", ["image.npy", "label.npy", "foreground_2.npy"])
def test_a_missing_or_cut_file_makes_a_case_incomplete(store: Store, name: str) -> None:
    path = store.folder("head") / name
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    assert not store.complete("head", "plan-scans")
    with pytest.raises(InputError, match="head: .* run preprocess again"):
        store.open("head")
    path.unlink()
    assert not store.complete("head", "plan-scans")
    path.write_bytes(content)
    assert store.complete("head", "plan-scans")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"key": 3, "files": {}}', b'{"key": "plan-scans", "files": {}}']
)
def test_a_damaged_manifest_makes_a_case_incomplete(store: Store, content: bytes) -> None:
    (store.folder("head") / "manifest.json").write_bytes(content)
    assert not store.complete("head", "plan-scans")
    with pytest.raises(InputError, match="head: not preprocessed"):
        store.open("head")


@pytest.mark.parametrize("name", ["../label.npy", "/etc/passwd", "foreground_x.npy", "notes.txt"])
def test_a_manifest_cannot_name_other_files(store: Store, name: str) -> None:
    path = store.folder("head") / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"][name] = 1
    path.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="head: not preprocessed"):
        store.open("head")


@pytest.mark.parametrize("at", range(0, 128, 3))
def test_a_flipped_byte_in_a_header_ends_in_one_line_or_in_an_array(store: Store, at: int) -> None:
    path = store.folder("head") / "image.npy"
    content = bytearray(path.read_bytes())
    content[at] ^= 0x55
    path.write_bytes(content)
    try:
        store.open("head")
    except InputError as error:
        assert "run preprocess again" in str(error)  # noqa: PT017
        assert "\n" not in str(error)  # noqa: PT017


def test_a_pickle_is_never_loaded(store: Store) -> None:
    folder = store.folder("head")
    np.save(folder / "label.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["label.npy"] = (folder / "label.npy").stat().st_size
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"label\.npy is damaged"):
        store.open("head")


def test_a_wrong_array_is_named(store: Store) -> None:
    folder = store.folder("head")
    size = (folder / "label.npy").stat().st_size
    np.save(folder / "label.npy", np.load(folder / "label.npy").view(np.uint16))
    assert (folder / "label.npy").stat().st_size == size
    with pytest.raises(InputError, match="label.npy holds uint16"):
        store.open("head")


def test_an_interrupted_rewrite_leaves_no_complete_case(
    store: Store, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(S.np, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        store.write(prepared, "plan-scans")
    assert not store.complete("head", "plan-scans")
    assert [path for path in store.folder("head").iterdir() if path.name.startswith(".")] == []


def test_a_rewrite_removes_what_does_not_belong(store: Store, prepared: Prepared) -> None:
    left = store.folder("head") / ".0123456789ab.image.npy"
    left.write_bytes(b"of a killed run")
    store.write(dataclasses.replace(prepared, foreground={1: prepared.foreground[1]}), "k")
    names = sorted(path.name for path in store.folder("head").iterdir())
    assert names == ["foreground_1.npy", "image.npy", "label.npy", "manifest.json"]


def test_an_open_case_outlives_a_rewrite(store: Store, prepared: Prepared) -> None:
    case = store.open("head")
    store.write(dataclasses.replace(prepared, image=prepared.image + 1), "k")
    np.testing.assert_array_equal(case.image, prepared.image)


def test_only_labelled_cases_are_stored(store: Store, prepared: Prepared) -> None:
    with pytest.raises(ValueError, match="label"):
        store.write(dataclasses.replace(prepared, label=None), "k")


def test_a_case_of_another_plan_is_refused_on_opening(store: Store, prepared: Prepared) -> None:
    plan = head_plan()
    store.write(prepared, f"{plan_key(plan)}-scans")
    assert store.open("head", plan).case_id == "head"
    with pytest.raises(InputError, match="head: preprocessed by another plan"):
        store.open("head", head_plan(spacing=(1.0, 1.0, 1.0)))


@pytest.fixture
def files(tmp_path: Path) -> CaseFiles:
    for name in ("t1", "flair", "label"):
        (tmp_path / name).write_text(name)
    return CaseFiles(case_id="head", images=(tmp_path / "t1", tmp_path / "flair"), label=tmp_path / "label")


def test_the_key_follows_what_preprocessing_reads(files: CaseFiles) -> None:
    key = case_key(head_plan(), files)
    assert key == case_key(head_plan(), files)
    assert key == case_key(head_plan(batch_size=7, patch=(32, 32, 32), dataset="renamed"), files)
    assert key != case_key(head_plan(spacing=(1.1, 1.5, 1.31)), files)
    assert key != case_key(head_plan(orientation="RAS"), files)
    assert key != case_key(head_plan(transpose=(0, 1, 2)), files)
    assert key != case_key(head_plan(use_mask_for_norm=(True, True)), files)


def test_the_key_follows_intensities_only_where_they_are_used(files: CaseFiles) -> None:
    stats = dataclasses.replace(head_plan().intensity[0], mean=5.0)
    assert case_key(head_plan(intensity=(stats, stats)), files) == case_key(head_plan(), files)
    ct = head_plan(normalisation=("ct", "zscore"), use_mask_for_norm=(False, False))
    assert case_key(dataclasses.replace(ct, intensity=(stats, stats)), files) != case_key(ct, files)


@pytest.mark.parametrize("name", ["t1", "label"])
def test_the_key_follows_the_scans(files: CaseFiles, tmp_path: Path, name: str) -> None:
    key = case_key(head_plan(), files)
    os.utime(tmp_path / name, ns=(1, 1))
    assert case_key(head_plan(), files) != key
    (tmp_path / name).unlink()
    with pytest.raises(InputError, match=r"head: cannot read .* \(No such file"):
        case_key(head_plan(), files)
