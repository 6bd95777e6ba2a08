"""The network: shapes, names and the initialisation of the published figures."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from kernels import instance_norm_act
from strokenet.model.network import ConvBlock, UNet, build_network
from tests.plans import paper_plan, tiny_network, tiny_plan


def anisotropic(kind: str) -> UNet:
    plan = tiny_network(
        kind=kind,
        features=(32, 64, 128),
        strides=((1, 1, 1), (1, 2, 2), (2, 2, 2)),
        kernels=((1, 3, 3), (3, 3, 3), (3, 3, 3)),
        encoder_blocks=(2, 2, 2),
        decoder_convs=(2, 2),
        decoder_kernels=((1, 3, 3), (3, 3, 3)),
    )
    return UNet(plan, channels=2, heads=2)


def test_names_and_shapes_are_the_peers() -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in anisotropic("plain").state_dict().items()}
    assert shapes["encoder.stages.0.0.convs.0.conv.weight"] == (32, 2, 1, 3, 3)
    assert shapes["encoder.stages.1.0.convs.0.conv.weight"] == (64, 32, 3, 3, 3)
    assert shapes["decoder.transpconvs.0.weight"] == (128, 64, 2, 2, 2)
    assert shapes["decoder.transpconvs.1.weight"] == (64, 32, 1, 2, 2)
    assert shapes["decoder.stages.0.convs.0.conv.weight"] == (64, 128, 3, 3, 3)
    assert shapes["decoder.stages.1.convs.0.conv.weight"] == (32, 64, 1, 3, 3)
    assert shapes["decoder.seg_layers.0.weight"] == (2, 64, 1, 1, 1)
    assert shapes["decoder.seg_layers.1.weight"] == (2, 32, 1, 1, 1)
    convolutions, up_or_head = 3 * 2 + 2 * 2, 2 + 2
    assert len(shapes) == 4 * convolutions + 2 * up_or_head  # the peer's 136 keys name each of them 2 or 4 times


def test_residual_names_are_the_peers() -> None:
    names = set(anisotropic("residual").state_dict())
    assert "encoder.stem.convs.0.conv.weight" in names
    assert "encoder.stages.1.blocks.0.skip.1.conv.weight" in names  # skip.0 is the pool
    assert "encoder.stages.0.blocks.0.skip.0.conv.weight" not in names  # identity
    assert "encoder.stages.1.blocks.1.conv2.norm.bias" in names


@pytest.mark.parametrize("kind", ["plain", "residual"])
def test_levels_are_halved_and_the_first_is_the_forward_pass(kind: str) -> None:
    torch.manual_seed(0)
    network = anisotropic(kind).eval()
    image = torch.randn(1, 2, 4, 8, 12)
    with torch.inference_mode():
        levels = network.forward_levels(image)
        alone = network(image)
    assert [tuple(level.shape[2:]) for level in levels] == [(4, 8, 12), (4, 4, 6)]
    assert torch.equal(levels[0], alone)


def test_initial_weights_have_the_published_spread() -> None:
    torch.manual_seed(0)
    weight = anisotropic("plain").encoder.stages[2][0].convs[1].conv.weight
    expected = math.sqrt(2 / (1 + 0.01**2) / (128 * 27))
    assert float(weight.detach().std()) == pytest.approx(expected, rel=0.02)


def test_residual_blocks_start_as_their_shortcut() -> None:
    torch.manual_seed(0)
    block = anisotropic("residual").encoder.stages[1].blocks[1]
    image = torch.randn(1, 64, 4, 4, 4)
    assert torch.equal(block(image), torch.nn.functional.leaky_relu(image, 0.01))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_and_stays_close(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    network = build_network(tiny_plan()).eval()
    image = torch.randn(1, 2, 16, 16, 16)
    with torch.inference_mode():
        exact = network(image)
        with torch.autocast("cpu", dtype=dtype):
            half = network(image).float()
    assert float((half - exact).abs().mean()) < 0.05 * float(exact.abs().mean()) + 0.01


def test_default_network_has_the_published_size() -> None:
    with torch.device("meta"):
        network = build_network(paper_plan("T1"))
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 2) == 31.20


@pytest.mark.parametrize("kind", ["plain", "residual"])
def test_channels_last_trains_by_the_fast_norm_with_the_same_gradients(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = _trained(kind)
    image = torch.randn(2, 2, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = _gradients(network, image)
    taken = []
    real = instance_norm_act.instance_norm_act_operator_backward
    monkeypatch.setattr(
        instance_norm_act,
        "instance_norm_act_operator_backward",
        lambda *given, **named: taken.append(named["recover"]) or real(*given, **named),
    )
    rows = network.to(memory_format=torch.channels_last_3d)
    found = _gradients(rows, image.contiguous(memory_format=torch.channels_last_3d))
    blocks = [module for module in network.modules() if isinstance(module, ConvBlock)]
    assert len(taken) >= len(blocks)  # a projection after a pool, which answers contiguous, takes the reference
    assert sum(taken) >= len(blocks) // 2  # those without a shortcut keep their answer alone
    for name, value in expected.items():
        if not name.endswith("conv.bias"):  # before a norm: nothing but rounding
            assert (found[name] - value).norm() < 1e-4 * value.norm(), name


def _trained(kind: str) -> UNet:
    torch.manual_seed(0)
    network = build_network(tiny_plan(network=tiny_network(kind=kind)))
    for module in network.modules():
        if isinstance(module, nn.InstanceNorm3d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return network


def _gradients(network: UNet, image: torch.Tensor) -> dict[str, torch.Tensor]:
    loss = sum(level.sigmoid().square().mean() for level in network.forward_levels(image))
    assert isinstance(loss, torch.Tensor)
    names, parameters = zip(*network.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def test_norms_keep_their_input_where_a_weight_has_gone_to_0() -> None:
    network = build_network(tiny_plan())
    blocks = [module for module in network.modules() if isinstance(module, ConvBlock)]
    assert {block.recover for block in blocks} == {None}
    assert network.choose_kept_maps()
    assert all(block.recover for block in blocks)
    assert not network.choose_kept_maps()  # nothing new
    with torch.no_grad():
        blocks[1].norm.weight[0] = 0
    assert network.choose_kept_maps()
    assert [block.recover for block in blocks] == [number != 1 for number in range(len(blocks))]
