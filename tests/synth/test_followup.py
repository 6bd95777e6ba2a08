"""The second time of a drawn patient: what is new, what has grown, and that nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from strokenet.data.errors import InputError
from strokenet.data.nifti import read_volume
from strokenet.prepare.inputs import read_inputs
from strokenet.synth.burden import Burden, draw_burden
from strokenet.synth.followup import Followup, Kind, draw_followup, kind_of, unchanged_in
from strokenet.synth.head import Head, drawn_head
from strokenet.synth.lesions import draw_hyperintensities
from strokenet.synth.masks import Placed, place_strokes
from strokenet.synth.signal import Overlay
from strokenet.synth.styles import CaseRecipe, SynthCase, draw_synth_case
from strokenet.synth.synth import SynthConfig, synthesise
from tests.synth.phantom import write_phantom


@cache
def patient() -> tuple[Head, Placed, Overlay]:
    rng = np.random.default_rng(21)
    head = drawn_head(rng)
    placed = place_strokes(rng, head, Burden(side="left", volume_ml=6.0), ())
    strokes = placed.strokes
    hyperintensity = draw_hyperintensities(rng, head.anatomy, strokes)
    return head, placed, Overlay(hyperintensity=hyperintensity, stroke=strokes.share, cavity=strokes.cavity)


@cache
def then(kind: Kind) -> Followup:
    head, placed, lesions = patient()
    return draw_followup(np.random.default_rng(4), head, placed.strokes, lesions, "left", (), kind)


def volume_ml(mask: NDArray[np.bool_]) -> float:
    return float(mask.sum()) * patient()[0].anatomy.spacing_mm ** 3 / 1000


def distance_mm(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    return np.asarray(ndimage.distance_transform_edt(~mask) * patient()[0].anatomy.spacing_mm)


@pytest.mark.parametrize("seed", [0, 1000])
def test_one_case_of_four_is_unchanged_and_the_others_are_of_every_kind(seed: int) -> None:
    kinds = [kind_of(seed, index) for index in range(200)]
    assert [kinds[start : start + 4].count("none") for start in range(0, 200, 4)] == [1] * 50
    assert set(kinds) == {"none", "new", "grown", "both"}
    assert kinds.count("new") > kinds.count("grown") > 15


@pytest.mark.parametrize("seed", [0, 1000])
def test_the_size_of_the_old_strokes_does_not_tell_who_is_unchanged(seed: int) -> None:
    """Quarters of all volumes: unchanged cases are in each of them, and so are changed ones."""
    volumes = np.array([draw_burden(seed, index).total_ml for index in range(80)])
    quarter = np.digitize(volumes, np.quantile(volumes, [0.25, 0.5, 0.75]))
    unchanged = np.array([kind_of(seed, index) == "none" for index in range(80)])
    for number in range(4):
        assert 0.05 < unchanged[quarter == number].mean() < 0.6


def test_nothing_changes_but_that_a_stroke_may_shrink_a_little() -> None:
    _, placed, lesions = patient()
    found = then("none")
    assert not found.changed.any()
    assert found.new_ml == ()
    assert 0 <= found.shrunk_ml <= 0.15 * volume_ml(placed.strokes.mask) + 0.01
    np.testing.assert_array_equal(found.overlay.hyperintensity, lesions.hyperintensity)
    assert (found.overlay.stroke <= lesions.stroke + 1e-5).all()
    assert (found.overlay.cavity <= lesions.cavity).all()


def test_new_strokes_lie_apart_from_the_old_and_from_hyperintensities() -> None:
    _, placed, lesions = patient()
    found = then("new")
    assert 1 <= len(found.new_ml) <= 3
    assert volume_ml(found.changed) == pytest.approx(sum(found.new_ml))
    assert all(0.3 <= ml <= 15 for ml in found.new_ml)
    assert distance_mm(placed.strokes.mask)[found.changed].min() >= 4 - 1e-6
    assert lesions.hyperintensity[found.changed].max() <= 0.1
    assert (found.overlay.stroke[found.changed] > 0.2).all()


def test_a_stroke_grows_at_its_edge_by_solid_tissue() -> None:
    head, placed, _ = patient()
    found, old = then("grown"), placed.strokes.mask
    assert not (found.changed & old).any()
    assert 0.29 * volume_ml(old) <= volume_ml(found.changed) <= 0.91 * volume_ml(old)
    assert found.grown_ml == pytest.approx(volume_ml(found.changed))
    pieces, count = ndimage.label(found.changed | old, np.ones((3, 3, 3)))
    touching = np.isin(pieces, np.unique(pieces[old]))
    assert count >= 1
    assert touching[found.changed].mean() > 0.8
    assert not found.overlay.cavity[found.changed].any()
    np.testing.assert_array_equal(found.overlay.cavity[old], placed.strokes.cavity[old])
    assert head.anatomy.brain[found.changed].all()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> CaseRecipe:
    head = write_phantom(tmp_path_factory.mktemp("maps") / "head.nii.gz")
    return CaseRecipe(
        case_id="c",
        style="clinic",
        domain="natural",
        seed=3,
        index=2,
        burden=Burden(side="right", volume_ml=2.0),
        label_maps=(head,),
        times=2,
    )


@pytest.fixture(scope="module")
def case(recipe: CaseRecipe) -> SynthCase:
    return draw_synth_case(recipe)


def test_the_first_time_is_the_case_of_one_time(case: SynthCase, recipe: CaseRecipe) -> None:
    alone = draw_synth_case(replace(recipe, times=1))
    for name, scan in alone.scans.items():
        np.testing.assert_array_equal(scan.image, case.scans[name].image)
    np.testing.assert_array_equal(alone.matrices["t1"], case.matrices["t1"])
    assert case.stroke_ml == alone.volume_ml


def test_the_saved_motions_bring_the_second_time_onto_the_first(case: SynthCase) -> None:
    """The oracle walks the points itself, from the first FLAIR's voxels into every other scan."""
    flair = case.scans["flair"].geometry
    voxels = np.argwhere(np.ones(flair.shape, bool))[::7]
    points = np.c_[voxels, np.ones(len(voxels))] @ flair.affine.T
    here = case.brains["flair"][tuple(voxels.T)]
    for name in ("t1", "t1_2", "flair_2"):

        def overlap(matrix: NDArray[np.float64], name: str = name) -> float:
            at = (points @ matrix.T @ np.linalg.inv(case.scans[name].geometry.affine).T)[:, :3]
            there = ndimage.map_coordinates(case.brains[name].astype(np.float32), at.T, order=1) > 0.5
            return 2 * float((there & here).sum()) / float(there.sum() + here.sum())

        assert overlap(case.matrices[name]) > 0.96, name
        assert overlap(np.linalg.inv(case.matrices[name]).astype(np.float64)) < 0.95


def test_the_label_is_what_is_bright_then_and_was_not_before(case: SynthCase) -> None:
    flair, label = case.scans["flair"].geometry, case.label > 0
    brain = case.brains["flair"]
    assert label.any()
    assert brain[label].mean() > 0.99
    voxels = np.argwhere(brain)
    points = np.c_[voxels, np.ones(len(voxels))] @ flair.affine.T @ case.matrices["flair_2"].T
    at = (points @ np.linalg.inv(case.scans["flair_2"].geometry.affine).T)[:, :3]
    second = np.zeros(brain.shape)
    second[brain] = ndimage.map_coordinates(case.scans["flair_2"].image, at.T, order=1)
    first = case.scans["flair"].image
    solid = ndimage.binary_erosion(label) if ndimage.binary_erosion(label).any() else label
    rank_before, rank_then = ((image[brain] < np.median(image[solid])).mean() for image in (first, second))
    assert rank_then > 0.85
    assert rank_then - rank_before > 0.2


def test_an_unchanged_case_has_an_empty_label(recipe: CaseRecipe) -> None:
    same = draw_synth_case(replace(recipe, index=unchanged_in(recipe.seed, 0)))
    assert not same.label.any()
    assert same.facts["changed"] is False
    assert same.stroke_ml > 0


def test_a_cohort_of_two_times_is_what_prepare_takes(recipe: CaseRecipe, tmp_path: Path) -> None:
    config = SynthConfig(cases=1, style="clinic", times=2, label_maps=recipe.label_maps[0].parent)
    cohort = synthesise(tmp_path / "out", config, jobs=1)
    (inputs,) = read_inputs(cohort.root / "patients")
    assert list(inputs.scans) == ["t1", "flair", "t1_2", "flair_2"]
    assert inputs.label is not None
    label, first = read_volume(inputs.label), read_volume(inputs.scans["flair"])
    np.testing.assert_allclose(label.geometry.affine, first.geometry.affine)
    assert cohort.rows[0].changed_ml == pytest.approx(label.array.sum() * 3 * 0.7 * 0.7 / 1000, rel=1e-5)
    assert len(list((cohort.root / "truth").glob("*_2_brain.nii.gz"))) == 2


def test_two_times_are_of_style_clinic_alone() -> None:
    with pytest.raises(InputError, match="in style clinic 2"):
        SynthConfig(cases=1, times=2)
