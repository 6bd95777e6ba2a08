"""--semantics, and the fields by which a model of nnU-Net v1 keeps its answer, through the whole of predict."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from planner.plan import Plan, PostprocessRule
from strokenet.data.case import case_from_images
from strokenet.data.errors import InputError
from strokenet.infer.predict import InferConfig, predict, window_rules
from strokenet.infer.sliding_window import WindowRules, predict_logits
from strokenet.model.checkpoint import Model, load_model
from strokenet.preprocess.preprocess import preprocess
from tests.infer.models import head, oblique, write_model
from tests.plans import tiny_plan

ARGMAX = PostprocessRule()
V1: dict[str, Any] = {
    "normalise": "after-resampling",
    "average": "probabilities",
    "tile_weights": "peak-1-float32",
    "orientation": "as-stored",
    "postprocess": ARGMAX,
}


def model(root: Path, plan: Plan, folds: tuple[str, ...] = ("0",)) -> Model:
    write_model(root, plan, folds)
    return load_model(root)


def case() -> Any:
    return case_from_images("case", {n: (head((30, 22, 26), s), oblique((0.8, 1, 1.2))) for s, n in enumerate(NAMES)})


NAMES = ("T1", "FLAIR")


def test_the_config_wins_over_the_plan() -> None:
    assert window_rules(tiny_plan(), InferConfig()) == WindowRules()
    assert window_rules(tiny_plan(), InferConfig(semantics="exact")).exact
    assert window_rules(tiny_plan(semantics="exact"), InferConfig()).exact
    assert not window_rules(tiny_plan(semantics="exact"), InferConfig(semantics="improved")).exact
    with pytest.raises(InputError, match="--semantics 'same'; allowed: improved, exact"):
        InferConfig(semantics="same")  # type: ignore[arg-type]


def test_exact_and_improved_differ_by_rounding_alone(tmp_path: Path) -> None:
    built = model(tmp_path, tiny_plan(postprocess=ARGMAX))
    exact, improved = (predict(built, case(), InferConfig(semantics=s)) for s in ("exact", "improved"))
    apart = np.abs(exact.probability - improved.probability)
    assert 1e-6 < apart.max() < 0.2  # corners of the image, where the peer's logits are whole numbers
    assert np.median(apart) < 1e-3


def test_exact_labels_are_read_from_the_rounded_logits(tmp_path: Path) -> None:
    """As the peer does; asked for probabilities it reads the labels from those instead, and so do we."""
    built = model(tmp_path, tiny_plan(spacing=(1.2, 1.0, 0.8), orientation="as-stored", postprocess=ARGMAX))
    prepared = preprocess(case(), built.plan)
    assert (
        prepared.image.shape[1:] == prepared.origin.box.shape
    )  # nothing is resampled: the logits are seen as they are
    logits = predict_logits(
        built.networks, torch.from_numpy(prepared.image), patch=(16, 16, 16), rules=WindowRules(exact=True)
    )
    labels = predict(built, case(), InferConfig(semantics="exact", tta="none")).mask[prepared.origin.box.slices]
    np.testing.assert_array_equal(labels, logits.float().numpy().argmax(0))
    asked = predict(built, case(), InferConfig(semantics="exact", tta="none", probabilities=True))
    np.testing.assert_array_equal(asked.mask, asked.probability.argmax(0))


def test_a_threshold_works_on_exact_probabilities(tmp_path: Path) -> None:
    built = model(tmp_path, tiny_plan())
    found = predict(built, case(), InferConfig(semantics="exact", threshold=0.4, min_volume_mm3=0))
    np.testing.assert_array_equal(found.mask, found.probability[1] > 0.4)


@pytest.mark.parametrize("semantics", ["exact", "improved"])
def test_a_model_of_v1_answers_with_averaged_probabilities(tmp_path: Path, semantics: Any) -> None:
    plan = tiny_plan(**V1, spacing=(1.2, 1.0, 0.8))
    built = model(tmp_path, plan, folds=("0", "1"))
    prepared = preprocess(case(), plan)
    image = torch.from_numpy(prepared.image)
    rules = WindowRules(average="probabilities", tile_weights="peak-1-float32")
    each = [
        predict_logits([network], image, patch=plan.patch, mirror_axes=(2,), rules=rules) for network in built.networks
    ]
    found = predict(built, case(), InferConfig(semantics=semantics))
    inside = found.probability[:, *prepared.origin.box.slices]
    np.testing.assert_allclose(inside, torch.stack(each).mean(0).numpy(), atol=1e-5)
    np.testing.assert_array_equal(found.mask, found.probability.argmax(0))


def test_v1_and_v2_rules_give_other_answers_to_the_same_weights(tmp_path: Path) -> None:
    """So that a field of the plan that nobody reads would be noticed."""
    plan = tiny_plan(**V1)
    answers = {}
    for name, value in (("none", None), ("normalise", "before-resampling"), ("average", "logits")):
        changed = plan if value is None else replace(plan, **{name: value})
        answers[name] = predict(model(tmp_path / name, changed), case(), InferConfig()).probability
    assert np.abs(answers["none"] - answers["normalise"]).max() > 1e-3
    assert np.abs(answers["none"] - answers["average"]).max() > 1e-5
