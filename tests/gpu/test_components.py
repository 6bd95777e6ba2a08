"""Connected components on a real GPU: what the interpreter, which runs one program after another, cannot show."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from bench.post import masks, serpentine
from kernels.components import (
    Connectivity,
    component_table,
    label_components,
    largest_k,
    lesion_mask,
    lesion_mask_of_logits,
    volume_filter,
)
from kernels.dispatch import choose_components
from kernels.holes import fill_holes
from tests.kernels.masks import MASKS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")

KINDS = list(masks((8, 8, 8)))
RULE = {"threshold": 0.2, "voxel_volume_mm3": 1.0, "min_volume_mm3": 4.0}


@functools.cache
def brain() -> dict[str, np.ndarray]:
    """The masks of the benchmark, of a brain's size."""
    return masks((197, 233, 189))


def adversarial(seed: int) -> np.ndarray:
    """A mask that many programs have to join at once: random near the percolation threshold, snakes, combs, sheets."""
    rng = np.random.default_rng(seed)
    shape = tuple(int(edge) for edge in rng.integers(1, 72, 3))
    kind = seed % 5
    if kind == 0:
        return rng.random(shape) < rng.choice([0.05, 0.1, 0.15, 0.25, 0.31, 0.5, 0.9])
    if kind == 1:
        mask = serpentine(shape)
        return mask.transpose(rng.permutation(3))[:: rng.choice([-1, 1]), :: rng.choice([-1, 1])]
    if kind == 2:  # teeth that meet at their last voxels only
        mask = np.zeros(shape, bool)
        mask[::2, ::2] = True
        mask[:, :, -1] = True
        return mask
    if kind == 3:
        return np.indices(shape).sum(0) % int(rng.integers(2, 5)) == 0
    return ~(rng.random(shape) < 0.02)


def assert_as_arrays(mask: np.ndarray, connectivity: Connectivity) -> None:
    labels, sizes = label_components(torch.from_numpy(np.ascontiguousarray(mask)).cuda(), connectivity)
    expected, voxels = label_components(mask, connectivity)
    np.testing.assert_array_equal(labels.cpu().numpy(), expected)
    np.testing.assert_array_equal(sizes.cpu().numpy(), voxels)


def test_triton_is_what_runs() -> None:
    assert choose_components("cuda").implementation == "triton"


@pytest.mark.parametrize("connectivity", [6, 18, 26])
def test_a_thousand_masks_are_labelled_as_cc3d_does(connectivity: Connectivity) -> None:
    for seed in range(1000):
        assert_as_arrays(adversarial(seed), connectivity)


@pytest.mark.parametrize("connectivity", [6, 18, 26])
@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_brain_is_labelled_as_cc3d_does(kind: str, connectivity: Connectivity) -> None:
    mask = brain()[kind]
    for _ in range(5):  # other interleavings
        assert_as_arrays(mask, connectivity)


@pytest.mark.parametrize("kind", KINDS)
def test_masks_and_tables_of_a_whole_brain_are_the_arrays(kind: str) -> None:
    mask = brain()[kind]
    on_gpu = torch.from_numpy(mask).cuda()
    expected = lesion_mask(mask.astype(np.float32), **RULE)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        np.testing.assert_array_equal(lesion_mask(on_gpu.to(dtype), **RULE).cpu().numpy(), expected)
    np.testing.assert_array_equal(largest_k(on_gpu, 30).cpu().numpy(), largest_k(mask, 30))
    ours, arrays = component_table(*label_components(on_gpu)), component_table(*label_components(mask))
    for column in ("voxels", "first", "last", "coordinate_sum"):
        np.testing.assert_array_equal(getattr(ours, column).cpu().numpy(), getattr(arrays, column))


@pytest.mark.parametrize("kind", KINDS)
def test_the_holes_of_a_whole_brain_are_the_arrays(kind: str) -> None:
    for mask in (brain()[kind], ~brain()[kind]):
        np.testing.assert_array_equal(fill_holes(torch.from_numpy(mask).cuda()).cpu().numpy(), fill_holes(mask))


def calls(probability: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    """What promises not to synchronise, by name."""
    from kernels.components_triton import label_triton, table_triton

    above = probability > 0.5
    logits = torch.stack([1 - probability, probability])
    volume = {"voxel_volume_mm3": 1.0, "min_volume_mm3": 4.0}
    return {
        "lesion_mask": lambda: lesion_mask(probability, **RULE),
        "voxels": lambda: lesion_mask(probability, **RULE, connectivity=6),
        "logits": lambda: lesion_mask_of_logits(logits, logit_threshold=0.1, **volume),
        "volume_filter": lambda: volume_filter(above, **volume),
        "largest_k": lambda: largest_k(above, 3),
        "labels": lambda: label_triton(above.byte(), 26)[0],
        "holes": lambda: fill_holes(above),
        "table": lambda: table_triton(above.int(), 1)[2],
    }


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    """Inside, whatever waits for the GPU raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["lesion_mask", "voxels", "logits", "volume_filter", "largest_k", "labels", "table"])
def test_nothing_waits_for_the_gpu(name: str, no_synchronisation: None) -> None:
    probability = torch.rand(33, 35, 37, device="cuda")
    with pytest.raises(RuntimeError, match="synchroniz"):
        probability.sum().item()  # the mode works
    calls(probability)[name]()


@pytest.mark.parametrize("name", ["lesion_mask", "voxels", "logits", "largest_k", "labels"])
def test_a_cuda_graph_replays_it_on_other_maps(name: str) -> None:
    probability = torch.zeros(33, 35, 37, device="cuda")
    calls(probability)[name]()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mask = calls(probability)[name]()
    for seed in range(20):
        probability.copy_(torch.rand(33, 35, 37, generator=torch.Generator().manual_seed(seed)) ** 8)
        graph.replay()
        assert mask.any()
        assert torch.equal(mask, calls(probability)[name]())


@pytest.mark.parametrize("kind", KINDS)
def test_every_run_gives_the_same_mask(kind: str) -> None:
    probability = torch.from_numpy(brain()[kind].astype(np.float32)).cuda()
    expected = lesion_mask(probability, **RULE)
    for _ in range(100):
        assert torch.equal(lesion_mask(probability, **RULE), expected)


def test_the_masks_of_the_interpreter_are_labelled_too() -> None:
    for mask in MASKS.values():
        assert_as_arrays(mask, 26)
