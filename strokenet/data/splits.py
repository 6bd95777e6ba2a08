"""Splits: which cases train together, and which validate; the cases of one subject are never on both sides."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from strokenet.data.errors import InputError

FOLDS = 5
SPLIT_SEED = 12345  # nnU-Net's: the folds are then its folds
_SUBJECT = re.compile(r"sub-[A-Za-z0-9]+")


@dataclass(frozen=True, kw_only=True)
class Split:
    """One fold: case ids to train on and to validate with."""

    train: tuple[str, ...]
    val: tuple[str, ...]


def subject_of(case_id: str) -> str:
    """The subject of a case: its BIDS prefix (sub-01 of sub-01_ses-2), else the case itself."""
    match = _SUBJECT.match(case_id)
    return match.group() if match else case_id


def make_splits(case_ids: Sequence[str]) -> tuple[Split, ...]:
    """Cross-validation: the cases of one subject are never on both sides.

    scikit-learn's KFold(5, shuffle=True, random_state=12345) over the subjects in the order of their sorted cases.
    Where every subject has one case these are nnU-Net's folds. Fewer than five subjects make that many folds, a single
    one makes none.
    """
    cases: dict[str, list[str]] = defaultdict(list)
    for case_id in sorted(case_ids):
        cases[subject_of(case_id)].append(case_id)
    subjects = list(cases)  # by their first case: "sub-1_a" comes after "sub-10_a", and so do the peer's folds
    if len(subjects) < 2:
        return ()
    order = np.arange(len(subjects))
    np.random.RandomState(SPLIT_SEED).shuffle(order)
    splits = []
    for fold in np.array_split(order, min(FOLDS, len(subjects))):  # the first folds are one larger, as in KFold
        held_out = {subjects[int(index)] for index in fold}
        splits.append(
            Split(
                train=tuple(c for s in subjects if s not in held_out for c in cases[s]),
                val=tuple(c for s in subjects if s in held_out for c in cases[s]),
            )
        )
    return tuple(splits)


def splits_to_json(splits: Sequence[Split]) -> list[dict[str, list[str]]]:
    """In the layout of nnU-Net's splits_final.json."""
    return [{"train": list(split.train), "val": list(split.val)} for split in splits]


def splits_from_json(value: Any) -> tuple[Split, ...]:
    """The folds of a splits.json; a user may have edited it.

    Raises:
        InputError: another layout, a fold with nothing to train on, or a case twice in a fold.
    """
    if not isinstance(value, list):
        raise InputError(
            f'splits.json: a list of {{"train": [ids], "val": [ids]}} is needed, got {type(value).__name__}'
        )
    splits = tuple(_split(fold, item) for fold, item in enumerate(value))
    for fold, split in enumerate(splits):
        if not split.train:
            raise InputError(f"splits.json: fold {fold} trains on no case; name one or more")
        both = sorted(set(split.train) & set(split.val))
        if both:
            raise InputError(f"splits.json: fold {fold} trains and validates on {both[0]}; put it on one side")
        if len({*split.train, *split.val}) < len(split.train) + len(split.val):
            raise InputError(f"splits.json: fold {fold} names a case twice; name it once")
    return splits


def _split(fold: int, item: Any) -> Split:
    for side in ("train", "val"):
        ids = item.get(side) if isinstance(item, dict) else None
        if not isinstance(ids, list) or not all(isinstance(case_id, str) for case_id in ids):
            raise InputError(f'splits.json: fold {fold} needs {{"train": [ids], "val": [ids]}} with case ids as text')
    return Split(train=tuple(item["train"]), val=tuple(item["val"]))
