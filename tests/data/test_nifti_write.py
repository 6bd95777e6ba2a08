"""The writer: the reference's grid to the bit, nothing else of it, and never half a file."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

import strokenet
from strokenet.data import nifti as writer
from strokenet.data.nifti import read_header, read_volume, write_image, write_mask, write_probability
from tests.data.malformed import FIELDS, OBLIQUE, SHAPE, nifti, packed, voxels

KEPT = ("pixdim", "xyzt_units", "qform_code", "sform_code", "quaternion", "qoffset", "srow_x", "srow_y", "srow_z")
BYTES = {"b": 1, "h": 2, "i": 4, "q": 8, "f": 4, "d": 8, "s": 1}
VARIANTS = [(version, order) for version in (1, 2) for order in "<>"]


def field(content: bytes, name: str, version: int) -> bytes:
    """The bytes of a header field, at the standard's offset."""
    offset, code = FIELDS[name][version - 1]
    return content[offset : offset + int(code[:-1] or 1) * BYTES[code[-1]]]


def reference(folder: Path, version: int = 1, order: str = "<", **fields: Any) -> Path:
    """A scan with all that identifies a patient, odd units, and pixdim beyond the third axis."""
    given: dict[str, Any] = {
        "pixdim": (-1.0, *(float(n) for n in np.linalg.norm(OBLIQUE[:3, :3], axis=0)), 2.5, 3.5),
        "xyzt_units": 10,
        "qform_code": 3,
        "sform_code": 4,
        "descrip": b"Doe^Jane 1950-01-01",
        "aux_file": b"doe.txt",
        "intent_name": b"Jane Doe",
        "scl_slope": 2.0,
        "scl_inter": -7.0,
    }
    path = folder / "reference.nii"
    path.write_bytes(nifti(version=version, order=order, **(given | fields)))
    return path


def mask() -> Any:
    return (voxels().transpose(2, 1, 0) > 90).astype(np.uint8)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize(("version", "order"), VARIANTS)
def test_the_grid_of_the_reference_is_kept_to_the_bit(tmp_path: Path, version: int, order: str, ending: str) -> None:
    source = reference(tmp_path, version, order)
    out = tmp_path / f"mask{ending}"
    write_mask(out, mask(), read_header(source))
    old, new = source.read_bytes(), out.read_bytes()
    new = gzip.decompress(new) if ending == ".nii.gz" else new
    for name in (*KEPT, "magic", "sizeof_hdr"):
        assert field(new, name, version) == field(old, name, version), name
    assert len(new) == (352 if version == 1 else 544) + mask().size


@pytest.mark.parametrize(("version", "order"), VARIANTS)
def test_nibabel_reads_the_same_mask_and_affine_without_a_complaint(
    tmp_path: Path, version: int, order: str, caplog: pytest.LogCaptureFixture
) -> None:
    source = reference(tmp_path, version, order)
    out = tmp_path / "mask.nii.gz"
    write_mask(out, mask(), read_header(source))
    image = nibabel.load(out)
    np.testing.assert_array_equal(np.asarray(image.dataobj).transpose(2, 1, 0), mask())
    assert image.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(image.affine, nibabel.load(source).affine)
    header = image.header
    assert header.endianness == order
    assert isinstance(image, nibabel.Nifti1Image if version == 1 else nibabel.Nifti2Image)
    assert header.get_xyzt_units() == ("mm", "sec")
    content = gzip.decompress(out.read_bytes())
    assert struct.unpack(order + "f" if version == 1 else order + "d", field(content, "scl_slope", version)) == (1.0,)
    assert field(content, "scl_inter", version) == bytes(4 * version)
    assert (float(header["cal_min"]), float(header["cal_max"])) == (0.0, 1.0)
    assert header.get_intent()[0] == "none"
    assert not caplog.messages


@pytest.mark.parametrize(("version", "order"), VARIANTS)
@pytest.mark.parametrize("write", [write_probability, write_image])
def test_float_maps_come_back_exactly(tmp_path: Path, version: int, order: str, write: Any) -> None:
    array = np.random.default_rng(1).random(SHAPE[::-1], np.float32)
    header = read_header(reference(tmp_path, version, order))
    write(tmp_path / "map.nii.gz", array, header)
    np.testing.assert_array_equal(read_volume(tmp_path / "map.nii.gz").array, array)
    image = nibabel.load(tmp_path / "map.nii.gz")
    np.testing.assert_array_equal(np.asarray(image.dataobj).transpose(2, 1, 0), array)
    assert image.get_data_dtype() == np.dtype("f4").newbyteorder(order)


@pytest.mark.parametrize("version", [1, 2])
def test_nothing_that_names_a_patient_is_copied(tmp_path: Path, version: int) -> None:
    kind = nibabel.Nifti1Image if version == 1 else nibabel.Nifti2Image
    image = kind(voxels(), OBLIQUE)
    image.header["descrip"], image.header["aux_file"], image.header["intent_name"] = b"Doe", b"Doe", b"Doe"
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"Doe^Jane" * 30))
    nibabel.save(image, tmp_path / "reference.nii")
    write_mask(tmp_path / "mask.nii", mask(), read_header(tmp_path / "reference.nii"))
    content = (tmp_path / "mask.nii").read_bytes()
    assert b"Doe" not in content
    written = nibabel.load(tmp_path / "mask.nii").header
    assert not written.extensions
    assert bytes(written["descrip"]).rstrip(b"\0").decode() == f"strokenet {strokenet.__version__}"


def test_a_trailing_axis_of_the_reference_is_not_written(tmp_path: Path) -> None:
    source = reference(tmp_path, dim=(5, *SHAPE, 1, 1))
    write_mask(tmp_path / "mask.nii", mask(), read_header(source))
    assert nibabel.load(tmp_path / "mask.nii").shape == SHAPE


def test_the_gzip_header_has_no_time_and_no_name_and_equal_masks_are_equal_files(tmp_path: Path) -> None:
    header = read_header(reference(tmp_path))
    write_mask(tmp_path / "a.nii.gz", mask(), header)
    write_mask(tmp_path / "b.nii.gz", np.asfortranarray(mask()), header)
    content = (tmp_path / "a.nii.gz").read_bytes()
    assert content == (tmp_path / "b.nii.gz").read_bytes()
    assert content[:4] == b"\x1f\x8b\x08\x00"  # no name
    assert content[4:8] == bytes(4)  # no time


def test_the_mask_of_a_mask_is_the_mask(tmp_path: Path) -> None:
    write_mask(tmp_path / "first.nii.gz", mask(), read_header(reference(tmp_path)))
    first = read_volume(tmp_path / "first.nii.gz")
    write_mask(tmp_path / "second.nii.gz", first.array.astype(np.uint8), first.header)
    assert (tmp_path / "first.nii.gz").read_bytes() == (tmp_path / "second.nii.gz").read_bytes()


def test_a_scan_read_from_a_compressed_big_endian_file_is_a_reference_too(tmp_path: Path) -> None:
    (tmp_path / "scan.nii.gz").write_bytes(packed(nifti(voxels("f8"), version=2, order=">")))
    volume = read_volume(tmp_path / "scan.nii.gz")
    write_image(tmp_path / "copy.nii.gz", volume.array, volume.header)
    copy = read_volume(tmp_path / "copy.nii.gz")
    np.testing.assert_array_equal(copy.array, volume.array)
    np.testing.assert_array_equal(copy.geometry.affine, volume.geometry.affine)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_a_write_that_fails_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    header = read_header(reference(tmp_path))
    out = tmp_path / "out" / f"mask{ending}"
    write_mask(out, mask(), header)
    before = out.read_bytes()

    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *error: object) -> None:
            self.file.close()

        def write(self, content: Any) -> None:
            self.file.write(bytes(content)[:100])
            raise OSError(28, "No space left on device")

    opened = Path.open
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda self, *a, **k: Full(opened(self, *a, **k)))
        with pytest.raises(OSError, match="No space left"):
            write_mask(out, 1 - mask(), header)
    assert out.read_bytes() == before
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_a_write_that_is_stopped_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = read_header(reference(tmp_path))

    def stop(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writer.isal_zlib, "compressobj", stop)
        with pytest.raises(KeyboardInterrupt):
            write_mask(tmp_path / "out" / "mask.nii.gz", mask(), header)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "array", [np.zeros((10, 11, 13), np.uint8), np.zeros(SHAPE, np.uint8), np.zeros(SHAPE[::-1], np.int16)]
)
def test_an_array_that_does_not_fit_the_reference_is_refused(tmp_path: Path, array: Any) -> None:
    header = read_header(reference(tmp_path))
    with pytest.raises(ValueError, match=r"\(10, 11, 12\) u1 is needed"):
        write_mask(tmp_path / "mask.nii", array, header)
    assert not (tmp_path / "mask.nii").exists()
