"""Case: label values, grids in mm, and images in memory that equal those read from files."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from strokenet.data.case import Case, case_from_images, read_case, read_label
from strokenet.data.errors import InputError
from tests.data.malformed import OBLIQUE, SHAPE, flipped, nifti, packed, voxels, with_fields

LESION = {"background": 0, "lesion": 1}
TWO = {"background": 0, "core": 1, "rim": 2}


def file(folder: Path, name: str, array: Any = None, **fields: Any) -> Path:
    path = folder / f"{name}.nii"
    path.write_bytes(nifti(array, **fields))
    return path


def labels(*values: float, dtype: str = "f4") -> Any:
    """A map of zeros with these values in its first voxels."""
    array = np.zeros(SHAPE, dtype)
    array.ravel()[: len(values)] = values
    return array


def shifted(mm: float, axis: int = 0) -> Any:
    affine = OBLIQUE.copy()
    affine[axis, 3] += mm
    return affine


# --- labels


def test_near_integers_are_rounded(tmp_path: Path) -> None:
    label = read_label(file(tmp_path, "label", labels(0.9995, 1.0009, 2.0, -0.0005, dtype="f8")), TWO)
    assert label.array.dtype == np.int16
    assert label.array.transpose(2, 1, 0).ravel()[:5].tolist() == [1, 1, 2, 0, 0]


@pytest.mark.parametrize("value", [0.5, 0.998, 1.002])
def test_values_between_integers_are_refused_by_name(tmp_path: Path, value: float) -> None:
    path = file(tmp_path, "label", labels(value))
    with pytest.raises(InputError, match=rf"label.nii: label values {value:g} are no integers; "):
        read_label(path, LESION)


def test_slope_is_applied_before_labels_are_judged(tmp_path: Path) -> None:
    path = file(tmp_path, "label", labels(255, dtype="u1"), scl_slope=1 / 255)
    assert read_label(path, LESION).array.max() == 1


def test_0_and_255_are_a_single_lesion_label_and_said_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = file(tmp_path, "label", labels(255, 255, 0, 255, dtype="u1"))
    with caplog.at_level(logging.INFO, "strokenet"):
        label = read_label(path, LESION)
    assert label.array.transpose(2, 1, 0).ravel()[:5].tolist() == [1, 1, 0, 1, 0]
    assert caplog.messages == [f"{path}: 255 is taken as the lesion label 1"]


@pytest.mark.parametrize(
    ("values", "allowed", "says"),
    [
        ((1, 255), LESION, "label values 255 are unknown; allowed: 0 (background), 1 (lesion)"),
        ((255,), TWO, "label values 255 are unknown; allowed: 0 (background), 1 (core), 2 (rim)"),
        ((2,), LESION, "label values 2 are unknown"),
        ((-1, 1), LESION, "label values -1 are unknown"),
        ((3, 4, 5, 6, 7, 8, 9), LESION, "label values 3, 4, 5, 6, 7 and 2 more are unknown"),
        ((256,), None, "label values 256 are unknown; allowed: 0 to 255"),
        ((1e20,), LESION, "label values 1e+20 are unknown"),
    ],
)
def test_unknown_values_are_refused_by_name(tmp_path: Path, values: Any, allowed: Any, says: str) -> None:
    path = file(tmp_path, "label", labels(*values))
    with pytest.raises(InputError) as caught:
        read_label(path, allowed)
    assert str(caught.value).startswith(f"{path}: ")
    assert says in str(caught.value)


def test_without_names_every_value_of_a_byte_is_a_label(tmp_path: Path) -> None:
    array = np.arange(256).repeat(6)[: np.prod(SHAPE)].reshape(SHAPE).astype("i2")
    np.testing.assert_array_equal(read_label(file(tmp_path, "label", array)).array, array.transpose(2, 1, 0))


@pytest.mark.parametrize("value", [0, 1])
def test_a_constant_map_is_a_label_map(tmp_path: Path, value: int) -> None:
    array = np.full(SHAPE, value, "u1")
    assert (read_label(file(tmp_path, "label", array), LESION).array == value).all()


def test_a_label_map_may_hold_no_nan(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="1 of 1320 voxels are NaN or infinite; none is allowed here"):
        read_label(file(tmp_path, "label", labels(float("nan"))), LESION)


# --- grids


def test_the_channels_are_stacked_in_order_and_the_first_gives_the_grid(tmp_path: Path) -> None:
    arrays = {name: voxels() + n for n, name in enumerate(("T1", "FLAIR", "DWI"))}
    paths = {name: file(tmp_path, name, array) for name, array in arrays.items()}
    case = read_case("sub-1", paths, file(tmp_path, "label", labels(1, 1)), LESION)
    assert (case.case_id, case.channels) == ("sub-1", ("T1", "FLAIR", "DWI"))
    for n, array in enumerate(arrays.values()):
        np.testing.assert_array_equal(case.image[n], array.transpose(2, 1, 0))
    assert case.label is not None
    assert case.label.sum() == 2
    assert case.image.dtype == np.float32
    assert case.header.raw == paths["T1"].read_bytes()[:352]
    assert read_case("sub-1", paths).label is None


@pytest.mark.parametrize("what", ["channel", "label"])
def test_grids_less_than_a_micrometre_apart_are_one(tmp_path: Path, what: str) -> None:
    t1 = file(tmp_path, "t1")
    near = file(tmp_path, "near", labels(1), affine=shifted(0.0009))
    if what == "channel":
        read_case("c", {"T1": t1, "FLAIR": near})
    else:
        read_case("c", {"T1": t1}, near, LESION)


@pytest.mark.parametrize("what", ["channel", "label"])
def test_grids_farther_apart_are_refused_with_the_distance(tmp_path: Path, what: str) -> None:
    t1 = file(tmp_path, "t1")
    far = file(tmp_path, "far", labels(1), affine=shifted(0.0011, axis=2))
    channels, label = ({"T1": t1, "FLAIR": far}, None) if what == "channel" else ({"T1": t1}, far)
    with pytest.raises(InputError) as caught:
        read_case("sub-7", channels, label, LESION)
    message = str(caught.value)
    name = f"FLAIR ({far})" if what == "channel" else f"label ({far})"
    assert message.startswith(f"sub-7: grid of {name} lies up to 0.0011 mm away from ")
    assert "allowed: below 0.001" in message
    assert "; resample" in message


def test_a_small_turn_is_measured_where_it_is_largest(tmp_path: Path) -> None:
    """A turn of 1e-3 rad moves the corner at the origin by nothing and the far one by a hundredth of a millimetre."""
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(1e-3), -np.sin(1e-3)], [np.sin(1e-3), np.cos(1e-3)]]
    paths = {"T1": file(tmp_path, "t1", affine=np.eye(4)), "FLAIR": file(tmp_path, "flair", affine=turn)}
    far = 2 * np.sin(0.5e-3) * np.hypot(11, 10)
    with pytest.raises(InputError, match=f"lies up to {far:.3g} mm away"):
        read_case("c", paths)


def test_a_mirrored_grid_is_refused(tmp_path: Path) -> None:
    mirror = np.diag([-1.0, 1.0, 1.0, 1.0])
    paths = {"T1": file(tmp_path, "t1"), "FLAIR": file(tmp_path, "flair", affine=OBLIQUE @ mirror)}
    with pytest.raises(InputError, match="grid of FLAIR .* mm away"):
        read_case("c", paths)


@pytest.mark.parametrize("what", ["channel", "label"])
def test_other_shapes_are_refused_with_both(tmp_path: Path, what: str) -> None:
    t1 = file(tmp_path, "t1")
    other = file(tmp_path, "other", np.zeros((12, 11, 9), "i2"))
    channels, label = ({"T1": t1, "FLAIR": other}, None) if what == "channel" else ({"T1": t1}, other)
    with pytest.raises(InputError) as caught:
        read_case("sub-7", channels, label, LESION)
    assert "(12, 11, 9) voxels, differs from" in str(caught.value)
    assert "(12, 11, 10); resample" in str(caught.value)


def test_a_case_without_channels_is_refused() -> None:
    with pytest.raises(InputError, match="no channel given"):
        read_case("c", {})
    with pytest.raises(InputError, match="no channel given"):
        case_from_images("c", {})


# --- images in memory


def assert_equal_cases(one: Case, other: Case) -> None:
    assert (one.case_id, one.channels) == (other.case_id, other.channels)
    np.testing.assert_array_equal(one.image, other.image)
    assert one.image.dtype == other.image.dtype
    assert (one.label is None) == (other.label is None)
    if one.label is not None and other.label is not None:
        np.testing.assert_array_equal(one.label, other.label)
        assert one.label.dtype == other.label.dtype
    assert one.geometry.shape == other.geometry.shape
    np.testing.assert_allclose(one.geometry.spacing, other.geometry.spacing, rtol=1e-6)
    np.testing.assert_allclose(one.geometry.affine, other.geometry.affine, atol=1e-5)


def test_a_nifti_2_image_stays_one(tmp_path: Path) -> None:
    path = file(tmp_path, "t1", version=2, order=">", qform_code=3, sform_code=4)
    of_file, in_memory = read_case("c", {"T1": path}), case_from_images("c", {"T1": nibabel.load(path)})
    assert (in_memory.header.version, in_memory.header.byte_order) == (2, ">")
    assert in_memory.header.raw[344:500] == of_file.header.raw[344:500]  # forms and codes


@pytest.fixture
def paths(tmp_path: Path) -> dict[str, Path]:
    return {
        "T1": file(tmp_path, "t1", scl_slope=0.1, scl_inter=-3.3),
        "FLAIR": file(tmp_path, "flair", voxels("f8") / 7, version=2, order=">"),
        "label": file(tmp_path, "label", labels(1, 1, 0.9995), order=">", sform_code=2),
    }


@pytest.mark.parametrize("form", ["path", "text", "nibabel", "array"])
def test_images_in_memory_make_the_case_of_their_files(paths: dict[str, Path], form: str) -> None:
    def given(path: Path) -> Any:
        image = nibabel.load(path)
        return {
            "path": path,
            "text": str(path),
            "nibabel": image,
            "array": (np.asarray(image.dataobj), image.affine),
        }[form]

    channels = {name: paths[name] for name in ("T1", "FLAIR")}
    from_files = read_case("c", channels, paths["label"], LESION)
    images = {name: given(path) for name, path in channels.items()}
    in_memory = case_from_images("c", images, given(paths["label"]), LESION)
    assert_equal_cases(from_files, in_memory)
    if form != "array":  # forms, codes and units of the image are those of the file
        raw, of_file = in_memory.header.raw, from_files.header.raw
        assert raw[76:108] == of_file[76:108]
        assert raw[252:328] == of_file[252:328]
        assert raw[123] == of_file[123]


def test_trailing_axes_of_one_and_their_header_are_kept_in_memory(tmp_path: Path) -> None:
    path = file(tmp_path, "t1", dim=(4, *SHAPE, 1), qform_code=3, sform_code=4)
    in_memory = case_from_images("c", {"T1": nibabel.load(path)})
    assert_equal_cases(in_memory, read_case("c", {"T1": path}))
    assert in_memory.header.raw[252:256] == b"\3\0\4\0"


def test_other_formats_of_nibabel_are_taken_by_their_affine(tmp_path: Path) -> None:
    image = nibabel.MGHImage(voxels("f4"), np.diag([-1.0, 1.2, 2.0, 1.0]))
    case = case_from_images("c", {"T1": image})
    np.testing.assert_array_equal(case.image[0], voxels("f4").transpose(2, 1, 0))
    np.testing.assert_allclose(case.geometry.affine[:, [2, 1, 0, 3]], image.affine, atol=1e-5)


@pytest.mark.parametrize("contiguous", [np.ascontiguousarray, np.asfortranarray])
def test_the_callers_array_is_neither_altered_nor_shared(contiguous: Any) -> None:
    array = contiguous(voxels("f4"))
    array[0, 0, 0] = np.nan
    case = case_from_images("c", {"T1": (array, np.eye(4))})
    assert case.image[0, 0, 0, 0] == 0
    assert np.isnan(array[0, 0, 0])
    assert not np.shares_memory(case.image, array)


@pytest.mark.parametrize("dtype", ["bool", "i8", "u8", "f2"])
def test_every_real_type_is_taken_from_memory(dtype: str) -> None:
    case = case_from_images("c", {"T1": (voxels().astype(dtype), np.eye(4))})
    np.testing.assert_array_equal(case.image[0], voxels().astype(dtype).astype("f4").transpose(2, 1, 0))


def _nan_affine() -> Any:
    affine = np.eye(4)
    affine[0, 0] = np.nan
    return affine


@pytest.mark.parametrize(
    ("image", "says"),
    [
        ((voxels("c8"), np.eye(4)), "voxels of type complex64"),
        ((np.zeros(SHAPE, "V3"), np.eye(4)), "voxels of type"),
        ((np.zeros(SHAPE, object), np.eye(4)), "voxels of type object"),
        ((np.zeros((4, 5)), np.eye(4)), "shape (4, 5); one 3-D volume"),
        ((np.zeros((4, 5, 6, 2)), np.eye(4)), "shape (4, 5, 6, 2); one 3-D volume"),
        ((np.zeros((0, 5, 6)), np.eye(4)), "(0, 5, 6) voxels"),
        ((np.zeros((1, 1, 40_000), "u1"), np.eye(4)), "correct them"),
        ((voxels(), np.eye(3)), "affine of shape (3, 3)"),
        ((voxels(), None), "affine of shape () or with NaN"),
        ((voxels(), "RAS"), "got tuple; give a path"),
        ((voxels(), _nan_affine()), "with NaN"),
        ((voxels(), np.diag([1.0, 1.0, 1e300, 1.0])), "c: T1: "),
        ((voxels(), np.diag([1.0, 1.0, 0.0, 1.0])), "c: T1: "),
        (voxels(), "got ndarray; give a path"),
        (None, "got NoneType; give a path"),
        ((np.full(SHAPE, np.inf), np.eye(4)), "1320 of 1320 voxels are NaN or infinite"),
    ],
)
def test_an_image_in_memory_that_cannot_be_used_is_refused(image: Any, says: str) -> None:
    with pytest.raises(InputError) as caught:
        case_from_images("c", {"T1": image})
    assert str(caught.value).startswith("c: T1: ")
    assert says in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_images_in_memory_are_compared_like_files() -> None:
    with pytest.raises(InputError, match="grid of FLAIR lies up to 1 mm away from T1"):
        case_from_images("c", {"T1": (voxels(), OBLIQUE), "FLAIR": (voxels(), shifted(1.0))})
    with pytest.raises(InputError, match="c: label: label values 2 are unknown"):
        case_from_images("c", {"T1": (voxels(), OBLIQUE)}, (labels(2), OBLIQUE), LESION)
    with pytest.raises(InputError, match="none is allowed here"):
        case_from_images("c", {"T1": (voxels(), OBLIQUE)}, (labels(np.nan), OBLIQUE), LESION)


def test_a_nibabel_image_without_a_form_or_with_lost_voxels_is_refused(tmp_path: Path) -> None:
    no_form = file(tmp_path, "t1", qform_code=0, sform_code=0)
    with pytest.raises(InputError, match="neither qform nor sform"):
        case_from_images("c", {"T1": nibabel.load(no_form)})
    cut = tmp_path / "cut.nii"
    cut.write_bytes(nifti()[:-100])
    with pytest.raises(InputError, match="voxels cannot be read"):
        case_from_images("c", {"T1": nibabel.load(cut)})
    bad = tmp_path / "bad.nii.gz"
    bad.write_bytes(flipped(packed(nifti()), 8 * 700))
    with pytest.raises(InputError, match="corrupt"):
        case_from_images("c", {"T1": str(bad)})


def test_a_nibabel_image_that_was_given_another_affine_lies_there(tmp_path: Path) -> None:
    image = nibabel.load(file(tmp_path, "t1"))
    moved = type(image)(image.dataobj, np.diag([2.0, 3.0, 4.0, 1.0]), image.header)
    geometry = case_from_images("c", {"T1": moved}).geometry
    assert geometry.spacing == (4.0, 3.0, 2.0)
    np.testing.assert_array_equal(geometry.affine[:, [2, 1, 0, 3]], moved.affine)


@pytest.mark.real
def test_a_real_case_reads_whole(real_data: Path) -> None:
    folder = real_data / "open_ms" / "cross_sectional" / "patient07"
    channels = {"T1": folder / "T1.nii.gz", "FLAIR": folder / "FLAIR.nii.gz"}
    case = read_case("patient07", channels, folder / "lesion.nii.gz", LESION)
    assert case.image.shape == (2, 182, 218, 182)
    assert case.label is not None
    assert case.label.sum() * case.geometry.voxel_volume_mm3 == pytest.approx(1300, abs=50)  # README: 1.3 ml


def test_the_field_offsets_of_these_tests_are_the_standards() -> None:
    raw = with_fields(nifti(), descrip=b"here", qform_code=7)
    header = nibabel.Nifti1Header(raw[:348], check=False)
    assert bytes(header["descrip"]).startswith(b"here")
    assert header["qform_code"] == 7
