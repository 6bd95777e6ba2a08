"""Memory: how many feature-map voxels a network writes, the planner's measure of GPU memory (Isensee 2021, Methods)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from planner.plan import NetworkKind
from planner.topology import Topology


def feature_map_voxels(
    shape: Topology, *, kind: NetworkKind, encoder_blocks: Sequence[int], decoder_convs: Sequence[int], labels: int
) -> int:
    """Elements of all feature maps of one sample at the topology's patch.

    plain: every convolution writes one map; each decoder level one more for the transposed convolution; and the head.
    residual: two maps a block, one more where a block has a stride or changes features, and the stem.

    Args:
        encoder_blocks: convolutions or residual blocks a level. decoder_convs: a level but the last.
        labels: entries of dataset.json's labels, background included.
    """
    features = shape.features
    size = list(shape.patch)
    voxels = []
    for stride in shape.strides:
        size = [n // s for n, s in zip(size, stride, strict=True)]
        voxels.append(math.prod(size))
    maps = [f * v for f, v in zip(features, voxels, strict=True)]
    decoder = sum((convs + 1) * m for convs, m in zip(decoder_convs, maps[:-1], strict=True))
    head = labels * voxels[0]
    if kind == "plain":
        return sum(n * m for n, m in zip(encoder_blocks, maps, strict=True)) + decoder + head
    before = (features[0], *features[:-1])
    projected = [stride != (1, 1, 1) or f != b for stride, f, b in zip(shape.strides, features, before, strict=True)]
    encoder = sum((2 * n + p) * m for n, p, m in zip(encoder_blocks, projected, maps, strict=True))
    return maps[0] + encoder + decoder + head
