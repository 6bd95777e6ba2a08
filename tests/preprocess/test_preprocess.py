"""The whole station against what nnU-Net 2.8.1 made of the same head (batchgenerators 0.25.5, scikit-image 0.26)."""

from __future__ import annotations

import dataclasses
import zlib

import numpy as np
import pytest
import torch

from strokenet.data.errors import InputError
from strokenet.data.geometry import Geometry, turned
from strokenet.preprocess.crop import Box
from strokenet.preprocess.preprocess import foreground_locations, preprocess
from tests.preprocess.heads import head, head_plan

AT = np.s_[:, (6, 4, 11, 0), (8, 5, 15, 0), (5, 3, 10, 0)]
AT_THICK = np.s_[:, (8, 5, 15, 0), (12, 8, 23, 0), (5, 3, 10, 0)]


def _crc(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).tobytes())


def test_an_isotropic_case_equals_nnunet() -> None:
    prepared = preprocess(head(), head_plan())
    assert prepared.origin.box == Box(start=(1, 1, 3), stop=(10, 13, 17))
    assert prepared.image.shape == (2, 12, 16, 11)
    assert prepared.image.dtype == torch.float32
    expected = [[-3.516248, -0.3704721, -4.698909e-06, -3.050753e-06], [-0.9860225, 0.9163166, -0.9860225, -0.9860225]]
    np.testing.assert_allclose(prepared.image[AT], expected, atol=1e-6)
    np.testing.assert_allclose(prepared.image.numpy().std(axis=(1, 2, 3)), [0.68304649, 0.94207375], rtol=1e-6)
    assert prepared.label is not None
    assert prepared.label.dtype == np.int16
    assert _crc(prepared.label) == 2275905863
    assert [_crc(prepared.foreground[value]) for value in (1, 2)] == [2940028331, 495875462]
    assert prepared.foreground[2][:3].tolist() == [[5, 11, 7], [5, 11, 6], [6, 11, 7]]


def test_an_anisotropic_case_equals_nnunet() -> None:
    prepared = preprocess(head((4.0, 1.0, 1.2)), head_plan(transpose=(1, 0, 2), spacing=(0.9, 2.0, 1.0)))
    assert prepared.image.shape == (2, 16, 24, 11)
    expected = [[-3.516248, -0.3774429, 6.914679e-07, -2.011971e-06], [-0.9860225, 0.7038659, -0.9860188, -0.986019]]
    np.testing.assert_allclose(prepared.image[AT_THICK], expected, atol=1e-6)
    np.testing.assert_allclose(prepared.image.numpy().std(axis=(1, 2, 3)), [0.68403334, 0.93852218], rtol=1e-6)
    assert prepared.label is not None
    assert _crc(prepared.label) == 172989532
    assert [_crc(prepared.foreground[value]) for value in (1, 2)] == [2522324406, 3482823850]


def test_an_unlabelled_case_has_the_same_image() -> None:
    plain, labelled = preprocess(head(labelled=False), head_plan()), preprocess(head(), head_plan())
    np.testing.assert_array_equal(plain.image, labelled.image)  # no label outside the mask in this head's box
    assert plain.label is None
    assert plain.foreground == {}
    assert plain.origin.box == labelled.origin.box


def test_a_labelled_voxel_outside_the_mask_is_measured_too() -> None:
    case = head()
    assert case.label is not None
    label = case.label.copy()
    label[1, 3, 1] = 1  # a corner of the box, zero in both channels
    marked = preprocess(dataclasses.replace(case, label=label), head_plan(spacing=(1.5, 2.0, 1.0)))
    plain = preprocess(case, head_plan(spacing=(1.5, 2.0, 1.0)))
    assert marked.image[0, 0, 0, 0] < -3  # 0 among values near 100
    assert plain.image[0, 0, 0, 0] == 0
    assert marked.label is not None
    assert marked.label[0, 0, 0] == 1
    np.testing.assert_array_equal(marked.image[1], plain.image[1])


def test_background_is_minus_one_outside_the_head_and_zero_in_its_ventricle() -> None:
    prepared = preprocess(head(), head_plan(transpose=(0, 1, 2), spacing=(2.0, 1.0, 1.5)))
    assert prepared.label is not None
    d, h, w = (i - s for i, s in zip((6, 9, 5), prepared.origin.box.start, strict=True))
    assert prepared.label[d, h, w] == 0
    assert prepared.label[0, 0, 0] == -1


def test_ras_gives_one_result_however_the_case_is_stored() -> None:
    case = head()
    assert case.label is not None
    flipped = dataclasses.replace(
        case,
        image=np.ascontiguousarray(case.image.transpose(0, 3, 1, 2)[:, ::-1]),
        label=np.ascontiguousarray(case.label.transpose(2, 0, 1)[::-1]),
        geometry=_flipped(case.geometry),
    )
    plan = head_plan(orientation="RAS")
    a, b = preprocess(case, plan), preprocess(flipped, plan)
    np.testing.assert_array_equal(a.image, b.image)
    assert a.label is not None
    assert b.label is not None
    np.testing.assert_array_equal(a.label, b.label)
    assert a.origin.box == b.origin.box


def _flipped(geometry: Geometry) -> Geometry:
    """Geometry of the axes in the order w, d, h with w reversed."""
    from strokenet.data.geometry import Turn

    return turned(geometry, Turn(order=(2, 0, 1), flip=(True, False, False)))


def test_the_origin_leads_back_to_the_stored_grid() -> None:
    case = head()
    plan = head_plan(orientation="RAS", transpose=(2, 1, 0), spacing=(1.5, 1.0, 2.0))  # its own spacing, turned
    origin = (prepared := preprocess(case, plan)).origin
    assert prepared.label is not None
    full = np.zeros([case.geometry.shape[axis] for axis in origin.turn.order], np.int16)
    full[origin.box.slices] = np.maximum(prepared.label, 0)
    back = origin.turn.invert(full)
    assert case.label is not None
    expected = case.label.copy()
    expected[0, 9, 5] = 0  # outside the box: lost in the crop
    np.testing.assert_array_equal(back, expected)


def test_an_empty_image_goes_through() -> None:
    case = dataclasses.replace(head(), image=np.zeros_like(head().image))
    prepared = preprocess(case, head_plan())
    assert not prepared.image.any()
    assert prepared.image.shape[1:] == (16, 19, 14)


def test_other_channels_than_the_plans_are_refused() -> None:
    case = dataclasses.replace(head(), channels=("FLAIR", "T1"))
    with pytest.raises(InputError, match=r"head: channels \['FLAIR', 'T1'\]; the plan needs \['T1', 'FLAIR'\]"):
        preprocess(case, head_plan())


def test_an_error_of_a_step_names_the_case() -> None:
    with pytest.raises(InputError, match="head: channel T1 has values"):
        preprocess(
            dataclasses.replace(head(), image=head().image * 9),
            head_plan(normalisation=("rgb_to_0_1", "zscore"), use_mask_for_norm=(False, False)),
        )


def test_the_given_case_is_left_alone() -> None:
    case, before = head(), head()
    preprocess(case, head_plan())
    np.testing.assert_array_equal(case.image, before.image)
    assert case.label is not None
    assert before.label is not None
    np.testing.assert_array_equal(case.label, before.label)


def test_locations_are_all_voxels_up_to_ten_thousand_then_a_percent() -> None:
    label = np.zeros((110, 110, 110), np.int16)
    label[:2] = 3
    label[5:] = 1
    label[3, 0, :7] = 2
    found = foreground_locations(label, (1, 2, 3, 4))
    assert {value: len(voxels) for value, voxels in found.items()} == {1: 12705, 2: 7, 3: 10000, 4: 0}
    for value, voxels in found.items():
        assert voxels.shape[1] == 3
        assert (label[tuple(voxels.T)] == value).all()
        assert len(np.unique(voxels, axis=0)) == len(voxels)


def test_a_plan_of_v1_resamples_first_and_measures_the_resampled_voxels() -> None:
    """What is measured is then exactly what the network sees: mean 0 and deviation 1 inside, 0 outside."""
    plan = dataclasses.replace(head_plan(), normalise="after-resampling", use_mask_for_norm=(True, False))
    image = preprocess(head(), plan).image.numpy()
    inside = image[0] != 0
    assert 0.2 < inside.mean() < 0.95
    np.testing.assert_allclose([image[0][inside].mean(), image[0][inside].std()], [0, 1], atol=1e-5)
    np.testing.assert_allclose([image[1].mean(), image[1].std()], [0, 1], atol=1e-5)
    assert abs(preprocess(head(), head_plan()).image[1].numpy().std() - 1) > 0.01  # v2 measured before
