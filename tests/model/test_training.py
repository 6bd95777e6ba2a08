"""The training form: the network's own parameters, the plain network's answer, and gradients where something reads."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels import instance_norm_act as norm
from planner.plan import Plan
from strokenet.model.network import Convolution, UNet, build_network
from strokenet.model.training import TrainingForm
from tests.plans import tiny_network, tiny_plan

RESIDUAL = tiny_plan(network=tiny_network(kind="residual"))
PLANS = pytest.mark.parametrize("plan", [tiny_plan(), RESIDUAL], ids=["plain", "residual"])


def network_of(plan: Plan) -> UNet:
    """With biases and affine parameters that show."""
    torch.manual_seed(0)
    network = build_network(plan)
    for parameter in network.parameters():
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return network


def form(network: UNet) -> TrainingForm:
    return TrainingForm(network, channels_last=True, without_bias=True, unread_heads=1)


def image() -> Tensor:
    return torch.randn(2, 2, 16, 16, 16, generator=torch.Generator().manual_seed(1))


@PLANS
def test_the_form_answers_as_the_network_does(plan: Plan) -> None:
    expected = network_of(plan).forward_levels(image())
    for level, wanted in zip(form(network_of(plan))(image()), expected, strict=True):
        torch.testing.assert_close(level, wanted, rtol=1e-5, atol=1e-5)


@PLANS
def test_gradients_are_the_networks_own(plan: Plan) -> None:
    plain, network = network_of(plan), network_of(plan)
    for levels in (plain.forward_levels(image()), form(network)(image())):
        sum((level**2).mean() for level in levels[:-1]).backward()  # type: ignore[union-attr]
    scale = max(float(p.grad.abs().max()) for p in plain.parameters() if p.grad is not None)
    for name, parameter in network.named_parameters():
        wanted = plain.get_parameter(name).grad
        if parameter.grad is None:
            assert wanted is None or float(wanted.abs().max()) < 1e-5 * scale, name
        else:
            assert wanted is not None
            torch.testing.assert_close(parameter.grad, wanted, rtol=1e-3, atol=1e-5 * scale, msg=name)


@PLANS
def test_only_what_is_read_has_a_gradient(plan: Plan) -> None:
    network = network_of(plan)
    form(network)
    frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    biases = {
        f"{name}.bias"
        for name, module in network.named_modules()
        if isinstance(module, Convolution) and module.bias is not None
    }
    assert frozen == biases | {"decoder.seg_layers.0.weight", "decoder.seg_layers.0.bias"}


def test_the_fast_norm_runs_in_the_form_and_not_in_the_plain_network(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []
    choose = norm.choose_instance_norm_act

    def note(*tensors: Tensor) -> object:
        chosen.append(choose(*tensors))
        return chosen[-1]

    monkeypatch.setattr(norm, "choose_instance_norm_act", note)
    network_of(tiny_plan()).forward_levels(image())
    assert {choice.implementation for choice in chosen} == {"reference"}
    chosen.clear()
    form(network_of(tiny_plan()))(image())
    assert {choice.implementation for choice in chosen} == {"operator"}, chosen


def test_a_checkpoint_of_the_form_is_the_plain_networks() -> None:
    network, plain = network_of(tiny_plan()), network_of(tiny_plan())
    form(network)
    state = network.state_dict()
    assert list(state) == list(plain.state_dict())
    assert all(torch.equal(tensor, state[name]) for name, tensor in plain.state_dict().items())
    plain.load_state_dict(state)


def test_the_form_can_be_left_again() -> None:
    network = network_of(tiny_plan())
    form(network)
    TrainingForm(network, channels_last=False, without_bias=False, unread_heads=0)
    assert all(parameter.requires_grad and parameter.is_contiguous() for parameter in network.parameters())
    assert torch.equal(network(image()), network_of(tiny_plan())(image()))


def test_a_single_decoder_level_is_read() -> None:
    plan = replace(
        tiny_plan(),
        network=tiny_network(
            features=(4, 8),
            strides=((1, 1, 1), (2, 2, 2)),
            kernels=((3, 3, 3),) * 2,
            encoder_blocks=(1, 1),
            decoder_convs=(1,),
            decoder_kernels=((3, 3, 3),),
        ),
    )
    network = build_network(plan)
    TrainingForm(network, channels_last=True, without_bias=True, unread_heads=0)
    assert all(parameter.requires_grad for parameter in network.decoder.seg_layers.parameters())
