"""Connected components of arrays against scipy.ndimage.label, on random masks and on masks made to fool a labelling."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage

from kernels import dispatch
from kernels.components import (
    Connectivity,
    component_table,
    label_components,
    largest_k,
    lesion_mask,
    lesion_mask_of_logits,
    smallest_size,
    volume_filter,
)
from kernels.dispatch import choices, choose_components
from tests.conftest import ROOT
from tests.kernels.masks import MASKS, REACH, scipys


@pytest.mark.parametrize("connectivity", [6, 18, 26])
@pytest.mark.parametrize("name", MASKS)
def test_components_are_scipys(name: str, connectivity: Connectivity) -> None:
    labels, sizes = label_components(MASKS[name], connectivity)
    expected, voxels = scipys(MASKS[name], connectivity)
    np.testing.assert_array_equal(labels, expected)
    np.testing.assert_array_equal(sizes, voxels)


@pytest.mark.parametrize("connectivity", [6, 18, 26])
@pytest.mark.parametrize("limit", [0.0, 1.0, 4.0, 60.0])
def test_the_filter_keeps_what_brute_force_keeps(connectivity: Connectivity, limit: float) -> None:
    mask = MASKS["random 0.1"]
    labels, count = ndimage.label(mask, ndimage.generate_binary_structure(3, REACH[connectivity]))
    expected = np.zeros_like(mask)
    for component in range(1, count + 1):
        own = labels == component
        expected |= own if own.sum() * 0.5 > limit else False
    kept = volume_filter(mask, voxel_volume_mm3=0.5, min_volume_mm3=limit, connectivity=connectivity)
    np.testing.assert_array_equal(kept, expected)


def test_the_mask_given_is_left_alone() -> None:
    mask = MASKS["random 0.1"].copy()
    volume_filter(mask, voxel_volume_mm3=1, min_volume_mm3=3)
    np.testing.assert_array_equal(mask, MASKS["random 0.1"])


def test_integers_are_a_mask_where_they_are_not_zero() -> None:
    mask = np.array([[[0, -1, 3, 0, 255]]], np.int16)
    assert label_components(mask)[1].tolist() == [2, 2, 1]


def test_a_lesion_mask_is_threshold_then_volume() -> None:
    probability = np.random.default_rng(0).random((12, 13, 14)).astype(np.float32) ** 3
    mask = lesion_mask(probability, threshold=0.4, voxel_volume_mm3=0.7, min_volume_mm3=4, connectivity=26)
    labels, count = ndimage.label(probability > np.float32(0.4), np.ones((3, 3, 3)))
    sizes = np.bincount(labels.ravel())
    expected = sum((labels == c for c in range(1, count + 1) if sizes[c] * 0.7 > 4), np.zeros(labels.shape, bool))
    np.testing.assert_array_equal(mask, expected)
    assert mask.dtype == np.uint8


def test_a_lesion_at_the_edges_is_not_lost_with_the_box() -> None:
    """The foreground's box is labelled alone: its corners are the volume's here, and one voxel inside them there."""
    for margin in (0, 1):
        probability = np.zeros((6, 7, 8), np.float32)
        inner = probability[margin : 6 - margin, margin : 7 - margin, margin : 8 - margin]
        inner[0, 0, :3] = inner[-1, -1, -3:] = 1
        mask = lesion_mask(probability, threshold=0.5, voxel_volume_mm3=1, min_volume_mm3=2)
        np.testing.assert_array_equal(mask, probability)


@pytest.mark.parametrize("connectivity", [6, 18, 26])
def test_thin_volumes_are_labelled_too(connectivity: Connectivity) -> None:
    """cc3d 4.1.1 raises on many of these where it is told that the image is binary."""
    for seed, shape in enumerate([(1, 1, 7), (1, 7, 7), (3, 3, 3), (7, 1, 7), (2, 1, 9), (5, 5, 1)] * 20):
        mask = np.random.default_rng(seed).random(shape) > 0.5
        np.testing.assert_array_equal(label_components(mask, connectivity)[0], scipys(mask, connectivity)[0])


@pytest.mark.parametrize(
    ("voxel", "limit"), [(1.0, 4.0), (0.7, 4.0), (0.1, 0.3), (1 / 3, 1.0), (2.5, 1e6), (1e-9, 7.0)]
)
def test_the_smallest_size_is_the_first_that_the_inequality_lets_through(voxel: float, limit: float) -> None:
    smallest = smallest_size(voxel_volume_mm3=voxel, min_volume_mm3=limit)
    sizes = np.arange(max(smallest - 3, 1), smallest + 4)
    np.testing.assert_array_equal(sizes * voxel > limit * (1 + 1e-6), sizes >= smallest)


def test_no_limit_keeps_one_voxel_and_no_volume_keeps_nothing() -> None:
    assert smallest_size(voxel_volume_mm3=1, min_volume_mm3=0) == 1
    assert smallest_size(voxel_volume_mm3=1, min_volume_mm3=-1) == 1
    assert smallest_size(voxel_volume_mm3=0, min_volume_mm3=1) > 2**52
    assert smallest_size(voxel_volume_mm3=1, min_volume_mm3=float("nan")) > 2**52


@pytest.mark.parametrize(
    ("k", "kept"), [(0, []), (1, [2]), (2, [2, 3]), (3, [1, 2, 3]), (4, [1, 2, 3, 4]), (9, [1, 2, 3, 4])]
)
def test_the_largest_of_equal_components_is_the_first(k: int, kept: list[int]) -> None:
    labels = np.array([[[1, 1, 0, 2, 2, 2, 0, 3, 3, 3, 0, 4, 4]]])
    np.testing.assert_array_equal(largest_k(labels > 0, k), np.isin(labels, kept))


def test_fewer_than_no_components_is_an_error() -> None:
    with pytest.raises(ValueError, match="k must be 0 or more"):
        largest_k(np.ones((1, 1, 1), bool), -1)


@pytest.mark.parametrize("name", ["random 0.1", "spiral", "empty", "full", "a view"])
def test_the_table_holds_what_scipy_measures(name: str) -> None:
    labels, sizes = label_components(MASKS[name], 18)
    table = component_table(labels, sizes)
    expected, _ = scipys(MASKS[name], 18)
    boxes = ndimage.find_objects(expected)
    assert table.voxels.tolist() == sizes[1:].tolist()
    assert table.first.tolist() == [[axis.start for axis in box] for box in boxes]
    assert table.last.tolist() == [[axis.stop - 1 for axis in box] for box in boxes]
    centres = ndimage.center_of_mass(expected > 0, expected, range(1, len(boxes) + 1))
    np.testing.assert_allclose(table.coordinate_sum / table.voxels[:, None], np.reshape(centres, (-1, 3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_tensor_on_the_cpu_has_the_arrays_answer(dtype: torch.dtype) -> None:
    probability = torch.from_numpy(np.random.default_rng(0).random((9, 8, 7)) ** 3).to(dtype)
    rule = {"threshold": 0.4, "voxel_volume_mm3": 0.7, "min_volume_mm3": 4.0}
    mask = lesion_mask(probability, **rule)
    assert mask.dtype == torch.uint8
    np.testing.assert_array_equal(mask.numpy(), lesion_mask(probability.float().numpy(), **rule))
    binary = probability > 0.4
    labels, sizes = label_components(binary, 6)
    assert (labels.dtype, sizes.dtype) == (torch.int32, torch.int64)
    np.testing.assert_array_equal(labels.numpy(), scipys(binary.numpy(), 6)[0])
    assert component_table(labels, sizes).voxels.tolist() == sizes[1:].tolist()
    np.testing.assert_array_equal(largest_k(binary, 2).numpy(), largest_k(binary.numpy(), 2))


def test_two_logits_are_a_map_of_their_difference() -> None:
    logits = torch.randn(2, 9, 8, 7, generator=torch.Generator().manual_seed(0))
    rule = {"voxel_volume_mm3": 1.0, "min_volume_mm3": 3.0}
    mask = lesion_mask_of_logits(logits, logit_threshold=1.4, **rule)
    expected = lesion_mask((logits[1] - logits[0]).numpy(), threshold=1.4, **rule)
    np.testing.assert_array_equal(mask.numpy(), expected)
    with pytest.raises(ValueError, match=r"allowed: \(2, D, H, W\)"):
        lesion_mask_of_logits(logits[:1], logit_threshold=0, **rule)


@pytest.mark.parametrize("given", [torch.zeros(2, 2), torch.zeros(2, 2, 2, dtype=torch.float64)])
def test_a_tensor_that_is_no_map_is_refused(given: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="allowed"):
        lesion_mask(given, threshold=0, voxel_volume_mm3=1, min_volume_mm3=0)


def test_the_gpu_labels_what_is_on_it_unless_the_plain_form_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.dispatch.missing_for_triton", lambda: "")
    assert [choose_components(device).implementation for device in ("cpu", "mps", "cuda")] == ["cc3d", "cc3d", "triton"]
    monkeypatch.setenv("STROKENET_KERNELS", "reference")
    assert choose_components("cuda").implementation == "cc3d"


@pytest.mark.parametrize(
    ("lacking", "says"),
    [
        ({"importlib.util.find_spec": lambda _: None}, "triton is not installed"),
        ({"shutil.which": lambda _: None}, "no C compiler"),
        ({"sysconfig.get_path": lambda _: "/nowhere"}, "no Python.h"),
    ],
)
def test_the_plain_form_runs_where_triton_cannot(
    lacking: dict[str, Any], says: str, triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "")
    for name, replacement in lacking.items():
        monkeypatch.setattr(name, replacement)
    dispatch.missing_for_triton.cache_clear()
    choice = choose_components("cuda")
    dispatch.missing_for_triton.cache_clear()
    assert choice.implementation == "cc3d"
    assert says in choice.why


def test_an_arrays_way_imports_no_triton() -> None:
    program = """import sys, numpy as np
from kernels.components import lesion_mask
lesion_mask(np.ones((2, 2, 2), np.float32), threshold=0.5, voxel_volume_mm3=1, min_volume_mm3=4)
assert not {"triton", "kernels.components_triton"} & set(sys.modules)"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_doctor_hears_of_the_components() -> None:
    assert "components" in {choice.operator for choice in choices()}
