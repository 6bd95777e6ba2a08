"""--semantics, and the fields by which a model of nnU-Net v1 keeps its answer, through the whole of predict."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor, nn

from planner.plan import Plan, PostprocessRule
from strokenet.data.case import case_from_images
from strokenet.data.errors import InputError
from strokenet.infer.config import InferConfig, window_rules
from strokenet.infer.predict import predict
from strokenet.infer.sliding_window import WindowRules, importance_map, predict_logits
from strokenet.model.checkpoint import Model, load_model
from strokenet.model.inference import InferenceNetwork, TrainedForm
from strokenet.preprocess.preprocess import preprocess
from tests.infer.models import head, known_plan, oblique, write_model
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
    logits = predict_logits(built.networks, prepared.image, patch=(16, 16, 16), rules=WindowRules(exact=True))
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
    image = prepared.image
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


# --- answers that are resampled to the scan


THREE = {"background": 0, "core": 1, "rim": 2}
GRIDS = [  # spacing of the plan, in mm; the scan has 1.2, 1 and 0.8
    pytest.param((1.0, 1.3, 0.9), id="linear"),
    pytest.param((5.0, 1.25, 1.0), id="separate-z"),
]


def on_scan(answer: np.ndarray, shape: tuple[int, int, int], spacing: tuple[float, ...]) -> np.ndarray:
    """The peer's way to the scan from its description, by scipy in float64: (K, *network) -> (K, *scan).

    Linear; where D is more than three times the finest, every slice of D in its plane and then the nearest slices.
    """
    if spacing[0] <= 3 * min(spacing):
        return np.stack([zoomed(channel.astype(np.float64), shape) for channel in answer])
    place = np.floor((np.arange(shape[0]) + 0.5) * (answer.shape[1] / shape[0])).astype(int)
    planes = [[zoomed(plane.astype(np.float64), shape[1:]) for plane in channel] for channel in answer]
    return np.array(planes)[:, place]


def zoomed(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Linear on the half-voxel grid, edges repeated: what scikit-image's resize asks scipy for."""
    factors = [new / old for new, old in zip(shape, values.shape, strict=True)]
    return np.asarray(ndimage.zoom(values, factors, order=1, mode="nearest", grid_mode=True))


def answered(built: Model, rules: WindowRules, semantics: str = "exact") -> tuple[np.ndarray, Any]:
    """What the window says on the plan's grid, by the form of the networks that predict takes, and where that is."""
    form = TrainedForm if semantics == "exact" else InferenceNetwork  # they round apart: 1.2e-6 with AVX-512
    networks = [form(network, torch.float32, torch.device("cpu")) for network in built.networks]
    prepared = preprocess(case(), built.plan)
    image = prepared.image
    assert prepared.image.shape[1:] != prepared.origin.box.shape
    return predict_logits(networks, image, patch=built.plan.patch, rules=rules).numpy(), prepared.origin


@pytest.mark.parametrize("spacing", GRIDS)
def test_resampled_exact_logits_are_rounded_once_to_float16(
    tmp_path: Path, spacing: tuple[float, float, float]
) -> None:
    """The peer resamples in float64 into an array of float16. By way of float32 some end one step beside it."""
    plan = tiny_plan(labels=THREE, spacing=spacing, orientation="as-stored", postprocess=ARGMAX)
    built = model(tmp_path, plan)
    answer, origin = answered(built, WindowRules(exact=True))
    assert answer.dtype == np.float16
    logits = on_scan(answer, origin.box.shape, spacing).astype(np.float16).astype(np.float32)
    raised = np.exp(logits - logits.max(0))
    found = predict(built, case(), InferConfig(semantics="exact", tta="none"))
    inside = (slice(None), *origin.box.slices)
    np.testing.assert_allclose(found.probability[inside], raised / raised.sum(0), rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(found.mask[inside[1:]], logits.argmax(0))
    outside = np.ones(found.mask.shape, bool)
    outside[inside[1:]] = False
    assert (found.probability[0][outside] == 1).all()
    assert not found.mask[outside].any()


@pytest.mark.parametrize("spacing", GRIDS)
@pytest.mark.parametrize("semantics", ["exact", "improved"])
def test_labels_of_averaged_probabilities_are_read_from_the_resampled_probabilities(
    tmp_path: Path, semantics: Any, spacing: tuple[float, float, float]
) -> None:
    """Not from probabilities whose labels are then resampled, and not from their logarithms."""
    plan = tiny_plan(**V1, labels=THREE, spacing=spacing)
    built = model(tmp_path, plan)
    answer, origin = answered(built, WindowRules(average="probabilities", tile_weights="peak-1-float32"), semantics)
    assert answer.dtype == np.float32
    expected = on_scan(answer, origin.box.shape, spacing)
    found = predict(built, case(), InferConfig(semantics=semantics, tta="none"))
    inside = (slice(None), *origin.box.slices)
    np.testing.assert_allclose(found.probability[inside], expected, atol=1e-6)
    np.testing.assert_array_equal(found.mask[inside[1:]], expected.astype(np.float32).argmax(0))
    other = on_scan(np.log(answer), origin.box.shape, spacing).argmax(0)
    assert (other != found.mask[inside[1:]]).any()  # so that the difference would be seen


# --- ties


class Levels(nn.Module):
    """Three labels from one channel x: 0, x, and x plus a little. (N, 1, D, H, W) -> (N, 3, D, H, W)."""

    def __init__(self, more: float) -> None:
        super().__init__()
        self.heads, self.more = 3, more
        self.decoder = nn.Module()
        self.decoder.seg_layers = nn.ModuleList([nn.Conv3d(1, 3, 1)])

    def forward(self, image: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(image), image, image + self.more], 1)


def labels_of(value: float, more: float, **how: Any) -> set[int]:
    """The labels of a scan that is one tile large and has one value, under the rules of v1 or v2."""
    fields = V1 if how.pop("v1", False) else {"postprocess": ARGMAX}
    plan = known_plan(labels=THREE, **fields)
    built = Model(root=Path("levels"), plan=plan, folds=("0",), networks=(Levels(more),))  # type: ignore[arg-type]
    image = np.full((16, 16, 16), value, np.float32)
    scan = case_from_images("even", {"T1": (image, np.eye(4))})
    return set(np.unique(predict(built, scan, InferConfig(tta="none", **how)).mask))


@pytest.mark.parametrize(
    ("value", "label"),
    [(-3.0, 0), (2.0, 1), (2048.0, 1)],
)
@pytest.mark.parametrize(
    "how",
    [
        *({"semantics": semantics, "probabilities": asked} for semantics in ("exact", "improved") for asked in (0, 1)),
        {"v1": True, "semantics": "exact"},
        {"v1": True, "semantics": "improved"},
    ],
)
def test_of_labels_that_tie_the_lowest_wins(value: float, label: int, how: dict[str, Any]) -> None:
    assert labels_of(value, 0.0, **how) == {label}


def test_what_float16_cannot_tell_apart_is_a_tie_of_the_exact_form_alone() -> None:
    """2048 and 2048.4: the steps of float16 are 2 there."""
    assert labels_of(2048.0, 0.4, semantics="exact") == {1}
    assert labels_of(2048.0, 0.4, semantics="improved") == {2}
    assert labels_of(2048.0, 4.0, semantics="exact") == {2}


# --- a network that answers in float16, as autocast makes it on a GPU


class Half(nn.Module):
    """Sine and cosine of the tile times a plane of weights, float16; not its own mirror image."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 2

    def forward(self, image: Tensor) -> Tensor:
        ramp = 3 + torch.arange(image[0, 0].numel()).reshape(image.shape[2:]) / 4096
        return torch.cat([(image * ramp).sin(), (image * ramp).cos()], 1).half()


def test_an_answer_in_float16_is_mirrored_weighted_and_summed_in_float16() -> None:
    """Every sum and product rounded: over the mirrored copies in the peer's order, then tile by tile."""
    image = torch.randn(1, 16, 16, 24, generator=torch.Generator().manual_seed(6))
    window = {"patch": (16, 16, 16), "mirror_axes": (0, 2), "rules": WindowRules(exact=True)}
    found = predict_logits([Half()], image, **window)  # type: ignore[list-item, arg-type]
    weights = importance_map((16, 16, 16)).numpy().astype(np.float16)
    total, norm = np.zeros((2, 16, 16, 24), np.float16), np.zeros((16, 16, 24), np.float16)
    for start in (0, 8):
        tile = image[None, ..., start : start + 16]
        copies = [Half()(tile.flip(axes)).flip(axes)[0].numpy() for axes in ([], [2], [4], [2, 4])]
        mean = (((copies[0] + copies[1]) + copies[2]) + copies[3]) / np.float16(4)
        total[..., start : start + 16] += mean * weights
        norm[..., start : start + 16] += weights
    assert found.dtype == torch.float16
    np.testing.assert_array_equal(found.numpy(), total / norm)
