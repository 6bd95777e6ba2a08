"""Steps of training: the peer's train_step and ours, from the same weights on the same batches.

Rounding alone keeps the two apart: the loss's gradient differs in the last digits. A step moves the weights by no more
than that. Over several steps such differences may grow, where an activation within rounding of 0 falls on the other
side of a LeakyReLU; how far, the peer shows against itself, with its images a last bit off. That is fastest where large
gradients are clipped, so those networks are compared step by step alone.
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

from planner.plan import NetworkKind, Plan
from strokenet.train.feed import Batch
from strokenet.train.run import FoldCases, Run, TrainConfig, start_run
from strokenet.train.train import GRADIENT_NORM, _step, poly_lr
from strokenet.workspace import Workspace
from tests.peers import peer
from tests.peers.loss import EPOCHS, peer_targets, peer_trainer, random_plan
from tests.peers.network import copy_weights
from tests.peers.row import Row

STEP_TOLERANCE = 2.5e-7  # two units in the last place of 1; a step's weight decay is 6e-7
RUN_TOLERANCE = 1e-5


def rows(full: bool) -> Iterator[Row]:
    """Ten steps, a step each of a schedule of ten epochs; with the peer's state before every step, and without."""
    kinds: tuple[NetworkKind, ...] = ("plain", "residual")
    for kind, batch_dice in product(kinds, (False, True)):
        compared = [_train_all(kind, batch_dice, seed) for seed in range(12 if full else 4)]
        yield from _rows(f"{kind} networks, batch Dice {'on' if batch_dice else 'off'}", compared)


@dataclass(frozen=True, kw_only=True)
class _Compared:
    """Distances of the weights from the peer's.

    step: largest of any weight in ten steps, each from the peer's weights and momentum; of 1, or of the largest weight
    of the parameter where that is more. run: after ten steps on their own, by norm. crossed: activations that then had
    another sign. itself: as `run`, of the peer with its images a last bit off. clipped: steps whose gradient was;
    strong: whether the heads were made so that it is.
    """

    step: float
    run: float
    crossed: int
    itself: float
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
    itself = f"the peer and itself, images a last bit off: {max(one.itself for one in free):.0e}"
    crossed = sum(one.crossed for one in free)
    yield Row(
        check=f"weights after {EPOCHS} steps",
        on=f"{len(free)} {on}",
        difference=max(one.run for one in free),
        tolerance=RUN_TOLERANCE,
        unit="of the weights' norm",
        note=f"{crossed} activations of another sign; {itself}",
        cause=f"{crossed} activations near 0 fell on another side of a LeakyReLU; {itself}" if crossed else "",
        bound=10 * RUN_TOLERANCE,
    )


def _train_all(kind: NetworkKind, batch_dice: bool, seed: int) -> _Compared:
    """The peer; its twin, with images a last bit off; our run; and one led, with the peer's state before every step."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    plan = replace(random_plan(rng, kind), batch_dice=batch_dice)
    theirs, twin = peer_trainer(plan), peer_trainer(plan)
    steps, crossed, clipped, strong = [], 0, 0, seed % 2 == 1
    with _clipped_norms() as norms, TemporaryDirectory() as folder:
        ours, led = (_our_run(plan, Path(folder) / name) for name in ("ours", "led"))
        if strong:
            _strengthen_heads(theirs.network)
        twin.network.load_state_dict(theirs.network.state_dict())
        copy_weights(theirs.network, ours.network)
        for epoch in range(EPOCHS):
            _copy_state(theirs, led)
            image, label = _random_batch(rng, plan)
            with _signs(theirs.network) as their_signs:
                _peer_step(theirs, image, label, epoch)
            clipped += norms[-1] > GRADIENT_NORM
            _peer_step(twin, torch.nextafter(image, torch.full_like(image, torch.inf)), label, epoch)
            with _signs(ours.network) as our_signs:
                _our_step(ours, image, label, epoch)
            _our_step(led, image, label, epoch)
            crossed += sum(peer.differing(a, b) for a, b in zip(their_signs, our_signs, strict=True))
            steps.append(_largest_difference(theirs.network, led.network))
    return _Compared(
        step=max(steps),
        run=_norm_difference(theirs.network, ours.network),
        crossed=crossed,
        itself=_norm_difference(theirs.network, twin.network),
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


def _our_step(run: Run, image: Tensor, label: Tensor, epoch: int) -> None:
    for group in run.optimizer.param_groups:
        group["lr"] = poly_lr(run.config.lr, epoch, run.config.epochs)
    run.network.train()
    _step(run, Batch(image=image, label=label, cases=("case",) * run.batch_size))
    assert run.progress.skipped == 0


def _copy_state(trainer: Any, run: Run) -> None:
    """The peer's weights, and the momentum of each of them, into ours."""
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


def _our_run(plan: Plan, folder: Path) -> Run:
    """A run of ours at its first step, with no cases: the batches come from here."""
    config = TrainConfig(device="cpu", precision="fp32", epochs=EPOCHS)
    return start_run(Workspace(folder), plan, config, FoldCases(train=(), val=()))


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
def _signs(network: nn.Module) -> Iterator[list[Tensor]]:
    """Notes which inputs of each LeakyReLU are above 0, in the order of the computation."""
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
