"""Masks on disk: which are compared, what is missing, what fails by name, and what is written."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path

import numpy as np
import pytest

from strokenet.data.errors import InputError
from strokenet.evaluate.evaluate import evaluate_paths
from strokenet.evaluate.records import METRICS
from strokenet.evaluate.tables import write_csv
from tests.evaluate.masks import blob, folder, write

NOTHING = np.zeros((9, 8, 7), np.uint8)
TWO = blob((1, 1, 1), (5, 5, 4))
ONE = blob((1, 1, 1))


@pytest.fixture(autouse=True)
def heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line keeps the package's log to itself; here caplog must hear it."""
    monkeypatch.setattr(logging.getLogger("strokenet"), "propagate", True)


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    return folder(tmp_path / "ref", {"a": TWO, "b": ONE, "c": NOTHING})


def describe(root: Path, labels: object) -> None:
    (root / "dataset.json").write_text(json.dumps({"labels": labels}))


def test_voxels_spacing_and_lesions_come_from_the_files(tmp_path: Path, reference: Path) -> None:
    prediction = folder(tmp_path / "pred", {"a": ONE, "b": ONE, "c": NOTHING})
    row = evaluate_paths(prediction, reference).cases[0]
    assert (row.case, row.label) == ("a", "1")
    assert row.dice == pytest.approx(2 * 8 / (8 + 16))
    assert row.reference_volume_ml == pytest.approx(16 * 6 / 1000)
    assert (row.lesions_found, row.lesions_missed, row.lesions_false) == (1, 1, 0)
    # from the second lesion's border to the first's: the farthest of its 8 voxels, at (6, 6, 5) from (2, 2, 2)
    assert row.hd95_mm == pytest.approx(np.sqrt(4**2 + (4 * 2) ** 2 + (3 * 3) ** 2), rel=0.05)


def test_a_missing_prediction_is_scored_as_empty_and_named(
    tmp_path: Path, reference: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prediction = folder(tmp_path / "pred", {"a": TWO, "c": NOTHING})
    with caplog.at_level(logging.WARNING, logger="strokenet"):
        evaluation = evaluate_paths(prediction, reference)
    rows = {row.case: row for row in evaluation.cases}
    assert list(rows) == ["a", "b", "c"]
    assert (rows["b"].dice, rows["b"].lesions_missed, rows["b"].missing_prediction) == (0.0, 1, True)
    assert rows["b"].hd95_mm == pytest.approx(np.sqrt(9**2 + 16**2 + 21**2))
    assert evaluation.summary.all_cases["dice"].mean == pytest.approx(2 / 3)
    assert evaluation.empty["missing_prediction"] == ("b",)
    assert evaluation.empty["missed"] == ("b",)
    assert evaluation.empty["both_empty"] == ("c",)
    assert "no prediction for b" in caplog.text


def test_predictions_without_a_reference_are_named_and_left_out(
    tmp_path: Path, reference: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prediction = folder(tmp_path / "pred", {"a": TWO, "b": ONE, "c": NOTHING, "other": ONE})
    with caplog.at_level(logging.WARNING, logger="strokenet"):
        assert len(evaluate_paths(prediction, reference).cases) == 3
    assert "no reference for other" in caplog.text


@pytest.mark.parametrize("wrong", ["shape", "place", "truncated", "values"])
def test_a_case_that_cannot_be_scored_fails_alone_and_by_name(tmp_path: Path, reference: Path, wrong: str) -> None:
    prediction = folder(tmp_path / "pred", {"a": TWO, "b": ONE, "c": NOTHING})
    bad = prediction / "b.nii.gz"
    if wrong == "shape":
        write(bad, ONE[:-1])
    elif wrong == "place":
        write(bad, ONE, shift_mm=0.5)
    elif wrong == "truncated":
        bad.write_bytes(bad.read_bytes()[:-20])
    else:
        write(bad, ONE.astype(np.int16) * 300)
    evaluation = evaluate_paths(prediction, reference, out=tmp_path / "scores.json")
    assert {row.case for row in evaluation.cases} == {"a", "c"}
    (failure,) = evaluation.failures
    assert failure.case == "b"
    told = {"shape": "(8, 8, 7)", "place": "0.5 mm", "truncated": "b.nii.gz", "values": "300"}[wrong]
    assert told in failure.error
    assert str(tmp_path) not in (tmp_path / "scores.json").read_text()


def test_names_of_labels_come_from_the_dataset(tmp_path: Path) -> None:
    label = blob((1, 1, 1), value=1) + blob((5, 5, 4), value=2)
    reference = folder(tmp_path / "raw" / "labelsTr", {"a": label, "b": blob((1, 1, 1))})
    describe(tmp_path / "raw", {"background": 0, "core": 1, "rim": 2, "scar": "3"})
    prediction = folder(tmp_path / "pred", {"a": blob((1, 1, 1), value=1), "b": blob((1, 1, 1))})
    evaluation = evaluate_paths(prediction, reference)
    assert [(row.case, row.label) for row in evaluation.cases] == [
        (case, name) for case in "ab" for name in ("core", "rim", "scar")
    ]
    assert [row.dice for row in evaluation.cases] == [1, 0, 1, 1, 1, 1]
    assert evaluation.summary.all_cases["dice"].mean == pytest.approx((2 / 3 + 1) / 2)
    assert evaluation.by_label["rim"].ref_nonempty["dice"].mean == 0
    assert evaluation.by_label["scar"].ref_nonempty == {}
    assert evaluation.empty["missed"] == ("a (rim)",)


def test_without_a_description_every_value_that_occurs_is_a_label(tmp_path: Path) -> None:
    reference = folder(tmp_path / "ref", {"a": blob((1, 1, 1), value=2)})
    prediction = folder(tmp_path / "pred", {"a": blob((1, 1, 1), value=4)})
    assert [row.label for row in evaluate_paths(prediction, reference).cases] == ["2", "4"]


@pytest.mark.parametrize("described", [True, False])
def test_masks_of_255_are_lesions(tmp_path: Path, described: bool) -> None:
    reference = folder(tmp_path / "raw" / "labelsTr", {"a": ONE * 255, "b": NOTHING})
    if described:
        describe(tmp_path / "raw", {"background": 0, "lesion": 1})
    prediction = folder(tmp_path / "pred", {"a": ONE, "b": NOTHING})
    assert [row.dice for row in evaluate_paths(prediction, reference).cases] == [1, 1]


@pytest.mark.parametrize("labels", [None, [], {"lesion": 1}, {"background": 0, "whole": [1, 2]}, {"background": 0}])
def test_labels_that_cannot_be_scored_are_refused(tmp_path: Path, reference: Path, labels: object) -> None:
    describe(tmp_path, labels)
    with pytest.raises(InputError, match=r"dataset\.json"):
        evaluate_paths(folder(tmp_path / "pred", {"a": ONE}), reference)


def test_two_files_are_compared(tmp_path: Path) -> None:
    prediction, reference = write(tmp_path / "p.nii", ONE), write(tmp_path / "case7.nii.gz", TWO)
    (row,) = evaluate_paths(prediction, reference).cases
    assert (row.case, row.lesions_missed) == ("case7", 1)


def test_a_folder_of_nii_is_paired_with_one_of_nii_gz(tmp_path: Path, reference: Path) -> None:
    prediction = tmp_path / "pred"
    for case in "abc":
        write(prediction / f"{case}.nii", TWO)
    (prediction / "results.json").write_text("{}")
    assert evaluate_paths(prediction, reference).cases[0].dice == 1


def test_nothing_to_score_is_refused_with_the_reason(tmp_path: Path, reference: Path) -> None:
    empty, one = folder(tmp_path / "empty", {}), write(tmp_path / "a.nii.gz", ONE)
    with pytest.raises(InputError, match="holds no masks"):
        evaluate_paths(reference, empty)
    with pytest.raises(InputError, match="no mask for any of the 3 reference cases"):
        evaluate_paths(empty, reference)
    with pytest.raises(InputError, match="two of a kind"):
        evaluate_paths(one, reference)
    with pytest.raises(InputError, match="not found"):
        evaluate_paths(tmp_path / "nowhere", reference)
    write(reference / "a.nii", ONE)
    with pytest.raises(InputError, match=r"both a\.nii and a\.nii\.gz"):
        evaluate_paths(reference, reference)


def test_scores_are_not_written_over_an_input(tmp_path: Path, reference: Path) -> None:
    describe(tmp_path, {"background": 0, "lesion": 1})
    for out, reason in ((tmp_path / "dataset.json", "description"), (tmp_path / "scores.csv", r"\.json")):
        with pytest.raises(InputError, match=reason):
            evaluate_paths(reference, reference, out=out)


def test_scores_json_has_the_published_shape_and_no_nan(tmp_path: Path, reference: Path) -> None:
    prediction = folder(tmp_path / "pred", {"a": NOTHING, "c": ONE})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    evaluate_paths(prediction, reference, out=tmp_path / "scores.json")
    scores = json.loads((tmp_path / "scores.json").read_text(), parse_constant=refuse)
    assert [case["case"] for case in scores["cases"]] == ["a", "b", "c"]
    assert set(METRICS) <= set(scores["cases"][0])
    assert set(scores["summary"]) == set(METRICS)
    assert set(scores["summary"]["dice"]) == {"n", "mean", "median", "q1", "q3", "min", "max", "ci95"}
    assert scores["summary"]["dice"]["n"] == 3
    assert scores["summary_ref_nonempty"]["dice"]["n"] == 2
    assert scores["empty"]["missed"] == {"n": 2, "cases": ["a", "b"]}
    assert scores["empty"]["missing_prediction"] == {"n": 1, "cases": ["b"]}
    assert scores["empty"]["ref_empty"]["cases"] == ["c"]
    assert scores["empty"]["ref_empty"]["false_volume_ml"] == pytest.approx(8 * 6 / 1000)


def test_a_name_in_the_csv_is_no_formula(tmp_path: Path) -> None:
    names = ["=cmd|' -C calc'!A0", "+1", "-1", "@sum", "plain"]
    reference = write(tmp_path / "ref" / "x.nii.gz", ONE)
    (row,) = evaluate_paths(reference, reference).cases
    rows = [type(row)(**{**vars(row), "case": name, "label": name}) for name in names]
    write_csv(rows, tmp_path / "scores.csv")
    with (tmp_path / "scores.csv").open(newline="") as file:
        header, *lines = csv.reader(file)
    assert header[:3] == ["case", "label", "dice"]
    assert [line[0][0] for line in lines] == ["'", "'", "'", "'", "p"]
    assert [line[1] for line in lines] == [line[0] for line in lines]
    assert float(lines[0][2]) == 1.0


def test_against_gives_the_difference_of_the_first_minus_the_second(tmp_path: Path, reference: Path) -> None:
    good = folder(tmp_path / "good", {"a": TWO, "b": ONE, "c": NOTHING})
    poor = folder(tmp_path / "poor", {"a": ONE, "c": ONE})
    evaluation = evaluate_paths(good, reference, against=poor, out=tmp_path / "scores.json")
    comparison = evaluation.comparison
    assert comparison is not None
    gains = [1 - 2 * 8 / 24, 1 - 0, 1 - 0]
    assert comparison.difference["dice"].mean == pytest.approx(np.mean(gains))
    # of 27 draws one is a, a, a and eight hold no a: both are likelier than 2.5 %
    assert comparison.difference["dice"].ci95 == (pytest.approx(min(gains)), pytest.approx(max(gains)))
    assert comparison.difference["hd95_mm"].mean < 0
    assert comparison.empty["missing_prediction"] == ("b",)
    written = json.loads((tmp_path / "scores.json").read_text())["against"]
    assert written["difference"]["dice"]["n"] == 3
    assert written["summary"]["dice"]["mean"] == pytest.approx(2 / 9)


def test_a_failure_of_the_second_prediction_is_named_as_its_own(tmp_path: Path, reference: Path) -> None:
    poor = folder(tmp_path / "poor", {"a": ONE[:-1], "b": ONE, "c": ONE})
    evaluation = evaluate_paths(reference, reference, against=poor)
    assert len(evaluation.cases) == 3
    assert [(f.case, f.error.split(":")[0]) for f in evaluation.failures] == [("a", "against")]
    assert evaluation.comparison is not None
    assert evaluation.comparison.difference["dice"].n == 2


@pytest.mark.real
def test_a_real_mask_against_itself_and_a_shifted_one(real_data: Path, tmp_path: Path) -> None:
    import nibabel

    lesion = real_data / "open_ms" / "cross_sectional" / "patient07" / "lesion.nii.gz"
    (same,) = evaluate_paths(lesion, lesion).cases
    assert (same.dice, same.hd95_mm, same.lesion_f1) == (1, 0, 1)
    image = nibabel.load(lesion)
    moved = np.roll(np.asarray(image.dataobj) > 0, 1, axis=0)
    nibabel.save(nibabel.Nifti1Image(moved.astype(np.uint8), image.affine, image.header), tmp_path / "moved.nii.gz")
    (row,) = evaluate_paths(tmp_path / "moved.nii.gz", lesion).cases
    assert 0 < row.dice < 1
    assert row.hd95_mm == pytest.approx(1.0)
    assert row.volume_difference_ml == 0
