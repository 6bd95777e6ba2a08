"""The folds: the peer's where every subject has one case, and never a subject on both sides."""

from __future__ import annotations

import json
from typing import Any

import pytest

from strokenet.data.errors import InputError
from strokenet.data.splits import Split, make_splits, splits_from_json, splits_to_json, subject_of

# scikit-learn 1.9.1: [v.tolist() for _, v in KFold(min(5, n), shuffle=True, random_state=12345).split(range(n))]
KFOLD: dict[int, list[list[int]]] = {
    2: [[1], [0]],
    3: [[0], [1], [2]],
    5: [[0], [4], [3], [1], [2]],
    7: [[3, 6], [0, 4], [1], [5], [2]],
    10: [[0, 7], [3, 9], [4, 6], [1, 8], [2, 5]],
    23: [[3, 8, 10, 17, 19], [0, 7, 12, 15, 16], [6, 11, 14, 18, 20], [9, 13, 21, 22], [1, 2, 4, 5]],
}


def folds_of(ordered: list[str], held_out: list[list[int]]) -> tuple[Split, ...]:
    return tuple(
        Split(
            train=tuple(case for index, case in enumerate(ordered) if index not in fold),
            val=tuple(ordered[index] for index in fold),
        )
        for fold in held_out
    )


@pytest.mark.parametrize("n", KFOLD)
def test_one_case_a_subject_gives_the_folds_of_scikit_learn(n: int) -> None:
    ids = [f"case{index:02d}" for index in range(n)]
    assert make_splits(ids[::-1]) == folds_of(ids, KFOLD[n])


def test_the_order_is_that_of_the_case_ids_as_in_the_peer() -> None:
    """Sorted as texts, sub-1_ses-1 comes behind sub-10_ses-1, although sub-1 comes before sub-10."""
    ids = sorted(f"sub-{index}_ses-1" for index in range(1, 24))
    assert ids.index("sub-1_ses-1") > ids.index("sub-10_ses-1")
    assert make_splits(ids) == folds_of(ids, KFOLD[23])


def test_the_cases_of_a_subject_are_never_on_both_sides() -> None:
    ids = [f"sub-{s:02d}_ses-{t}" for s in range(10) for t in range(1 + s % 3)]
    splits = make_splits(ids)
    assert len(splits) == 5
    for split in splits:
        assert not {subject_of(case) for case in split.train} & {subject_of(case) for case in split.val}
        assert sorted((*split.train, *split.val)) == sorted(ids)
    assert sorted(case for split in splits for case in split.val) == sorted(ids)
    held_out = [sorted({int(subject_of(case)[4:]) for case in split.val}) for split in splits]
    assert held_out == KFOLD[10]


def test_fewer_than_five_subjects_make_that_many_folds_and_one_makes_none() -> None:
    ids = [f"sub-{s}_ses-{t}" for s in "abc" for t in (1, 2)]
    assert [split.val for split in make_splits(ids)] == [tuple(ids[i : i + 2]) for i in (0, 2, 4)]
    assert make_splits(["sub-a_ses-1", "sub-a_ses-2"]) == ()
    assert make_splits(["alone"]) == ()
    assert make_splits([]) == ()


@pytest.mark.parametrize(
    ("case", "subject"),
    [
        ("sub-01_ses-2", "sub-01"),
        ("sub-strokecase0001", "sub-strokecase0001"),
        ("sub-A1_run-2_T1w", "sub-A1"),
        ("patient07", "patient07"),
        ("my_sub-01", "my_sub-01"),
        ("sub-", "sub-"),
    ],
)
def test_a_subject_is_the_bids_prefix_or_the_case(case: str, subject: str) -> None:
    assert subject_of(case) == subject


def test_folds_come_back_from_json_as_written() -> None:
    splits = make_splits([f"case{index}" for index in range(7)])
    assert splits_from_json(json.loads(json.dumps(splits_to_json(splits)))) == splits
    assert splits_from_json([]) == ()


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (None, "a list of"),
        ({"train": ["a"], "val": ["b"]}, "a list of"),
        ("text", "a list of"),
        ([3], "fold 0 needs"),
        ([["a"]], "fold 0 needs"),
        ([{"train": ["a"]}], "fold 0 needs"),
        ([{"train": "abc", "val": ["d"]}], "fold 0 needs"),
        ([{"train": ["a", 7], "val": ["d"]}], "case ids as text"),
        ([{"train": ["a"], "val": None}], "fold 0 needs"),
        ([{"train": ["a"], "val": ["b"]}, {"train": ["a", "b"], "val": ["b"]}], "fold 1 trains and validates on b"),
        ([{"train": [], "val": ["b"]}], "fold 0 trains on no case"),
        ([{"train": ["a", "a"], "val": ["b"]}], "fold 0 names a case twice"),
        ([{"train": ["a"], "val": ["b", "b"]}], "fold 0 names a case twice"),
    ],
)
def test_edited_folds_that_make_no_sense_are_refused(value: Any, says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        splits_from_json(value)
    assert str(caught.value).startswith("splits.json: ")


def test_a_fold_without_validation_is_allowed() -> None:
    assert splits_from_json([{"train": ["a"], "val": []}]) == (Split(train=("a",), val=()),)
