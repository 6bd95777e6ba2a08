"""Modality dropout: one model for T1, FLAIR or both (Meddahi 2024, VII.A, asks which modalities a model needs).

Comes in: an augmented batch, and a Generator a sample. Goes out: the batch with channels that are 0 everywhere: after
z-scoring that is their mean, and what `infer` puts in the place of a scan that was not made. After augmentation, so
that noise and brightness do not fill them again; from a stream of its own, so that the patches are those of a run
without it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from planner.plan import Plan
from strokenet.data.errors import InputError
from strokenet.preprocess.normalise import blank_channels


def draw_dropped(rng: np.random.Generator, channels: int, p: float) -> tuple[int, ...]:
    """The channels that one sample loses: none with probability 1 - p, else some but not all.

    Each of the 2^C - 2 non-empty proper subsets is equally likely: of two channels, each alone in half of the draws.
    """
    if rng.random() >= p:
        return ()
    while True:  # uniform over all subsets until it is neither empty nor all of them: two draws on average at most
        lost = np.flatnonzero(rng.integers(2, size=channels))
        if 0 < len(lost) < channels:
            return tuple(lost.tolist())


def drop_channels(image: Tensor, rngs: Sequence[np.random.Generator], p: float) -> None:
    """Sets the drawn channels of every sample to 0. image: (N, C, D, H, W), changed in place; rngs: one a sample."""
    for sample, rng in zip(image, rngs, strict=True):
        for channel in draw_dropped(rng, len(sample), p):
            sample[channel].zero_()


def check_dropout(plan: Plan, p: float) -> None:
    """Refuses a dropout that makes no sense for the plan.

    Raises:
        InputError: one channel, or one whose normalisation does not leave zeros at 0: `infer` could not do without it.
    """
    if p == 0:
        return
    if len(plan.channels) < 2:
        raise InputError(f"--modality-dropout {p:g}: the plan has {plan.channels[0]} alone; two channels are needed")
    blank = blank_channels(plan)
    for name, scheme in zip(plan.channels, plan.normalisation, strict=True):
        if name not in blank:
            raise InputError(
                f"--modality-dropout {p:g}: an absent {name} would not be 0 after its normalisation, {scheme}; plan "
                "it as zscore (another name than CT in dataset.json), or train without dropout"
            )
