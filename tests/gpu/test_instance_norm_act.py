"""Instance norm on a GPU: the interpreter's cases, maps of the network's size, and the path that is taken."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import instance_norm_act as norm
from kernels.dispatch import choose_instance_norm_act
from tests.kernels.norm_cases import CASES, EPS, TOLERANCES, Case, Problem, error, exact, problem, tolerance

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch sees")

DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in TOLERANCES]
FULL_SIZE = {
    "full resolution": Case(shape=(1, 32, 128, 128, 128), background=0.4),
    "full resolution, 2 samples, residual": Case(shape=(2, 32, 96, 112, 80), residual=True),
    "one level down": Case(shape=(2, 64, 64, 64, 64), mean=30.0, deviation=1.0),
    "the bottleneck": Case(shape=(2, 320, 8, 8, 8)),
    "odd": Case(shape=(3, 33, 31, 37, 41), residual=True),
}


def _call(given: Problem, case: Case, *, inplace: bool = False) -> Tensor:
    return norm.instance_norm_act(
        given.x, given.weight, given.bias, eps=EPS, slope=case.slope, residual=given.residual, inplace=inplace
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


def test_gradients_take_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(shape=(2, 8, 5, 4, 3), residual=True)
    given = problem(case, torch.float32, "cuda")
    monkeypatch.setattr("kernels.instance_norm_act_triton.instance_norm_act_triton", None)
    given.weight.requires_grad_()
    (found,) = torch.autograd.grad(_call(given, case).sum(), given.weight)
    (expected,) = torch.autograd.grad(exact(given, case.slope).sum(), given.weight)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_map_on_the_second_gpu_is_normed_there() -> None:
    case = CASES["63 voxels"]
    given = problem(case, torch.float32, "cuda:1")
    y = _call(given, case)
    assert y.device == given.x.device
    assert error(y, given, case) < tolerance(case, torch.float32)
