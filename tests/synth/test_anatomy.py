"""The drawn brain and its lesions on the fine grid."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from scipy import ndimage

from strokenet.synth.anatomy import Anatomy, Tissue, draw_anatomy
from strokenet.synth.contrast import FLAIR, T1, render
from strokenet.synth.field import smooth_field
from strokenet.synth.lesions import (
    MAIN_ML,
    ROOM,
    SATELLITE_ML,
    Strokes,
    draw_hyperintensities,
    draw_strokes,
    paint,
)


@cache
def brain() -> Anatomy:
    return draw_anatomy(np.random.default_rng(11))


@cache
def strokes(seed: int) -> Strokes:
    return draw_strokes(np.random.default_rng(seed), brain())


@pytest.mark.parametrize("sigma", [0.0, 1.0, 2.5, 12.0])
def test_smooth_field_has_unit_spread_and_the_asked_length(sigma: float) -> None:
    """A Gaussian-smoothed white noise correlates by exp(-x^2 / (4 sigma^2)) at distance x."""
    shape = (70, 80, 90)
    field = smooth_field(np.random.default_rng(0), shape, sigma)
    assert field.shape == shape
    assert field.dtype == np.float32
    assert (field.mean(), field.std()) == (pytest.approx(0, abs=1e-4), pytest.approx(1, abs=1e-3))
    lag = max(1, round(sigma))
    expected = np.exp(-(lag**2) / (4 * sigma**2)) if sigma else 0.0
    for axis in range(3):
        a, b = (np.take(field, range(start, field.shape[axis] - lag + start), axis) for start in (0, lag))
        assert float((a * b).mean()) == pytest.approx(expected, abs=0.15)


def test_tissue_shares_add_up_to_one_before_and_after_lesions_are_painted() -> None:
    wmh = draw_hyperintensities(np.random.default_rng(0), brain(), strokes(0))
    painted = paint(brain(), strokes(0), wmh)
    for anatomy in (brain(), painted):
        assert anatomy.tissue.dtype == np.float32
        assert anatomy.tissue.min() >= -1e-6
        np.testing.assert_allclose(anatomy.tissue.sum(0), 1, atol=1e-5)
    assert not brain().tissue[Tissue.RIM :].any()


def test_tissue_volumes_are_those_of_an_adult_brain() -> None:
    """Adults: about 1.1 to 1.4 l of brain, grey and white matter near 55 : 45, a few per cent of them ventricle."""
    anatomy = brain()
    ml = anatomy.spacing_mm**3 / 1000
    inside = anatomy.tissue[:, anatomy.brain].sum(1) * ml
    grey, white = inside[Tissue.GREY] + inside[Tissue.DEEP_GREY], inside[Tissue.WHITE]
    assert 1000 < inside.sum() < 1600
    assert 0.6 < grey / white < 1.6
    ventricles = (anatomy.ventricle_mm < 0).sum() * ml
    assert 8 < ventricles < 80
    assert ndimage.label(anatomy.brain)[1] == 1


def test_brain_is_deep_inside_and_its_left_is_not_its_mirrored_right() -> None:
    anatomy = brain()
    d, h, w = (n // 2 for n in anatomy.shape)
    assert anatomy.depth_mm[d, h, w] > 30
    assert (anatomy.depth_mm[~anatomy.brain] < 1).all()
    grey = anatomy.tissue[Tissue.GREY]
    assert np.corrcoef(grey.ravel(), grey[:, :, ::-1].ravel())[0, 1] < 0.6


def test_cortex_is_folded() -> None:
    """CSF reaches far below the hull: a smooth ellipsoid has none at 6 to 12 mm away from the midline."""
    anatomy = brain()
    shell = (anatomy.depth_mm > 6) & (anatomy.depth_mm < 12) & (anatomy.ventricle_mm > 3)
    shell &= np.abs(anatomy.right_mm) > 25
    assert 0.05 < anatomy.tissue[Tissue.CSF][shell].mean() < 0.4
    assert anatomy.tissue[Tissue.GREY][shell].mean() > 0.25


@pytest.mark.parametrize("seed", range(8))
def test_strokes_lie_in_brain_tissue_on_one_side_and_have_the_stated_volumes(seed: int) -> None:
    drawn, anatomy = strokes(seed), brain()
    assert drawn.mask.any()
    assert (anatomy.depth_mm[drawn.mask] > 1).all()
    assert (anatomy.ventricle_mm[drawn.mask] > 1).all()
    labels, count = ndimage.label(drawn.mask)
    assert count == len(drawn.volumes_ml)
    sizes_ml = np.bincount(labels.ravel())[1:] * anatomy.spacing_mm**3 / 1000
    np.testing.assert_allclose(sorted(sizes_ml), sorted(drawn.volumes_ml))
    right = np.broadcast_to(anatomy.right_mm > 0, anatomy.shape)
    for index in range(1, count + 1):
        assert len(np.unique(right[labels == index])) == 1
    assert ROOM * MAIN_ML[0] <= drawn.volumes_ml[0] <= MAIN_ML[1]
    assert min(drawn.volumes_ml) >= 0.9 * ROOM * SATELLITE_ML[0]


def test_both_sides_and_several_counts_and_sizes_of_strokes_occur() -> None:
    drawn = [strokes(seed) for seed in range(16)]
    right = np.broadcast_to(brain().right_mm > 0, brain().shape)
    sides = [bool(right[s.mask].mean() > 0.5) for s in drawn]
    assert 3 <= sum(sides) <= 13
    assert {1, 2} <= {len(s.volumes_ml) for s in drawn}
    mains = [s.volumes_ml[0] for s in drawn]
    assert max(mains) > 4 * min(mains)


def test_a_stroke_has_a_cavity_inside_a_rim() -> None:
    drawn = max((strokes(seed) for seed in range(8)), key=lambda s: s.volumes_ml[0])
    depth = ndimage.distance_transform_edt(drawn.mask) * brain().spacing_mm
    assert drawn.cavity[depth > 6].mean() > 0.4
    assert drawn.cavity[(depth > 0) & (depth <= 1.5)].mean() < 0.1
    assert not drawn.cavity[~drawn.mask].any()


@pytest.mark.parametrize("seed", range(3))
def test_hyperintensities_lie_in_white_matter_beside_ventricles_and_deep_and_apart_from_strokes(seed: int) -> None:
    anatomy, drawn = brain(), strokes(seed)
    share = draw_hyperintensities(np.random.default_rng(seed), anatomy, drawn)
    mask = share > 0.5
    assert share.max() <= 1.0 + 1e-6
    assert (anatomy.tissue[Tissue.WHITE][mask] > 0.6).mean() > 0.97  # the soft edge closes a pinhole here and there
    assert ndimage.distance_transform_edt(~drawn.mask)[mask].min() * anatomy.spacing_mm > 2
    ml = anatomy.spacing_mm**3 / 1000
    assert (mask & (anatomy.ventricle_mm < 8)).sum() * ml > 2
    foci = ndimage.label(mask & (anatomy.ventricle_mm > 10))[1]
    assert foci >= 5


def test_contrasts_order_the_tissues_as_t1_and_flair_do() -> None:
    wmh = draw_hyperintensities(np.random.default_rng(0), brain(), strokes(0))
    anatomy = paint(brain(), strokes(0), wmh)
    means = {}
    for name, contrast in (("T1", T1), ("FLAIR", FLAIR)):
        image = render(np.random.default_rng(1), anatomy, contrast)
        assert image.dtype == np.float32
        pure = {tissue: image[anatomy.tissue[tissue] > 0.9] for tissue in Tissue if tissue != Tissue.CAVITY}
        means[name] = {tissue: float(values.mean()) for tissue, values in pure.items()}
    t1, flair = means["T1"], means["FLAIR"]
    assert t1[Tissue.WHITE] > t1[Tissue.DEEP_GREY] > t1[Tissue.GREY] > t1[Tissue.CSF]
    assert t1[Tissue.CSF] < t1[Tissue.RIM] < t1[Tissue.GREY]
    assert t1[Tissue.DEEP_GREY] - 0.1 < t1[Tissue.WMH] < t1[Tissue.WHITE]
    assert flair[Tissue.CSF] < flair[Tissue.WHITE] < flair[Tissue.GREY] < flair[Tissue.RIM]
    assert 0.95 < flair[Tissue.WMH] / flair[Tissue.RIM] < 1.3
    for contrast in (T1, FLAIR):
        assert contrast.mean[Tissue.CSF] < contrast.mean[Tissue.CAVITY] < contrast.mean[Tissue.GREY]
