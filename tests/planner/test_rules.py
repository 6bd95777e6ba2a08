"""The rules: peer results frozen as a table, and each decision by itself.

PEER holds what nnunetv2 2.8.1 (dynamic_network_architectures 0.4.4, torch 2.13.0) plans for 3d_fullres. How they were
made: the planner object (ExperimentPlanner, nnUNetPlannerResEncM, L, XL; gpu_memory_target_in_gb where given) with its
dataset_fingerprint, labels and numTraining set to the row's numbers, two channels T1 and FLAIR, and plan_experiment()
run under torch.device("meta") with save_plans left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest

from planner.fingerprint import Fingerprint
from planner.plan import Plan, PlanError, PostprocessRule, Spacing, Triple
from planner.rules import Planner, explain, has_two_times, make_plan
from tests.planner.fingerprints import STATS, brains, fingerprint

CHANNELS = ("T1", "FLAIR")
LABELS = {"background": 0, "lesion": 1}
ISO6 = "111 222 222 222 222 222"
MANY_SMALL = [(36, 50, 35), (37, 51, 34), (35, 49, 36), (36, 52, 35)] * 65
THICK = [(22, 410, 350), (24, 400, 340), (20, 380, 330), (44, 400, 345), (23, 410, 350)]
THICK_MM = [(6.5, 0.45, 0.45), (6.0, 0.45, 0.45), (6.5, 0.48, 0.48), (3.0, 0.45, 0.45), (6.0, 0.47, 0.47)]
CT_MM = [(1.0, 0.75, 0.75), (1.2, 0.7, 0.7), (1.0, 0.8, 0.8)]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A fingerprint and the peer's answer. strides, kernels: a level each, the last kernel always 333."""

    planner: Planner = "plain"
    gpu_memory_gb: float | None = None
    data: Fingerprint
    labels: int = 2
    spacing: Spacing = (1.0, 1.0, 1.0)
    transpose: Triple = (0, 1, 2)
    median: tuple[float, float, float] = (155.0, 180.0, 147.0)
    patch: Triple
    batch_size: int = 2
    batch_dice: bool = False
    strides: str = ISO6
    kernels: str = "333 333 333 333 333 333"


PEER = {
    "brains": Row(data=brains(), patch=(128, 128, 128)),
    "brains, resenc-m": Row(planner="resenc-m", data=brains(), patch=(128, 128, 128)),
    "brains, resenc-l": Row(planner="resenc-l", data=brains(), patch=(160, 192, 160), batch_size=3),
    "brains, resenc-xl": Row(planner="resenc-xl", data=brains(), patch=(160, 192, 160), batch_size=6),
    "brains in 2 GB": Row(
        gpu_memory_gb=2,
        data=brains(),
        patch=(80, 96, 80),
        strides="111 222 222 222 222",
        kernels="333 333 333 333 333",
    ),
    "diffusion, two cases": Row(
        gpu_memory_gb=4,
        data=fingerprint([(73, 112, 98), (71, 109, 95)], [(2.0, 2.0, 2.0), (2.0, 1.9, 1.9)]),
        spacing=(2.0, 1.95, 1.95),
        median=(72.0, 110.5, 97.0),
        patch=(80, 112, 112),
        strides="111 222 222 222 222",
        kernels="333 333 333 333 333",
    ),
    "thick slices": Row(
        data=fingerprint(THICK, THICK_MM),
        spacing=(4.2, 0.45, 0.45),
        median=(33.0, 405.0, 350.0),
        patch=(24, 256, 256),
        strides="111 122 122 122 222 222 122",
        kernels="133 133 133 333 333 333 333",
    ),
    "thick along the last axis": Row(
        planner="resenc-m",
        data=fingerprint([(256, 230, 40)] * 4, [(0.9, 0.9, 4.0)] * 4),
        labels=3,
        spacing=(4.0, 0.9, 0.9),
        transpose=(2, 0, 1),
        median=(40.0, 256.0, 230.0),
        patch=(32, 224, 192),
        strides="111 122 122 222 222 222",
        kernels="133 133 333 333 333 333",
    ),
    "tenth percentile below the plane": Row(
        data=fingerprint([(30, 200, 180)] * 6 + [(250, 200, 180)] * 3, [(4.0, 1.0, 1.0)] * 6 + [(0.5, 1.0, 1.0)] * 3),
        spacing=(1.00001, 1.0, 1.0),
        median=(120.0, 200.0, 180.0),
        patch=(96, 160, 160),
        strides="111 222 222 222 222 122",
    ),
    "large CT": Row(
        data=fingerprint([(300, 420, 480), (280, 400, 460), (320, 440, 470)], CT_MM),
        labels=5,
        spacing=(1.0, 0.75, 0.75),
        median=(320.0, 420.0, 480.0),
        patch=(112, 128, 160),
        batch_dice=True,
        strides="111 222 222 222 222 122",
    ),
    "many small images": Row(
        data=fingerprint(MANY_SMALL, [(1.0, 1.0, 1.0)] * 260),
        labels=3,
        median=(36.0, 50.5, 35.0),
        patch=(40, 56, 40),
        batch_size=9,
        strides="111 222 222 222",
        kernels="333 333 333 333",
    ),
    "mild anisotropy in 11 GB": Row(
        planner="resenc-l",
        gpu_memory_gb=11,
        data=fingerprint([(60, 240, 200), (64, 230, 210)], [(2.2, 0.9, 0.9), (2.2, 0.9, 0.95)]),
        spacing=(2.2, 0.9, 0.925),
        median=(62.0, 235.0, 205.5),
        patch=(56, 224, 192),
        strides="111 122 222 222 222 122",
        kernels="133 333 333 333 333 333",
    ),
    "low resolution dropped": Row(
        data=fingerprint([(200, 230, 200)] * 20, [(0.8, 0.8, 0.8)] * 20),
        spacing=(0.8, 0.8, 0.8),
        median=(200.0, 230.0, 200.0),
        patch=(128, 128, 128),
    ),
}


def _plan(data: Fingerprint, *, channels: tuple[str, ...] = CHANNELS, **options: object) -> Plan:
    fields: dict[str, object] = {"dataset": "strokes", "labels": LABELS, "orientation": "as-stored"}
    return make_plan(data, channels=channels, **(fields | options))  # type: ignore[arg-type]


def _levels(triples: tuple[Triple, ...]) -> str:
    return " ".join("".join(map(str, triple)) for triple in triples)


@pytest.mark.parametrize("name", PEER)
def test_a_plan_equals_the_peers(name: str) -> None:
    row = PEER[name]
    labels = {"background": 0, **{f"lesion {i}": i for i in range(1, row.labels)}}
    plan = _plan(row.data, planner=row.planner, gpu_memory_gb=row.gpu_memory_gb, labels=labels)
    assert plan.spacing == pytest.approx(row.spacing, rel=1e-12)
    assert (plan.transpose, plan.median_shape) == (row.transpose, row.median)
    assert (plan.patch, plan.batch_size, plan.batch_dice) == (row.patch, row.batch_size, row.batch_dice)
    network = plan.network
    assert (_levels(network.strides), _levels(network.kernels)) == (row.strides, row.kernels)
    assert network.features == (32, 64, 128, 256, 320, 320, 320)[: network.stages]
    residual = row.planner != "plain"
    blocks = (1, 3, 4, 6, 6, 6, 6) if residual else (2,) * 7
    assert network.kind == ("residual" if residual else "plain")
    assert network.encoder_blocks == blocks[: network.stages]
    assert network.decoder_convs == ((1,) if residual else (2,)) * (network.stages - 1)
    assert network.decoder_kernels == network.kernels[:-1]


def test_the_first_patch_has_256_cubed_voxels_and_the_aspect_of_millimetres() -> None:
    huge = fingerprint([(900, 900, 900)], [(2.0, 1.0, 1.0)])
    plan = _plan(huge, planner="resenc-xl", gpu_memory_gb=1e6)  # memory never shrinks it
    assert plan.patch == (192, 384, 384)  # 161 x 323 x 323, halved 5, 6 and 6 times, rounded up


def test_the_first_patch_is_cut_to_the_median_image() -> None:
    plan = _plan(fingerprint([(40, 900, 900)], [(1.0, 1.0, 1.0)]), planner="resenc-xl", gpu_memory_gb=1e6)
    assert plan.patch == (40, 256, 256)


def test_the_batch_fills_the_memory_up_to_a_share_of_the_data() -> None:
    one = fingerprint([(64, 64, 64)], [(1.0, 1.0, 1.0)])
    assert _plan(one).batch_size == 2  # 5 % of a case is less than one patch
    maps = [32 * 64**3, 64 * 32**3, 128 * 16**3, 256 * 8**3, 320 * 4**3]  # of the patch 64^3
    voxels = 2 * sum(maps) + 3 * sum(maps[:-1]) + 2 * 64**3
    many = fingerprint([(64, 64, 64)] * 1000, [(1.0, 1.0, 1.0)] * 1000)
    assert _plan(many).batch_size == round(560e6 / voxels * 2) == 20
    assert _plan(many, gpu_memory_gb=16).batch_size == round(2 * 560e6 / voxels * 2)
    hundred = fingerprint([(64, 64, 64)] * 100, [(1.0, 1.0, 1.0)] * 100)
    assert _plan(hundred).batch_size == 5
    assert _plan(hundred, planner="resenc-l").batch_size > 5  # its share is the whole dataset


@pytest.mark.parametrize(("edge", "batch_dice"), [(128, False), (200, False), (300, True)])
def test_batch_dice_is_set_where_a_low_resolution_stage_would_exist(edge: int, batch_dice: bool) -> None:
    plan = _plan(fingerprint([(edge, edge, edge)] * 3, [(1.0, 1.0, 1.0)] * 3))
    covered = math.prod(plan.patch) / edge**3
    assert plan.batch_dice == batch_dice
    assert (covered < 0.25) == (edge == 300)


def test_channels_are_normalised_by_their_name_and_masked_where_the_crop_is_small() -> None:
    names = ("T1", "CT", "noNorm", "ZSCORE", "rescale_to_0_1", "rgb_to_0_1")
    schemes = ("zscore", "ct", "none", "zscore", "rescale_to_0_1", "rgb_to_0_1")
    for size, masked in ((0.74, True), (0.75, False)):
        data = fingerprint([(90, 90, 90)], [(1.0, 1.0, 1.0)], channels=6, relative_size=size)
        plan = _plan(data, channels=names)
        assert plan.normalisation == schemes
        assert plan.use_mask_for_norm == tuple(masked and scheme == "zscore" for scheme in schemes)
        assert plan.intensity == (STATS,) * 6


def test_ras_plans_mirror_left_and_right_alone_wherever_that_axis_lies() -> None:
    assert _plan(brains(), orientation="RAS").mirror_axes == (2,)
    sagittal = fingerprint([(256, 230, 40)], [(0.9, 0.9, 4.0)])
    assert _plan(sagittal, orientation="RAS").mirror_axes == (0,)
    assert _plan(brains()).mirror_axes == (0, 1, 2)


@pytest.mark.parametrize(
    ("channels", "expected"),
    [
        (("T1", "FLAIR"), False),
        (("T1", "FLAIR", "T1_2", "FLAIR_2"), True),
        (("flair", "FLAIR_2"), True),
        (("T1", "FLAIR_2"), False),  # no namesake: T1_2 may be another sequence's name
        (("T1_2",), False),
    ],
)
def test_two_times_are_looked_at_where_both_were_scanned(channels: tuple[str, ...], expected: bool) -> None:
    assert has_two_times(channels) == expected
    data = fingerprint([(155, 180, 147)] * 10, [(1.0, 1.0, 1.0)] * 10, channels=len(channels))
    rule = make_plan(data, dataset="d", channels=channels, labels=LABELS).postprocess
    assert rule == PostprocessRule(threshold=0.2, min_volume_mm3=4.0, scanned_only=True, common_field=expected)
    several = make_plan(data, dataset="d", channels=channels, labels={"background": 0, "a": 1, "b": 2})
    assert not several.postprocess.looks_at_scans


def test_one_lesion_label_takes_the_papers_mask_rule_and_several_the_most_probable() -> None:
    assert _plan(brains()).postprocess == PostprocessRule(
        threshold=0.2, min_volume_mm3=4.0, connectivity=26, scanned_only=True
    )
    several = _plan(brains(), labels={"background": 0, "core": 1, "rim": 2})
    assert several.postprocess == PostprocessRule(threshold=None, min_volume_mm3=0.0)


@pytest.mark.parametrize("memory", [0.0, -1.0, float("nan"), float("inf")])
def test_memory_that_is_no_memory_is_refused(memory: float) -> None:
    with pytest.raises(PlanError, match=f"GPU memory is {memory} GB; a number above 0 is needed"):
        _plan(brains(), gpu_memory_gb=memory)


def test_too_little_memory_too_small_images_and_other_channels_are_refused() -> None:
    with pytest.raises(PlanError, match="memory budget is too small"):
        _plan(brains(), gpu_memory_gb=1e-7)
    with pytest.raises(PlanError, match=r"patch \(5, 5, 4\) of images of 155 x 180 x 147 .* more GPU memory"):
        _plan(brains(), gpu_memory_gb=1e-4)
    with pytest.raises(PlanError, match="images of 7 x 7 x 7 voxels cannot be halved"):
        _plan(fingerprint([(7, 7, 7)], [(1.0, 1.0, 1.0)]))
    with pytest.raises(PlanError, match="1 channel names for a fingerprint of 2 channels"):
        _plan(brains(), channels=("T1",))


def test_a_search_for_low_resolution_that_finds_none_does_not_stop_the_plan() -> None:
    plan = _plan(fingerprint([(1022, 483, 10)], [(0.81, 3.38, 0.22)]), planner="resenc-m", gpu_memory_gb=0.1)
    assert not plan.batch_dice
    slice_alone = fingerprint([(1, 2000, 2000)], [(1.0, 1.0, 1.0)])  # coarsened, its one voxel must not round to none
    assert _plan(slice_alone).batch_dice


def test_every_decision_is_explained() -> None:
    data = PEER["thick slices"].data
    plan = _plan(data)
    rows = {decision.what: decision for decision in explain(plan, data)}
    assert all(row.value and row.why for row in rows.values())
    decided = {
        *("orientation", "spacing (mm)", "median shape", "patch", "batch size", "network", "features", "strides"),
        *("kernels", "normalisation", "z-score inside the head only", "batch Dice", "mirror axes", "mask"),
    }
    assert set(rows) == decided
    assert rows["spacing (mm)"].value == "4.2 x 0.45 x 0.45"
    assert "10th percentile" in rows["spacing (mm)"].why
    assert rows["patch"].value == "24 x 256 x 256"
    assert f"{24 * 256 * 256 / (33 * 405 * 350):.0%}" in rows["patch"].why
    assert rows["strides"].value.startswith("1 x 1 x 1; 1 x 2 x 2;")
    assert rows["mask"].value == "p > 0.2, 26-connected, > 4 mm3, where scanned"
    assert rows["z-score inside the head only"].value == "no"
    assert rows["mirror axes"].value == "axis 0, axis 1, axis 2"


def test_mirror_axes_and_masked_channels_are_named() -> None:
    sagittal = fingerprint([(256, 230, 40)], [(0.9, 0.9, 4.0)], relative_size=0.5)
    plan = _plan(sagittal, orientation="RAS", channels=("T1", "CT"))

    def value(plan: Plan, what: str) -> str:
        return next(decision.value for decision in explain(plan, sagittal) if decision.what == what)

    assert value(plan, "mirror axes") == "left-right"
    assert plan.transpose == (2, 0, 1)
    everywhere = replace(plan, mirror_axes=(0, 1, 2))
    assert value(everywhere, "mirror axes") == "left-right, foot-head, back-front"
    assert value(plan, "z-score inside the head only") == "T1 yes, CT no"


def test_an_explanation_follows_the_plan() -> None:
    data = brains()
    plan = replace(_plan(data), mirror_axes=(), batch_dice=True, postprocess=PostprocessRule())
    rows = {decision.what: decision for decision in explain(plan, data)}
    assert rows["mirror axes"].value == "none"
    assert rows["batch Dice"].value == "yes"
    assert rows["mask"].value == "most probable label"
    assert rows["spacing (mm)"].why == "median of 10 cases, axes D x H x W"
