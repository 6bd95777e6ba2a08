"""Contrast facts: what T1 and FLAIR show, by hand-computed numbers and by the image itself."""

from __future__ import annotations

from dataclasses import replace
from math import exp

import numpy as np
import pytest

from strokenet.synth.burden import Burden
from strokenet.synth.head import Head, Matter, drawn_head
from strokenet.synth.labelmap import bent_head, read_label_map
from strokenet.synth.masks import place_strokes
from strokenet.synth.signal import BETWEEN_CASES, RANDOM_APART, T1_MEANS, Look, Overlay, draw_look, flair_means, signal
from tests.synth.phantom import write_phantom


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Head:
    path = write_phantom(tmp_path_factory.mktemp("maps") / "head.nii.gz")
    return bent_head(np.random.default_rng(1), read_label_map(path), whole=True)


def healthy(of: Head) -> Overlay:
    zero = np.zeros(of.anatomy.shape, np.float32)
    return Overlay(hyperintensity=zero, stroke=zero, cavity=zero)


def plain(means: dict[Matter, float]) -> Look:
    mean = np.array([means.get(matter, 0.0) for matter in Matter], np.float32)
    return Look(mean=mean, texture=np.zeros(len(Matter), np.float32))


def test_flair_is_the_inversion_recovery_equation() -> None:
    """Grey over white matter with the numbers of Stanisz 2005, by hand: TR 9000, TI 2500, TE 100 ms."""
    grey = 0.82 * (1 - 2 * exp(-2500 / 1820) + exp(-9000 / 1820)) * exp(-100 / 99)
    white = 0.70 * (1 - 2 * exp(-2500 / 1084) + exp(-9000 / 1084)) * exp(-100 / 69)
    assert flair_means()[Matter.CORTEX] == pytest.approx(grey / white)
    assert flair_means()[Matter.WHITE] == 1


def test_order_of_brightness_is_that_of_the_sequences() -> None:
    flair, t1 = flair_means(), dict(T1_MEANS)
    assert flair[Matter.CSF] < flair[Matter.CAVITY] < flair[Matter.WHITE] < flair[Matter.CORTEX] < flair[Matter.RIM]
    assert flair[Matter.WMH] > 1.5  # a hyperintensity is no darker than a stroke's rim, so that no threshold finds one
    assert t1[Matter.CSF] <= t1[Matter.CAVITY] < t1[Matter.RIM] < t1[Matter.CORTEX] < t1[Matter.STRIATUM] < 1
    assert t1[Matter.RIM] < t1[Matter.WMH] < 1
    assert t1[Matter.EYE] < t1[Matter.BONE] < t1[Matter.MARROW] < t1[Matter.FAT]


def test_without_texture_a_voxel_shows_its_matter_and_a_border_the_mean_of_two(head: Head) -> None:
    image = signal(np.random.default_rng(0), head, healthy(head), plain(dict(T1_MEANS)))
    ventricle = head.fluid & (head.anatomy.ventricle_mm < -2.5)
    assert np.median(image[head.box][ventricle]) == pytest.approx(44.4 / 160.3, abs=0.02)
    matter = np.full_like(head.matter, Matter.WHITE)
    matter[matter.shape[0] // 2 :] = Matter.CSF
    half = signal(np.random.default_rng(0), replace(head, matter=matter), healthy(head), plain(dict(T1_MEANS)))
    d = matter.shape[0] // 2
    assert half[d - 4].mean() == pytest.approx(1.0, abs=1e-4)
    assert (half[d - 1].mean() + half[d].mean()) / 2 == pytest.approx((1 + 44.4 / 160.3) / 2, abs=1e-3)
    assert 0.6 < half[d - 1].mean() < 0.99


@pytest.mark.parametrize("source", ["map", "drawn"])
def test_a_stroke_is_dark_on_t1_and_has_a_bright_rim_and_a_dark_cavity_on_flair(source: str, head: Head) -> None:
    of = head if source == "map" else drawn_head(np.random.default_rng(3))
    stroke = np.zeros(of.anatomy.shape, np.float32)
    middle = tuple(n // 2 for n in stroke.shape)
    d, h, w = (slice(m - 8, m + 9) for m in middle)
    stroke[d, h, w] = 1
    cavity = np.zeros_like(stroke)
    cavity[tuple(slice(m - 4, m + 5) for m in middle)] = 1
    lesions = Overlay(hyperintensity=np.zeros_like(stroke), stroke=stroke, cavity=cavity)
    rng = np.random.default_rng(4)
    t1 = signal(rng, of, lesions, draw_look(rng, "T1", "natural"))[of.box]
    flair = signal(rng, of, lesions, draw_look(rng, "FLAIR", "natural"))[of.box]
    rim = (middle[0] + 6, middle[1], middle[2])
    assert t1[middle] < t1[rim] < 0.75
    assert flair[rim] > 1.5
    assert flair[middle] < 0.7


def test_the_middle_of_every_large_stroke_is_darker_than_white_matter_on_flair() -> None:
    """As placed, not as set by hand: without texture, for the share of fluid differs from case to case."""
    head = drawn_head(np.random.default_rng(3))
    for seed in range(8):
        rng = np.random.default_rng(seed)
        strokes = place_strokes(rng, head, Burden(side="left", volume_ml=50.0), ()).strokes
        lesions = Overlay(hyperintensity=np.zeros_like(strokes.share), stroke=strokes.share, cavity=strokes.cavity)
        look = draw_look(rng, "FLAIR", "natural")
        flair = signal(rng, head, lesions, replace(look, texture=np.zeros_like(look.texture)))[head.box]
        white = look.mean[Matter.WHITE]
        assert flair[strokes.cavity > 0.95 * strokes.cavity.max()].mean() < 0.95 * white
        assert flair[(strokes.share > 0.95) & (strokes.cavity == 0)].mean() > 1.4 * white


def test_natural_looks_differ_a_little_from_case_to_case() -> None:
    looks = [draw_look(np.random.default_rng(seed), "T1", "natural").mean for seed in range(400)]
    spread = np.std([look[Matter.CORTEX] for look in looks]) / (96.3 / 160.3)
    assert spread == pytest.approx(BETWEEN_CASES, rel=0.15)


def test_random_looks_have_any_contrast_but_show_every_lesion() -> None:
    looks = [draw_look(np.random.default_rng(seed), "T1", "random").mean for seed in range(300)]
    brighter = np.mean([look[Matter.CORTEX] > look[Matter.WHITE] for look in looks])
    assert 0.4 < brighter < 0.6
    for look in looks:
        assert look[Matter.AIR] == 0
        for part in (Matter.RIM, Matter.CAVITY, Matter.WMH):
            assert abs(look[part] - look[Matter.WHITE]) >= RANDOM_APART - 1e-5


def test_fat_saturation_darkens_the_scalp_in_about_half_of_the_flair_scans() -> None:
    fat = np.array([draw_look(np.random.default_rng(seed), "FLAIR", "natural").mean[Matter.FAT] for seed in range(300)])
    assert 0.4 < np.mean(fat < 1) < 0.6
