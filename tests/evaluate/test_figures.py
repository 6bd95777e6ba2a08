"""The pictures: read back as pixels, so that what a reader sees is tested and not what was meant."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from numpy.typing import NDArray
from scipy.ndimage import binary_opening

from strokenet.evaluate.figures import PREDICTION_COLOUR, REFERENCE_COLOUR, _outline, draw_boxes, draw_overlay

Picture = NDArray[np.float64]
SPACING = (5.0, 1.0, 2.0)


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half the resolution: a quarter of the time."""
    monkeypatch.setattr("strokenet.evaluate.figures._DPI", 75)


def pixels(path: Path) -> Picture:
    """(rows, columns, 3), 0 .. 1."""
    return np.asarray(imread(path), dtype=np.float64)[..., :3]


def of_colour(picture: Picture, colour: str) -> NDArray[np.bool_]:
    return np.asarray(np.abs(picture - to_rgb(colour)).max(axis=-1) < 0.02)


def head(*, shape: tuple[int, int, int] = (12, 60, 31)) -> NDArray[np.float32]:
    """50 mm of grey in every direction, in air, at a spacing of 5, 1 and 2 mm."""
    scan = np.zeros(shape, np.float32)
    scan[1:-1, 5:-5, 3:-3] = 100
    return scan


def lesion(d: slice, h: slice, w: slice) -> NDArray[np.bool_]:
    mask = np.zeros((12, 60, 31), bool)
    mask[d, h, w] = True
    return mask


REFERENCE = lesion(slice(4, 7), slice(30, 42), slice(18, 25))
PREDICTION = lesion(slice(4, 7), slice(33, 46), slice(18, 22))


def panels(grey: NDArray[np.bool_]) -> list[tuple[int, int, int, int]]:
    """Boxes (top, bottom, left, right) of the pieces between empty columns, from the left."""
    used = np.flatnonzero(grey.any(axis=0))
    pieces = np.split(used, np.flatnonzero(np.diff(used) > 3) + 1)
    boxes = []
    for piece in pieces:
        rows = np.flatnonzero(grey[:, piece].any(axis=1))
        boxes.append((int(rows[0]), int(rows[-1]), int(piece[0]), int(piece[-1])))
    return boxes


def grey_panels(path: Path) -> tuple[Picture, list[tuple[int, int, int, int]]]:
    """The picture, and where its scans are: pieces of one grey, larger than the grey edges of white letters."""
    picture = pixels(path)
    grey = (np.ptp(picture, axis=-1) < 0.01) & (np.abs(picture[..., 0] - 0.5) < 0.1)
    return picture, panels(binary_opening(grey, np.ones((5, 5))))


def test_both_outlines_are_drawn_in_every_plane_and_channel(tmp_path: Path) -> None:
    path = tmp_path / "case.png"
    channels = {"T1": head(), "FLAIR": head() * 2}
    draw_overlay(channels, SPACING, path, case="case", reference=REFERENCE, prediction=PREDICTION)
    picture = pixels(path)
    rows, columns, _ = picture.shape
    for colour in (REFERENCE_COLOUR, PREDICTION_COLOUR):
        drawn = of_colour(picture, colour)
        for top in (0, rows // 2):
            for left in range(3):
                part = drawn[top : top + rows // 2, left * columns // 3 : (left + 1) * columns // 3]
                assert part.sum() > 50, (colour, top, left)
    assert path.stat().st_size > 10_000


def test_a_mask_that_is_not_given_has_no_outline(tmp_path: Path) -> None:
    draw_overlay({"T1": head()}, SPACING, tmp_path / "a.png", case="a", reference=REFERENCE)
    picture = pixels(tmp_path / "a.png")
    assert of_colour(picture, REFERENCE_COLOUR).any()
    assert not of_colour(picture, PREDICTION_COLOUR).any()


def test_millimetres_have_one_length_in_every_panel_and_direction(tmp_path: Path) -> None:
    draw_overlay({"T1": head()}, SPACING, tmp_path / "a.png", case="a")
    _, boxes = grey_panels(tmp_path / "a.png")
    assert len(boxes) == 3
    sizes = [length for top, bottom, left, right in boxes for length in (bottom - top + 1, right - left + 1)]
    assert max(sizes) - min(sizes) <= 3, sizes  # the head is 50 mm from every side
    assert min(sizes) > 150


def test_the_patients_right_is_on_the_left_and_the_front_at_the_top(tmp_path: Path) -> None:
    marker = lesion(slice(6, 7), slice(45, 50), slice(21, 25))  # front right: high H, high W
    draw_overlay({"T1": head()}, SPACING, tmp_path / "a.png", case="a", reference=marker)
    picture, boxes = grey_panels(tmp_path / "a.png")
    drawn = of_colour(picture, REFERENCE_COLOUR)
    for (top, bottom, left, right), plane in zip(boxes, ("axial", "coronal", "sagittal"), strict=True):
        ys, xs = np.nonzero(drawn[top:bottom, left:right])
        assert xs.max() < (right - left) / 2, plane  # right, or in the sagittal plane the front, is at the left
        if plane == "axial":
            assert ys.max() < (bottom - top) / 2


def test_the_head_is_at_the_top_of_the_coronal_and_sagittal_planes(tmp_path: Path) -> None:
    marker = lesion(slice(9, 11), slice(28, 32), slice(14, 16))
    draw_overlay({"T1": head()}, SPACING, tmp_path / "a.png", case="a", reference=marker)
    picture, boxes = grey_panels(tmp_path / "a.png")
    drawn = of_colour(picture, REFERENCE_COLOUR)
    for top, bottom, left, right in boxes[1:]:
        assert np.nonzero(drawn[top:bottom, left:right])[0].max() < (bottom - top) / 2


def test_an_outline_is_the_edges_between_inside_and_outside() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        mask = rng.random((5, 6)) < 0.5
        inside = {(int(x), int(y)) for y, x in np.argwhere(mask)}
        edges = set()
        for x, y in inside:
            for neighbour, ends in (
                ((x - 1, y), ((x, y), (x, y + 1))),
                ((x + 1, y), ((x + 1, y), (x + 1, y + 1))),
                ((x, y - 1), ((x, y), (x + 1, y))),
                ((x, y + 1), ((x, y + 1), (x + 1, y + 1))),
            ):
                if neighbour not in inside:
                    edges.add(ends)
        drawn = [tuple((int(x), int(y)) for x, y in edge) for edge in _outline(mask)]
        assert len(drawn) == len(edges)
        assert set(drawn) == edges


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 40, 40), (40, 3, 3)])
def test_a_volume_of_any_shape_and_no_content_is_drawn(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    nothing = np.zeros(shape, bool)
    draw_overlay(
        {"$T_1$": np.zeros(shape, np.float32)},
        (1.0, 1.0, 1.0),
        tmp_path / "a.png",
        case="price $5 and $",
        reference=nothing,
        prediction=nothing,
    )
    assert pixels(tmp_path / "a.png").max() > 0.5


def test_shapes_that_differ_are_refused_and_leave_the_old_picture(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match="one shape"):
        draw_overlay({"T1": head()}, SPACING, path, case="a", reference=REFERENCE[:-1])
    with pytest.raises(ValueError, match="one or more"):
        draw_overlay({}, SPACING, path, case="a")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_boxes_show_every_case_as_a_point_at_its_height(tmp_path: Path) -> None:
    draw_boxes({"one": [0.0, 1.0], "other": [0.5]}, tmp_path / "boxes.png")
    picture = pixels(tmp_path / "boxes.png")
    first, second = (of_colour(picture, colour) for colour in ("#0072B2", "#D55E00"))
    heights = np.nonzero(first)[0]
    low, high = heights.max(), heights.min()
    middle = np.median(np.nonzero(second)[0])
    assert middle == pytest.approx((low + high) / 2, abs=3)
    assert (low - high) > 0.6 * picture.shape[0]
    assert np.nonzero(first)[1].max() < np.nonzero(second)[1].min()


def test_a_group_without_cases_keeps_its_place(tmp_path: Path) -> None:
    draw_boxes({"a": [0.2, 0.4], "none": [], "c": [0.1]}, tmp_path / "boxes.png", metric="$HD$", unit="mm")
    assert of_colour(pixels(tmp_path / "boxes.png"), "#009E73").any()  # the third colour


@pytest.mark.parametrize("groups", [{}, {"a": [0.5, float("nan")]}])
def test_boxes_refuse_what_they_cannot_show(tmp_path: Path, groups: dict[str, list[float]]) -> None:
    with pytest.raises(ValueError, match="finite"):
        draw_boxes(groups, tmp_path / "boxes.png")
    assert not (tmp_path / "boxes.png").exists()
