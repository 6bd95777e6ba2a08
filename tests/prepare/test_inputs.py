"""The three forms of input, and one line for each that is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from strokenet.data.errors import InputError
from strokenet.prepare.inputs import CaseInputs, read_inputs


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_a_folder_of_patients(tmp_path: Path) -> None:
    touch(tmp_path / "b" / "t1.nii.gz", tmp_path / "a" / "FLAIR.nii", tmp_path / "a" / "label.nii.gz")
    touch(tmp_path / "notes" / "readme.txt", tmp_path / ".hidden" / "t1.nii.gz")
    first, second = read_inputs(tmp_path)
    assert first == CaseInputs(case_id="a", flair=tmp_path / "a" / "FLAIR.nii", label=tmp_path / "a" / "label.nii.gz")
    assert second == CaseInputs(case_id="b", t1=tmp_path / "b" / "t1.nii.gz")


def test_a_second_time_is_two_more_files(tmp_path: Path) -> None:
    names = ("t1", "flair", "t1_2", "FLAIR_2")
    touch(*(tmp_path / "a" / f"{name}.nii.gz" for name in names), tmp_path / "b" / "flair.nii.gz")
    first, second = read_inputs(tmp_path)
    assert list(first.scans) == ["t1", "flair", "t1_2", "flair_2"]
    assert first.flair_2 == tmp_path / "a" / "FLAIR_2.nii.gz"
    assert list(second.scans) == ["flair"]
    table = tmp_path / "cases.csv"
    table.write_text("case,flair,flair_2\np1,b/flair.nii.gz,a/FLAIR_2.nii.gz\n")
    (row,) = read_inputs(table)
    assert row.scans == {"flair": tmp_path / "b" / "flair.nii.gz", "flair_2": tmp_path / "a" / "FLAIR_2.nii.gz"}


def test_a_second_time_without_a_first_is_refused_and_not_passed_over(tmp_path: Path) -> None:
    touch(tmp_path / "a" / "flair_2.nii.gz", tmp_path / "b" / "flair.nii.gz")
    with pytest.raises(InputError, match="a: neither t1 nor flair is given"):
        read_inputs(tmp_path)


@pytest.mark.parametrize("separator", [",", ";"])
def test_a_table_with_columns_in_any_order(tmp_path: Path, separator: str) -> None:
    touch(tmp_path / "one.nii.gz", tmp_path / "two.nii.gz")
    table = tmp_path / "cases.csv"
    rows = ["flair,case,t1,label", "two.nii.gz,p1,one.nii.gz,", ",p2,one.nii.gz,"]
    table.write_text("\ufeff" + "\n".join(rows).replace(",", separator), encoding="utf-8")
    first, second = read_inputs(table)
    assert (first.case_id, first.t1, first.label) == ("p1", tmp_path / "one.nii.gz", None)
    assert list(first.scans) == ["t1", "flair"]
    assert list(second.scans) == ["t1"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("case,t1\np1,none.nii.gz\n", "line 2: .*none.nii.gz not found"),
        ("case,t2\np1,x.nii.gz\n", "allowed: case, t1, flair, label"),
        ("t1\nx.nii.gz\n", "with case"),
        ("case,t1\np1\n", "line 2: has more or fewer cells"),
        ("case,t1\np1,x.nii.gz,3\n", "line 2: has more or fewer cells"),
        ("case,t1\np1,\n", "line 2: p1: neither t1 nor flair"),
        ("case,t1\n../p1,x.nii.gz\n", "not allowed in a file name"),
        ("case,t1\np1,x.nii.gz\nP1,x.nii.gz\n", "2 cases are named p1"),
        ("case,t1\n", "holds no case"),
        ("", "holds no case"),
    ],
)
def test_a_wrong_table_is_one_line(tmp_path: Path, content: str, said: str) -> None:
    touch(tmp_path / "x.nii.gz")
    table = tmp_path / "cases.csv"
    table.write_text(content)
    with pytest.raises(InputError, match=said) as caught:
        read_inputs(table)
    assert "\n" not in str(caught.value)


def test_two_files_of_one_scan_are_refused(tmp_path: Path) -> None:
    touch(tmp_path / "a" / "t1.nii.gz", tmp_path / "a" / "t1.nii")
    with pytest.raises(InputError, match="both the t1"):
        read_inputs(tmp_path)


def test_anything_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither a folder"):
        read_inputs(tmp_path / "scan.nii.gz")
