"""--crop brain: the brain is inside, the answer in it stays, around it is background, and in doubt nothing changes."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from planner.plan import Plan
from strokenet.cli import cli
from strokenet.data.case import Case, case_from_images
from strokenet.data.errors import InputError
from strokenet.data.geometry import Geometry
from strokenet.data.nifti import read_volume
from strokenet.infer import brain_box
from strokenet.infer.brain_box import MARGIN_MM, count_tiles, is_stripped, on_network_grid, without_extra_tiles
from strokenet.infer.config import InferConfig
from strokenet.infer.infer import infer_folder
from strokenet.infer.predict import Prediction, predict
from strokenet.model.checkpoint import load_model
from strokenet.prepare.brain import Brain, make_brain
from strokenet.preprocess.crop import Box
from strokenet.preprocess.preprocess import preprocess
from tests.infer.models import head, known_model, known_plan, oblique, write_case, write_model
from tests.plans import tiny_plan

NONZERO, BRAIN = InferConfig(), InferConfig(crop="brain")
SHAPE = (70, 64, 60)  # i, j, k of a whole head in noise
INNER = (slice(40, 58), slice(8, 22), slice(38, 50))  # its brain
IN_BRAIN, IN_SKULL = (slice(44, 48), slice(10, 14), slice(40, 43)), (slice(3, 7), slice(50, 54), slice(4, 8))
V1: dict[str, Any] = {"average": "probabilities", "tile_weights": "peak-1-float32"}


def head_case(spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> Case:
    """Noise that fills its box, bright in the brain and in the skull."""
    array = np.random.default_rng(0).uniform(1, 2, SHAPE).astype(np.float32)
    array[IN_BRAIN] = array[IN_SKULL] = 9
    return case_from_images("x", {"T1": (array, oblique(spacing))})


def inner(case: Case, box: tuple[slice, slice, slice] = INNER) -> np.ndarray:
    """The brain of head_case, (D, H, W) bool."""
    mask = np.zeros(case.image.shape[1:], bool)
    mask.transpose(2, 1, 0)[box] = True
    return mask


@pytest.fixture
def finder(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """deepbet's place taken by INNER: near the right, the back and the vertex of an upright head. Holds the calls."""
    calls: list[str] = []

    def find(array: np.ndarray, geometry: Geometry, device: torch.device) -> Brain:
        calls.append(str(array.shape))
        mask = np.zeros(array.shape, bool)
        mask.transpose(2, 1, 0)[INNER] = True
        return Brain(mask=mask, volume_ml=1400, method="deepbet")

    monkeypatch.setattr(brain_box, "brain_by_network", find)
    return calls


def both(plan: Plan, case: Case, **options: Any) -> tuple[Prediction, Prediction]:
    """The default's answer, and the brain's."""
    a, b = (predict(known_model(plan), case, InferConfig(crop=crop, **options)) for crop in ("nonzero", "brain"))
    return a, b


@pytest.mark.parametrize("semantics", ["improved", "exact"])
@pytest.mark.parametrize("fields", [{}, V1, {"transpose": (2, 0, 1)}, {"spacing": (2.0, 1.0, 0.8)}])
def test_the_mask_stays_in_the_brain_and_is_empty_elsewhere(
    fields: dict[str, Any], semantics: Any, finder: list[str]
) -> None:
    default, brain = both(known_plan(**fields), head_case(), semantics=semantics)
    assert default.mask_ijk[IN_SKULL].any()
    assert default.mask_ijk[IN_BRAIN].any()
    assert not brain.mask_ijk[IN_SKULL].any()
    np.testing.assert_array_equal(brain.mask_ijk[INNER], default.mask_ijk[INNER])
    np.testing.assert_array_less(1 - 1e-6, brain.probability[0].transpose(2, 1, 0)[IN_SKULL])
    assert len(finder) == 1


def test_fewer_tiles_are_computed_and_the_log_says_how_many(
    finder: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[int] = []

    def track(items: Any, total: int, what: str) -> Any:
        seen.append(total)
        return items

    for config in (NONZERO, BRAIN):
        with caplog.at_level(logging.INFO, "strokenet"):
            predict(known_model(known_plan()), head_case(), config, track)
    assert seen[1] < seen[0] / 3
    assert f"--crop brain: {seen[1]} tiles instead of {seen[0]}" in caplog.text


def test_a_whole_head_is_brought_upright_for_deepbet(finder: list[str]) -> None:
    upright = head_case()
    array = upright.image[0].transpose(2, 1, 0)  # (i, j, k), RAS
    affine = oblique()
    lying = affine @ np.array([[0, 0, -1, SHAPE[0] - 1], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    turned = case_from_images("x", {"T1": (array.transpose(1, 2, 0)[:, :, ::-1], lying)})  # stored j, k, -i
    found = predict(known_model(known_plan()), turned, BRAIN).mask_ijk[:, :, ::-1].transpose(2, 0, 1)
    np.testing.assert_array_equal(found, predict(known_model(known_plan()), upright, BRAIN).mask_ijk)
    assert finder == [str(SHAPE[::-1])] * 2


@pytest.mark.parametrize("config", [{}, {"semantics": "exact"}, {"tta": "full", "probabilities": True}])
def test_a_brain_that_fills_the_crop_changes_no_bit(tmp_path: Path, config: dict[str, Any], finder: list[str]) -> None:
    write_model(tmp_path, tiny_plan(mirror_axes=(0, 1, 2)))
    arrays = {name: (head((24, 26, 28), seed), oblique()) for seed, name in enumerate(("T1", "FLAIR"))}
    case, model = case_from_images("x", arrays), load_model(tmp_path)
    default, brain = (predict(model, case, InferConfig(crop=crop, **config)) for crop in ("nonzero", "brain"))  # type: ignore[arg-type]
    assert 0 < default.mask.sum() < default.mask.size
    np.testing.assert_array_equal(brain.mask, default.mask)
    np.testing.assert_array_equal(brain.probability, default.probability)
    assert not finder  # a stripped scan needs no deepbet


def test_no_brain_is_looked_for_where_no_tile_can_be_saved(finder: list[str]) -> None:
    default, brain = both(known_plan(patch=(64, 64, 72)), head_case())
    np.testing.assert_array_equal(brain.probability, default.probability)
    assert not finder


def stripped(specks: int = 0, second: bool = False) -> Case:
    """An ellipsoid in zeros, by itself or with another one, and specks in a far corner."""
    array = np.zeros((120, 80, 70), np.float32)
    array[60:110, 20:70, 15:60] = head((50, 50, 45))
    array[:specks, 0, 0] = 1
    if second:
        array[5:50, 20:70, 15:60] = head((45, 50, 45))
    return case_from_images("x", {"T1": (array, oblique())})


def test_of_a_stripped_scan_the_brain_is_its_largest_piece(finder: list[str]) -> None:
    """Specks that stripping left make the box of what is not zero large, and that of the brain no larger."""
    case = stripped(specks=5)
    found = brain_box.find_brain(case)
    assert not finder
    np.testing.assert_array_equal(found.transpose(2, 1, 0)[5:], case.image[0].transpose(2, 1, 0)[5:] != 0)
    assert not found.transpose(2, 1, 0)[:5].any()
    prepared = preprocess(case, known_plan())
    d, h, w = prepared.image.shape[1:]
    assert brain_box.brain_box(case, known_plan(), prepared.origin, (d, h, w)).shape < (d, h, w)


def nothing(array: np.ndarray, geometry: Geometry, device: torch.device) -> Brain:
    return make_brain(np.zeros(array.shape, bool), geometry, "deepbet")


def an_eye(array: np.ndarray, geometry: Geometry, device: torch.device) -> Brain:
    return Brain(mask=array > 8, volume_ml=7, method="deepbet")


@pytest.mark.parametrize(
    ("find", "case", "why"),
    [
        (nothing, head_case(), "no brain found"),
        (an_eye, head_case(), "deepbet's brain has 7 ml only"),
        (an_eye, stripped(second=True), "the stripped scan is in pieces"),
    ],
)
def test_where_the_brain_is_in_doubt_the_whole_crop_is_tiled(
    find: Any, case: Case, why: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(brain_box, "brain_by_network", find)
    with caplog.at_level(logging.INFO, "strokenet"):
        default, brain = both(known_plan(), case)
    np.testing.assert_array_equal(brain.probability, default.probability)
    assert [
        line for line in caplog.messages if "--crop brain" in line and why in line and "whole crop is tiled" in line
    ]


@pytest.mark.parametrize("orientation", ["RAS", "as-stored"])
@pytest.mark.parametrize("transpose", [(0, 1, 2), (1, 2, 0), (2, 1, 0)])
@pytest.mark.parametrize("target", [(1.0, 1.0, 1.0), (3.0, 0.7, 0.9), (0.6, 1.3, 5.5)])
@pytest.mark.parametrize("flip", [False, True])
def test_every_brain_voxel_lies_in_the_box_on_the_networks_grid(
    orientation: Any, transpose: tuple[int, int, int], target: tuple[float, float, float], flip: bool
) -> None:
    """Against preprocess itself: the brain drawn into the image, wherever that puts it."""
    array = np.zeros(SHAPE, np.float32)
    array[2:, 1:-3, 4:] = 1  # a crop that begins somewhere
    array[20:48, 30:47, 22:41] = 100
    affine = oblique((1.1, 0.9, 2.5)) @ np.diag([-1 if flip else 1, 1, -1, 1])
    case = case_from_images("x", {"T1": (array, affine)})
    plan = known_plan(orientation=orientation, transpose=transpose, spacing=target)
    prepared = preprocess(case, plan)
    d, h, w = prepared.image.shape[1:]
    box = on_network_grid(case.image[0] == 100, prepared.origin, (d, h, w), plan.spacing)
    drawn = np.argwhere(prepared.image[0].numpy() > 50)
    margin = np.ceil(MARGIN_MM / np.array(target)).astype(int)
    size = np.array((d, h, w))
    assert (np.array(box.start) <= np.maximum(drawn.min(0) - margin, 0)).all()
    assert (np.array(box.stop) >= np.minimum(drawn.max(0) + 1 + margin, size)).all()
    assert (np.array(box.start) >= np.maximum(drawn.min(0) - margin - 3, 0)).all()  # and no larger than it must be
    assert (np.array(box.stop) <= np.minimum(drawn.max(0) + 4 + margin, size)).all()


def test_a_box_grows_as_far_as_no_tile_is_added() -> None:
    draw = np.random.default_rng(0)
    saved = 0
    for _ in range(300):
        shape, patch = (tuple(int(n) for n in draw.integers(low, high, 3)) for low, high in ((20, 90), (8, 33)))
        start = tuple(int(draw.integers(0, n - 1)) for n in shape)
        stop = tuple(int(draw.integers(a + 1, n + 1)) for a, n in zip(start, shape, strict=True))
        box = Box(start=start, stop=stop)  # type: ignore[arg-type]
        grown = without_extra_tiles(box, shape, patch)  # type: ignore[arg-type]
        assert all(a <= b for a, b in zip(grown.start, start, strict=True))
        assert all(b <= a <= n for a, b, n in zip(grown.stop, stop, shape, strict=True))
        assert count_tiles(grown.shape, patch) == count_tiles(box.shape, patch)  # type: ignore[arg-type]
        for axis in range(3):
            longer = list(grown.shape)
            longer[axis] += 1
            more = count_tiles(tuple(longer), patch) > count_tiles(grown.shape, patch)  # type: ignore[arg-type]
            assert more or grown.shape[axis] == shape[axis]
        saved += grown.shape != shape
    assert saved > 100


def test_without_deepbet_the_option_is_refused_before_a_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "model")
    write_case(tmp_path / "scans", "a")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=r'^--crop brain: deepbet.* is not installed; run `pip install "strokenet\[mri'
    ):
        infer_folder(tmp_path / "model", tmp_path / "scans", tmp_path / "out", BRAIN)
    assert not (tmp_path / "out").exists()
    words = ["infer", str(tmp_path / "model"), str(tmp_path / "scans"), "-o", str(tmp_path / "out"), "--crop", "brain"]
    assert "--crop brain: deepbet" in str(CliRunner().invoke(cli, words).exception)


def test_another_crop_is_another_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finder: list[str]) -> None:
    monkeypatch.setattr("strokenet.infer.infer.check_brain_finder", lambda: None)
    write_model(tmp_path / "model")
    write_case(tmp_path / "scans", "a")
    kept = [
        infer_folder(tmp_path / "model", tmp_path / "scans", tmp_path / "out", config)[0].kept
        for config in (NONZERO, NONZERO, BRAIN, BRAIN, NONZERO)
    ]
    assert kept == [False, True, False, True, False]


def test_an_unknown_crop_is_refused() -> None:
    with pytest.raises(InputError, match="--crop 'head'; allowed: nonzero, brain"):
        InferConfig(crop="head")  # type: ignore[arg-type]


@pytest.mark.real
def test_stripped_scans_and_heads_are_told_apart(real_data: Path) -> None:
    bare = [
        *(real_data / "open_ms" / "cross_sectional").glob("*/[TF]*.nii.gz"),
        *(real_data / "isles22").glob("*/*_dwi.nii.gz"),
    ]
    heads = [
        *(real_data / "open_ms" / "longitudinal").glob("*/study*.nii.gz"),
        *(real_data / "native_grids_tcga").glob("[ft]*.nii.gz"),
    ]
    assert [is_stripped(read_volume(path).array != 0) for path in bare] == [True] * 5
    assert [is_stripped(read_volume(path).array != 0) for path in heads] == [False] * 8
