"""Rotation, scaling and the cut: sizes of the specification, and places checked against scipy."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from planner.plan import Triple
from strokenet.train import sampling_cpu
from strokenet.train.sampling import sample_by_grid, sample_labels
from strokenet.train.sampling_cpu import sample_on_cpu
from strokenet.train.spatial import SpatialDraw, initial_patch, is_flat, matrix_of, seen_box, transform

RAW: Triple = (30, 34, 32)
PATCH: Triple = (16, 20, 18)


FORMS = pytest.mark.parametrize("sample", [sample_by_grid, sample_on_cpu])


def sampled(
    sample: Callable[..., None], image: Tensor, label: Tensor, draw: SpatialDraw, patch: Triple, heads: int
) -> tuple[Tensor, Tensor]:
    """By one of the two forms: image (C, D, H, W) and label (D, H, W) of the patch."""
    out, out_label = torch.full((len(image), *patch), torch.nan), torch.full(patch, -9, dtype=label.dtype)
    sample(image, label, matrix_of(draw, patch), heads, out, out_label)
    return out, out_label


def smooth(shape: Triple, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=shape)
    return ndimage.gaussian_filter(noise, 2.0).astype(np.float32)


def source_places(draw: SpatialDraw, patch: Triple, raw: Triple) -> np.ndarray:
    """Raw voxel of every patch voxel, (3, D, H, W), from the formula of the module: matrices written out by hand."""
    (a, b, c), s = draw.angles, draw.scale
    about_d = np.array([[1, 0, 0], [0, math.cos(a), -math.sin(a)], [0, math.sin(a), math.cos(a)]])
    about_h = np.array([[math.cos(b), 0, math.sin(b)], [0, 1, 0], [-math.sin(b), 0, math.cos(b)]])
    about_w = np.array([[math.cos(c), -math.sin(c), 0], [math.sin(c), math.cos(c), 0], [0, 0, 1]])
    scale = np.diag([1.0 if is_flat(patch) else s, s, s])
    voxels = np.indices(patch).reshape(3, -1).astype(float)
    centred = voxels - (np.array(patch)[:, None] - 1) / 2
    places = about_w @ about_h @ about_d @ scale @ centred + (np.array(raw)[:, None] - 1) / 2
    return places.reshape(3, *patch)


@pytest.mark.parametrize(
    ("patch", "expected"),
    [
        ((128, 128, 128), (205, 205, 205)),
        ((20, 48, 40), (48, 72, 52)),
        ((64, 160, 192), (159, 275, 233)),
    ],
)
def test_initial_patch_has_the_published_size(patch: Triple, expected: Triple) -> None:
    assert initial_patch(patch) == expected


def test_a_flat_patch_keeps_its_thickness() -> None:
    assert is_flat((16, 64, 64))
    assert not is_flat((16, 48, 48))  # exactly three times is not flat
    d, h, w = initial_patch((16, 64, 64))
    assert d == 16
    assert h > 64 < w


@pytest.mark.parametrize(
    "draw",
    [
        SpatialDraw(angles=(0.3, -0.4, 0.2), scale=1.3),
        SpatialDraw(angles=(0.0, 0.0, 0.0), scale=0.7),
        SpatialDraw(angles=(-0.5, 0.5, 0.1), scale=1.0),
    ],
)
@pytest.mark.parametrize(("patch", "raw"), [(PATCH, RAW), ((5, 20, 17), (5, 40, 41))])
def test_images_are_taken_from_the_formulas_places(draw: SpatialDraw, patch: Triple, raw: Triple) -> None:
    if is_flat(patch):
        draw = SpatialDraw(angles=(draw.angles[0] * 5, 0.0, 0.0), scale=draw.scale)
    image = smooth(raw)
    expected = ndimage.map_coordinates(image, source_places(draw, patch, raw), order=1, mode="grid-constant")
    label = torch.zeros(1, *raw, dtype=torch.int16)
    ours, _ = transform(torch.from_numpy(image)[None, None], label, [draw], patch=patch, heads=2)
    assert np.abs(ours[0, 0].numpy() - expected).max() < 1e-5


def test_a_plain_cut_takes_the_centre_and_no_other_sample_is_touched() -> None:
    image = torch.rand(2, 3, *RAW)
    label = torch.randint(-1, 2, (2, *RAW), dtype=torch.int16)
    draws = [None, SpatialDraw(angles=(0.2, 0.0, 0.0), scale=1.0)]
    cut, cut_label = transform(image, label, draws, patch=PATCH, heads=2)
    assert torch.equal(cut[0], image[0, :, 7:23, 7:27, 7:25])
    assert torch.equal(cut_label[0], label[0, 7:23, 7:27, 7:25])
    assert not torch.equal(cut[1], image[1, :, 7:23, 7:27, 7:25])
    cut.zero_()
    assert image.min() >= 0  # a new tensor: the raw batch is not changed by what follows
    assert bool((image > 0).any())


@FORMS
def test_labels_are_the_likeliest_of_their_interpolated_indicators(sample: Callable[..., None]) -> None:
    draw = SpatialDraw(angles=(0.3, -0.2, 0.4), scale=1.35)
    label = np.digitize(smooth(RAW, 1), [-0.06, 0.0, 0.06]).astype(np.int16) - 1  # -1, 0, 1, 2
    places = source_places(draw, PATCH, RAW)
    scores = []
    for value in (-1, 0, 1, 2):
        indicator = (label == value).astype(float)
        scores.append(ndimage.map_coordinates(indicator, places, order=1, mode="grid-constant", cval=float(value < 0)))
    ranked = np.sort(scores, axis=0)
    clear = ranked[-1] - ranked[-2] > 1e-3
    expected = np.argmax(scores, axis=0) - 1
    ours = sampled(sample, torch.zeros(1, *RAW), torch.from_numpy(label), draw, PATCH, heads=3)[1].numpy()
    assert ours.dtype == np.int16
    assert clear.mean() > 0.9
    assert (ours == expected)[clear].all()
    assert (ours == -1).any()


def test_a_tie_goes_to_the_nearest_voxels_label() -> None:
    label = torch.tensor([0, 0, 1, 1], dtype=torch.int16).repeat(4, 4, 1)  # (4, 4, 4)
    grid = torch.zeros(1, 1, 2, 3)  # exactly between the 0s and the 1s, then a little to the right
    grid[..., 1, 0] = 1e-5
    nearest = torch.nn.functional.grid_sample(
        label[None, None].float(), grid[None], mode="nearest", padding_mode="zeros", align_corners=False
    )
    ours = sample_labels(label, grid, heads=2)
    assert ours.flatten().tolist() == nearest.flatten().int().tolist()
    assert ours.flatten().tolist()[1] == 1


@pytest.mark.parametrize(
    ("patch", "angles", "scale"),
    [
        ((40, 70, 66), (0.3, -0.4, 0.2), 1.0),  # more than one tile along each axis
        ((20, 24, 28), (0.5, 0.5, -0.5), 1.4),  # far beyond the raw patch on all sides
        ((24, 16, 20), (-0.5, 0.1, 0.4), 0.71),
        ((24, 16, 20), (0.0, 0.0, 0.0), 1.27),
        ((5, 24, 28), (2.2, 0.0, 0.0), 1.31),  # flat
    ],
)
def test_both_forms_give_the_same_image_and_label(
    patch: Triple, angles: tuple[float, float, float], scale: float
) -> None:
    raw = initial_patch(patch)
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, *raw, generator=generator)
    label = torch.from_numpy(np.digitize(smooth(raw, 1), [-0.06, 0.0, 0.06]).astype(np.int16) - 1)
    draw = SpatialDraw(angles=angles, scale=scale)
    by_grid, on_cpu = (sampled(form, image, label, draw, patch, 3) for form in (sample_by_grid, sample_on_cpu))
    assert float((by_grid[0] - on_cpu[0]).abs().max()) < 1e-4 * float(image.max() - image.min())
    different = int((by_grid[1] != on_cpu[1]).sum())  # where a head start is as large as the difference of scores
    assert different <= by_grid[1].numel() // 50_000
    assert on_cpu[1].unique().tolist() == [-1, 0, 1, 2]


@pytest.mark.parametrize("scale", [0.7, 1.13, 1.4])
@pytest.mark.parametrize("raw", [(24, 18, 20), (23, 40, 2)])
def test_both_forms_agree_on_a_scaled_sample_that_leaves_the_raw_patch(raw: Triple, scale: float) -> None:
    patch = (24, 20, 19)
    image = torch.randn(2, *raw, generator=torch.Generator().manual_seed(0))
    label = torch.from_numpy(np.digitize(smooth(raw, 1), [-0.06, 0.0, 0.06]).astype(np.int16) - 1)
    draw = SpatialDraw(angles=(0.0, 0.0, 0.0), scale=scale)
    by_grid, on_cpu = (sampled(form, image, label, draw, patch, 3) for form in (sample_by_grid, sample_on_cpu))
    assert float((by_grid[0] - on_cpu[0]).abs().max()) < 1e-5 * float(image.max() - image.min())
    assert int((by_grid[1] != on_cpu[1]).sum()) <= 2  # as above
    assert bool((on_cpu[1] == -1).any())
    assert len(on_cpu[1].unique()) > 2


@pytest.mark.parametrize("heads", [3, 100, 101, 130])
@pytest.mark.parametrize("angles", [(0.3, -0.4, 0.2), (0.0, 0.0, 0.0)])
def test_both_forms_find_the_labels_of_large_and_of_lone_regions(
    heads: int, angles: tuple[float, float, float]
) -> None:
    """Tiles of one label, of its border, and of labels whose difference fills the type."""
    patch = (70, 40, 44)
    label = torch.full(initial_patch(patch), -1, dtype=torch.int16)
    label[30:, :, :] = 0
    label[60:72, 20:40, 20:40] = heads - 1
    label[50, 30, 30] = heads - 2
    image = torch.zeros(1, *label.shape)
    draw = SpatialDraw(angles=angles, scale=0.8)
    by_grid, on_cpu = (sampled(form, image, label, draw, patch, heads)[1] for form in (sample_by_grid, sample_on_cpu))
    assert int((by_grid != on_cpu).sum()) <= by_grid.numel() // 50_000
    assert set(on_cpu.unique().tolist()) >= {-1, 0, heads - 1}


@pytest.mark.parametrize(
    ("angles", "taken"), [((0.0, 0.0, 0.0), "_sample_by_axes"), ((0.0, 0.2, 0.0), "_sample_by_tiles")]
)
def test_a_scaled_sample_goes_by_axes_and_a_turned_one_by_tiles(
    angles: tuple[float, float, float], taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def noted(name: str) -> Callable[..., None]:
        form = getattr(sampling_cpu, name)
        return lambda *args: (calls.append(name), form(*args))[1]

    for name in ("_sample_by_axes", "_sample_by_tiles"):
        monkeypatch.setattr(sampling_cpu, name, noted(name))
    draws = [SpatialDraw(angles=angles, scale=1.2), None]
    label = torch.zeros(2, *RAW, dtype=torch.int16)
    transform(torch.rand(2, 1, *RAW), label, draws, patch=PATCH, heads=2)
    assert calls == [taken]  # and none for the plain cut


def test_ties_are_decided_as_in_the_whole_raw_patch() -> None:
    """An odd patch in an even raw one, turned in its plane: every place lies halfway between two slices."""
    patch, raw = (5, 30, 30), (40, 60, 60)
    label = torch.randint(-1, 3, raw, generator=torch.Generator().manual_seed(0), dtype=torch.int16)
    draw = SpatialDraw(angles=(0.4, 0.0, 0.0), scale=0.9)
    assert seen_box(draw, patch, raw)[0] < raw[0]
    whole = sampled(sample_on_cpu, torch.zeros(1, *raw), label, draw, patch, 3)[1]
    found = transform(torch.zeros(1, 1, *raw), label[None], [draw], patch=patch, heads=3)[1][0]
    assert torch.equal(found, whole)


@pytest.mark.parametrize("patch", [(16, 20, 18), (5, 20, 17), (9, 9, 9)])
@pytest.mark.parametrize("margin", [0, 1, 40])
@pytest.mark.parametrize("seed", range(4))
def test_a_sample_looks_into_its_box_alone(patch: Triple, margin: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    angles = tuple(float(a) for a in rng.uniform(-0.6, 0.6, 3))
    draw = SpatialDraw(angles=(angles[0], 0.0, 0.0) if is_flat(patch) else angles, scale=float(rng.uniform(0.7, 1.4)))
    d, h, w = (edge + margin + number % 2 for number, edge in enumerate(patch))
    image, label = torch.randn(1, 1, d, h, w), torch.randint(-1, 2, (1, d, h, w), dtype=torch.int16)
    expected = transform(image, label, [draw], patch=patch, heads=2)
    box = seen_box(draw, patch, (d, h, w))
    assert all((size - edge) % 4 == 0 for edge, size in zip(box, (d, h, w), strict=True))
    assert margin < 40 or box[1] < h
    inner = tuple(slice((size - edge) // 2, (size + edge) // 2) for size, edge in zip((d, h, w), box, strict=True))
    apart = torch.full_like(image, torch.nan), torch.full_like(label, 1)
    apart[0][(0, 0, *inner)], apart[1][(0, *inner)] = image[(0, 0, *inner)], label[(0, *inner)]
    whole_of = source_places(draw, patch, (d, h, w))
    for cut_image, cut_label in (apart, (image[(..., *inner)], label[(..., *inner)])):
        found = transform(cut_image, cut_label, [draw], patch=patch, heads=2)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
    reference = ndimage.map_coordinates(image[0, 0].numpy(), whole_of, order=1, mode="grid-constant")
    assert np.abs(expected[0][0, 0].numpy() - reference).max() < 1e-4 * float(image.max() - image.min())
