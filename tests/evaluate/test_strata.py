"""Lesions by size: cases by hand, and sums that equal the rows they come from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from strokenet.evaluate.anima import DetectionRule
from strokenet.evaluate.evaluate import evaluate_paths, score_case
from strokenet.evaluate.strata import COUNTS, EDGES_ML, NO_LESIONS, sum_strata
from tests.evaluate.masks import blob, folder

NOTHING = np.zeros((9, 8, 7), np.uint8)
TWO, ONE = blob((1, 1, 1), (5, 5, 4)), blob((1, 1, 1))


def test_lesions_lie_in_the_stratum_of_their_own_volume() -> None:
    a, b = np.zeros((1, 3, 400), bool), np.zeros((1, 3, 400), bool)
    b[0, 0, 0:9] = True  # 0.09 ml, found by both rules
    a[0, 0, 2:7] = True  # 0.05 ml
    b[0, 0, 20:30] = True  # 0.1 ml: exactly the edge, and missed
    b[0, 0, 60:170] = True  # 1.1 ml: found by ISLES'22 through one voxel in 110
    a[0, 0, 169:180] = True  # 0.11 ml, 10 of 11 voxels outside; of it less than a tenth lies in the lesion
    a[0, 2, 200:320] = True  # 1.2 ml, false
    row = score_case("a", "1", a, b, (1.0, 1.0, 10.0))
    tiny, small, medium, large = row.strata
    assert [(s.low_ml, s.high_ml) for s in row.strata] == [(0.0, 0.1), (0.1, 1.0), (1.0, 10.0), (10.0, None)]
    assert (tiny.reference_lesions, tiny.lesions_found, tiny.anima_found) == (1, 1, 1)
    assert (tiny.prediction_lesions, tiny.lesions_false, tiny.anima_false) == (1, 0, 0)
    assert (small.reference_lesions, small.lesions_found, small.lesions_missed, small.anima_missed) == (1, 0, 1, 1)
    assert (small.prediction_lesions, small.lesions_false, small.anima_false) == (1, 0, 1)
    assert (medium.reference_lesions, medium.lesions_found, medium.anima_found, medium.anima_missed) == (1, 1, 0, 1)
    assert (medium.prediction_lesions, medium.lesions_false, medium.anima_false) == (1, 1, 1)
    assert large == NO_LESIONS[3]


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("rounding", [1 - 1e-9, 1, 1 + 1e-9])
def test_a_lesion_of_exactly_an_edge_belongs_above_it(place: int, rounding: float) -> None:
    mask = np.ones((1, 1, 10), bool)
    row = score_case("a", "1", mask, mask, (EDGES_ML[place] * 100 * rounding, 1.0, 1.0))
    assert [s.reference_lesions for s in row.strata].index(1) == place + 1
    below = score_case("a", "1", mask, mask, (EDGES_ML[place] * 100 * 0.999, 1.0, 1.0))
    assert [s.prediction_lesions for s in below.strata].index(1) == place


def test_strata_sum_to_the_counts_of_the_rows() -> None:
    rng = np.random.default_rng(0)
    rows = []
    for case in range(30):
        shape = tuple(rng.integers(4, 14, 3))
        a, b = (rng.random(shape) < rng.choice([0, 0.03, 0.1]) for _ in range(2))
        spacing, rule = (float(rng.choice([1, 4, 20])), 2.0, 3.0), DetectionRule(min_volume_mm3=rng.choice([0.0, 30.0]))
        rows.append(score_case(str(case), "1", a, b, spacing, rule=rule))
    for row in rows:
        assert {name: sum(getattr(s, name) for s in row.strata) for name in COUNTS} == {
            name: getattr(row, name) for name in COUNTS
        }
    total = sum_strata(row.strata for row in rows)
    for name in COUNTS:
        assert sum(getattr(s, name) for s in total) == sum(getattr(row, name) for row in rows) > 0
        for place, stratum in enumerate(total):
            assert getattr(stratum, name) == sum(getattr(row.strata[place], name) for row in rows)
    assert sum_strata([]) == NO_LESIONS


def test_scores_json_says_which_sizes_were_missed(tmp_path: Path) -> None:
    reference = folder(tmp_path / "ref", {"a": TWO, "b": ONE, "c": NOTHING})  # lesions of 8 voxels, 0.048 ml
    prediction = folder(tmp_path / "pred", {"a": ONE, "c": TWO})
    evaluation = evaluate_paths(prediction, reference, against=reference, out=tmp_path / "scores.json")
    scores = json.loads((tmp_path / "scores.json").read_text())
    tiny, *others = scores["strata"]["1"]
    found = {"lesions_found": 1, "lesions_missed": 2, "anima_found": 1, "anima_missed": 2}
    false = {"lesions_false": 2, "anima_false": 2}
    assert tiny == {"low_ml": 0.0, "high_ml": 0.1, "reference_lesions": 3, "prediction_lesions": 3, **found, **false}
    assert all(stratum[name] == 0 for stratum in others for name in COUNTS)
    assert others[-1]["high_ml"] is None
    assert scores["against"]["strata"]["1"][0]["anima_found"] == 3
    assert scores["detection_rule"] == {"alpha": 0.1, "beta": 0.7, "gamma": 0.65, "min_volume_mm3": 0.0}
    assert evaluation.summary.all_cases["anima_f1"].mean == pytest.approx((2 / 3 + 0 + 0) / 3)


def test_each_label_has_its_own_strata(tmp_path: Path) -> None:
    both = blob((1, 1, 1), value=1) + blob((5, 5, 4), value=2)
    reference = folder(tmp_path / "ref", {"a": both, "b": ONE})
    evaluation = evaluate_paths(folder(tmp_path / "pred", {"a": ONE, "b": ONE}), reference)
    found = {label: (s[0].lesions_found, s[0].lesions_missed) for label, s in evaluation.strata.items()}
    assert found == {"1": (2, 0), "2": (0, 1)}


def test_the_rule_given_is_the_rule_used(tmp_path: Path) -> None:
    reference = folder(tmp_path / "ref", {"a": TWO, "b": ONE})
    rule = DetectionRule(min_volume_mm3=48)  # a lesion is exactly that large, and so none is left
    evaluation = evaluate_paths(reference, reference, rule=rule)
    assert evaluation.rule == rule
    assert [(row.anima_found, row.lesions_found) for row in evaluation.cases] == [(0, 2), (0, 1)]
