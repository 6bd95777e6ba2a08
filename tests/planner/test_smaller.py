"""A smaller plan gives up what it says and keeps the rest."""

from __future__ import annotations

from dataclasses import replace

from planner.fingerprint import Fingerprint
from planner.smaller import at_spacing, narrower
from tests.plans import STATS, tiny_plan


def test_the_network_is_made_narrower_and_nothing_else_changes() -> None:
    plan = tiny_plan()
    small = narrower(plan, 2)
    assert small.network.features == (2, 4, 4)
    assert (small.patch, small.spacing, small.network.strides) == (plan.patch, plan.spacing, plan.network.strides)
    assert narrower(plan, 100).network.features == (1, 1, 1)


def test_cases_on_coarser_voxels_are_as_large_in_mm() -> None:
    found = Fingerprint(
        case_ids=("a", "b"),
        shapes_after_crop=((50, 200, 180), (160, 200, 1)),
        spacings=((3.0, 0.7, 0.7), (1.0, 1.0, 1.0)),
        median_relative_size=1.0,
        intensity=(STATS,),
    )
    coarse = at_spacing(found, 2.0)
    assert coarse.shapes_after_crop == ((75, 70, 63), (80, 100, 1))
    assert coarse.spacings == ((2.0, 2.0, 2.0),) * 2
    assert coarse == replace(found, shapes_after_crop=coarse.shapes_after_crop, spacings=coarse.spacings)
