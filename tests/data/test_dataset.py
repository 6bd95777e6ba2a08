"""Datasets of nnU-Net's layout: what is read, and what a stranger's dataset.json may not do."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from strokenet.data.dataset import from_json, input_cases, read_dataset, to_json
from strokenet.data.errors import InputError

DESCRIPTION: dict[str, Any] = {
    "channel_names": {"0": "T1", "1": "FLAIR"},
    "labels": {"background": 0, "lesion": 1},
    "numTraining": 2,
    "file_ending": ".nii.gz",
}
LISTED = {"images": ["scans/a_t1.nii.gz", "scans/a_flair.nii.gz"], "label": "masks/a.nii.gz"}


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def dataset(folder: Path, cases: tuple[str, ...] = ("sub-2", "sub-10"), channels: int = 2, **changes: Any) -> Path:
    """An nnU-Net raw folder of empty files; a change of None takes the key out."""
    root = folder / "Dataset007_Stroke"
    for case in cases:
        touch(*(root / "imagesTr" / f"{case}_{channel:04d}.nii.gz" for channel in range(channels)))
        touch(root / "labelsTr" / f"{case}.nii.gz")
    description = {key: value for key, value in (DESCRIPTION | changes).items() if value is not None}
    root.mkdir(parents=True, exist_ok=True)
    (root / "dataset.json").write_text(json.dumps(description))
    return root


def listed(folder: Path, **changes: Any) -> Path:
    """A folder whose dataset.json lists case a; the files are there."""
    root = dataset(folder, (), dataset={"a": LISTED | changes}, numTraining=1)
    touch(*(root / path for path in (*LISTED["images"], LISTED["label"])))
    return root


def refused(root: Path, says: str) -> str:
    with pytest.raises(InputError) as caught:
        read_dataset(root)
    message = str(caught.value)
    assert says in message
    assert message.isprintable()
    return message


# --- reading


def test_cases_are_found_sorted_with_their_channels_in_order(tmp_path: Path) -> None:
    root = dataset(tmp_path)
    found = read_dataset(root)
    assert (found.name, found.channels, found.file_ending) == ("Dataset007_Stroke", ("T1", "FLAIR"), ".nii.gz")
    assert found.labels == {"background": 0, "lesion": 1}
    assert [case.case_id for case in found.cases] == ["sub-10", "sub-2"]
    assert found.cases[1].images == tuple(root / "imagesTr" / f"sub-2_000{c}.nii.gz" for c in (0, 1))
    assert found.cases[1].label == root / "labelsTr" / "sub-2.nii.gz"


def test_the_older_key_modality_and_uncompressed_files_are_read(tmp_path: Path) -> None:
    root = dataset(tmp_path, (), channel_names=None, modality={"0": "T1"}, file_ending=".nii")
    touch(root / "imagesTr" / "a_0000.nii", root / "labelsTr" / "a.nii")
    assert read_dataset(root).channels == ("T1",)


def test_label_values_may_be_written_as_text(tmp_path: Path) -> None:
    root = dataset(tmp_path, labels={"background": "0", "lesion": "1"})
    assert read_dataset(root).labels == {"background": 0, "lesion": 1}


def test_a_case_name_may_end_in_four_digits_itself(tmp_path: Path) -> None:
    found = read_dataset(dataset(tmp_path, ("scan_0007", "läsion 3")))
    assert [case.case_id for case in found.cases] == ["läsion 3", "scan_0007"]


def test_the_dataset_key_lists_files_anywhere_below_the_folder(tmp_path: Path) -> None:
    root = listed(tmp_path)
    (case,) = read_dataset(root).cases
    assert (case.case_id, case.label) == ("a", root / "masks" / "a.nii.gz")
    assert case.images == (root / "scans" / "a_t1.nii.gz", root / "scans" / "a_flair.nii.gz")


def test_a_link_in_images_tr_may_point_elsewhere(tmp_path: Path) -> None:
    """The folder is the user's own, and linking the raw scans into it is the usual way."""
    root = dataset(tmp_path, ("a",), 1)
    touch(tmp_path / "archive" / "flair.nii.gz")
    (root / "imagesTr" / "a_0001.nii.gz").symlink_to(tmp_path / "archive" / "flair.nii.gz")
    assert len(read_dataset(root).cases[0].images) == 2


def test_hidden_files_and_folders_are_passed_over(tmp_path: Path) -> None:
    root = dataset(tmp_path)
    touch(root / "imagesTr" / "._sub-2_0000.nii.gz", root / "imagesTr" / "notes.txt")
    (root / "imagesTr" / "folder_0000.nii.gz").mkdir()
    assert len(read_dataset(root).cases) == 2


def test_what_is_not_used_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = dataset(tmp_path, numTraining=5)
    touch(root / "imagesTr" / "sub-3.nii.gz", root / "labelsTr" / "sub-4.nii.gz")
    with caplog.at_level(logging.WARNING, "strokenet"):
        read_dataset(root)
    said = "\n".join(caplog.messages)
    assert "1 scans have no channel number (_0000) and are not used, first 'sub-3.nii.gz'" in said
    assert "1 labels without images are not used, first 'sub-4'" in said
    assert "numTraining is 5, 2 cases were found" in said


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"labels": {"background": 0, "whole": [1, 2], "core": 2}}, "'whole' is a region [1, 2]; regions are not"),
        ({"labels": {"background": 0, "lesion": 1, "ignore": 2}}, "an ignore label is not supported"),
        ({"file_ending": ".png"}, "2d images and other formats are not supported"),
        ({"file_ending": ".mha"}, "file_ending is '.mha'; allowed: .nii.gz, .nii"),
        ({"file_ending": None}, "file_ending is None"),
        ({"file_ending": [".nii"]}, "file_ending is ['.nii']"),
        ({"channel_names": None}, "channel_names is missing"),
        ({"channel_names": {}}, "channel_names is missing or empty"),
        ({"channel_names": ["T1", "FLAIR"]}, "channel_names is missing"),
        ({"channel_names": {"1": "FLAIR", "0": "T1"}}, "number them from 0 in order"),
        ({"channel_names": {"0": "T1", "2": "FLAIR"}}, "number them from 0 in order"),
        ({"channel_names": {"0": "T1", "1": "T1"}}, "holds a name twice"),
        ({"channel_names": {"0": "T1", "1": None}}, "give each channel a name"),
        ({"channel_names": {"0": "T1", "1": " "}}, "give each channel a name"),
        ({"channel_names": {"0": "T1", "1": "FL\x1b[31mAIR"}}, "give each channel a name"),
        ({"channel_names": {str(n): f"c{n}" for n in range(65)}}, "channel_names"),
        ({"labels": None}, "labels: a JSON object is needed, got NoneType"),
        ({"labels": {"lesion": 1}}, '"background": 0'),
        ({"labels": {"background": 0}}, "two or more"),
        ({"labels": {"background": 1, "lesion": 0}}, '"background": 0'),
        ({"labels": {"background": 0, "lesion": 255}}, "label values [0, 255]; number them from 0"),
        ({"labels": {"background": 0, "a": 1, "b": 1}}, "label values [0, 1, 1]"),
        ({"labels": {"background": 0, "lesion": 1.0}}, "label 'lesion' is 1.0; write a whole number"),
        ({"labels": {"background": 0, "lesion": True}}, "label 'lesion' is True"),
        ({"labels": {"background": 0, "lesion": "1" * 5000}}, "label 'lesion' is '1111"),
        ({"labels": {"background": 0, "lesion": -1}}, "label values [-1, 0]"),
        ({"labels": {"background": 0, "lesion": None}}, "label 'lesion' is None"),
        ({"labels": {"0": "background", "1": "lesion"}}, "label '0' is 'background'; write a whole number"),
        ({"labels": {"background": 0} | {f"l{n}": n for n in range(1, 257)}}, "257 labels; allowed: 256"),
        ({"dataset": []}, "dataset: a JSON object is needed"),
        ({"dataset": {}}, "dataset names no case"),
    ],
)
def test_a_description_that_cannot_be_used_is_refused_by_name(tmp_path: Path, changes: Any, says: str) -> None:
    root = dataset(tmp_path, **changes)
    assert refused(root, says).startswith(f"{root / 'dataset.json'}")


@pytest.mark.parametrize("content", ["[]", '"text"', "null", "3"])
def test_a_description_that_is_no_object_is_refused(tmp_path: Path, content: str) -> None:
    root = dataset(tmp_path)
    (root / "dataset.json").write_text(content)
    refused(root, "a JSON object is needed")


def test_missing_parts_are_named(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "is no folder")
    root = dataset(tmp_path)
    (root / "labelsTr" / "sub-2.nii.gz").unlink()
    refused(root, "sub-2.nii.gz: not found; add the label or leave sub-2 out")
    (root / "imagesTr" / "sub-10_0001.nii.gz").unlink()
    refused(root, "imagesTr: case sub-10 lacks FLAIR (sub-10_0001.nii.gz); add it or leave the case out")
    touch(*(root / "imagesTr" / f"sub-10_000{n}.nii.gz" for n in (1, 2)))
    refused(root, "case sub-10 has sub-10_0002.nii.gz beyond its 2 channels (T1, FLAIR); remove it")
    (root / "dataset.json").unlink()
    refused(root, "dataset.json: not found; a raw dataset contains dataset.json, imagesTr (CASE_0000.nii.gz ...)")


@pytest.mark.parametrize("folder", ["imagesTr", "labelsTr"])
def test_a_missing_folder_is_named(tmp_path: Path, folder: str) -> None:
    root = dataset(tmp_path)
    (root / folder).rename(root / "elsewhere")
    refused(root, f"{folder}: not found; an nnU-Net raw dataset has imagesTr and labelsTr")


def test_zero_matches_list_the_nearest_names(tmp_path: Path) -> None:
    root = dataset(tmp_path, ())
    files = ["case1_T1.nii.gz", "case1_FLAIR.nii.gz", "CASE_000.nii.gz", "case_0000.nii", "readme.txt"]
    touch(*(root / "imagesTr" / name for name in files))
    (root / "labelsTr").mkdir()
    message = refused(root, "no file like CASE_0000.nii.gz (four digits for the channel)")
    assert "there are 5 other files such as CASE_000.nii.gz" in message
    assert "readme.txt" not in message
    empty = dataset(tmp_path / "second", ())
    (empty / "imagesTr").mkdir()
    (empty / "labelsTr").mkdir()
    refused(empty, "the folder is empty")


# --- names from a stranger


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "../outside.nii.gz",
        "scans/../../outside.nii.gz",
        "scans/..",
        "..\\outside.nii.gz",
        "C:/windows/scan.nii.gz",
        "C:scan.nii.gz",
        "\\\\server\\share\\scan.nii.gz",
        "",
        ".",
        "scans/a\nb.nii.gz",
        "scans/a\0b.nii.gz",
        "scans/\x1b[31m.nii.gz",
        "scans/gpj\u202e.nii.gz",
        7,
        None,
        ["scans/a_t1.nii.gz"],
        {"a": 1},
    ],
)
def test_a_path_that_leaves_the_folder_or_hides_something_is_refused(tmp_path: Path, path: Any) -> None:
    touch(tmp_path / "outside.nii.gz")
    root = listed(tmp_path, images=[path, "scans/a_flair.nii.gz"])
    refused(root, "a path below the dataset's folder is needed, without '..'")


def test_a_listed_link_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    root = listed(tmp_path)
    touch(tmp_path / "secret" / "scan.nii.gz")
    scan, folder = root / "scans" / "a_t1.nii.gz", root / "scans"
    scan.unlink()
    scan.symlink_to(tmp_path / "secret" / "scan.nii.gz")
    refused(root, "a_t1.nii.gz: is a link out of the dataset, case a names it")
    scan.unlink()
    touch(root / "elsewhere" / "scan.nii.gz")
    scan.symlink_to(root / "elsewhere" / "scan.nii.gz")
    assert len(read_dataset(root).cases) == 1  # a link within the folder
    scan.unlink()
    (folder / "a_flair.nii.gz").unlink()
    folder.rmdir()
    folder.symlink_to(tmp_path / "secret")
    touch(tmp_path / "secret" / "a_t1.nii.gz", tmp_path / "secret" / "a_flair.nii.gz")
    refused(root, "is a link out of the dataset")


def test_a_listed_file_that_is_missing_is_named(tmp_path: Path) -> None:
    root = listed(tmp_path, label="masks/b.nii.gz")
    refused(root, "b.nii.gz: not found, case a names it")


@pytest.mark.parametrize(
    "changes",
    [
        {"images": ["scans/a_t1.nii.gz"]},
        {"images": "scans/a_t1.nii.gz"},
        {"images": None},
        {"label": None},
        {"label": ["masks/a.nii.gz"]},
    ],
)
def test_a_listed_case_needs_an_image_for_each_channel_and_a_label(tmp_path: Path, changes: Any) -> None:
    refused(listed(tmp_path, **changes), "case a needs 2 images (one a channel) and a label")


@pytest.mark.parametrize("name", ["../a", "/a", "a/b", "a\nb", ".a", "con", "", "a\x00", "x" * 300])
def test_a_listed_case_with_an_unsafe_name_is_refused(tmp_path: Path, name: str) -> None:
    root = dataset(tmp_path, (), dataset={name: LISTED})
    refused(root, "dataset.json: case ")


@pytest.mark.parametrize("name", ["two\nlines", "escape\x1b[31m", "con", "back\\slash", "gpj\u202e"])
def test_a_found_case_with_an_unsafe_name_is_refused(tmp_path: Path, name: str) -> None:
    refused(dataset(tmp_path, (name,)), "imagesTr: case ")


# --- folders of scans to infer


def test_scans_to_infer_are_found_in_either_ending(tmp_path: Path) -> None:
    touch(*(tmp_path / name for name in ("b_0000.nii", "b_0001.nii.gz", "a_0000.nii.gz", "a_0001.nii.gz")))
    cases = input_cases(tmp_path, ("T1", "FLAIR"))
    assert [case.case_id for case in cases] == ["a", "b"]
    assert cases[1].images == (tmp_path / "b_0000.nii", tmp_path / "b_0001.nii.gz")
    assert cases[0].label is None


def test_a_channel_that_is_missing_or_too_many_is_that_cases_problem(tmp_path: Path) -> None:
    touch(*(tmp_path / name for name in ("a_0001.nii", "b_0000.nii.gz", "b_0001.nii.gz")))
    touch(*(tmp_path / f"c_000{n}.nii.gz" for n in (0, 1, 3)))
    lacking, whole, spare = input_cases(tmp_path, ("T1", "FLAIR"))
    assert lacking.problem == f"{tmp_path}: case a lacks T1 (a_0000.nii); add it or leave the case out"
    assert whole.problem is None
    assert spare.problem == f"{tmp_path}: case c has c_0003.nii.gz beyond its 2 channels (T1, FLAIR); remove it"
    touch(tmp_path / "alone" / "d_0002.nii.gz")
    with pytest.raises(InputError, match=r"case d lacks T1 \(d_0000.nii.gz\), FLAIR \(d_0001.nii.gz\)"):
        input_cases(tmp_path / "alone", ("T1", "FLAIR"))


def test_the_dataset_beside_a_folder_says_what_its_numbers_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """prepare numbers a cohort of FLAIR alone from 0: to a model of both it is not a T1."""
    folder = tmp_path / "imagesTs"
    touch(folder / "a_0000.nii.gz")
    description = tmp_path / "dataset.json"
    description.write_text('{"channel_names": {"0": "flair"}}')
    (case,) = input_cases(folder, ("T1", "FLAIR"), subsets=True)
    assert (case.channels, case.images) == (("FLAIR",), (folder / "a_0000.nii.gz",))
    with pytest.raises(InputError, match="case a lacks T1; add it"):
        input_cases(folder, ("T1", "FLAIR"))
    assert input_cases(folder, ("FLAIR",))[0].images == (folder / "a_0000.nii.gz",)
    touch(folder / "a_0001.nii.gz")
    description.write_text('{"channel_names": {"0": "FLAIR", "1": "T1"}}')
    (case,) = input_cases(folder, ("T1", "FLAIR"))
    assert case.images == (folder / "a_0001.nii.gz", folder / "a_0000.nii.gz")
    touch(folder / "a_0002.nii.gz")
    with pytest.raises(InputError, match=r"has a_0002\.nii\.gz beyond its 2 channels"):
        input_cases(folder, ("T1", "FLAIR"))
    (folder / "a_0002.nii.gz").unlink()
    assert not caplog.text
    assert input_cases(folder, ("T1",))[0].images == (folder / "a_0001.nii.gz",)  # the model does not read the FLAIR
    (folder / "a_0001.nii.gz").rename(tmp_path / "elsewhere.nii.gz")
    with pytest.raises(InputError, match="no case has any of the channels T1; there are FLAIR, T1"):
        input_cases(folder, ("T1",))
    (tmp_path / "elsewhere.nii.gz").rename(folder / "a_0001.nii.gz")
    description.write_text('{"channel_names": {"0": "MRI", "1": "other"}}')
    (case,) = input_cases(folder, ("T1", "FLAIR"))
    assert case.images == (folder / "a_0000.nii.gz", folder / "a_0001.nii.gz")
    assert "names the channels MRI, other, the model T1, FLAIR; files are taken by their numbers" in caplog.text


def test_a_raw_dataset_is_answered_with_the_folder_of_its_scans(tmp_path: Path) -> None:
    root = dataset(tmp_path)
    with pytest.raises(InputError, match="holds no scans itself; give .*imagesTr$"):
        input_cases(root, ("T1", "FLAIR"))
    touch(root / "imagesTs" / "a_0000.nii.gz")
    with pytest.raises(InputError, match="holds no scans itself; give .*imagesTs$"):
        input_cases(root, ("T1", "FLAIR"))


def test_two_files_of_one_channel_are_refused(tmp_path: Path) -> None:
    touch(tmp_path / "a_0000.nii", tmp_path / "a_0000.nii.gz")
    with pytest.raises(InputError, match=r"a_0000.nii.gz: a_0000.nii is the same channel; keep one"):
        input_cases(tmp_path, ("T1",))


def test_a_folder_without_scans_is_refused_with_the_nearest_names(tmp_path: Path) -> None:
    touch(tmp_path / "sub-1_T1w.nii.gz")
    with pytest.raises(InputError, match=r"no file like CASE_0000.nii.gz .* such as sub-1_T1w.nii.gz"):
        input_cases(tmp_path, ("T1",))
    with pytest.raises(InputError, match="is no folder"):
        input_cases(tmp_path / "sub-1_T1w.nii.gz", ("T1",))


# --- the workspace's copy


@pytest.mark.parametrize("make", [dataset, listed])
def test_a_workspace_and_its_dataset_may_move_together(tmp_path: Path, make: Any) -> None:
    (tmp_path / "here" / "work").mkdir(parents=True)
    root = make(tmp_path / "here")
    written = json.loads(json.dumps(to_json(read_dataset(root), tmp_path / "here" / "work")))
    assert not Path(written["root"]).is_absolute()
    assert from_json(written, tmp_path / "here" / "work") == read_dataset(root)
    (tmp_path / "here").rename(tmp_path / "there")
    moved = from_json(written, tmp_path / "there" / "work")
    assert all(path.is_file() for case in moved.cases for path in case.images)


@pytest.mark.parametrize(
    "change",
    [
        {"root": None},
        {"root": "a\0b", "cases": None},
        {"name": None},
        {"name": 3},
        {"name": "../x"},
        {"channels": None},
        {"labels": None},
        {"file_ending": ".png"},
        {"cases": None},
        {"cases": "text"},
        {"cases": [3]},
        {"cases": [{"case": "a"}]},
        {"cases": [{"case": "../a", "images": ["a", "b"], "label": None}]},
        {"cases": [{"case": "a", "images": ["a"], "label": None}]},
        {"cases": [{"case": "a", "images": "ab", "label": None}]},
        {"cases": [{"case": "a", "images": ["a", "../b"], "label": None}]},
        {"cases": [{"case": "a", "images": ["a", "/b"], "label": None}]},
        {"cases": [{"case": "a", "images": ["a", "b"], "label": "../c"}]},
        {"cases": [{"case": 7, "images": ["a", "b"], "label": None}]},
    ],
)
def test_a_damaged_copy_is_refused_in_one_line(tmp_path: Path, change: Any) -> None:
    written = to_json(read_dataset(dataset(tmp_path)), tmp_path)
    with pytest.raises(InputError) as caught:
        from_json(written | change, tmp_path)
    assert len(str(caught.value).splitlines()) == 1
    for key in written:
        with pytest.raises(InputError):
            from_json({k: v for k, v in written.items() if k != key}, tmp_path)
    with pytest.raises(InputError, match="a JSON object is needed"):
        from_json([written], tmp_path)
