"""The memory estimate: the peer's two published numbers, and the maps of a real network counted one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from planner.memory import feature_map_voxels
from planner.plan import NetworkKind
from planner.topology import topology
from strokenet.model.network import UNet
from tests.plans import tiny_network

CUBE = topology((1.0, 1.0, 1.0), (128, 128, 128))


def test_a_plain_network_costs_what_the_peer_says() -> None:
    voxels = feature_map_voxels(CUBE, kind="plain", encoder_blocks=(2,) * 6, decoder_convs=(2,) * 5, labels=2)
    assert voxels == 450_699_264


def test_a_residual_network_costs_what_the_peer_says() -> None:
    blocks = (1, 3, 4, 6, 6, 6)
    voxels = feature_map_voxels(CUBE, kind="residual", encoder_blocks=blocks, decoder_convs=(1,) * 5, labels=2)
    assert voxels == 555_323_392


@pytest.mark.parametrize("kind", ["plain", "residual"])
@pytest.mark.parametrize("labels", [2, 5])
def test_the_estimate_counts_the_maps_of_a_real_network(kind: NetworkKind, labels: int) -> None:
    shape = topology((4.2, 0.45, 0.45), (23, 250, 256))  # anisotropic, rounded up, three levels of 320 features
    blocks, convs = (2, 1, 3, 2, 1, 2, 2), (2, 1, 3, 1, 2, 1)
    plan = tiny_network(
        kind=kind,
        features=shape.features,
        strides=shape.strides,
        kernels=shape.kernels,
        encoder_blocks=blocks,
        decoder_convs=convs,
        decoder_kernels=shape.kernels[:-1],
    )
    with torch.device("meta"):
        written = _written(UNet(plan, channels=3, heads=labels), torch.empty(1, 3, *shape.patch))
    assert written == feature_map_voxels(shape, kind=kind, encoder_blocks=blocks, decoder_convs=convs, labels=labels)


def _written(network: UNet, image: torch.Tensor) -> int:
    """Elements that convolutions and shortcuts (pooled, projected or both: one map each) write in a forward pass."""
    elements = []

    def count(_: nn.Module, __: Any, out: torch.Tensor) -> None:
        elements.append(out.numel())

    for name, module in network.named_modules():
        shortcut = name.endswith(".skip") and len(list(module.children())) > 0
        if shortcut or (isinstance(module, (nn.Conv3d, nn.ConvTranspose3d)) and ".skip." not in name):
            module.register_forward_hook(count)
    network(image)
    return sum(elements)
