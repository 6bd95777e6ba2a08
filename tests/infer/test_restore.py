"""Restore is the exact inverse of preprocess: 48 orientations, oblique and anisotropic grids, turned network axes."""

from __future__ import annotations

import itertools
from dataclasses import replace

import nibabel
import numpy as np
import pytest
import torch

from planner.plan import Plan
from strokenet.data.case import Case, case_from_images
from strokenet.infer.config import InferConfig
from strokenet.infer.predict import predict
from strokenet.infer.restore import place_back, place_back_probability, resample_logits
from strokenet.preprocess.preprocess import preprocess
from tests.infer.models import head, known_model, known_plan, oblique

ORIENTATIONS = [
    np.array(list(zip(order, flips, strict=True)))
    for order in itertools.permutations(range(3))
    for flips in itertools.product((1, -1), repeat=3)
]
SPACING = (0.7, 0.9, 3.5)  # i, j, k of the RAS grid, mm: anisotropic enough for "separate z"


def canonical() -> np.ndarray:
    """(i, j, k) RAS: 1 in the head, 10 in two lesions, 0 outside; nothing is symmetric."""
    image = np.zeros((15, 13, 11), np.float32)
    image[1:13, 2:12, 1:10] = 1
    image[2:5, 3:6, 2:4] = 10
    image[9:11, 8:11, 6:9] = 10
    image[12, 11, 9] = 10
    return image


def stored(image: np.ndarray, orientation: np.ndarray, spacing: tuple[float, ...] = SPACING) -> nibabel.Nifti1Image:
    """The same head at the same place of the world, with its axes stored in another order and direction (nibabel)."""
    turned = nibabel.orientations.apply_orientation(image, orientation)
    back = nibabel.orientations.inv_ornt_aff(orientation, image.shape)
    return nibabel.Nifti1Image(np.ascontiguousarray(turned), oblique(spacing) @ back)


def in_network_axes(values: tuple[float, ...], transpose: tuple[int, int, int]) -> tuple[float, float, float]:
    """i, j, k -> D, H, W -> the network's order."""
    a, b, c = (values[::-1][axis] for axis in transpose)
    return a, b, c


def plan_of(case: Case, orientation: str, transpose: tuple[int, int, int]) -> Plan:
    """A plan at the case's own spacing."""
    own = SPACING if orientation == "RAS" else case.header.spacing
    return known_plan(orientation=orientation, transpose=transpose, spacing=in_network_axes(own, transpose))


@pytest.mark.parametrize(
    ("kind", "transpose"),
    [("RAS", (0, 1, 2)), ("RAS", (2, 0, 1)), ("as-stored", (0, 1, 2)), ("as-stored", (1, 0, 2))],
)
def test_the_mask_of_a_mask_is_the_mask_in_all_48_orientations(kind: str, transpose: tuple[int, int, int]) -> None:
    for orientation in ORIENTATIONS:
        image = stored(canonical(), orientation)
        case = case_from_images("head", {"T1": image})
        found = predict(known_model(plan_of(case, kind, transpose)), case, InferConfig(tta="none"))
        expected = np.asarray(image.dataobj) == 10
        np.testing.assert_array_equal(found.mask_ijk, expected, err_msg=str(orientation))
        assert found.mask.dtype == np.uint8
        np.testing.assert_array_equal(found.probability[1].transpose(2, 1, 0) > 0.5, expected)


@pytest.mark.parametrize("transpose", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_every_voxel_keeps_its_place(transpose: tuple[int, int, int]) -> None:
    unique = canonical()
    unique[unique > 0] = 1 + np.random.default_rng(0).permutation(int((unique > 0).sum()))
    crop = unique[1:13, 2:12, 1:10].transpose(2, 1, 0).transpose(transpose)
    for orientation in ORIENTATIONS:
        image = stored(unique, orientation)
        case = case_from_images("head", {"T1": image})
        prepared = preprocess(case, plan_of(case, "RAS", transpose))
        np.testing.assert_array_equal(prepared.image[0], crop)  # RAS, whatever the file's order
        back = place_back(prepared.image, prepared.origin)
        np.testing.assert_array_equal(back[0].permute(2, 1, 0), np.asarray(image.dataobj))


def test_logits_on_the_cases_own_grid_come_back_unchanged() -> None:
    case = case_from_images("head", {"T1": stored(canonical(), ORIENTATIONS[29])})
    plan = plan_of(case, "RAS", (2, 0, 1))
    prepared = preprocess(case, plan)
    logits = np.random.default_rng(0).normal(size=(3, *prepared.image.shape[1:])).astype(np.float32)
    np.testing.assert_array_equal(resample_logits(torch.from_numpy(logits), plan, prepared.origin), logits)


def test_outside_the_crop_all_is_background() -> None:
    case = case_from_images("head", {"T1": stored(canonical(), ORIENTATIONS[29])})
    origin = preprocess(case, plan_of(case, "RAS", (2, 0, 1))).origin
    inside = torch.full((3, *origin.box.shape), 1 / 3)
    whole = place_back_probability(inside, origin).numpy()
    assert whole.shape == (3, *case.geometry.shape)
    outside = place_back(torch.ones(origin.box.shape, dtype=torch.uint8), origin).numpy() == 0
    assert int((~outside).sum()) == 12 * 10 * 9
    assert (whole[0][outside] == 1).all()
    assert (whole[1:, outside] == 0).all()
    assert (whole[:, ~outside] == np.float32(1 / 3)).all()


def blob() -> np.ndarray:
    """A smooth lesion of 10 in a head of 1, (i, j, k)."""
    i, j, k = np.indices((40, 36, 24)).astype(np.float64)
    image = np.zeros(i.shape, np.float32)
    image[2:38, 2:34, 2:22] = 1
    distance = np.sqrt(((i - 17) / 9) ** 2 + ((j - 20) / 7) ** 2 + ((k - 11) / 5) ** 2)
    return np.where(image > 0, 1 + 9 / (1 + np.exp(8 * (distance - 1))), 0).astype(np.float32)


@pytest.mark.parametrize("orientation", [0, 13, 22, 35, 47])
@pytest.mark.parametrize("kind", ["RAS", "as-stored"])
@pytest.mark.parametrize("target", [(1.0, 1.0, 1.0), (1.3, 0.8, 0.6), (1.9, 1.0, 0.6)])  # the last one by separate z
def test_a_lesion_survives_the_way_there_and_back(
    orientation: int, kind: str, target: tuple[float, float, float]
) -> None:
    image = stored(blob(), ORIENTATIONS[orientation], (0.8, 0.9, 1.4))
    plan = known_plan(orientation=kind, transpose=(2, 1, 0), spacing=target)
    found = predict(known_model(plan), case_from_images("head", {"T1": image}), InferConfig(tta="none")).mask_ijk > 0
    expected = np.asarray(image.dataobj) > 5.5
    dice = 2 * (found & expected).sum() / (found.sum() + expected.sum())
    assert dice > 0.9


def test_a_model_of_v1_asks_the_scan_first_which_axis_is_thick() -> None:
    """A plan of 5 mm along D, a scan of 5 mm along W: v2 takes whole slices of D, v1 whole slices of W."""
    case = case_from_images("case", {"T1": (head((6, 20, 22)), np.diag([5.0, 1.1, 1.0, 1.0]))})
    plan = known_plan(spacing=(5.0, 1.0, 1.0), orientation="as-stored")
    prepared = preprocess(case, plan)
    values = torch.from_numpy(np.random.default_rng(0).random((1, *prepared.image.shape[1:]), dtype=np.float32))

    def slices_of_d(plan: Plan) -> int:
        return int(np.unique(resample_logits(values, plan, prepared.origin)[0], axis=0).shape[0])

    assert slices_of_d(plan) == values.shape[1] == 4
    assert slices_of_d(replace(plan, average="probabilities")) > 4 * 3
