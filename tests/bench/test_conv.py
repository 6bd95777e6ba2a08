"""The conv suite: the layers of the network, compared before they are timed, and their floor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from bench import conv
from bench.ceilings import Ceilings, module_flops
from bench.conv import LAYERS, Layer
from bench.measure import Measurement
from strokenet.model.inference import InferenceNetwork, OneDnnConvolution
from strokenet.model.network import ConvBlock, build_network
from tests.plans import tiny_plan

CPU = torch.device("cpu")
TINY = (
    Layer(inputs=2, outputs=8, edge=6),
    Layer(inputs=8, outputs=8, edge=6, stride=2),
    Layer(inputs=8, outputs=4, edge=3, transposed=True),
)


@pytest.fixture(autouse=True)
def _known_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv, "ceilings", lambda *_: Ceilings(flops=1e6, bytes=1.0))


@pytest.mark.parametrize("layer", TINY, ids=str)
def test_ours_is_timed_beside_torchs_layer_after_its_error_is_known(layer: Layer) -> None:
    measured = conv.one(layer, torch.float32, CPU, repeats=2)
    assert list(measured.times_ms) == ["strokenet", "torch, contiguous"]
    assert measured.what == f"{layer}, float32"
    assert measured.answers.startswith("largest error ")


def test_the_floor_is_the_operations_counted_by_hand() -> None:
    floors = [conv.one(layer, torch.float32, CPU, repeats=1).floor_ms for layer in TINY]
    flops = (2 * 6**3 * 27 * 2 * 8, 2 * 3**3 * 27 * 8 * 8, 2 * 3**3 * 8 * 8 * 4)
    assert floors == [1000 * count / 1e6 for count in flops]


def test_a_wrong_answer_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv, "in_turn", None)
    monkeypatch.setattr(conv, "_inference_form", lambda stock, *_: nn.Sequential(stock, nn.LeakyReLU()))
    with pytest.raises(AssertionError, match="largest error"):
        conv.one(TINY[0], torch.float32, CPU, repeats=1)


def test_cudnn_is_on_and_searches_while_both_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    cudnn, seen = torch.backends.cudnn, []
    timed = conv.in_turn

    def watched(*given: Any, **named: Any) -> Measurement:
        seen.append((cudnn.enabled, cudnn.benchmark))
        return timed(*given, **named)

    monkeypatch.setattr(conv, "in_turn", watched)
    conv.one(TINY[0], torch.float32, CPU, repeats=1)
    assert seen == [(True, True)]
    assert not cudnn.benchmark


def test_ours_is_what_the_inference_network_runs() -> None:
    network = InferenceNetwork(build_network(tiny_plan()), torch.float32, CPU)
    of_network = {type(block.conv) for block in network.modules() if isinstance(block, ConvBlock)}
    assert {type(conv._inference_form(TINY[0].module(), torch.float32, CPU))} == of_network
    assert isinstance(conv._inference_form(TINY[2].module(), torch.float32, CPU), nn.ConvTranspose3d)
    assert OneDnnConvolution in of_network or not torch.backends.mkldnn.is_available()


def test_the_networks_own_sizes_are_measured() -> None:
    assert [str(layer) for layer in LAYERS] == [
        "3x3x3, 2 to 32 at 96^3",
        "3x3x3, 32 to 32 at 96^3",
        "3x3x3, 64 to 64 at 48^3",
        "3x3x3, 320 to 320 at 6^3",
        "3x3x3 stride 2, 32 to 64 at 96^3",
        "transposed 2x2x2, 64 to 32 at 48^3",
    ]
    with torch.device("meta"):
        assert module_flops(LAYERS[1].module(), LAYERS[1].shape) == 2 * 96**3 * 27 * 32 * 32


def test_the_type_of_inference_is_measured_beside_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv, "choose_dtype", lambda *_: torch.bfloat16)
    names = [comparison.what.split(", ")[-1] for comparison in conv.comparisons(quick=False)]
    assert names == ["bfloat16", "float32"] * len(LAYERS)
    monkeypatch.setattr(conv, "choose_dtype", lambda *_: torch.float32)
    assert len(conv.comparisons(quick=True)) == len(LAYERS)
