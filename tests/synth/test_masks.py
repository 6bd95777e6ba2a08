"""Strokes in a head: where they may be, how large, and how a real mask comes there."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from strokenet.data.errors import InputError
from strokenet.synth.burden import Burden, Side
from strokenet.synth.head import Head, drawn_head, extent
from strokenet.synth.masks import TEMPLATE_MM, place_strokes, read_source
from tests.synth.phantom import write_mask_mni


@cache
def head() -> Head:
    return drawn_head(np.random.default_rng(21))


def volume_ml(mask: NDArray[np.bool_]) -> float:
    return float(mask.sum()) * head().anatomy.spacing_mm ** 3 / 1000


@pytest.mark.parametrize(
    ("side", "wanted_ml"),
    [("left", 0.1), ("left", 40.0), ("right", 4.0), ("right", 150.0), ("other", 0.1), ("other", 4.0), ("other", 40.0)],
)
def test_a_drawn_stroke_is_in_the_brain_on_its_side_and_of_its_volume(side: Side, wanted_ml: float) -> None:
    anatomy = head().anatomy
    placed = place_strokes(np.random.default_rng(1), head(), Burden(side=side, volume_ml=wanted_ml), ())
    mask = placed.strokes.mask
    assert volume_ml(mask) == pytest.approx(wanted_ml, rel=0.05)
    assert anatomy.brain[mask].all()
    assert not (anatomy.ventricle_mm[mask] < 0).any()
    right = np.broadcast_to(anatomy.right_mm, mask.shape)[mask]
    assert {"left": (right < 0).all(), "right": (right > 0).all(), "other": np.abs(right).min() < 40}[side]
    assert placed.masks == ("drawn",)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_real_mask_comes_to_its_place_mirrored_where_the_side_asks_it(side: Side, tmp_path: Path) -> None:
    """The oracle: the ball's centre in the template's box, in shares of the box, is its centre in the brain's box."""
    centre = np.array([-38.0, -10.0, 30.0])
    path = write_mask_mni(tmp_path / "ball.nii.gz", (-38.0, -10.0, 30.0), 12.0)
    placed = place_strokes(np.random.default_rng(3), head(), Burden(side=side, volume_ml=6.0), (path,))
    assert placed.masks == ("ball.nii.gz",)
    centre[0] *= -1 if side == "right" else 1
    share = (centre[::-1] - TEMPLATE_MM[0]) / (TEMPLATE_MM[1] - TEMPLATE_MM[0])
    low, high = extent(head().anatomy.brain)
    found = np.argwhere(placed.strokes.mask).mean(0)
    assert np.abs(found - (low + share * (high - low))).max() * head().anatomy.spacing_mm < 3
    assert volume_ml(placed.strokes.mask) == pytest.approx(6.0, rel=0.02)


def test_a_second_stroke_keeps_apart_and_both_are_in_the_mask() -> None:
    burden = Burden(side="left", volume_ml=10.0, second_side="right", second_ml=2.0)
    strokes = place_strokes(np.random.default_rng(5), head(), burden, ()).strokes
    assert strokes.volumes_ml == pytest.approx((10.0, 2.0), rel=0.05)
    assert volume_ml(strokes.mask) == pytest.approx(sum(strokes.volumes_ml))
    right = np.broadcast_to(head().anatomy.right_mm, strokes.mask.shape)
    assert volume_ml(strokes.mask & (right > 0)) == pytest.approx(2.0, rel=0.05)


def test_a_mask_is_measured_in_the_world_and_central_ones_are_of_no_side(tmp_path: Path) -> None:
    cases = {"left": (-30.0, 0.0, 20.0), "right": (25.0, 10.0, 5.0), "other": (2.0, -20.0, 0.0)}
    for side, centre in cases.items():
        source = read_source(write_mask_mni(tmp_path / f"{side}.nii.gz", centre, 8.0))
        assert source is not None
        assert source.side == side
        np.testing.assert_allclose(source.centre, centre, atol=1e-4)
        assert source.volume_ml == pytest.approx(4 / 3 * np.pi * 8**3 / 1000, rel=0.02)
    fossa = read_source(write_mask_mni(tmp_path / "fossa.nii.gz", (25.0, -60.0, -35.0), 8.0))
    assert fossa is not None
    assert fossa.side == "other"
    assert read_source(write_mask_mni(tmp_path / "empty.nii.gz", (500.0, 0.0, 0.0), 8.0)) is None


def test_a_mask_of_the_wrong_kind_is_passed_over_and_a_full_volume_refused(tmp_path: Path) -> None:
    central = write_mask_mni(tmp_path / "central.nii.gz", (0.0, -20.0, 0.0), 6.0)
    placed = place_strokes(np.random.default_rng(0), head(), Burden(side="left", volume_ml=3.0), (central,))
    assert placed.masks == ("drawn",)
    with pytest.raises(InputError, match="more than 1000"):
        read_source(write_mask_mni(tmp_path / "all.nii.gz", (0.0, 0.0, 0.0), 79.0))


def test_a_chronic_stroke_is_fluid_in_the_middle_and_none_at_its_rim() -> None:
    strokes = place_strokes(np.random.default_rng(7), head(), Burden(side="right", volume_ml=60.0), ()).strokes
    depth = ndimage.distance_transform_edt(strokes.mask) * head().anatomy.spacing_mm
    rim, middle = strokes.mask & (depth <= 2), depth > 9
    assert strokes.cavity[rim].mean() < 0.05
    assert strokes.cavity[middle].mean() > 0.65
