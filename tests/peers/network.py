"""The network: the same weights and the same image in both; logits of every level, and gradients of every parameter."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from planner.plan import NetworkKind, NetworkPlan, Triple
from strokenet.model.network import UNet
from tests.peers import peer
from tests.peers.row import Row
from tests.peers.translate import NETWORKS, peer_architecture

# isort: split
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

TOPOLOGIES = 20
LARGE = 10_000  # entries of a weight whose standard deviation is compared: it is known to 1 % then


def rows(full: bool) -> Iterator[Row]:
    """Random topologies of both kinds: levels, features, strides, kernels, convolutions, channels and labels."""
    kinds: tuple[NetworkKind, ...] = ("plain", "residual")
    for kind in kinds:
        compared = [_compare(kind, seed) for seed in range(100 if full else TOPOLOGIES)]
        yield from _rows(kind, compared)
    yield _fresh_weights()


@dataclass(frozen=True, kw_only=True)
class _Compared:
    """Differences of one topology. The gradients are of sum over the levels of mean(logits^2).

    logits: of the largest logit. gradients: of the network's largest. own: each parameter's of its own largest, without
    the biases in front of a norm, whose gradient is 0 but for rounding. values: outputs compared.
    """

    stages: int
    values: int
    logits: float
    gradients: float
    own: float


def _rows(kind: NetworkKind, compared: list[_Compared]) -> Iterator[Row]:
    stages = [one.stages for one in compared]
    on = f"{len(compared)} random topologies, {min(stages)} to {max(stages)} stages"
    yield Row(
        check=f"network, {kind}",
        on=on,
        difference=max(one.logits for one in compared),
        tolerance=1e-5,
        unit="of the largest logit",
        note=f"deep supervision on and off, float32, {sum(one.values for one in compared)} logits",
    )
    yield Row(
        check=f"gradients, {kind}",
        on=on,
        difference=max(one.gradients for one in compared),
        tolerance=1e-6,
        unit="of the largest gradient",
        note=_gradient_note(max(one.own for one in compared)),
    )


def _gradient_note(own: float) -> str:
    if own == 0:
        return "every gradient equal to the last bit"
    return (
        f"each parameter by its own largest: {own:.1e}; the order in which a block's branches are added, and biases in "
        "front of a norm, left out here, have gradients of rounding only"
    )


def _compare(kind: NetworkKind, seed: int) -> _Compared:
    rng = np.random.default_rng(seed)
    plan, size = _random_topology(rng, kind)
    channels, heads, batch = int(rng.integers(1, 5)), int(rng.integers(2, 7)), int(rng.integers(1, 3))
    torch.manual_seed(seed)
    theirs, ours = networks(plan, channels=channels, heads=heads)
    _randomise(theirs, ours)
    image = torch.randn(batch, channels, *size)
    their_levels, our_levels = theirs(image), ours.forward_levels(image)
    assert [level.shape for level in their_levels] == [level.shape for level in our_levels]
    for levels in (their_levels, our_levels):
        torch.stack([level.square().mean() for level in levels]).sum().backward()  # type: ignore[no-untyped-call]
    theirs.decoder.deep_supervision = False
    with torch.no_grad():
        pairs = [*zip(their_levels, our_levels, strict=True), (theirs(image), ours(image))]
    gradients, own = _gradient_differences(theirs, ours)
    return _Compared(
        stages=plan.stages,
        values=sum(level.numel() for level, _ in pairs),
        logits=max(relative_difference(a, b) for a, b in pairs),
        gradients=gradients,
        own=own,
    )


def networks(plan: NetworkPlan, *, channels: int, heads: int) -> tuple[Any, UNet]:
    """The peer's network of its own random weights, deep supervision on, and ours with the same weights."""
    architecture = peer_architecture(plan)
    with peer.quiet():
        theirs = get_network_from_plans(
            architecture["network_class_name"],
            architecture["arch_kwargs"],
            architecture["_kw_requires_import"],
            channels,
            heads,
            allow_init=True,
            deep_supervision=True,
        )
    ours = UNet(plan, channels=channels, heads=heads)
    copy_weights(theirs, ours)
    return theirs, ours


def copy_weights(theirs: nn.Module, ours: UNet) -> None:
    """The peer's weights into ours. Both have the same parameters, by name; the peer's state has aliases besides."""
    assert dict(theirs.named_parameters()).keys() == dict(ours.named_parameters()).keys()
    state = theirs.state_dict()
    ours.load_state_dict({name: state[name] for name in ours.state_dict()})


def relative_difference(theirs: Tensor, ours: Tensor) -> float:
    """Largest difference, as a share of the peer's largest value."""
    return float((theirs - ours).detach().abs().max() / theirs.detach().abs().max())


def _randomise(theirs: nn.Module, ours: UNet) -> None:
    """Random weights everywhere: fresh ones are zero in places, which would hide what they multiply."""
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.2 if parameter.ndim > 1 else 0.5))
    copy_weights(theirs, ours)


def _gradient_differences(theirs: nn.Module, ours: UNet) -> tuple[float, float]:
    pairs = {
        name: (_gradient(parameter), _gradient(ours.get_parameter(name)))
        for name, parameter in theirs.named_parameters()
    }
    largest = max(float(a.abs().max()) for a, _ in pairs.values())
    differences = {name: float((a - b).abs().max()) for name, (a, b) in pairs.items()}
    own = [
        difference / float(pairs[name][0].abs().max())
        for name, difference in differences.items()
        if not name.endswith(".conv.bias")
    ]
    return max(differences.values()) / largest, max(own)


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _random_topology(rng: np.random.Generator, kind: NetworkKind) -> tuple[NetworkPlan, Triple]:
    """2 to 6 levels, stride and kernel drawn for each axis; and a small image size that the strides divide."""
    while True:
        stages = int(rng.integers(2, 7))
        strides = ((1, 1, 1), *(_triple(rng.choice([1, 2, 2], 3)) for _ in range(stages - 1)))
        kernels = tuple(_triple(rng.choice([1, 3, 3], 3)) for _ in range(stages))
        divisor = np.prod(np.array(strides), 0)
        size = _triple(divisor * rng.integers(1, 4, 3))
        if math.prod(size) <= 100_000 and math.prod(size) >= 2 * math.prod(divisor):  # a norm needs two voxels
            break
    features = tuple(sorted(int(n) for n in rng.choice([4, 6, 8, 12, 16, 24], stages)))
    plan = NetworkPlan(
        kind=kind,
        features=features,
        strides=strides,
        kernels=kernels,
        encoder_blocks=tuple(int(n) for n in rng.integers(1, 4, stages)),
        decoder_convs=tuple(int(n) for n in rng.integers(1, 4, stages - 1)),
        decoder_kernels=kernels[:-1],
    )
    return plan, size


def _fresh_weights() -> Row:
    """Both initialise by themselves: what is constant is equal, and what is random has the same spread."""
    wrong, spread, tensors = 0, 0.0, 0
    kinds: tuple[NetworkKind, ...] = ("plain", "residual")
    for kind in kinds:
        plan = NetworkPlan(
            kind=kind,
            features=(32, 64, 128),
            strides=((1, 1, 1), (2, 2, 2), (1, 2, 2)),
            kernels=((1, 3, 3), (3, 3, 3), (3, 3, 3)),
            encoder_blocks=(2, 2, 2),
            decoder_convs=(1, 2),
            decoder_kernels=((1, 3, 3), (3, 3, 3)),
        )
        torch.manual_seed(0)
        theirs, _ = networks(plan, channels=2, heads=2)
        fresh = UNet(plan, channels=2, heads=2)
        for name, parameter in theirs.named_parameters():
            own = fresh.get_parameter(name)
            constant, own_constant = (bool(p.min() == p.max()) for p in (parameter, own))
            wrong += int(constant != own_constant or (constant and not torch.equal(parameter, own)))
            tensors += 1
            if parameter.numel() >= LARGE and not constant:
                spread = max(spread, abs(float(own.detach().std() / parameter.detach().std()) - 1))
    return Row(
        check="fresh weights",
        on=f"{len(NETWORKS)} networks, {tensors} parameters",
        difference=float("inf") if wrong else spread,
        tolerance=0.05,
        unit="of the deviation",
        note=f"spread of the random ones ({LARGE} entries or more); {wrong} constant ones differ",
    )


def _triple(values: Any) -> Triple:
    d, h, w = (int(value) for value in values)
    return (d, h, w)
