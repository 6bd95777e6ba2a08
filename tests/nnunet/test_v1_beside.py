"""What stands beside a model of nnU-Net v1: debug.json, dataset.json, postprocessing.json, the folders of folds."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from strokenet.data.errors import InputError
from strokenet.nnunet.v1 import read_v1
from tests.nnunet.hostile import LONGEST, refused
from tests.nnunet.v1_folders import write_folder


@pytest.mark.parametrize(
    ("trainer", "axes", "noted"),
    [
        ("nnUNetTrainer", (0, 1, 2), False),
        ("nnUNetTrainerV2", (0, 1, 2), False),
        ("nnUNetTrainerV2_Loss_TopK10_copy3", (0, 1, 2), False),
        ("nnUNetTrainerV2_noMirroring", (), False),
        ("nnUNetTrainerV2_noDataAugmentation_copy1", (), False),
        ("nnUNetTrainerV2_ours", (), True),
        ("StrokeTrainer", (), True),
    ],
)
def test_mirroring_is_what_the_trainer_is_known_to_do(
    tmp_path: Path, trainer: str, axes: tuple[int, ...], noted: bool
) -> None:
    model = read_v1(write_folder(tmp_path / "source", trainer=trainer))
    assert model.plan.mirror_axes == axes
    assert model.notes == ((f"{trainer} {UNKNOWN}; {UNRECORDED}",) if noted else ())


UNKNOWN = "is not known here: its network is taken to be nnU-Net's own"
UNRECORDED = "no debug.json says how it mirrored, so nothing is mirrored at inference"


@pytest.mark.parametrize(
    ("parameters", "axes"),
    [
        ("{'p_rot': 0.2, 'do_mirror': True, 'mirror_axes': (0, 1, 2), 'dummy_2D': False}", (0, 1, 2)),
        ("{'do_mirror': True, 'mirror_axes': (1,)}", (1,)),
        ("{'do_mirror': True, 'mirror_axes': [2, 0]}", (0, 2)),
        ("{'do_mirror': False, 'mirror_axes': (0, 1, 2)}", ()),
        ("{'do_mirror': True, 'mirror_axes': ()}", ()),
        ("{'do_mirror': True, 'mirror_axes': (2, 3, 4)}", (0, 1, 2)),  # the oldest counted from the batch: not used
        ("None", (0, 1, 2)),
    ],
)
def test_mirroring_is_what_the_training_recorded(tmp_path: Path, parameters: str, axes: tuple[int, ...]) -> None:
    source = write_folder(tmp_path / "source")
    (source / "fold_0" / "debug.json").write_text(json.dumps({"data_aug_params": parameters}))
    assert read_v1(source).plan.mirror_axes == axes


def test_folds_that_mirrored_otherwise_share_the_axes_of_both(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", folds=("fold_0", "fold_1"), trainer="Unknown")
    for fold, axes in (("fold_0", "(0, 1)"), ("fold_1", "(1, 2)")):
        text = f"{{'do_mirror': True, 'mirror_axes': {axes}}}"
        (source / fold / "debug.json").write_text(json.dumps({"data_aug_params": text}))
    model = read_v1(source)
    assert (model.plan.mirror_axes, model.notes) == ((1,), (f"Unknown {UNKNOWN}",))


@pytest.mark.parametrize(
    "labels", [{"0": "Background", "1": "lesion"}, {"1": "lesion", "0": "clear"}, {"background": 0, "lesion": 1}]
)
def test_a_dataset_json_beside_names_the_labels(tmp_path: Path, labels: dict[str, Any]) -> None:
    source = write_folder(tmp_path / "source")
    (source / "dataset.json").write_text(json.dumps({"labels": labels, "modality": {"0": "other"}}))
    plan = read_v1(source).plan
    assert (dict(plan.labels), plan.channels) == ({"background": 0, "lesion": 1}, ("flair", "t1"))


@pytest.mark.parametrize(
    ("content", "noted"),
    [
        ({"for_which_classes": [[1, 2], 1], "min_valid_object_sizes": None}, True),
        ({"for_which_classes": [1]}, True),
        ({"for_which_classes": []}, False),
        ({"for_which_classes": None}, False),
        ({"dc_per_class_raw": {"1": 0.5}}, False),
    ],
)
def test_postprocessing_of_some_classes_is_noted(tmp_path: Path, content: dict[str, Any], noted: bool) -> None:
    source = write_folder(tmp_path / "source")
    (source / "postprocessing.json").write_text(json.dumps(content))
    notes = read_v1(source).notes
    assert len(notes) == noted
    assert all(
        note.startswith("postprocessing.json keeps the largest component alone of some labels") for note in notes
    )


def nested(depth: int) -> list[Any]:
    found: list[Any] = []
    for _ in range(depth):
        found = [found]
    return found


FILES: dict[str, tuple[dict[str, Any], ...]] = {
    "dataset.json": ({"labels": {"0": "background", "1": "x"}}, {"labels": {"background": 0, "x": 1}}),
    "debug.json": ({"data_aug_params": "None"}, {"regions_class_order": "None"}),
    "postprocessing.json": ({"for_which_classes": [1]},),
}


@pytest.mark.parametrize("name", FILES)
def test_anything_in_a_file_beside_is_read_or_refused(tmp_path: Path, name: str) -> None:
    source = write_folder(tmp_path / "source")
    file = source / "fold_0" / name if name == "debug.json" else source / name
    for good in FILES[name]:
        for key, value in good.items():
            inside = [{key: {**value, inner: "@"}} for inner in value] if isinstance(value, dict) else []
            for template, text in itertools.product(("@", {key: "@"}, *inside), ANYTHING):
                file.write_text(json.dumps(template).replace('"@"', text))
                said = line_of(source)
                assert said.isprintable()
                assert len(said) < LONGEST


ANYTHING = (
    "null",
    "true",
    "-1",
    "1e308",
    "NaN",
    "1" * 400,
    "1" * 5000,
    '""',
    '"a\\nb"',
    '"\\ud800"',
    f'"{"x" * 10**6}"',
    "[]",
    "{}",
    json.dumps(nested(900)),
    json.dumps({"x" * 10**5: nested(3)}),
    "[" * 100_000,
    "not json",
)


def line_of(source: Path) -> str:
    """The notes of a model that is read, else what is said of it."""
    try:
        model = read_v1(source)
    except InputError as error:
        return str(error)
    return " ".join(model.notes)


@pytest.mark.parametrize("value", [["lesion"], {"a": 1}, None])
def test_a_label_is_named_by_a_text(tmp_path: Path, value: Any) -> None:
    source = write_folder(tmp_path / "source")
    (source / "dataset.json").write_text(json.dumps({"labels": {"0": "background", "1": value}}))
    refused(source, tmp_path, "dataset.json")


@pytest.mark.parametrize("name", ["fold_\u0663", "fold_-1", "fold_1000", "fold_0_old", "all2", "Fold_0"])
def test_a_folder_of_another_name_is_no_fold(tmp_path: Path, name: str) -> None:
    """A fold that is written must be one that is found again: \\d would take the digits of every script."""
    refused(write_folder(tmp_path / "source", folds=(name,)), tmp_path, "no fold_K/")
