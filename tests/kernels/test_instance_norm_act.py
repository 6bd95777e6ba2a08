"""Instance normalisation, residual and LeakyReLU: every form against the formula in float64, and which form runs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels import instance_norm_act as norm
from kernels import instance_norm_act_operator
from kernels.dispatch import choices, choose_instance_norm_act
from tests.kernels.norm_cases import CASES, EPS, TOLERANCES, Case, Problem, error, exact, problem, tolerance

DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in TOLERANCES]
SMALL = Case(shape=(2, 8, 5, 4, 3), residual=True)


def _call(given: Problem, case: Case, *, inplace: bool = False) -> Tensor:
    return norm.instance_norm_act(
        given.x, given.weight, given.bias, eps=EPS, slope=case.slope, residual=given.residual, inplace=inplace
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_the_cpu_form_is_the_formula(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    given = problem(case, dtype)
    before = given.x.clone()
    y, mean, rstd = norm.instance_norm_act_operator(
        given.x, given.weight, given.bias, eps=EPS, slope=case.slope, residual=given.residual
    )
    assert error(y, given, case) < tolerance(case, dtype)
    assert (y.dtype, y.shape, y.stride()) == (dtype, given.x.shape, given.x.stride())
    assert torch.equal(given.x, before)
    _check_moments(mean, rstd, given)


def _check_moments(mean: Tensor, rstd: Tensor, given: Problem) -> None:
    x = given.x.double()
    deviation = (x.var((2, 3, 4), correction=0) + EPS).sqrt()
    assert (((mean - x.mean((2, 3, 4))) / deviation).abs()).max() < 5e-4
    assert (rstd * deviation - 1).abs().max() < 5e-4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_the_triton_form_is_the_formula(name: str, dtype: torch.dtype, triton_device: torch.device) -> None:
    from kernels.instance_norm_act_triton import instance_norm_act_triton

    case = CASES[name]
    given = problem(case, dtype, triton_device)
    y, mean, rstd = instance_norm_act_triton(
        given.x, given.weight, given.bias, eps=EPS, slope=case.slope, residual=given.residual, programs=8
    )
    assert error(y, given, case) < tolerance(case, dtype)
    assert (y.dtype, y.shape, y.stride()) == (dtype, given.x.shape, given.x.stride())
    _check_moments(mean, rstd, given)


@pytest.mark.parametrize("programs", [1, 3, 400])
def test_the_shares_of_a_map_do_not_change_its_norm(programs: int, triton_device: torch.device) -> None:
    """One share, several with a short last one, and one a tile, which are more than combine reads at once."""
    from kernels.instance_norm_act_triton import SHARES, row_moments_triton, share_tiles, tile_of

    case = Case(shape=(1, 128, 1, 67, 67), mean=30.0, deviation=1.0)
    x = problem(case, torch.float32, triton_device).x
    voxels, tile = 67 * 67, tile_of(128)[0]
    tiles = share_tiles(voxels, tile, 1, programs)
    shares = -(-voxels // (tiles * tile))
    assert (shares > SHARES) == (programs == 400)
    assert shares <= programs
    assert voxels % (tiles * tile) != 0
    mean, rstd = row_moments_triton(x, eps=EPS, programs=programs)
    exactly = x.double().flatten(2)
    torch.testing.assert_close(mean.double(), exactly.mean(2), rtol=0, atol=5e-6)
    torch.testing.assert_close(rstd.double(), (exactly.var(2, correction=0) + EPS).rsqrt(), rtol=2e-6, atol=0)


def test_a_tile_covers_every_channel_and_wastes_little() -> None:
    pytest.importorskip("triton")
    from kernels.instance_norm_act_triton import TILE, tile_of

    for channels in range(1, 513):
        voxels, width = tile_of(channels)
        assert voxels * width == TILE
        assert width & (width - 1) == 0
        read = -(-channels // width) * width
        assert read < 2 * channels
        if channels % 32 == 0:
            assert read == channels


@pytest.mark.parametrize("voxels", [1, 27, 216, 8**3, 24**3, 128**3, 192 * 224 * 192])
@pytest.mark.parametrize(("samples", "channels"), [(1, 32), (1, 320), (2, 64), (8, 512)])
def test_a_gpu_is_filled_without_idle_programs(voxels: int, samples: int, channels: int) -> None:
    pytest.importorskip("triton")
    from kernels.instance_norm_act_triton import share_tiles, tile_of

    tile, width = tile_of(channels)
    others, wanted = samples * channels // width, 4 * 132
    share = share_tiles(voxels, tile, others, wanted) * tile
    shares = -(-voxels // share)
    assert (shares - 1) * share < voxels  # the last one has work
    assert others * shares <= max(wanted, others)
    if voxels >= 2 * wanted * tile:
        assert others * shares > 0.7 * wanted


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_map_of_many_parts_is_the_formula(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["several blocks"]
    given = problem(case, dtype)
    monkeypatch.setattr(instance_norm_act_operator, "BLOCK_VALUES", 96 * 100)
    assert error(_call(given, case), given, case) < tolerance(case, dtype)


def test_the_cpu_form_writes_to_x_in_place() -> None:
    given = problem(SMALL, torch.float32)
    expected = exact(given, SMALL.slope)
    assert _call(given, SMALL, inplace=True) is given.x
    torch.testing.assert_close(given.x.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_triton_form_writes_to_x_in_place(triton_device: torch.device) -> None:
    from kernels.instance_norm_act_triton import instance_norm_act_triton

    given = problem(SMALL, torch.float32, triton_device)
    expected = exact(given, SMALL.slope)
    y = instance_norm_act_triton(
        given.x, given.weight, given.bias, eps=EPS, slope=0.01, residual=given.residual, inplace=True, programs=8
    )[0]
    assert y is given.x
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_channels_last_map_takes_the_cpu_form(monkeypatch: pytest.MonkeyPatch) -> None:
    given = problem(SMALL, torch.float32)
    given.weight.requires_grad_()  # as a parameter's
    monkeypatch.setattr(norm, "instance_norm_act_reference", None)  # proves that it does not run
    with torch.no_grad():
        choice = choose_instance_norm_act(given.x, given.weight, given.bias, given.residual)
        y = _call(given, SMALL)
    assert (choice.operator, choice.implementation) == ("instance_norm_act", "operator")
    assert error(y, given, SMALL) < TOLERANCES[torch.float32]


def test_a_residual_that_is_x_is_not_overwritten_before_it_is_read() -> None:
    given = problem(SMALL, torch.float32)
    own = Problem(x=given.x, weight=given.weight, bias=given.bias, residual=given.x)
    expected = exact(own, SMALL.slope)
    torch.testing.assert_close(_call(own, SMALL, inplace=True).double(), expected, rtol=1e-5, atol=1e-5)


def _other_layouts() -> dict[str, Tensor]:
    x = problem(SMALL, torch.float32).x
    return {
        "contiguous": x.contiguous(),
        "one channel": x[:, :1].contiguous(memory_format=torch.channels_last_3d),
        "every second voxel": x[..., ::2],
        "half of the channels": x[:, ::2],
    }


@pytest.mark.parametrize("name", _other_layouts())
def test_another_layout_takes_the_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = _other_layouts()[name]
    given = Problem(x=x, weight=torch.rand(x.shape[1]), bias=torch.rand(x.shape[1]), residual=None)
    monkeypatch.setattr(norm, "instance_norm_act_operator", None)
    y = _call(given, SMALL)
    assert "not channels_last_3d" in choose_instance_norm_act(x, given.weight, given.bias).why
    torch.testing.assert_close(y.double(), exact(given, SMALL.slope), rtol=1e-5, atol=1e-5)


def test_float64_and_a_residual_that_broadcasts_take_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    given = problem(SMALL, torch.float32)
    monkeypatch.setattr(norm, "instance_norm_act_operator", None)
    double = Problem(x=given.x.double(), weight=given.weight.double(), bias=given.bias.double(), residual=None)
    assert "float64" in choose_instance_norm_act(double.x, double.weight, double.bias).why
    torch.testing.assert_close(_call(double, SMALL), exact(double, SMALL.slope), rtol=1e-12, atol=1e-12)
    plane = Problem(x=given.x, weight=given.weight, bias=given.bias, residual=torch.rand(2, 8, 1, 4, 3))
    torch.testing.assert_close(_call(plane, SMALL).double(), exact(plane, SMALL.slope), rtol=1e-5, atol=1e-5)


def test_the_environment_chooses_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    given = problem(SMALL, torch.float32)
    fast = _call(given, SMALL)
    monkeypatch.setenv("STROKENET_KERNELS", "reference")
    monkeypatch.setattr(norm, "instance_norm_act_operator", None)
    torch.testing.assert_close(_call(given, SMALL), fast, rtol=1e-5, atol=1e-5)


def test_a_gpu_takes_triton_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode():  # a tensor that says it is on a GPU, and has no memory
        x = torch.empty(1, 8, 4, 4, 4, device="cuda").to(memory_format=torch.channels_last_3d)
        vector = torch.empty(8, device="cuda")
        monkeypatch.setattr("kernels.dispatch.missing_for_triton", lambda: "")
        assert choose_instance_norm_act(x, vector, vector).implementation == "triton"
        assert choose_instance_norm_act(x, vector.cpu(), vector).implementation == "reference"
        monkeypatch.setattr("kernels.dispatch.missing_for_triton", lambda: "triton is not installed")
        choice = choose_instance_norm_act(x, vector, vector)
        assert (choice.implementation, choice.why) == ("reference", "triton is not installed")


def test_the_doctor_lists_the_norm() -> None:
    listed = {choice.operator: choice.implementation for choice in choices()}
    assert listed["instance_norm_act"] == ("triton" if torch.cuda.is_available() else "operator")


def test_one_voxel_has_no_variance() -> None:
    given = problem(Case(shape=(2, 8, 1, 1, 1)), torch.float32)
    with pytest.raises(ValueError, match="more than 1 spatial element"):
        _call(given, SMALL)


def test_a_negative_slope_is_refused() -> None:
    with pytest.raises(ValueError, match="slope -0.1"):
        _call(problem(SMALL, torch.float32), Case(shape=SMALL.shape, slope=-0.1))


def test_triton_is_not_imported_where_it_does_not_run() -> None:
    code = (
        "import sys, torch; from kernels.instance_norm_act import instance_norm_act as run;"
        "x = torch.randn(1, 8, 4, 4, 4).to(memory_format=torch.channels_last_3d);"
        "before = 'triton' in sys.modules;"
        "run(x, torch.ones(8), torch.zeros(8), eps=1e-5, slope=0.01);"
        "sys.exit('kernels.instance_norm_act_triton' in sys.modules or ('triton' in sys.modules) != before)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
