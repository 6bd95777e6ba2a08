"""Augmentation on a GPU: the CPU's answer, and nothing in it waits for the GPU."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from planner.plan import Triple
from strokenet.train.augment import PUBLISHED, Draw, Table, augment, draw
from strokenet.train.spatial import initial_patch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch sees")
GPU = torch.device("cuda", 0)
ALWAYS = Table(**{field.name: replace(getattr(PUBLISHED, field.name), p=1.0, p_channel=1.0) for field in fields(Table)})
SOLID: Triple = (20, 24, 28)
FLAT: Triple = (6, 32, 28)


def batch(patch: Triple) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    raw = initial_patch(patch)
    label = torch.randint(-1, 2, (2, *(edge // 4 + 1 for edge in raw)), generator=generator)  # blobs of four voxels
    for axis in (1, 2, 3):
        label = label.repeat_interleave(4, axis).narrow(axis, 0, raw[axis - 1])
    return torch.randn(2, 2, *raw, generator=generator), label.to(torch.int16)


def draws(patch: Triple) -> list[Draw]:
    rngs = [np.random.default_rng(seed) for seed in range(2)]
    return [draw(rng, channels=2, patch=patch, mirror_axes=(0, 1, 2), table=ALWAYS) for rng in rngs]


@pytest.mark.parametrize("patch", [SOLID, FLAT])
def test_the_gpu_augments_as_the_cpu_does(patch: Triple) -> None:
    """All but the noise, whose numbers are each device's own."""
    image, label = batch(patch)
    quiet = [replace(d, noise=None) for d in draws(patch)]
    options = {"patch": patch, "heads": 2, "mask_channels": (False, False)}
    expected, expected_label = augment(image, label, quiet, **options)
    found, found_label = augment(image.to(GPU), label.to(GPU), quiet, **options)
    assert float((found.cpu() - expected).abs().max()) < 1e-3 * float(image.max() - image.min())
    assert float((found_label.cpu() != expected_label).float().mean()) < 1e-3  # ties


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("patch", [SOLID, FLAT])
def test_nothing_waits_for_the_gpu(patch: Triple) -> None:
    image, label = (tensor.to(GPU) for tensor in batch(patch))
    what = draws(patch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            image.sum().item()  # proves that waiting is seen
        out, mask = augment(image, label, what, patch=patch, heads=2, mask_channels=(True, False))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert out.device == mask.device == image.device
