"""Steps: the fast form and the reference learn the same, a bad step changes nothing, and momentum survives a change."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from planner.plan import Plan
from strokenet.train.run import FoldCases, Run, start_run
from strokenet.train.step import REFERENCE, Compiled, Compute, Speedups, arrange, make_step
from strokenet.train.train import train
from strokenet.workspace import Workspace
from tests.plans import tiny_network, tiny_plan
from tests.train.workspaces import make_workspace, short

FAST = Speedups()
FORMS = pytest.mark.parametrize("speedups", [REFERENCE, FAST], ids=["reference", "fast"])
RESIDUAL = tiny_plan(network=tiny_network(kind="residual"), batch_dice=True)
Batch = tuple[Tensor, Tensor]


def started(folder: Path, speedups: Speedups, plan: Plan | None = None, **changes: Any) -> tuple[Run, Compute]:
    """A run at its first step, without cases."""
    run = start_run(Workspace(folder), plan or tiny_plan(), short(**changes), FoldCases(train=(), val=()))
    run.network.train()
    return run, make_step(run, speedups)


def batch(seed: int) -> Batch:
    """Noise, brighter where the label is."""
    generator = torch.Generator().manual_seed(seed)
    label = (torch.rand(2, 16, 16, 16, generator=generator) > 0.9).long()
    return torch.randn(2, 2, 16, 16, 16, generator=generator) + 2 * label[:, None], label


def distance(one: Run, other: Run) -> float:
    """Of the weights, by norm, relative."""
    a, b = (torch.cat([p.detach().flatten() for p in run.network.parameters()]).double() for run in (one, other))
    return float((a - b).norm() / a.norm())


@pytest.mark.parametrize("plan", [tiny_plan(), RESIDUAL], ids=["plain", "residual, batch Dice"])
def test_ten_fast_steps_are_the_references_but_for_rounding(tmp_path: Path, plan: Plan) -> None:
    (one, plain), (other, fast) = (started(tmp_path / str(n), s, plan) for n, s in enumerate((REFERENCE, FAST)))
    start, _ = started(tmp_path / "start", REFERENCE, plan)
    for seed in range(10):
        losses = [compute(*batch(seed))[0] for compute in (plain, fast)]
        torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)
    assert distance(one, other) < 1e-3 * distance(one, start)


@pytest.mark.parametrize("name", ["channels_last", "without_bias", "fused_update"])
def test_each_speedup_alone_learns_the_same(tmp_path: Path, name: str) -> None:
    (one, plain), (other, fast) = (started(tmp_path / str(n), s) for n, s in enumerate((REFERENCE, _with(name))))
    for seed in range(3):
        plain(*batch(seed))
        fast(*batch(seed))
    assert distance(one, other) < 1e-6


def _with(name: str) -> Speedups:
    return Speedups(**{field: field == name for field in ("channels_last", "without_bias", "fused_update", "graph")})


@FORMS
@pytest.mark.parametrize("first", [True, False])
def test_a_bad_step_changes_neither_weights_nor_momentum(tmp_path: Path, speedups: Speedups, first: bool) -> None:
    (one, compute), (other, undisturbed) = (started(tmp_path / name, speedups) for name in ("one", "other"))
    good = [batch(seed) for seed in range(2)]
    image, label = batch(9)
    image[0, 0, 3, 3, 3] = math.nan
    steps = [(image, label), *good] if first else [good[0], (image, label), good[1]]
    outcomes = [compute(*values).tolist() for values in steps]
    assert [bool(ok) for _, ok in outcomes] == [values[0] is not image for values in steps]
    for values in good:
        undisturbed(*values)
    for a, b in zip(one.network.parameters(), other.network.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("before", "after"), [(REFERENCE, FAST), (FAST, REFERENCE)])
def test_a_run_may_change_its_form(tmp_path: Path, before: Speedups, after: Speedups) -> None:
    """As a resumed one does: the optimizer's state is loaded, then the new form is made."""
    whole, plain = started(tmp_path / "whole", REFERENCE)
    for seed in range(4):
        plain(*batch(seed))
    first, compute = started(tmp_path / "first", before)
    for seed in range(2):
        compute(*batch(seed))
    second = start_run(Workspace(tmp_path / "second"), tiny_plan(), short(), FoldCases(train=(), val=()))
    second.network.load_state_dict(first.network.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    compute = make_step(second, after)
    for seed in (2, 3):
        compute(*batch(seed))
    assert distance(whole, second) < 1e-6


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_loss_curves_of_both_forms_lie_within_the_noise_of_seeds(tmp_path: Path, precision: str) -> None:
    """Three seeds show the noise. Held-out whole volumes are scored too."""
    dice: dict[str, list[float]] = {"fast": [], "reference": []}
    curves: dict[str, list[Tensor]] = {"fast": [], "reference": []}
    for step, seed in ((step, seed) for step in dice for seed in range(3)):
        workspace = make_workspace(tmp_path / f"{step} {seed}")
        config = short(seed=seed, step=step, precision=precision, epochs=8, iterations=8, validate_every=8)
        history = train(workspace, config).history
        curves[step].append(torch.tensor([row["train_loss"] for row in history]))
        dice[step].append(history[-1]["volume_dice"])
    fast, reference = (torch.stack(curves[step]) for step in ("fast", "reference"))  # (seeds, epochs)
    noise = (reference.max(0).values - reference.min(0).values).mean()
    assert (fast - reference).abs().mean() < (0.01 if precision == "fp32" else 0.5) * noise
    spread = max(dice["reference"]) - min(dice["reference"])
    assert abs(sum(dice["fast"]) - sum(dice["reference"])) / 3 < max(0.02, spread)


def test_the_learning_rate_that_a_recording_left_is_a_number_again(tmp_path: Path) -> None:
    optimizer = started(tmp_path, FAST)[0].optimizer
    optimizer.param_groups[0]["lr"] = torch.tensor(0.25)
    arrange(optimizer, fused=True)
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert isinstance(optimizer.param_groups[0]["lr"], float)


def test_compiling_that_fails_is_said_once_and_done_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        def compiled(image: Tensor) -> Tensor:
            raise RuntimeError("no compiler\nat all")

        return compiled

    monkeypatch.setattr(torch, "compile", refuse)
    module = Compiled(nn.Identity())
    x = torch.ones(1)
    with caplog.at_level(logging.WARNING, "strokenet"):
        assert module(x) is x
        assert module(x) is x
    assert caplog.messages == ["--compile: torch.compile failed and the run goes on without it (no compiler)"]


def test_memory_that_runs_out_is_no_failure_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(image: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: full)
    with pytest.raises(torch.OutOfMemoryError):
        Compiled(nn.Identity())(torch.ones(1))
