"""The ceilings, and the arithmetic of a network counted by hand."""

from __future__ import annotations

import torch

from bench.ceilings import forward_flops, measure_ceilings
from tests.plans import tiny_plan


def test_the_networks_operations_are_counted_as_by_hand() -> None:
    voxels, coarse, deep = 16**3, 8**3, 4**3
    convolutions = 27 * (voxels * 2 * 4 + coarse * 4 * 8 + deep * 8 * 8 + coarse * 16 * 8 + voxels * 8 * 4)
    up = coarse * 8 * 8 + voxels * 8 * 4  # a transposed convolution of stride 2 writes each voxel once
    head = voxels * 4 * 2
    assert forward_flops(tiny_plan()) == 2 * (convolutions + up + head)


def test_a_machine_computes_and_copies() -> None:
    found = measure_ceilings(torch.float32, torch.device("cpu"), edge=64, copied=2**16, repeats=2)
    assert found.flops > 1e6
    assert found.bytes > 1e6
