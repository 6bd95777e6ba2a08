"""Small plans that several rooms' tests share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from planner.plan import IntensityStats, NetworkPlan, Plan, PostprocessRule

STATS = IntensityStats(mean=0.0, std=1.0, min=-3.0, max=3.0, median=0.0, percentile_00_5=-2.5, percentile_99_5=2.5)


def tiny_network(**changes: Any) -> NetworkPlan:
    """Three levels, 4 to 8 features: milliseconds on a CPU."""
    network = NetworkPlan(
        kind="plain",
        features=(4, 8, 8),
        strides=((1, 1, 1), (2, 2, 2), (2, 2, 2)),
        kernels=((3, 3, 3),) * 3,
        encoder_blocks=(1, 1, 1),
        decoder_convs=(1, 1),
        decoder_kernels=((3, 3, 3),) * 2,
    )
    return replace(network, **changes)


def tiny_plan(**changes: Any) -> Plan:
    """One lesion label, two channels, 16^3 patches at 1 mm."""
    plan = Plan(
        dataset="tiny",
        planner="plain",
        channels=("T1", "FLAIR"),
        labels={"background": 0, "lesion": 1},
        orientation="RAS",
        transpose=(0, 1, 2),
        spacing=(1.0, 1.0, 1.0),
        median_shape=(24.0, 24.0, 24.0),
        patch=(16, 16, 16),
        batch_size=2,
        batch_dice=False,
        normalisation=("zscore", "zscore"),
        use_mask_for_norm=(False, False),
        intensity=(STATS, STATS),
        network=tiny_network(),
        mirror_axes=(2,),
        postprocess=PostprocessRule(threshold=0.2, min_volume_mm3=4.0),
    )
    return replace(plan, **changes)


def paper_plan(*channels: str) -> Plan:
    """The plan of the paper's models: 128^3 patches, six levels of 32 to 320 features (Meddahi 2024; nnU-Net v1)."""
    network = NetworkPlan(
        kind="plain",
        features=(32, 64, 128, 256, 320, 320),
        strides=((1, 1, 1), *((2, 2, 2),) * 5),
        kernels=((3, 3, 3),) * 6,
        encoder_blocks=(2,) * 6,
        decoder_convs=(2,) * 5,
        decoder_kernels=((3, 3, 3),) * 5,
    )
    n = len(channels)
    return tiny_plan(
        channels=channels,
        patch=(128, 128, 128),
        normalisation=("zscore",) * n,
        use_mask_for_norm=(False,) * n,
        intensity=(STATS,) * n,
        network=network,
    )
