"""The tables' arithmetic by hand, the verdicts at their borders, and the README's table of what was kept."""

from __future__ import annotations

import json

import pytest

from tests.conftest import ROOT
from tools.paper.scales import SCALES
from tools.paper.table import (
    PAPER_BOXES,
    README_SCALES,
    RESULTS,
    boxes,
    console_rows,
    difference,
    readme_table,
    shapes,
    table_2,
    verdict,
)

VALIDATION = ["c1", "c2", "c3", "c4", "c5"]
DICE = {
    "ATLAS": {"a1": 0.50, "a2": 0.75},
    "T1": {"c1": 0.2, "c2": 0.9, "c3": 0.5, "c4": 0.7, "c5": 0.4, "c6": 0.0},
    "FLAIR": {"c1": 0.1, "c2": 0.3, "c3": 0.0, "c4": 0.2, "c5": 0.0, "c6": 0.0},
    "T1+FLAIR": {"c1": 0.3, "c2": 1.0, "c3": 0.6, "c4": 0.8, "c5": 0.5},
    "adapted": {"c1": 0.0, "c2": 0.1, "c3": 0.0, "c4": 0.0, "c5": 0.4},
}


def test_table_ii_has_means_over_the_validation_cases_and_over_all() -> None:
    atlas, flair, t1, both = table_2(DICE, VALIDATION)
    assert atlas.ours == (pytest.approx(0.625), pytest.approx(0.625), None)
    assert flair.ours == (pytest.approx(0.12), pytest.approx(0.1), None)
    assert t1.ours == (pytest.approx(0.54), pytest.approx(0.45), None)
    assert both.ours == (None, None, pytest.approx(0.64))
    assert (atlas.paper, flair.paper) == ((0.633, 0.633, None), (0.210, 0.158, None))
    assert (t1.paper, both.paper) == ((0.692, 0.655, None), (None, None, 0.707))


def test_the_box_is_that_of_the_validation_cases() -> None:
    found = boxes(DICE, VALIDATION)
    assert list(found) == list(PAPER_BOXES)
    assert found["pretrained, T1"] == pytest.approx((0.2, 0.4, 0.5, 0.7, 0.9, 0.54))
    assert found["fine-tuned, T1+FLAIR"] == pytest.approx((0.3, 0.5, 0.6, 0.8, 1.0, 0.64))


def test_the_difference_is_paired_by_case() -> None:
    """All cases gain 0.1, whatever the order of the cases: every resample has that mean."""
    turned = dict(reversed(DICE["T1+FLAIR"].items()))
    gained = difference(turned, DICE["T1"], VALIDATION)
    assert gained["n"] == 5
    assert gained["mean"] == pytest.approx(0.1)
    assert gained["ci95"] == pytest.approx([0.1, 0.1])


def test_the_interval_of_two_cases_reaches_from_one_to_the_other() -> None:
    """A resample of two is one twice (1/4), the other twice (1/4) or both (1/2): the tails of 2.5 % are the ends."""
    gained = difference({"a": 0.3, "b": 0.9}, {"a": 0.5, "b": 0.5}, ["a", "b"])
    assert gained["mean"] == pytest.approx(0.1)
    assert gained["ci95"] == pytest.approx([-0.2, 0.4])
    assert difference({"a": 0.3}, {"a": 0.5}, ["a"])["ci95"] is None


def dice(flair: tuple[float, float], both: float) -> dict[str, dict[str, float]]:
    """T1 has 0.5 everywhere; FLAIR these on three validation cases and on three others, T1+FLAIR this."""
    return {
        "ATLAS": {"a": 0.5},
        "T1": dict.fromkeys("uvwrst", 0.5),
        "FLAIR": dict.fromkeys("uvw", flair[0]) | dict.fromkeys("rst", flair[1]),
        "T1+FLAIR": dict.fromkeys("uvw", both),
    }


@pytest.mark.parametrize(
    ("flair", "both", "shown"),
    [
        ((0.25, 0.25), 0.5, (True, True)),
        ((0.26, 0.10), 0.51, (False, True)),  # the validation cases do not show it
        ((0.25, 0.40), 0.49, (False, False)),  # the mean of all does not
    ],
)
def test_a_shape_that_does_not_show_is_said(flair: tuple[float, float], both: float, shown: tuple[bool, bool]) -> None:
    assert tuple(shape.shown for shape in shapes(dice(flair, both), list("uvw"))) == shown


def test_a_t1_network_that_found_nothing_shows_nothing() -> None:
    empty = dice((0.0, 0.0), 0.0) | {"T1": dict.fromkeys("uvwrst", 0.0)}
    assert shapes(empty, list("uvw"))[0].shown is False


def test_two_validation_cases_are_too_few_to_judge() -> None:
    few = shapes(dice((0.0, 0.0), 0.9), ["u", "v"])
    assert [(shape.shown, verdict(shape)) for shape in few] == [(None, "not judged")] * 2


def test_what_is_not_the_papers_is_named_ours() -> None:
    rows = console_rows(DICE | {"other": DICE["T1+FLAIR"]}, VALIDATION, 1e-3)
    assert [row[0] for row in rows[:4]] == ["ATLAS", "FLAIR", "T1", "T1+FLAIR"]
    assert rows[2][1:] == ("0.540 (0.692)", "0.450 (0.655)", "x")
    assert [row[0].endswith("(ours)") for row in rows[4:]] == [True, True]
    assert [row[3] for row in rows[4:]] == ["0.100", "0.640"]


def test_a_scale_without_a_result_is_not_yet_measured() -> None:
    assert readme_table({"scales": {}}).endswith("\n\n`cpu`, `gpu`, `full`: not yet measured.")
    assert set(README_SCALES) < set(SCALES)


def test_a_scale_that_was_kept_has_a_column_beside_the_papers() -> None:
    found = {
        "scale": {"atlas": 2, "clinic": 6, "spacing_mm": 3.0, "other_lr": 1e-3},
        "steps": {"train_t1": 800, "finetune": 1160},
        "dice": DICE | {"other": DICE["T1+FLAIR"]},
        "validation": VALIDATION,
        "seconds": {"atlas": 60.0, "prepare": 120.0},
        "machine": {"GPU": "none", "cores": "2", "processor": "abacus"},
    }
    lines = readme_table({"scales": {"cpu": found}}).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:-2]]
    assert cells[0][1:] == ["paper", "`cpu`"]
    assert [row[2] for row in cells[2:]] == [
        "2, 6",
        "3 mm; 800, 1,160",
        "0.625",
        "0.120 / 0.100",
        "0.540 / 0.450",
        "0.640",
        "+0.100 [+0.100, +0.100], n = 5",
        "0.200 0.400 0.500 0.700 0.900",
        "0.300 0.500 0.600 0.800 1.000",
        "shown",
        "shown",
        "0.100",
        "0.640 (0.001)",
        "3, 2 cores of abacus",
    ]
    assert [row[1] for row in cells[9:11]] == ["0.608 0.6315 0.698 0.732 0.81", "0.552 0.5945 0.657 0.801 0.952"]
    assert lines[-1] == "`gpu`, `full`: not yet measured."


def test_the_readmes_table_is_the_one_that_was_kept() -> None:
    kept = json.loads(RESULTS.read_text())
    assert readme_table(kept) in (ROOT / "README.md").read_text()
    for name, found in kept["scales"].items():
        assert found["scale"]["name"] == name
        assert set(found["validation"]) == set(found["dice"]["T1+FLAIR"])
