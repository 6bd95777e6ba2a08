"""Augmenting training samples: the table in torch on the device, and by the batchgenerators package on a CPU core.

The draws are random and each side's own, so that answers are not compared here; tests/peers compares them, operation by
operation.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from bench.measure import Comparison, Measurement, in_turn
from planner.plan import Triple
from strokenet.train.augment import augment, draw
from strokenet.train.published import augment_published
from strokenet.train.spatial import initial_patch

PATCHES: tuple[Triple, ...] = ((64, 64, 64), (128, 128, 128))
QUICK: tuple[Triple, ...] = ((48, 48, 48),)
SAMPLES = 8  # of different draws, so that the rare and dear operations count as often as they happen


def comparisons(quick: bool) -> list[Comparison]:
    """Eight samples of two channels; both paths draw from the same table, each from its own seeds."""
    rows = []
    for patch in QUICK if quick else PATCHES:
        what = f"{SAMPLES} samples of {patch}, 2 channels"
        rows.append(Comparison(what=what, run=partial(_one, what, patch)))
    return rows


def _one(what: str, patch: Triple) -> Measurement:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    raw = initial_patch(patch)
    image, label = torch.randn(2, 2, *raw), torch.zeros(2, *raw, dtype=torch.int16)
    on_device = image.to(device), label.to(device)

    def ours() -> None:
        for batch in range(SAMPLES // 2):
            rngs = [np.random.default_rng((batch, index)) for index in range(2)]
            draws = [draw(rng, channels=2, patch=patch, mirror_axes=(2,)) for rng in rngs]
            augment(*on_device, draws, patch=patch, heads=2, mask_channels=(False, False))

    def peer() -> None:
        for seed in range(SAMPLES):
            augment_published(
                image[0].numpy().copy(),
                label[0].numpy().copy(),
                seed,
                patch=patch,
                mirror_axes=(2,),
                mask_channels=(False, False),
            )

    return in_turn("augment", what, {f"strokenet, {device}": ours, "batchgenerators": peer}, device=device, repeats=3)
