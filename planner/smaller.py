"""Smaller: what a plan gives up where the machine is small, and nothing else of it.

Comes in: a Fingerprint or a Plan. Goes out: the fingerprint of the same cases on coarser voxels, of which the rules
make a plan as of any other; the plan with fewer features. nnU-Net has neither: for demonstrations on a CPU.
"""

from __future__ import annotations

from dataclasses import replace

from planner.fingerprint import Fingerprint
from planner.plan import Plan
from planner.spacing import resampled_shape


def at_spacing(fingerprint: Fingerprint, edge_mm: float) -> Fingerprint:
    """The fingerprint of the same cases, brought to cubic voxels of this edge."""
    edges = (edge_mm, edge_mm, edge_mm)
    shapes = zip(fingerprint.shapes_after_crop, fingerprint.spacings, strict=True)
    return replace(
        fingerprint,
        shapes_after_crop=tuple(resampled_shape(shape, spacing, edges) for shape, spacing in shapes),
        spacings=(edges,) * len(fingerprint.spacings),
    )


def narrower(plan: Plan, by: int) -> Plan:
    """The plan with the features of every level divided by so much, at least 1."""
    features = tuple(max(1, n // by) for n in plan.network.features)
    return replace(plan, network=replace(plan.network, features=features))
