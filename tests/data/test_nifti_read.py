"""The reader: what it accepts equals nibabel, what it refuses is refused in one line that says why."""

from __future__ import annotations

import gzip
import logging
import os
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from strokenet.data.case import read_case
from strokenet.data.errors import InputError
from strokenet.data.nifti import Volume, read_header, read_volume
from tests.data.malformed import BAD, FIELDS, OBLIQUE, SHAPE, Bad, flipped, nifti, packed, voxels, with_fields


def written(folder: Path, content: bytes, ending: str = ".nii") -> Path:
    path = folder / f"scan{ending}"
    path.write_bytes(content)
    return path


def refusal(path: Path) -> str:
    """The one line that reading the file ends in."""
    with pytest.raises(InputError) as caught:
        read_volume(path)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def outcome_of(call: Callable[[], Any]) -> Any:
    """What the call returns, or the InputError it raises; nothing else may come."""
    try:
        return call()
    except InputError as error:
        return error


def by_nibabel(path: Path) -> tuple[Any, Any]:
    """Values (D, H, W) float32, and the affine of (i, j, k)."""
    image = nibabel.load(path)
    values = np.asarray(image.dataobj)
    return values.reshape(values.shape[:3]).transpose(2, 1, 0).astype(np.float32), image.affine


def assert_reads_as_nibabel(path: Path) -> Volume:
    volume = read_volume(path)
    values, affine = by_nibabel(path)
    np.testing.assert_array_equal(volume.array, values)
    assert volume.array.dtype == np.float32
    np.testing.assert_allclose(volume.geometry.affine[:, [2, 1, 0, 3]], affine, rtol=0, atol=1e-6)
    zooms = nibabel.load(path).header.get_zooms()[:3]
    assert volume.geometry.spacing == tuple(float(z) for z in zooms[::-1])
    assert volume.geometry.shape == volume.array.shape
    return volume


# --- refused


def test_the_corpus_has_at_least_sixty_kinds_of_broken_files() -> None:
    assert len({bad.name for bad in BAD}) == len(BAD) >= 60


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name)
def test_a_broken_file_ends_in_one_line_with_file_reason_and_mend(tmp_path: Path, bad: Bad) -> None:
    path = written(tmp_path, bad.build(), bad.ending)
    message = refusal(path)
    assert message.startswith(f"{path}: ")
    assert bad.says in message
    reason, _, mend = message.removeprefix(f"{path}: ").partition("; ")
    assert reason
    assert len(mend) > 10


@pytest.mark.parametrize("bad", [b for b in BAD if "not finite" not in b.name], ids=lambda bad: bad.name)
def test_a_broken_header_is_refused_without_its_voxels(tmp_path: Path, bad: Bad) -> None:
    """read_header either refuses too, or the header is in order and the fault lies behind it."""
    path = written(tmp_path, bad.build(), bad.ending)
    outcome = outcome_of(lambda: read_header(path))
    if isinstance(outcome, InputError):
        assert bad.says in str(outcome)
    else:
        assert outcome.shape == SHAPE or "more than there is" in bad.name


@pytest.mark.parametrize("position", np.linspace(0, 1, 60).tolist())
def test_one_flipped_bit_of_the_deflate_stream_is_found(tmp_path: Path, position: float) -> None:
    gz = packed(nifti())
    first, last = 8 * 10, 8 * (len(gz) - 8) - 8  # the last byte of the stream may end in unused bits
    bit = first + int(position * (last - first))
    assert "scan.nii.gz: " in refusal(written(tmp_path, flipped(gz, bit), ".nii.gz"))


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.nii.gz").mkdir()
    os.mkfifo(tmp_path / "pipe.nii")
    (tmp_path / "loop.nii").symlink_to(tmp_path / "loop.nii")
    (tmp_path / "dangling.nii").symlink_to(tmp_path / "nowhere.nii")
    (tmp_path / "device.nii").symlink_to("/dev/zero")
    (tmp_path / "scan.dcm").write_bytes(nifti())
    assert "is no regular file" in refusal(tmp_path / "folder.nii.gz")
    assert "is no regular file" in refusal(tmp_path / "pipe.nii")
    assert "is no regular file" in refusal(tmp_path / "device.nii")
    assert "cannot be opened" in refusal(tmp_path / "loop.nii")
    assert "not found" in refusal(tmp_path / "dangling.nii")
    assert "not found" in refusal(tmp_path / "missing.nii.gz")
    assert "dcm2niix" in refusal(tmp_path / "scan.dcm")
    assert "cannot be opened" in refusal(tmp_path / "scan.dcm" / "scan.nii")
    assert "cannot be opened" in refusal(tmp_path / f"{'n' * 300}.nii")
    assert "check the path" in refusal(tmp_path / "zero\0byte.nii")
    assert "check the path" in refusal(tmp_path / "half a surrogate \ud83d.nii")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, nifti())
    path.chmod(0)
    assert "Permission denied" in refusal(path)


def test_a_file_name_with_line_breaks_and_escape_codes_stays_one_line(tmp_path: Path) -> None:
    path = tmp_path / "two\nlines\x1b[31m\u202e.nii"
    path.write_bytes(b"no scan, but long enough for one")
    message = refusal(path)
    assert "two\\nlines\\x1b[31m\\u202e.nii" in message
    assert message.isprintable()


def test_pixdim_and_affine_that_differ_are_both_named(tmp_path: Path) -> None:
    raw = nifti(affine=np.diag([1.0, 1.0, 2.0, 1.0]), pixdim=(1.0, 1.0, 1.0, 2.0011))
    message = refusal(written(tmp_path, raw))
    assert "(1.0, 1.0, 2.0011)" in message
    assert "(1.0, 1.0, 2.0)" in message
    close = nifti(affine=np.diag([1.0, 1.0, 2.0, 1.0]), pixdim=(1.0, 1.0, 1.0, 2.0009))
    volume = read_volume(written(tmp_path, close))
    assert volume.geometry.spacing == (float(np.float32(2.0009)), 1.0, 1.0)  # spacing is pixdim


def test_a_voxel_cap_is_the_callers(tmp_path: Path) -> None:
    path = written(tmp_path, nifti())
    read_volume(path, max_voxels=1320)
    with pytest.raises(InputError, match="1320 voxels; allowed: 1319"):
        read_volume(path, max_voxels=1319)


def test_any_mutated_header_ends_in_a_result_or_one_line(tmp_path: Path) -> None:
    rng = np.random.default_rng(20240711)
    accepted = 0
    for _ in range(400):
        raw = _mutated(rng)
        path = written(tmp_path, *((raw, ".nii") if rng.random() < 0.7 else (gzip.compress(raw, 1), ".nii.gz")))
        accepted += _result_or_line(path)
    assert 20 < accepted < 300  # the fuzz reaches both ends


def test_any_mutated_gzip_stream_ends_in_a_result_or_one_line(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    gz = np.frombuffer(packed(nifti()), np.uint8)
    for _ in range(200):
        content = gz.copy()
        where = rng.integers(0, 30 if rng.random() < 0.5 else len(gz), rng.integers(1, 4))
        content[where] = rng.integers(0, 256, len(where))
        _result_or_line(written(tmp_path, content.tobytes(), ".nii.gz"))


def _mutated(rng: np.random.Generator) -> bytes:
    version, order = int(rng.integers(1, 3)), str(rng.choice(["<", ">"]))
    raw = bytearray(nifti(version=version, order=order))
    if rng.random() < 0.5:  # any byte of the header
        for place in rng.integers(0, 352 if version == 1 else 544, rng.integers(1, 4)):
            raw[place] = rng.integers(0, 256)
        return bytes(raw)
    offset, code = FIELDS[str(rng.choice(list(FIELDS)))][version - 1]
    if code.endswith("s"):
        raw[offset : offset + 4] = rng.bytes(4)
        return bytes(raw)
    kind = code[-1]
    special = [0, 1, 2, 3, -1, 127, 2048, 32767, *rng.integers(-100, 100, 4).tolist()]
    if kind in "fd":
        special += [float("nan"), float("inf"), -float("inf"), 1e-40, 3e38, 0.5, *rng.normal(0, 3, 4).tolist()]
    special += {"d": [1e308, -1e308], "q": [2**63 - 1, -(2**63)]}.get(kind, [])
    item = struct.calcsize("=" + kind)
    place = offset + item * int(rng.integers(0, int(code[:-1] or 1)))
    value = special[int(rng.integers(0, len(special)))]
    if kind in "b" and not -128 <= value <= 127:
        value = 0
    struct.pack_into(order + kind, raw, place, value)
    return bytes(raw)


def _result_or_line(path: Path) -> bool:
    case = outcome_of(lambda: read_case("fuzz", {"T1": path}))
    if isinstance(case, InputError):
        assert str(path) in str(case)
        assert len(str(case).splitlines()) == 1
        return False
    assert np.isfinite(case.image).all()
    assert case.image.shape[1:] == case.geometry.shape
    return True


# --- accepted


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
def test_every_type_order_and_version_reads_as_nibabel(
    tmp_path: Path, dtype: str, version: int, order: str, ending: str
) -> None:
    raw = nifti(voxels(dtype), version=version, order=order)
    volume = assert_reads_as_nibabel(written(tmp_path, packed(raw) if ending == ".nii.gz" else raw, ending))
    assert (volume.header.version, volume.header.byte_order) == (version, order)
    assert volume.array.max() == 120


def test_the_axes_are_turned_over_and_the_affine_with_them(tmp_path: Path) -> None:
    path = written(tmp_path, nifti())
    volume = read_volume(path)
    image = nibabel.load(path)
    i, j, k = 3, 7, 2
    assert volume.array[k, j, i] == np.asarray(image.dataobj)[i, j, k]
    np.testing.assert_allclose(volume.geometry.affine @ [k, j, i, 1], image.affine @ [i, j, k, 1], atol=1e-6)


@pytest.mark.parametrize(
    ("slope", "intercept", "factor", "constant"),
    [
        (0.0, 7.0, 1.0, 0.0),
        (float("nan"), 7.0, 1.0, 0.0),
        (2.5, -30.0, 2.5, -30.0),
        (-1.0, 0.0, -1.0, 0.0),
        (1.0, 5.0, 1.0, 5.0),
        (float("nan"), float("nan"), 1.0, 0.0),
    ],
)
def test_slope_and_intercept_are_applied_and_slope_zero_is_none(
    tmp_path: Path, slope: float, intercept: float, factor: float, constant: float
) -> None:
    path = written(tmp_path, nifti(scl_slope=slope, scl_inter=intercept))
    np.testing.assert_array_equal(read_volume(path).array, voxels().transpose(2, 1, 0) * factor + constant)
    assert_reads_as_nibabel(path)


def test_scaling_is_computed_in_double_precision(tmp_path: Path) -> None:
    stored = voxels("i4") * 16_777_000
    path = written(tmp_path, nifti(stored, version=2, scl_slope=0.1, scl_inter=-1e8 / 3))
    expected = (stored.astype(np.float64) * 0.1 - 1e8 / 3).astype(np.float32)
    np.testing.assert_array_equal(read_volume(path).array, expected.transpose(2, 1, 0))


@pytest.mark.parametrize("trailing", [(1,), (1, 1), (1, 1, 1, 1)])
def test_trailing_axes_of_one_are_dropped(tmp_path: Path, trailing: tuple[int, ...]) -> None:
    assert_reads_as_nibabel(written(tmp_path, nifti(dim=(3 + len(trailing), *SHAPE, *trailing))))


def test_axes_beyond_the_declared_ones_are_ignored(tmp_path: Path) -> None:
    assert_reads_as_nibabel(written(tmp_path, nifti(dim=(3, *SHAPE, 0, 7, -3, 9))))


def test_one_voxel_and_one_slice_are_volumes(tmp_path: Path) -> None:
    for shape in ((1, 1, 1), (7, 5, 1), (1, 5, 7)):
        assert_reads_as_nibabel(written(tmp_path, nifti(voxels("i2", shape))))


def test_gzip_of_several_members_is_one_file(tmp_path: Path) -> None:
    raw = nifti()
    parts = (raw[:100], raw[100:352], raw[352:1000], b"", raw[1000:])
    assert_reads_as_nibabel(written(tmp_path, b"".join(gzip.compress(part) for part in parts), ".nii.gz"))


def test_a_gzip_header_with_name_comment_and_extra_field_is_skipped(tmp_path: Path) -> None:
    gz = packed(nifti())
    extra = struct.pack("<H", 3) + b"abc" + b"name.nii\0" + b"comment\0"
    assert_reads_as_nibabel(written(tmp_path, gz[:3] + b"\x1c" + gz[4:10] + extra + gz[10:], ".nii.gz"))


def test_zero_padding_behind_the_gzip_data_is_accepted(tmp_path: Path) -> None:
    assert_reads_as_nibabel(written(tmp_path, packed(nifti()) + bytes(10_000), ".nii.gz"))


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_a_tail_of_64_kib_is_accepted(tmp_path: Path, ending: str) -> None:
    raw = nifti() + bytes(64 * 1024)
    assert_reads_as_nibabel(written(tmp_path, packed(raw) if ending == ".nii.gz" else raw, ending))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_header_extensions_are_skipped(tmp_path: Path, version: int, ending: str) -> None:
    kind = nibabel.Nifti1Image if version == 1 else nibabel.Nifti2Image
    image = kind(voxels(), OBLIQUE)
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"name of a patient" * 1000))
    nibabel.save(image, tmp_path / f"scan{ending}")
    volume = assert_reads_as_nibabel(tmp_path / f"scan{ending}")
    assert volume.header.offset > 17_000


@pytest.mark.parametrize("codes", [(0, 1), (1, 0), (1, 1), (3, 4)])
def test_the_sform_is_taken_where_it_is_set_else_the_qform(tmp_path: Path, codes: tuple[int, int]) -> None:
    qform_code, sform_code = codes
    raw = nifti(qform_code=qform_code, sform_code=sform_code)
    if sform_code == 0:  # the quaternion holds no shear, and an unset sform may hold anything
        raw = with_fields(raw, srow_x=(float("nan"),))
    assert_reads_as_nibabel(written(tmp_path, raw))


@pytest.mark.parametrize("qfac", [-1.0, 1.0])
def test_a_qform_alone_places_both_handednesses(tmp_path: Path, qfac: float) -> None:
    raw = nifti(affine=np.diag([2.0, 3.0, 4.0, 1.0]), sform_code=0, pixdim=(qfac,), quaternion=(0.3, -0.5, 0.1))
    volume = assert_reads_as_nibabel(written(tmp_path, raw))
    assert np.sign(np.linalg.det(volume.geometry.affine[:3, [2, 1, 0]])) == qfac


def test_an_unset_qform_may_hold_anything(tmp_path: Path) -> None:
    nan = float("nan")
    assert_reads_as_nibabel(written(tmp_path, nifti(qform_code=0, quaternion=(9.0, nan, 9.0), qoffset=(nan,))))


def test_a_half_turn_written_in_single_precision_is_accepted(tmp_path: Path) -> None:
    b = np.float32(np.sqrt(0.5))
    raw = nifti(affine=np.diag([1.0, 1.0, 1.0, 1.0]), sform_code=0, quaternion=(float(b), float(b) * (1 + 1e-7), 0.0))
    assert_reads_as_nibabel(written(tmp_path, raw))


def test_a_sheared_affine_is_kept(tmp_path: Path) -> None:
    sheared = np.array([[1.0, 0.3, 0.0, 5.0], [0.0, 1.0, -0.4, 6.0], [0.1, 0.0, 2.0, 7.0], [0, 0, 0, 1]])
    columns = np.linalg.norm(sheared[:3, :3], axis=0)
    raw = nifti(affine=np.diag([*columns, 1.0]), srow_x=tuple(sheared[0]), srow_y=tuple(sheared[1]))
    volume = assert_reads_as_nibabel(written(tmp_path, with_fields(raw, srow_z=tuple(sheared[2]))))
    np.testing.assert_allclose(volume.geometry.affine[:, [2, 1, 0, 3]], sheared, atol=1e-6)


@pytest.mark.parametrize(("count", "dtype"), [(1, "f4"), (13, "f4"), (13, "f8")])
def test_up_to_one_percent_of_nonfinite_voxels_become_zero_with_a_counted_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, count: int, dtype: str
) -> None:
    array = voxels(dtype) + 1
    array.ravel()[:count] = [np.nan, np.inf, -np.inf][: count % 3 or 3] + [np.nan] * (count - (count % 3 or 3))
    path = written(tmp_path, nifti(array))
    with caplog.at_level(logging.WARNING, "strokenet"):
        volume = read_volume(path)
    expected = np.where(np.isfinite(array), array, 0).transpose(2, 1, 0)
    np.testing.assert_array_equal(volume.array, expected)
    assert [f"{path}: {count} of 1320 voxels are NaN or infinite; they are set to 0"] == caplog.messages
    with pytest.raises(InputError, match="none is allowed here"):
        read_volume(path, max_nonfinite=0.0)


def test_values_beyond_single_precision_count_as_infinite(tmp_path: Path) -> None:
    array = voxels("f8")
    array[0, 0, 0] = 1e300
    assert read_volume(written(tmp_path, nifti(array))).array[0, 0, 0] == 0


def test_no_file_is_left_open(tmp_path: Path) -> None:
    good, bad = packed(nifti()), flipped(packed(nifti()), 8 * 300)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        read_volume(written(tmp_path, good, ".nii.gz"))
        refusal(written(tmp_path, bad, ".nii.gz"))
    if Path("/proc/self/fd").is_dir():
        assert not [fd for fd in Path("/proc/self/fd").iterdir() if str(tmp_path) in os.path.realpath(fd)]


# --- real scans


@pytest.mark.real
@pytest.mark.parametrize("folder", ["isles22", "open_ms", "native_grids_tcga"])
def test_every_real_scan_reads_as_nibabel(real_data: Path, folder: str) -> None:
    paths = sorted((real_data / folder).rglob("*.nii.gz"))
    assert len(paths) >= 5
    for path in paths:
        assert_reads_as_nibabel(path)


@pytest.mark.real
@pytest.mark.parametrize("folder", ["lesions_soop", "lesions_lesymap"])
def test_real_lesion_masks_read_as_nibabel(real_data: Path, folder: str) -> None:
    paths = sorted((real_data / folder).glob("*.nii.gz"))
    for path in paths[:: len(paths) // 5][:5]:
        assert set(np.unique(assert_reads_as_nibabel(path).array)) <= {0, 1}
