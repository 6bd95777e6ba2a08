"""Label maps as heads: read, turned, bent, and measured."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from strokenet.data.errors import InputError
from strokenet.synth.head import Head, Matter, drawn_head, extent, widened
from strokenet.synth.labelmap import (
    LABELS,
    TEMPLATE_SIZE_MM,
    bent_head,
    read_label_map,
)
from tests.synth.phantom import SHAPE, SPACING, phantom, write_phantom


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantom(tmp_path_factory.mktemp("maps") / "head.nii.gz")


@pytest.fixture(scope="module")
def head(path: Path) -> Head:
    return bent_head(np.random.default_rng(4), read_label_map(path), whole=True)


def test_a_map_in_lia_order_is_read_in_ras(path: Path) -> None:
    labels = read_label_map(path)
    table = np.vectorize(lambda number: int(LABELS[number]))
    np.testing.assert_array_equal(labels.matter, table(phantom()).transpose(2, 1, 0))  # (x, y, z) -> (D, H, W)
    assert labels.midline == pytest.approx((SHAPE[0] - 1) / 2, abs=0.6)


def test_an_unknown_label_and_half_a_brain_are_refused(tmp_path: Path) -> None:
    labels = phantom()
    labels[20, 20, 20] = 999
    with pytest.raises(InputError, match=r"holds 999\.0, no FreeSurfer label"):
        read_label_map(write_phantom(tmp_path / "strange.nii.gz", labels))
    half = phantom()
    half[half == 41] = 2
    with pytest.raises(InputError, match="labels 2, 3, 41 and 42"):
        read_label_map(write_phantom(tmp_path / "half.nii.gz", half))


def test_a_map_of_cortex_by_region_with_a_corpus_callosum_is_the_same_head(tmp_path: Path, path: Path) -> None:
    """As FreeSurfer's aparc+aseg has them."""
    labels = phantom()
    labels[labels == 3], labels[labels == 42] = 1001, 2035
    labels[labels == 2] = 251
    labels[:16][labels[:16] == 251] = 2
    np.testing.assert_array_equal(
        read_label_map(write_phantom(tmp_path / "aparc.nii.gz", labels)).matter, read_label_map(path).matter
    )


def test_the_brain_mask_holds_the_brain_and_the_csf_in_it_and_no_skull(head: Head) -> None:
    inner, brain = head.inner, head.anatomy.brain
    solid = np.isin(inner, [Matter.CORTEX, Matter.WHITE, Matter.VENTRICLE, Matter.CEREBELLAR_GREY, Matter.STEM])
    assert brain[solid].all()
    assert not brain[np.isin(inner, [Matter.BONE, Matter.SKIN, Matter.FAT, Matter.SOFT, Matter.AIR])].any()
    assert set(np.unique(head.matter)) >= {Matter.SKIN, Matter.BONE, Matter.FAT, Matter.AIR}


def test_depth_and_distance_to_the_ventricle_are_measured_in_the_bent_head(head: Head) -> None:
    anatomy = head.anatomy
    assert np.percentile(anatomy.ventricle_mm[head.fluid], 98) <= 2  # measured on every second voxel
    assert np.percentile(anatomy.ventricle_mm[~head.fluid], 2) > 0
    deep = anatomy.depth_mm > 3
    assert anatomy.brain[deep].all()
    d, h, w = np.argwhere(head.fluid).mean(0).astype(int)
    assert anatomy.depth_mm[d, h, w] > 15
    np.testing.assert_allclose(anatomy.tissue.sum(0), 1)


def test_the_midline_is_the_origin_and_a_grid_of_whole_mm(head: Head, path: Path) -> None:
    assert np.array_equal(head.affine, np.rint(head.affine))
    white = np.argwhere(head.inner == Matter.WHITE) @ head.anatomy.affine[:3, :3].T + head.anatomy.affine[:3, 3]
    assert abs(white[:, 0].mean()) < 4  # a bend may make one hemisphere the larger one
    fluid = np.argwhere(head.fluid) @ head.anatomy.affine[:3, :3].T + head.anatomy.affine[:3, 3]
    assert np.abs(fluid[:, 0]).min() > 3  # the horns of the phantom begin 6 mm from the midline, on both sides
    top = np.argwhere(head.anatomy.brain)[:, 0].max() + head.anatomy.affine[2, 3]
    assert top == pytest.approx(62, abs=8)
    again = bent_head(np.random.default_rng(4), read_label_map(path), whole=True)
    np.testing.assert_array_equal(again.matter, head.matter)
    other = bent_head(np.random.default_rng(5), read_label_map(path), whole=True)
    assert other.matter.shape != head.matter.shape or (other.matter != head.matter).any()


def test_mirroring_is_drawn_and_swaps_the_sides(tmp_path: Path) -> None:
    labels = phantom()
    labels[(labels == 2) & (np.arange(SHAPE[0]) > 12)[:, None, None]] = 10  # a thalamus on the left only
    one_sided = read_label_map(write_phantom(tmp_path / "one.nii.gz", labels))
    sides = []
    for seed in range(8):
        anatomy_head = bent_head(np.random.default_rng(seed), one_sided, whole=False)
        at = np.argwhere(anatomy_head.inner == Matter.THALAMUS).mean(0)
        sides.append(np.sign((anatomy_head.anatomy.affine @ [*at, 1])[0]))
    assert set(sides) == {-1.0, 1.0}


def test_a_head_that_sticks_out_on_one_side_is_whole_when_it_is_mirrored(tmp_path: Path) -> None:
    labels = phantom()
    labels[0:2, 20:24, 20:24] = 506  # far to the left, where the right side has nothing
    lopsided = read_label_map(write_phantom(tmp_path / "lopsided.nii.gz", labels[:-2]))
    for seed in range(6):
        whole = bent_head(np.random.default_rng(seed), lopsided, whole=True)
        assert (whole.matter == Matter.EYE).sum() > 0.4 * 2 * 4 * 4 * SPACING**3


def test_fitted_to_the_template_the_brain_has_its_size(path: Path) -> None:
    fitted = bent_head(np.random.default_rng(1), read_label_map(path), whole=False, to_template=True)
    low, high = extent(fitted.anatomy.brain)
    np.testing.assert_allclose(high - low, TEMPLATE_SIZE_MM, rtol=0.12)


@pytest.mark.parametrize("side", [-1, 1])
@pytest.mark.parametrize("source", ["map", "drawn"])
def test_a_ventricle_widens_on_its_side_only_and_nothing_else_is_lost(side: int, source: str, path: Path) -> None:
    rng = np.random.default_rng(2)
    before = drawn_head(rng) if source == "drawn" else bent_head(rng, read_label_map(path), whole=False)
    after = widened(before, side, 3.0)
    here = np.broadcast_to(side * before.anatomy.right_mm > 1.5, before.fluid.shape)
    assert after.fluid[here].sum() > 1.3 * before.fluid[here].sum()
    there = np.broadcast_to(side * before.anatomy.right_mm < 0, before.fluid.shape)
    np.testing.assert_array_equal(after.fluid[there], before.fluid[there])
    np.testing.assert_allclose(after.anatomy.tissue.sum(0), 1, atol=1e-5)
    np.testing.assert_array_equal(after.anatomy.brain, before.anatomy.brain)
    assert widened(before, side, 0.0) is before


def test_a_drawn_head_has_shells_around_an_unchanged_brain() -> None:
    drawn = drawn_head(np.random.default_rng(9))
    assert (drawn.inner[drawn.anatomy.brain] == Matter.MIXED).all()
    middle = drawn.matter.shape[0] // 2, drawn.matter.shape[1] // 2
    line = drawn.matter[middle[0], middle[1]]
    kinds = [Matter(line[0])] + [Matter(b) for a, b in itertools.pairwise(line) if a != b]
    assert kinds[:6] == [Matter.AIR, Matter.SKIN, Matter.FAT, Matter.BONE, Matter.MARROW, Matter.BONE]
    assert kinds[-3:] == [Matter.FAT, Matter.SKIN, Matter.AIR]


def test_a_real_label_map_has_a_brain_of_a_litre_and_a_half(real_data: Path) -> None:
    labels = read_label_map(min((real_data / "synthseg" / "label_maps").glob("*.nii.gz")))
    real = bent_head(np.random.default_rng(0), labels, whole=True)
    litres = np.count_nonzero(real.anatomy.brain) / 1e6
    assert 1.0 < litres < 1.8
    assert 0.005 < np.count_nonzero(real.fluid) / 1e6 < 0.15
    assert 0.08 < np.count_nonzero(real.fossa) / 1e6 < 0.25
