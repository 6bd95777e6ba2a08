"""The GPU's connected components against scipy's and cc3d's, by Triton's interpreter where there is no GPU."""

from __future__ import annotations

import cc3d
import numpy as np
import pytest
import torch
from scipy import ndimage

from bench.post import serpentine
from kernels import components
from kernels.components import (
    Connectivity,
    component_table,
    label_components,
    largest_k,
    lesion_mask,
    lesion_mask_of_logits,
    volume_filter,
)
from kernels.dispatch import Choice
from kernels.holes import fill_holes_triton
from tests.kernels.masks import MASKS, scipys

TYPES = [torch.float32, torch.float16, torch.bfloat16]
RULE = {"voxel_volume_mm3": 1.0, "min_volume_mm3": 4.0}


@pytest.fixture(autouse=True)
def device(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where the kernels run; without a GPU they are chosen for the CPU too."""
    if triton_device.type == "cpu":
        choice = Choice(operator="components", implementation="triton", why="the interpreter")
        monkeypatch.setattr(components, "choose_components", lambda _: choice)
        set_programs(2048, monkeypatch)
    return triton_device


def set_programs(cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells of a program; the interpreter takes about as long for one of 2048 as for one of 32."""
    for programs in ("MERGE", "COUNT", "WIDE"):
        monkeypatch.setattr(f"kernels.components_triton.{programs}", cells)


def on(device: torch.device, mask: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(mask)).to(device)


def assert_scipys(mask: np.ndarray, connectivity: Connectivity, device: torch.device) -> None:
    labels, sizes = label_components(on(device, mask), connectivity)
    expected, voxels = scipys(mask, connectivity)
    assert (labels.dtype, sizes.dtype) == (torch.int32, torch.int64)
    np.testing.assert_array_equal(labels.cpu().numpy(), expected)
    np.testing.assert_array_equal(sizes.cpu().numpy(), voxels)


@pytest.mark.parametrize("name", MASKS)
def test_blocks_give_scipys_labels(name: str, device: torch.device) -> None:
    assert_scipys(MASKS[name], 26, device)


@pytest.mark.parametrize("connectivity", [6, 18, 26])
def test_all_masks_in_one_volume_have_scipys_labels(
    connectivity: Connectivity, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One beside the other with a voxel between."""
    if device.type == "cpu":
        set_programs(2**16, monkeypatch)
    widths = [mask.shape[2] + 1 for mask in MASKS.values()]
    volume = np.zeros((23, 40, sum(widths)), bool)
    for mask, end in zip(MASKS.values(), np.cumsum(widths), strict=True):
        depth, height, width = mask.shape
        volume[:depth, :height, end - width - 1 : end - 1] = mask
    assert_scipys(volume, connectivity, device)


@pytest.mark.parametrize("connectivity", [6, 18, 26])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 50), (7, 1, 2), (3, 5, 1)])
def test_odd_shapes_are_labelled_too(
    shape: tuple[int, int, int], connectivity: Connectivity, device: torch.device
) -> None:
    assert_scipys(np.random.default_rng(1).random(shape) < 0.6, connectivity, device)


@pytest.mark.parametrize("connectivity", [6, 26])
def test_programs_as_small_as_on_a_gpu_give_the_same(
    connectivity: Connectivity, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_programs(32, monkeypatch)
    mask = np.random.default_rng(0).random((5, 7, 12)) < 0.35
    assert_scipys(mask if connectivity == 26 else serpentine((4, 5, 7)), connectivity, device)


def test_a_volume_without_voxels_has_no_components(device: torch.device) -> None:
    labels, sizes = label_components(torch.zeros(0, 4, 5, dtype=torch.bool, device=device))
    assert labels.shape == (0, 4, 5)
    assert sizes.tolist() == [0]
    assert lesion_mask(torch.zeros(3, 0, 5, device=device), threshold=0.2, **RULE).shape == (3, 0, 5)


@pytest.mark.parametrize(
    ("name", "connectivity"), [("random 0.1", 6), ("random 0.1", 18), ("random 0.1", 26), ("full", 26), ("empty", 26)]
)
def test_the_filter_keeps_what_cc3d_keeps(name: str, connectivity: Connectivity, device: torch.device) -> None:
    kept = volume_filter(on(device, MASKS[name]), **RULE, connectivity=connectivity)
    expected = cc3d.dust(np.ascontiguousarray(MASKS[name]), threshold=5, connectivity=connectivity)
    assert kept.dtype == torch.bool
    np.testing.assert_array_equal(kept.cpu().numpy(), expected)


@pytest.mark.parametrize("dtype", TYPES)
def test_a_lesion_mask_is_the_arrays_in_every_type(dtype: torch.dtype, device: torch.device) -> None:
    """Values are 0.3 rounded to the type, and its neighbours: a tie is not above, and 0.3 is compared in float32.

    float16 and bfloat16 round 0.3 up: compared in their own type it would tie, and not be above.
    """
    steps = torch.from_numpy(np.random.default_rng(0).integers(-1, 2, (9, 10, 11))).to(torch.int16)
    at = torch.full(steps.shape, 0.3).to(dtype)
    values = (at.view(torch.int32) + steps if dtype == torch.float32 else at.view(torch.int16) + steps).view(dtype)
    for threshold in {0.3, float(at[0, 0, 0])}:
        expected = lesion_mask(values.float().numpy(), threshold=threshold, **RULE)
        mask = lesion_mask(values.to(device), threshold=threshold, **RULE)
        assert mask.dtype == torch.uint8
        assert 0 < expected.sum() < expected.size
        np.testing.assert_array_equal(mask.cpu().numpy(), expected)


def test_nan_is_no_lesion_and_infinity_is_one(device: torch.device) -> None:
    values = torch.tensor([[[float("nan"), float("inf"), float("-inf"), 0.5, 1e-40]]], device=device)
    rule = {"threshold": 0.0, "voxel_volume_mm3": 1.0, "min_volume_mm3": 0.0}
    assert lesion_mask(values, **rule).tolist() == [[[0, 1, 0, 1, 1]]]


@pytest.mark.parametrize(("voxel_volume_mm3", "kept"), [(1.0, [5, 6]), (1.0000002, [5, 6]), (1.01, [4, 5, 6])])
def test_a_volume_of_exactly_the_limit_goes(voxel_volume_mm3: float, kept: list[int], device: torch.device) -> None:
    probability = np.zeros((8, 1, 8), np.float32)
    for row, size in zip((0, 2, 4, 6), (3, 4, 5, 6), strict=True):
        probability[row, 0, :size] = 0.9
    rule = {"threshold": 0.2, "voxel_volume_mm3": voxel_volume_mm3, "min_volume_mm3": 4.0}
    mask = lesion_mask(on(device, probability), **rule).cpu().numpy()
    np.testing.assert_array_equal(mask, lesion_mask(probability, **rule))
    assert [int(size) for size in mask.sum(axis=(1, 2)) if size] == kept


def test_two_logits_give_the_mask_of_their_difference(device: torch.device) -> None:
    logits = torch.randn(2, 9, 7, 11, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    difference = (logits[1].float() - logits[0].float()).numpy()
    mask = lesion_mask_of_logits(logits.to(device), logit_threshold=1.25, **RULE)
    expected = lesion_mask(difference, threshold=1.25, **RULE)
    assert (difference == 1.25).any()
    assert expected.any()
    np.testing.assert_array_equal(mask.cpu().numpy(), expected)


@pytest.mark.parametrize("k", [0, 2, 9])
def test_the_largest_of_equal_components_is_the_first_voxels(k: int, device: torch.device) -> None:
    """The second's block comes before the first's, though its first voxel comes after."""
    mask = np.zeros((4, 4, 12), bool)
    mask[0, 0, 8:10] = True
    mask[1, 0, 0:2] = True
    mask[3, 3, 3:6] = True
    mask[3, 0, 0] = True
    for connectivity in (6, 26):
        kept = largest_k(on(device, mask), k, connectivity=connectivity).cpu().numpy()
        np.testing.assert_array_equal(kept, largest_k(mask, k, connectivity=connectivity))
    if k == 2:
        assert (kept.sum(), kept[0, 0, 8]) == (5, True)


def test_the_largest_of_many_are_the_arrays(device: torch.device) -> None:
    mask = MASKS["random 0.1"]
    np.testing.assert_array_equal(largest_k(on(device, mask), 20).cpu().numpy(), largest_k(mask, 20))


@pytest.mark.parametrize("share", [0, 0.1, 1])
def test_the_table_is_the_arrays(share: float, device: torch.device) -> None:
    mask = np.random.default_rng(0).random((5, 6, 7)) < share
    table = component_table(*label_components(on(device, mask)))
    expected = component_table(*label_components(mask))
    for column in ("voxels", "first", "last", "coordinate_sum"):
        assert getattr(table, column).tolist() == getattr(expected, column).tolist()


def test_more_voxels_than_an_index_counts_are_refused(device: torch.device) -> None:
    """A view of one voxel: nothing so large is made."""
    with pytest.raises(ValueError, match="2147483648 voxels; at most 2147482624"):
        lesion_mask(torch.zeros(1, 1, 1, device=device).expand(2048, 1024, 1024), threshold=0.2, **RULE)


@pytest.mark.parametrize("density", [0.05, 0.6, 0.8, 0.95])
def test_holes_are_filled_as_by_scipy(density: float, device: torch.device) -> None:
    mask = np.random.default_rng(0).random((7, 9, 11)) < density
    mask[2:5, 2:6, 2:7], mask[3, 3, 3:6] = True, False
    found = fill_holes_triton(torch.from_numpy(mask).to(device)).cpu().numpy()
    np.testing.assert_array_equal(found, ndimage.binary_fill_holes(mask))
    assert found[3, 3, 4]


def test_what_is_chosen_is_what_runs(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels run where dispatch says triton, and not where it says the plain form."""
    import kernels.components_triton as on_gpu

    taken = []
    paint = on_gpu.paint
    monkeypatch.setattr(on_gpu, "paint", lambda *args, **kwargs: taken.append(1) or paint(*args, **kwargs))
    mask = on(device, MASKS["one voxel"])
    calls = (
        lambda: lesion_mask(mask.float(), threshold=0.2, **RULE),
        lambda: lesion_mask_of_logits(torch.stack([mask, mask]).float(), logit_threshold=0, **RULE),
        lambda: volume_filter(mask, **RULE),
        lambda: label_components(mask),
        lambda: largest_k(mask, 1),
    )
    for number, call in enumerate(calls, 1):
        call()
        assert len(taken) == number
    monkeypatch.setattr(components, "choose_components", lambda _: Choice(operator="", implementation="cc3d", why=""))
    for call in calls:
        call()
    assert len(taken) == len(calls)
