"""Gradients of instance_norm_act: every form against float64, what is kept for them, and which form runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import instance_norm_act as norm
from kernels import instance_norm_act_operator as operator
from kernels.dispatch import choose_instance_norm_act
from tests.kernels.norm_cases import (
    CASES,
    EPS,
    GRADIENT_TOLERANCES,
    Case,
    Problem,
    exact,
    gradient_errors,
    gradients,
    leaves,
    problem,
    tolerance,
    towards,
)

DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in GRADIENT_TOLERANCES]
SMALL = Case(shape=(2, 8, 5, 4, 3))
HARD = "weights near 0 and below"
RECOVERABLE = {
    name: case
    for name, case in CASES.items()
    if not case.residual and case.slope >= norm.SMALLEST_SLOPE and name != HARD
}


def _form(case: Case, implementation: str, *, recover: bool) -> norm.Form:
    assert implementation in ("operator", "triton")
    return norm.Form(
        implementation=implementation,  # type: ignore[arg-type]
        eps=EPS,
        slope=case.slope,
        inplace=False,
        recover=recover,
    )


def _check(case: Case, dtype: torch.dtype, device: torch.device | str, implementation: str, *, recover: bool) -> None:
    given = problem(case, dtype, device)
    of = leaves(given)
    y = norm.InstanceNormAct.apply(of.x, of.weight, of.bias, of.residual, _form(case, implementation, recover=recover))
    found = gradients(y, of, towards(given))
    errors = gradient_errors(found, y, given, case.slope)
    assert max(errors.values()) < tolerance(case, dtype, GRADIENT_TOLERANCES), errors
    assert (found["x"].dtype, found["x"].stride()) == (dtype, given.x.stride())
    assert {found["weight"].dtype, found["bias"].dtype} == {torch.float32}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_the_gradients_of_the_cpu_form_are_the_formulas(name: str, dtype: torch.dtype) -> None:
    _check(CASES[name], dtype, "cpu", "operator", recover=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RECOVERABLE)
def test_the_gradients_of_the_cpu_form_recover_x_hat_from_y(name: str, dtype: torch.dtype) -> None:
    _check(RECOVERABLE[name], dtype, "cpu", "operator", recover=True)


@pytest.mark.parametrize("name", CASES)
def test_the_gradients_of_the_triton_form_are_the_formulas(name: str, triton_device: torch.device) -> None:
    with _few_programs():
        _check(CASES[name], torch.float32, triton_device, "triton", recover=False)


@pytest.mark.parametrize("name", RECOVERABLE)
def test_the_gradients_of_the_triton_form_recover_x_hat_from_y(name: str, triton_device: torch.device) -> None:
    with _few_programs():
        _check(RECOVERABLE[name], torch.float32, triton_device, "triton", recover=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("recover", [False, True])
@pytest.mark.parametrize("name", ["100 voxels, 3 samples, residual", "101 voxels in a line", "ReLU", "mean 30"])
def test_the_gradients_of_the_triton_form_in_16_bit_are_the_formulas(
    name: str, recover: bool, dtype: torch.dtype, triton_device: torch.device
) -> None:
    with _few_programs():
        _check(CASES[name], dtype, triton_device, "triton", recover=recover and name in RECOVERABLE)


@contextmanager
def _few_programs(programs: int = 8, tile: int = 1 << 14) -> Iterator[None]:
    """Eight shares in all, because a map without a GPU has no number of multiprocessors, and tiles of 16384 values.

    The interpreter takes its time a program and not a value.
    """
    from kernels import instance_norm_act_backward_triton as backward
    from kernels import instance_norm_act_triton as forward

    run, run_backward = forward.instance_norm_act_triton, backward.instance_norm_act_triton_backward
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(forward, "TILE", tile)
        patched.setattr(
            forward, "instance_norm_act_triton", lambda *given, **options: run(*given, **options, programs=programs)
        )
        patched.setattr(
            backward,
            "instance_norm_act_triton_backward",
            lambda *given, **options: run_backward(*given, **options, programs=programs),
        )
        yield


@pytest.mark.parametrize("programs", [1, 3, 400])
def test_the_shares_of_a_map_do_not_change_its_gradients(
    programs: int, triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One share, several with a short last one, and one a tile, which are more than combine reads at once."""
    from kernels import instance_norm_act_backward_triton as backward

    monkeypatch.setattr(backward, "SHARES", 8)
    with _few_programs(programs, tile=1 << 12):
        half = backward.tile_of(128)[0] // 2
        shares = -(-23 * 23 // (backward.share_tiles(23 * 23, half, 1, programs) * half))
        assert (shares > backward.SHARES) == (programs == 400)
        assert 23 * 23 % half != 0
        _check(Case(shape=(1, 128, 1, 23, 23)), torch.float32, triton_device, "triton", recover=True)


@pytest.mark.parametrize("name", CASES)
def test_the_gradients_of_a_map_of_many_parts_are_the_formulas(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a large float32 map; where it has several parts the last one is of rows that cannot be read 16 as one."""
    monkeypatch.setattr(operator, "PLAIN_ROWS", 0)
    monkeypatch.setattr(operator, "GRADIENT_VALUES", 1 << 12)
    _check(CASES[name], torch.float32, "cpu", "operator", recover=False)
    if name in RECOVERABLE:
        _check(CASES[name], torch.float32, "cpu", "operator", recover=True)


@pytest.mark.parametrize("recover", [False, True])
def test_a_mean_of_the_gradient_costs_no_digits(recover: bool) -> None:
    """Which a plain float32 sum of 125,000 numbers of one sign does."""
    case = Case(shape=(1, 8, 50, 50, 50))
    given = problem(case, torch.float32)
    of, direction = leaves(given), towards(given) + 3
    y = _call(of, case, recover=recover)
    found = gradients(y, of, direction)
    doubled = replace(of, x=of.x.detach().double().requires_grad_())
    expected = gradients(exact(doubled, case.slope, y > 0), doubled, direction.double())
    for name, value in found.items():  # 3e-5 by plain sums
        assert (value - expected[name]).norm() < 1e-6 * expected[name].norm()


def test_a_weight_of_0_keeps_x_and_has_its_gradient() -> None:
    case = CASES[HARD]
    given = problem(case, torch.float32)
    of = leaves(given)
    assert not norm.recoverable(of.weight, of.bias)
    y = _call(of, case)
    assert _kept(y) == {of.x.data_ptr(), y.data_ptr()}
    found = gradients(y, of, towards(given))
    assert max(gradient_errors(found, y, given, case.slope).values()) < GRADIENT_TOLERANCES[torch.float32]
    assert (found["weight"][:4] != 0).all()  # what a recovered x_hat would not know


@pytest.mark.parametrize("implementation", ["operator", "triton"])
def test_a_weight_that_has_gone_to_0_makes_nothing_infinite(implementation: str, triton_device: torch.device) -> None:
    """recover=True from a caller who looked too long ago: the channels that still can be recovered are as they were."""
    case = CASES[HARD]
    given = problem(case, torch.bfloat16, triton_device)
    of = leaves(given)
    with _few_programs():
        y = norm.InstanceNormAct.apply(of.x, of.weight, of.bias, None, _form(case, implementation, recover=True))
        found = gradients(y, of, towards(given))
    assert all(value.isfinite().all() for value in found.values())
    assert found["weight"][:2].tolist() == [0, 0]
    well = slice(4, None)
    part = replace(given, x=given.x[:, well], weight=given.weight[well], bias=given.bias[well])
    direction = towards(given)[:, well]
    expected = gradients(exact(of := leaves(part), case.slope, y[:, well] > 0), of, direction.double())
    for name in ("weight", "bias"):
        assert (found[name][well] - expected[name]).norm() < 1e-2 * expected[name].norm()


def test_where_y_is_enough() -> None:
    ones, bias = torch.ones(3), torch.tensor([0.0, 16.0, -16.0])
    assert norm.recoverable(ones, bias)
    assert norm.recoverable(-ones, bias)
    assert not norm.recoverable(0.99 * ones, bias)
    assert norm.recoverable(torch.tensor([norm.SMALLEST_WEIGHT]), torch.zeros(1))
    assert not norm.recoverable(torch.zeros(1), torch.zeros(1))


def test_half_precision_costs_a_recovered_x_hat_no_more_than_a_kept_one() -> None:
    """Root mean square errors of x_hat, weights between 0.5 and 1.5, biases normal: from y and from a rounded x_hat."""
    case = Case(shape=(1, 64, 16, 16, 16))
    given = problem(case, torch.bfloat16)
    y = _call(given, case).float()
    z = torch.where(y > 0, y, y / case.slope)
    weight, bias = (each[:, None, None, None] for each in (given.weight, given.bias))
    x = given.x.double()
    x_hat = (x - x.mean((2, 3, 4), keepdim=True)) / (x.var((2, 3, 4), correction=0, keepdim=True) + EPS).sqrt()
    recovered = ((z - bias) / weight - x_hat).square().mean().sqrt()
    rounded = (x_hat.bfloat16().double() - x_hat).square().mean().sqrt()
    assert recovered < 3 * rounded


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


def _kept(y: Tensor) -> set[int]:
    """Addresses of the maps that y keeps for its gradient."""
    assert y.grad_fn is not None
    saved = y.grad_fn.saved_tensors  # type: ignore[attr-defined]
    return {tensor.data_ptr() for tensor in saved if tensor is not None and tensor.ndim == 5}


def test_only_y_is_kept_and_x_is_overwritten() -> None:
    given = problem(SMALL, torch.float32)
    expected = exact(given, SMALL.slope)
    of = leaves(given)
    x = of.x * 1  # a fresh map, as a convolution's
    y = _call(replace(of, x=x), SMALL, inplace=True)
    assert y is x
    assert _kept(y) == {x.data_ptr()}
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    found = gradients(y, of, towards(given))
    assert max(gradient_errors(found, y, given, SMALL.slope).values()) < GRADIENT_TOLERANCES[torch.float32]


@pytest.mark.parametrize(
    ("case", "recover"),
    [(SMALL, False), (replace(SMALL, residual=True), True), (replace(SMALL, slope=0.0), True)],
    ids=["not asked to", "residual", "ReLU"],
)
def test_x_is_kept_and_not_overwritten_where_y_is_not_enough(case: Case, recover: bool) -> None:
    given = problem(case, torch.float32)
    before = given.x.clone()
    of = leaves(given)
    x = of.x * 1
    y = _call(replace(of, x=x), case, inplace=True, recover=recover)
    assert torch.equal(x, before)
    assert _kept(y) == {x.data_ptr(), y.data_ptr()}  # y: of the next convolution
    found = gradients(y, of, towards(given))
    assert max(gradient_errors(found, y, given, case.slope).values()) < GRADIENT_TOLERANCES[torch.float32]


def test_the_triton_form_keeps_one_map(triton_device: torch.device) -> None:
    given = leaves(problem(SMALL, torch.float32, triton_device))
    with _few_programs():
        for recover in (False, True):
            form = _form(SMALL, "triton", recover=recover)
            y = norm.InstanceNormAct.apply(given.x, given.weight, given.bias, None, form)
            assert _kept(y) == {(y if recover else given.x).data_ptr()}


def test_a_view_and_a_leaf_are_not_overwritten() -> None:
    given = problem(SMALL, torch.float32)
    before = given.x.clone()
    of = leaves(given)
    _call(of, SMALL, inplace=True)
    _call(replace(of, x=of.x.view_as(of.x)), SMALL, inplace=True)
    assert torch.equal(of.x, before)


@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "residual"])
def test_gradients_flow_through_whatever_wants_them(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(SMALL, residual=True)
    given = problem(case, torch.float32)
    monkeypatch.setattr(norm, "instance_norm_act_reference", None)  # proves that it does not run
    leaf = getattr(given, wanted).requires_grad_()
    assert choose_instance_norm_act(given.x, given.weight, given.bias, given.residual).implementation == "operator"
    (found,) = torch.autograd.grad(_call(given, case), leaf, towards(given))
    (expected,) = torch.autograd.grad(exact(given, case.slope), leaf, towards(given).double())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_layers_of_torch_give_the_same_gradients() -> None:
    given = problem(SMALL, torch.float32)
    ours, theirs = leaves(given), leaves(replace(given, x=given.x.contiguous()))
    assert choose_instance_norm_act(theirs.x, theirs.weight, theirs.bias).implementation == "reference"
    found = gradients(_call(ours, SMALL), ours, towards(given))
    for name, expected in gradients(_call(theirs, SMALL), theirs, towards(given)).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_between_convolutions_under_autocast(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """convolution, norm, convolution, norm, as the network calls it: the gradients of all weights of torch's layers."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn((2, 4, 6, 7, 5), generator=generator).to(memory_format=torch.channels_last_3d)
    kernels = [torch.randn((8, channels, 3, 3, 3), generator=generator) / 10 for channels in (4, 8)]
    vectors = [torch.rand((2, 8), generator=generator) + 0.5 for _ in kernels]

    def run() -> list[Tensor]:
        weights = [kernel.clone().requires_grad_() for kernel in kernels]
        affine = [vector.clone().requires_grad_() for vector in vectors]
        x = image
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            for weight, (scale, shift) in zip(weights, affine, strict=True):
                x = F.conv3d(x, weight, padding=1)
                x = x.contiguous(memory_format=torch.channels_last_3d)  # not every CPU's bfloat16 answer is
                x = norm.instance_norm_act(x, scale, shift, eps=EPS, slope=0.01, inplace=True)
        assert x.dtype == dtype
        return list(torch.autograd.grad((x.float() * image.mean(1, keepdim=True)).sum(), [*weights, *affine]))

    with monkeypatch.context() as patched:
        patched.setattr(norm, "instance_norm_act_reference", None)
        found = run()
    monkeypatch.setenv("STROKENET_KERNELS", "reference")
    for ours, theirs in zip(found, run(), strict=True):
        share = 1e-5 if dtype == torch.float32 else 2e-2
        assert (ours - theirs).norm() < share * theirs.norm()


def test_a_gradient_in_another_layout_is_read_as_it_is() -> None:
    """Of a sum it has no memory of its own, after a concatenation it lies between others."""
    given = problem(SMALL, torch.float32)
    of = leaves(given)
    (found,) = torch.autograd.grad(_call(of, SMALL).sum(), of.weight)
    (expected,) = torch.autograd.grad(exact(given := leaves(given), SMALL.slope).sum(), given.weight)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    beside = torch.cat([_call(of, SMALL), of.x], 1)[:, :8]
    alone = _call(of, SMALL)
    for one, other in zip(
        gradients(beside, of, towards(given).contiguous()).values(),
        gradients(alone, of, towards(given)).values(),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_a_gradient_of_the_gradient_is_refused() -> None:
    given = leaves(problem(SMALL, torch.float32))
    direction = towards(given).requires_grad_()
    (first,) = torch.autograd.grad(_call(given, SMALL), given.x, direction, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_an_x_that_is_needed_again_is_missed_and_not_silently_wrong() -> None:
    given = leaves(problem(SMALL, torch.float32))
    x = given.x.exp()  # its gradient reads its answer
    y = _call(replace(given, x=x), SMALL, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum(), given.x)


def test_a_compiled_network_takes_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    given = leaves(problem(SMALL, torch.float32))
    found = gradients(_call(given, SMALL), given, towards(given))
    monkeypatch.setattr(norm.InstanceNormAct, "apply", None)
    compiled = torch.compile(_call, backend="aot_eager", fullgraph=True)
    for name, expected in gradients(compiled(given, SMALL), given, towards(given)).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()
