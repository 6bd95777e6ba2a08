"""Instance norm on a GPU: the interpreter's cases, maps of the network's size, and the path that is taken."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels import instance_norm_act as norm
from kernels.dispatch import choose_instance_norm_act
from tests.kernels.norm_cases import (
    CASES,
    EPS,
    GRADIENT_TOLERANCES,
    TOLERANCES,
    Case,
    Problem,
    error,
    gradient_errors,
    gradients,
    leaves,
    problem,
    tolerance,
    towards,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch sees")

DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in TOLERANCES]
FULL_SIZE = {
    "full resolution": Case(shape=(1, 32, 128, 128, 128), background=0.4),
    "full resolution, 2 samples, residual": Case(shape=(2, 32, 96, 112, 80), residual=True),
    "one level down": Case(shape=(2, 64, 64, 64, 64), mean=30.0, deviation=1.0),
    "the bottleneck": Case(shape=(2, 320, 8, 8, 8)),
    "odd": Case(shape=(3, 33, 31, 37, 41), residual=True),
}


def _call(given: Problem, case: Case, *, inplace: bool = False, recover: bool | None = None) -> Tensor:
    return norm.instance_norm_act(
        given.x,
        given.weight,
        given.bias,
        eps=EPS,
        slope=case.slope,
        residual=given.residual,
        inplace=inplace,
        recover=recover,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*CASES, *(f"large: {name}" for name in FULL_SIZE)])
def test_the_gpu_form_is_the_formula(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    case = FULL_SIZE[name.removeprefix("large: ")] if name.startswith("large: ") else CASES[name]
    given = problem(case, dtype, "cuda")
    if choose_instance_norm_act(given.x, given.weight, given.bias, given.residual).implementation == "triton":
        monkeypatch.setattr(norm, "instance_norm_act_reference", None)  # proves that it does not run
    else:
        assert case.shape[1] == 1  # a map of one channel is contiguous too
    before = given.x.clone()
    y = _call(given, case)
    assert error(y, given, case) < tolerance(case, dtype)
    assert torch.equal(given.x, before)
    in_place = _call(given, case, inplace=True)
    assert torch.equal(in_place, y)  # the same kernels on the same numbers, whatever order the programs run in
    assert case.shape[1] == 1 or in_place is given.x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recover", [False, True])
@pytest.mark.parametrize("name", [*CASES, *(f"large: {name}" for name in FULL_SIZE)])
def test_the_gradients_are_the_formulas(
    name: str, recover: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = FULL_SIZE[name.removeprefix("large: ")] if name.startswith("large: ") else CASES[name]
    if case.weights and recover:
        pytest.skip("x_hat cannot be recovered where a weight is near 0: the caller has to look")
    given = problem(case, dtype, "cuda")
    if case.shape[1] > 1:  # a map of one channel is contiguous too
        monkeypatch.setattr(norm, "instance_norm_act_reference", None)  # proves that it does not run
    of = leaves(given)
    y = _call(of, case, recover=recover)
    found = gradients(y, of, towards(given))
    errors = gradient_errors(found, y, given, case.slope)
    assert max(errors.values()) < tolerance(case, dtype, GRADIENT_TOLERANCES), errors
    again = gradients(_call(of, case, recover=recover), of, towards(given))
    assert all(torch.equal(found[each], again[each]) for each in found)


def test_a_step_with_gradients_can_be_captured_in_a_graph() -> None:
    """Forward and backward, x overwritten: nothing waits for the GPU, and a replay computes from new values."""
    case = Case(shape=(2, 32, 24, 20, 16))
    given = problem(case, torch.bfloat16, "cuda")
    of, direction = leaves(given), towards(given)

    def step() -> dict[str, Tensor]:
        x = of.x * 1  # a fresh map, as a convolution's
        return gradients(_call(replace(of, x=x), case, inplace=True, recover=True), of, direction)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        of.x.copy_(-0.5 * of.x)
        of.weight.mul_(1.5)
    graph.replay()
    expected = step()
    assert all(torch.equal(captured[each], expected[each]) for each in expected)


def test_one_map_is_kept() -> None:
    case = Case(shape=(1, 32, 64, 64, 64))
    of = leaves(problem(case, torch.bfloat16, "cuda"))
    with torch.no_grad():
        x = of.x * 1
    _call(replace(of, x=x.clone()), case, inplace=True, recover=True)  # compiles, and warms the allocator
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = _call(replace(of, x=x), case, inplace=True, recover=True)
    assert y is x
    assert torch.cuda.memory_allocated() - before < 1e5  # moments: the map itself has 16 MB


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_map_on_the_second_gpu_is_normed_there() -> None:
    case = CASES["63 voxels"]
    given = problem(case, torch.float32, "cuda:1")
    y = _call(given, case)
    assert y.device == given.x.device
    assert error(y, given, case) < tolerance(case, torch.float32)
