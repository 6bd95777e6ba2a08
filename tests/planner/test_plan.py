"""The plan as data that a stranger may hand us: what is read back, what is refused, and with which words."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from planner.plan import IntensityStats, Plan, PlanError, from_json, to_json
from tests.plans import tiny_network, tiny_plan


def stored(**changes: Any) -> dict[str, Any]:
    """A plan.json as a stranger writes it, some fields replaced."""
    data: dict[str, Any] = json.loads(json.dumps(to_json(tiny_plan())))
    return data | changes


def nested(part: str, **changes: Any) -> dict[str, Any]:
    """A plan.json with fields of its network or postprocess replaced."""
    data = stored()
    return data | {part: data[part] | changes}


def test_json_gives_the_plan_back() -> None:
    plans = [
        tiny_plan(),
        tiny_plan(normalise="after-resampling", average="probabilities", tile_weights="peak-1-float32"),
        tiny_plan(intensity=(None, None)),
        tiny_plan(semantics="exact", mirror_axes=(), normalisation=("ct", "none"), use_mask_for_norm=(False, True)),
        tiny_plan(network=tiny_network(kind="residual"), orientation="as-stored", transpose=(2, 0, 1)),
    ]
    for plan in plans:
        assert from_json(json.loads(json.dumps(to_json(plan)))) == plan


def test_the_field_names_are_those_of_the_record_in_order() -> None:
    assert list(to_json(tiny_plan())) == list(Plan.__dataclass_fields__)


def test_fields_with_a_default_may_be_missing_and_others_not() -> None:
    short = stored()
    del short["semantics"], short["postprocess"]
    assert from_json(short).semantics == "improved"
    del short["patch"]
    with pytest.raises(PlanError, match=r"plan cannot be read: .*'patch'"):
        from_json(short)


REFUSED = [
    (stored(learning_rate=1), "plan has unknown fields ['learning_rate']"),
    (nested("network", dropout=0.5), "network has unknown fields ['dropout']"),
    (nested("postprocess", erode=1), "postprocess has unknown fields ['erode']"),
    ([], "plan must be a JSON object, got list"),
    (stored(network=3), "network must be a JSON object, got int"),
    (stored(intensity={}), "plan intensity must be a list, got dict"),
    (stored(labels=["background"]), "plan labels must be an object"),
    (stored(labels={"lesion": 1}), "plan labels need background: 0"),
    (stored(labels={"background": 0, "lesion": 2}), "label values [0, 2]; allowed: consecutive from 0"),
    (stored(labels={"background": 0}), "plan has 1 labels; allowed: 2 to 256"),
    (stored(labels={"background": 0, "lesion": True}), "plan labels is {'background': 0, 'lesion': True}"),
    (stored(orientation="LPS"), "plan orientation is 'LPS'; needed: Literal['RAS', 'as-stored']"),
    (stored(semantics="fast"), "plan semantics is 'fast'"),
    (stored(normalise="never"), "plan normalise is 'never'"),
    (stored(average="masks"), "plan average is 'masks'"),
    (stored(tile_weights=1), "plan tile_weights is 1"),
    (stored(intensity=[None, 3]), "intensity must be a JSON object"),
    (stored(intensity=[None, None], normalisation=["zscore", "ct"]), "ct needs the channel's intensity statistics"),
    (stored(normalisation=["zscore", "minmax"]), "plan normalisation is ('zscore', 'minmax')"),
    (stored(normalisation=["zscore"]), "plan normalisation has 1 entries for 2 channels"),
    (stored(use_mask_for_norm=[1, 0]), "plan use_mask_for_norm is (1, 0)"),
    (stored(channels=[]), "plan has 0 channels; allowed: 1 to 64"),
    (stored(channels="T1"), "plan channels is 'T1'"),
    (stored(transpose=[0, 1, 1]), "transpose (0, 1, 1); a permutation of 0, 1, 2 is needed"),
    (stored(transpose=[0, 1]), "plan transpose is (0, 1)"),
    (stored(spacing=[1, 1, 0]), "spacing (1, 1, 0) mm; allowed: 0.001 to 1000"),
    (stored(spacing=[1, 1, float("nan")]), "spacing (1, 1, nan) mm"),
    (stored(median_shape=[1, float("nan"), 1]), "median_shape (1, nan, 1); positive numbers are needed"),
    (stored(patch=[16, 16, 4096]), "patch (16, 16, 4096); allowed: 1 to 2048"),
    (stored(patch=[16, 16, 18]), "patch (16, 16, 18) is no multiple of the strides' (4, 4, 4)"),
    (stored(patch=[16, 16, 16.0]), "plan patch is (16, 16, 16.0); needed: tuple[int, int, int]"),
    (stored(batch_size=0), "batch_size 0; allowed: 1 to 4096"),
    (stored(batch_size="2"), "plan batch_size is '2'; needed: int"),
    (stored(batch_size=2.5), "plan batch_size is 2.5; needed: int"),
    (stored(batch_dice="no"), "plan batch_dice is 'no'; needed: bool"),
    (stored(mirror_axes=[0, 3]), "mirror_axes (0, 3); allowed: distinct axes"),
    (stored(mirror_axes=[0, 0]), "mirror_axes (0, 0)"),
    (nested("postprocess", threshold=1), "threshold is 1; allowed: 0 <= threshold < 1"),
    (nested("postprocess", min_volume_mm3=-1), "min_volume_mm3 is -1"),
    (nested("postprocess", connectivity=4), "postprocess connectivity is 4; needed: Literal[6, 18, 26]"),
    (nested("postprocess", connectivity=26.0), "postprocess connectivity is 26.0; needed: Literal[6, 18, 26]"),
    (nested("network", kind="transformer"), "network kind is 'transformer'"),
    (nested("network", features=[4]), "network has 1 stages; allowed: 2 to 12"),
    (nested("network", features=[4, 8, 5000]), "allowed: 1 to 4096 a level"),
    (nested("network", kernels=[[3, 3, 3]] * 2), "network kernels has 2 entries for 3 stages; 3 are needed"),
    (nested("network", kernels=[[3, 3, 3], [3, 3, 3], [3, 3, 2]]), "kernel (3, 3, 2); allowed: 1, 3, 5, 7"),
    (nested("network", strides=[[2, 2, 2]] * 3), "the first stride is (2, 2, 2); it must be (1, 1, 1)"),
    (nested("network", strides=[[1, 1, 1], [2, 2, 9], [2, 2, 2]]), "stride (2, 2, 9); allowed: 1 to 8"),
    (nested("network", encoder_blocks=[1, 1, 99]), "99 convolutions at one level; allowed: 1 to 32"),
]


@pytest.mark.parametrize(("data", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_a_wrong_plan_is_refused_with_one_line_that_names_the_field(data: Any, words: str) -> None:
    with pytest.raises(PlanError) as error:
        from_json(data)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_threshold_belongs_to_a_single_lesion_label() -> None:
    with pytest.raises(PlanError, match="exactly one lesion label"):
        tiny_plan(labels={"background": 0, "core": 1, "rim": 2})


@pytest.mark.parametrize(("name", "value"), [("std", -1.0), ("mean", float("inf")), ("median", float("nan"))])
def test_a_statistic_that_is_no_statistic_is_refused(name: str, value: float) -> None:
    numbers = dict.fromkeys(IntensityStats.__dataclass_fields__, 1.0) | {name: value}
    with pytest.raises(PlanError, match=f"intensity statistic {name} is {value}"):
        IntensityStats(**numbers)


def test_a_plan_cannot_be_altered() -> None:
    plan = tiny_plan()
    with pytest.raises(FrozenInstanceError):
        plan.batch_size = 4  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        plan.network.kind = "residual"  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        plan.postprocess.threshold = None  # type: ignore[misc]


def test_heads_are_all_labels_and_foreground_is_what_is_not_background() -> None:
    plan = tiny_plan(labels={"rim": 2, "background": 0, "core": 1}, postprocess=type(tiny_plan().postprocess)())
    assert plan.heads == 3
    assert plan.foreground == (1, 2)
    assert plan.network.divisor == (4, 4, 4)
