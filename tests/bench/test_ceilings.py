"""The ceilings, and the arithmetic of a network counted by hand."""

from __future__ import annotations

import pytest
import torch

from bench.ceilings import Ceilings, ceilings, forward_flops, measure_ceilings
from tests.plans import tiny_plan

FOUND = Ceilings(flops=2e9, bytes=3e9)


def test_the_networks_operations_are_counted_as_by_hand() -> None:
    voxels, coarse, deep = 16**3, 8**3, 4**3
    convolutions = 27 * (voxels * 2 * 4 + coarse * 4 * 8 + deep * 8 * 8 + coarse * 16 * 8 + voxels * 8 * 4)
    up = coarse * 8 * 8 + voxels * 8 * 4  # a transposed convolution of stride 2 writes each voxel once
    head = voxels * 4 * 2
    assert forward_flops(tiny_plan()) == 2 * (convolutions + up + head)


def test_a_machine_computes_and_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.ceilings.SUSTAINED", 0.01)
    found = measure_ceilings(torch.float32, torch.device("cpu"), edge=64, copied=2**16, repeats=2)
    assert found.flops > 1e6
    assert found.bytes > 1e6


def test_the_ceilings_of_a_process_are_measured_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cpu = torch.device("cpu")
    asked = []
    monkeypatch.setattr("bench.ceilings.measure_ceilings", lambda dtype, *_, **__: asked.append(dtype) or FOUND)
    ceilings.cache_clear()
    assert [ceilings(dtype, cpu) for dtype in (torch.float32, torch.float32, torch.bfloat16)] == [FOUND] * 3
    ceilings.cache_clear()
    assert asked == [torch.float32, torch.bfloat16]
    assert "float32 product 2 GFLOP/s, copy 3.0 GB/s" in capsys.readouterr().out
