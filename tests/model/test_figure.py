"""The figure in words: what it says is what the network does."""

from __future__ import annotations

import re
from dataclasses import replace

import torch

from strokenet.model.figure import level_sizes, network_figure
from strokenet.model.network import build_network
from tests.plans import tiny_network, tiny_plan


def test_sizes_and_features_are_those_of_the_feature_maps() -> None:
    plan = tiny_plan(network=tiny_network(strides=((1, 1, 1), (1, 2, 2), (2, 2, 2))))
    maps = build_network(plan).encoder(torch.zeros(1, 2, *plan.patch))
    assert [tuple(m.shape[2:]) for m in maps] == list(level_sizes(plan))
    lines = network_figure(plan).splitlines()
    assert lines[0] == "T1 + FLAIR in, 2 labels out; patch 16 16 16 voxels"
    for line, feature_map in zip(lines[1:], maps, strict=True):
        assert f">{feature_map.shape[1]}" in line.split("--")[0]


def test_a_channel_more_changes_the_first_convolution_alone() -> None:
    """The paper's Fig. 4 beside its Fig. 1 (Meddahi 2024, V)."""
    both = tiny_plan()
    one = replace(
        both, channels=("T1",), normalisation=("zscore",), use_mask_for_norm=(False,), intensity=both.intensity[:1]
    )
    fig_1, fig_4 = network_figure(one).splitlines(), network_figure(both).splitlines()
    assert "conv 1>4" in fig_1[1]
    assert fig_4[1] == fig_1[1].replace("conv 1>4", "conv 2>4")
    assert fig_4[2:] == fig_1[2:]


def test_strides_and_kernels_that_are_not_the_usual_are_named() -> None:
    network = tiny_network(
        kind="residual", kernels=((1, 3, 3), (3, 3, 3), (3, 3, 3)), strides=((1, 1, 1), (1, 2, 2), (2, 2, 2)),
        encoder_blocks=(1, 3, 1), decoder_kernels=((1, 3, 3), (3, 3, 3)),
    )  # fmt: skip
    lines = network_figure(tiny_plan(network=network)).splitlines()
    assert lines[1].startswith(" 0  16 16 16  stem 2>4, block 4>4 (1x3x3)")
    assert re.search(r"block 4>8 /1x2x2, 2x 8>8 ", lines[2])
    assert "up 8>4 x1x2x2, cat, conv 8>4 (1x3x3)" in lines[1]
    assert lines[3].endswith("bottleneck")
