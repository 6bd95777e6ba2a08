"""Steps of training: the peer's train_step and ours, from the same weights on the same batches.

Rounding alone keeps the two apart: the loss's gradient differs in the last digits. A step moves the weights by no more
than that. Over several steps such differences may grow, where an activation within rounding of 0 falls on the other
side of a LeakyReLU and takes the slope 1 for 0.01, or the reverse. That nothing else makes them grow is shown by a run
of ours whose LeakyReLUs take the slopes that the peer's took. Where large gradients are clipped they grow fastest, so
those networks are compared step by step and by the peer's slopes alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from planner.plan import NetworkKind, Plan
from strokenet.train.run import FoldCases, Run, TrainConfig, start_run
from strokenet.train.step import GRADIENT_NORM, REFERENCE, Compute, Speedups, make_step, set_rate
from strokenet.train.train import poly_lr
from strokenet.workspace import Workspace
from tests.peers import peer
from tests.peers.loss import EPOCHS, peer_targets, peer_trainer, random_plan
from tests.peers.network import copy_weights
from tests.peers.row import Row

STEP_TOLERANCE = 2.5e-7  # two units in the last place of 1; a step's weight decay is 6e-7
RUN_TOLERANCE = 1e-5
FAST_TOLERANCE = 1e-4  # of ten steps whose sums run in another order
SLOPES_TOLERANCE = 1e-6  # of ten steps by the peer's slopes


def rows(full: bool) -> Iterator[Row]:
    """Ten steps, a step each of a schedule of ten epochs: from the peer's state before every step, alone, and alone
    but for the slopes.
    """
    kinds: tuple[NetworkKind, ...] = ("plain", "residual")
    for kind, batch_dice in product(kinds, (False, True)):
        compared = [_train_all(kind, batch_dice, seed) for seed in range(12 if full else 4)]
        yield from _rows(f"{kind} networks, batch Dice {'on' if batch_dice else 'off'}", compared)


@dataclass(frozen=True, kw_only=True)
class _Compared:
    """Distances of our weights from the peer's.

    step: largest of any weight in ten steps, each from the peer's weights and momentum; of 1, or of the largest weight
    of the parameter where that is more. run: after ten steps on their own, by norm. crossed: activations that then had
    another sign. sloped: as `run`, by the peer's slopes. fast: as `run`, by the fast step. clipped: steps whose
    gradient was; strong: whether the heads were made so that it is.
    """

    step: float
    run: float
    crossed: int
    sloped: float
    fast: float
    clipped: int
    strong: bool


def _rows(on: str, compared: list[_Compared]) -> Iterator[Row]:
    yield Row(
        check="a step of training",
        on=f"{EPOCHS} steps of {len(compared)} {on}",
        difference=max(one.step for one in compared),
        tolerance=STEP_TOLERANCE,
        unit="of a weight",
        note=f"gradient clipped in {sum(one.clipped for one in compared)} steps",
    )
    free = [one for one in compared if not one.strong]
    yield Row(
        check=f"weights after {EPOCHS} steps",
        on=f"{len(free)} {on}",
        difference=max(one.run for one in free),
        tolerance=RUN_TOLERANCE,
        unit="of the weights' norm",
        note=_crossed_note(free),
        cause=_crossed_note(free) if any(one.crossed for one in free) else "",
        bound=10 * RUN_TOLERANCE,
    )
    yield Row(
        check=f"weights after {EPOCHS} fast steps",
        on=f"{len(free)} {on}",
        difference=max(one.fast for one in free),
        tolerance=FAST_TOLERANCE,
        unit="of the weights' norm",
        note="channels_last_3d, no biases before norms, fused update: sums in another order",
    )
    yield Row(
        check=f"weights after {EPOCHS} steps by the peer's slopes",
        on=f"{len(compared)} {on}",
        difference=max(one.sloped for one in compared),
        tolerance=SLOPES_TOLERANCE,
        unit="of the weights' norm",
        note="each LeakyReLU of ours takes the slope that the peer's took in the same step",
    )


def _crossed_note(free: list[_Compared]) -> str:
    """What is shown of the activations that had another sign."""
    crossed = [one for one in free if one.crossed]
    same = [one.run for one in free if not one.crossed]
    parts = [f"{sum(one.crossed for one in crossed)} activations of another sign in {len(crossed)} networks"]
    if crossed:
        parts.append(f"by the peer's slopes these are at most {max(one.sloped for one in crossed):.0e} apart")
    if same:
        parts.append(f"the others are at most {max(same):.0e} apart as they are")
    return "; ".join(parts)


def _train_all(kind: NetworkKind, batch_dice: bool, seed: int) -> _Compared:
    """The peer; our run; one that takes the peer's slopes; and one led, with the peer's state before every step."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    plan = replace(random_plan(rng, kind), batch_dice=batch_dice)
    theirs = peer_trainer(plan)
    steps, crossed, clipped, strong = [], 0, 0, seed % 2 == 1
    with _clipped_norms() as norms, TemporaryDirectory() as folder:
        ours, sloped, led = (_our_run(plan, Path(folder) / name, REFERENCE) for name in ("ours", "sloped", "led"))
        fast = _our_run(plan, Path(folder) / "fast", Speedups())
        if strong:
            _strengthen_heads(theirs.network)
        for run in (ours, sloped, fast):
            copy_weights(theirs.network, run.run.network)
        for epoch in range(EPOCHS):
            _copy_state(theirs, led)
            image, label = _random_batch(rng, plan)
            with _peer_signs(theirs.network) as their_signs:
                _peer_step(theirs, image, label, epoch)
            clipped += norms[-1] > GRADIENT_NORM
            with _our_signs() as our_signs:
                _our_step(ours, image, label, epoch)
            with _slopes_taken(their_signs):
                _our_step(sloped, image, label, epoch)
            _our_step(led, image, label, epoch)
            _our_step(fast, image, label, epoch)
            crossed += sum(peer.differing(a, b) for a, b in zip(their_signs, our_signs, strict=True))
            steps.append(_largest_difference(theirs.network, led.run.network))
    return _Compared(
        step=max(steps),
        run=_norm_difference(theirs.network, ours.run.network),
        crossed=crossed,
        sloped=_norm_difference(theirs.network, sloped.run.network),
        fast=_norm_difference(theirs.network, fast.run.network),
        clipped=clipped,
        strong=strong,
    )


@torch.no_grad()
def _largest_difference(theirs: nn.Module, other: nn.Module) -> float:
    return max(
        float((weight - other.get_parameter(name)).abs().max()) / max(1.0, float(weight.abs().max()))
        for name, weight in theirs.named_parameters()
    )


@torch.no_grad()
def _norm_difference(theirs: nn.Module, other: nn.Module) -> float:
    weights = torch.cat([weight.flatten() for weight in theirs.parameters()]).double()
    others = torch.cat([other.get_parameter(name).flatten() for name, _ in theirs.named_parameters()]).double()
    return float((weights - others).norm() / weights.norm())


def _peer_step(trainer: Any, image: Tensor, label: Tensor, epoch: int) -> None:
    trainer.lr_scheduler.step(epoch)
    trainer.network.train()
    trainer.train_step({"data": image.clone(), "target": peer_targets(trainer, label)})


@dataclass(frozen=True, kw_only=True, eq=False)
class _Ours:
    """A run of ours and its step."""

    run: Run
    compute: Compute


def _our_step(ours: _Ours, image: Tensor, label: Tensor, epoch: int) -> None:
    run = ours.run
    set_rate(run.optimizer, poly_lr(run.config.lr, epoch, run.config.epochs))
    run.network.train()
    _, good = ours.compute(image, label)
    assert good


def _copy_state(trainer: Any, ours: _Ours) -> None:
    """The peer's weights, and the momentum of each of them, into ours."""
    run = ours.run
    copy_weights(trainer.network, run.network)
    for name, weight in trainer.network.named_parameters():
        momentum = trainer.optimizer.state[weight].get("momentum_buffer")
        if momentum is not None:  # none before the first step, and of the heads that have no gradient
            run.optimizer.state[run.network.get_parameter(name)]["momentum_buffer"] = momentum.clone()


def _strengthen_heads(network: Any) -> None:
    """Output layers so strong that gradients are clipped."""
    with torch.no_grad():
        for layer in network.decoder.seg_layers:
            layer.weight.mul_(30)


def _our_run(plan: Plan, folder: Path, speedups: Speedups) -> _Ours:
    """A run of ours at its first step, with no cases: the batches come from here."""
    config = TrainConfig(device="cpu", precision="fp32", epochs=EPOCHS)
    run = start_run(Workspace(folder), plan, config, FoldCases(train=(), val=()))
    return _Ours(run=run, compute=make_step(run, speedups))


def _random_batch(rng: np.random.Generator, plan: Plan) -> tuple[Tensor, Tensor]:
    """Noise (N, C, D, H, W), brighter in a ball for each label; the balls as labels (N, D, H, W)."""
    label = np.zeros((plan.batch_size, *plan.patch), np.int64)
    places = np.indices(plan.patch).reshape(3, -1).T.reshape(*plan.patch, 3)
    for sample, value in product(range(plan.batch_size), plan.foreground):
        centre = rng.uniform(0, 1, 3) * plan.patch
        label[sample][np.linalg.norm(places - centre, axis=-1) < 0.3 * min(plan.patch)] = value
    image = rng.normal(size=(plan.batch_size, len(plan.channels), *plan.patch)) + 2 * label[:, None]
    return torch.from_numpy(image).float(), torch.from_numpy(label)


@contextmanager
def _peer_signs(network: nn.Module) -> Iterator[list[Tensor]]:
    """Notes which inputs of each of the peer's LeakyReLUs are above 0, in the order of the computation."""
    signs: list[Tensor] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs: signs.append(inputs[0].detach() > 0))
        for module in network.modules()
        if isinstance(module, nn.LeakyReLU)
    ]
    yield signs
    for hook in hooks:
        hook.remove()


@contextmanager
def _our_signs() -> Iterator[list[Tensor]]:
    """As `_peer_signs`, of ours: in training every norm and LeakyReLU is `instance_norm_act_reference`."""
    signs: list[Tensor] = []
    leaky_relu = F.leaky_relu_

    def act(x: Tensor, slope: float) -> Tensor:
        signs.append(x.detach() > 0)
        return leaky_relu(x, slope)

    with mock.patch.object(F, "leaky_relu_", act):
        yield signs


@contextmanager
def _slopes_taken(signs: list[Tensor]) -> Iterator[None]:
    """Each LeakyReLU of ours takes its slopes, forward and backward, by the signs given and not by its input's."""
    given = iter(signs)

    def act(x: Tensor, slope: float) -> Tensor:
        return torch.where(next(given), x, slope * x)

    with mock.patch.object(F, "leaky_relu_", act):
        yield
    assert next(given, None) is None


@contextmanager
def _clipped_norms() -> Iterator[list[float]]:
    """Notes the norm of every gradient that a side hands to torch's clip_grad_norm_."""
    norms: list[float] = []
    clip = nn.utils.clip_grad_norm_

    def note(parameters: Any, limit: float) -> Tensor:
        norm = clip(parameters, limit)
        norms.append(float(norm))
        return norm

    with mock.patch.object(nn.utils, "clip_grad_norm_", note):
        yield norms
