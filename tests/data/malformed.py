"""NIfTI files that are broken or unusual, made from bytes: what the reader is tested against.

A BAD entry says how the file is called, how its bytes are made, and a part of the message it must end in. Fields are
set at the offsets of the NIfTI-1 and NIfTI-2 standards, not through the code under test.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

SHAPE = (12, 11, 10)
OBLIQUE = np.array(
    [[-0.9, 0.16, 0.3, 80.0], [0.1, 1.17, -0.24, -60.5], [0.2, 0.22, 2.4, -40.25], [0, 0, 0, 1]], dtype=np.float64
)
# offset and struct code of a field: NIfTI-1, NIfTI-2
FIELDS: dict[str, tuple[tuple[int, str], tuple[int, str]]] = {
    "sizeof_hdr": ((0, "i"), (0, "i")),
    "dim": ((40, "8h"), (16, "8q")),
    "datatype": ((70, "h"), (12, "h")),
    "bitpix": ((72, "h"), (14, "h")),
    "pixdim": ((76, "8f"), (104, "8d")),
    "vox_offset": ((108, "f"), (168, "q")),
    "scl_slope": ((112, "f"), (176, "d")),
    "scl_inter": ((116, "f"), (184, "d")),
    "descrip": ((148, "80s"), (240, "80s")),
    "aux_file": ((228, "24s"), (320, "24s")),
    "qform_code": ((252, "h"), (344, "i")),
    "sform_code": ((254, "h"), (348, "i")),
    "quaternion": ((256, "3f"), (352, "3d")),
    "qoffset": ((268, "3f"), (376, "3d")),
    "srow_x": ((280, "4f"), (400, "4d")),
    "srow_y": ((296, "4f"), (416, "4d")),
    "srow_z": ((312, "4f"), (432, "4d")),
    "intent_name": ((328, "16s"), (508, "16s")),
    "magic": ((344, "4s"), (4, "8s")),
    "xyzt_units": ((123, "b"), (500, "i")),
}


def voxels(dtype: str = "i2", shape: tuple[int, ...] = SHAPE) -> NDArray[Any]:
    """Noise (i, j, k) that fits every type: 0 .. 120."""
    return np.random.default_rng(5).integers(0, 121, shape).astype(dtype)


def nifti(
    array: NDArray[Any] | None = None, *, version: int = 1, order: str = "<", affine: Any = OBLIQUE, **fields: Any
) -> bytes:
    """An uncompressed file by nibabel: sform (code 2) and qform (code 1) of the affine, then the fields as given."""
    array = voxels() if array is None else array
    kind = nibabel.Nifti1Header if version == 1 else nibabel.Nifti2Header
    header = kind(endianness=order)
    header.set_data_dtype(array.dtype)
    header.set_data_shape(array.shape)
    header.set_qform(affine, code=1)
    header.set_sform(affine, code=2)
    header["magic"] = b"n+1" if version == 1 else b"n+2\0\r\n\x1a\n"
    header["vox_offset"] = 352 if version == 1 else 544
    block = np.asfortranarray(array).astype(array.dtype.newbyteorder(order)).tobytes(order="F")
    return with_fields(header.binaryblock + bytes(4) + block, version=version, order=order, **fields)


def with_fields(raw: bytes, *, version: int = 1, order: str = "<", **fields: Any) -> bytes:
    """The file with other header fields; a tuple fills the first places of an array."""
    content = bytearray(raw)
    for name, value in fields.items():
        offset, code = FIELDS[name][version - 1]
        values = list(struct.unpack_from(order + code, content, offset))
        given = value if isinstance(value, tuple) else (value,)
        values[: len(given)] = given
        struct.pack_into(order + code, content, offset, *values)
    return bytes(content)


def packed(raw: bytes, **fields: Any) -> bytes:
    """The file by zlib's gzip, as scanners' tools write it."""
    return gzip.compress(with_fields(raw, **fields), 6, mtime=0)


def flipped(content: bytes, bit: int) -> bytes:
    """One bit turned over."""
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@dataclass(frozen=True)
class Bad:
    """One broken file: its name's ending, its bytes, and what the error must say."""

    name: str
    build: Callable[[], bytes]
    says: str
    ending: str = ".nii"


def _header_cases() -> list[Bad]:
    nan, inf = float("nan"), float("inf")

    def case(name: str, says: str, version: int = 1, **fields: Any) -> Bad:
        return Bad(name, lambda: nifti(version=version, **fields), says)

    return [
        case("no axes", "declares 0 axes", dim=(0,)),
        case("eight axes", "declares 8 axes", dim=(8,)),
        case("minus one axis", "declares -1 axes", dim=(-1,)),
        case("sixty thousand axes in NIfTI-2", "declares 60000 axes", 2, dim=(60_000,)),
        case("one axis", "1-D image", dim=(1,)),
        case("two axes", "2d is not supported", dim=(2,)),
        case("an empty axis", "(12, 0, 10) voxels", dim=(3, 12, 0, 10)),
        case("a negative axis", "(12, -11, 10) voxels", dim=(3, 12, -11, 10)),
        case("an axis of 2049", "1 to 2048", dim=(3, 12, 2049, 10)),
        case("an axis that overflows", "1 to 2048", 2, dim=(3, 2**62, 4, 4)),
        case("giant axes", "8000000000 voxels", dim=(3, 2000, 2000, 2000)),
        case("axes that the file does not hold", "truncated", dim=(3, 600, 600, 600)),
        case("one voxel more than there is", "truncated", dim=(3, 12, 11, 11)),
        case("two volumes", "one 3-D volume", dim=(4, 12, 11, 5, 2)),
        case("a vector image", "5-D", dim=(5, 12, 11, 10, 1, 3)),
        case("no volume", "one 3-D volume", dim=(4, 12, 11, 10, 0)),
        case("unknown type 0", "(unknown)", datatype=0),
        case("type 3 that no standard names", "datatype 3", datatype=3),
        case("one bit a voxel", "(binary)", datatype=1, bitpix=1),
        case("complex", "(complex)", datatype=32, bitpix=64),
        case("complex128", "(complex128)", datatype=1792, bitpix=128),
        case("complex256", "(complex256)", datatype=2048, bitpix=256),
        case("RGB", "(RGB)", datatype=128, bitpix=24),
        case("RGBA", "(RGBA)", datatype=2304, bitpix=32),
        case("float128", "(float128)", datatype=1536, bitpix=128),
        case("int16 of 8 bits", "contradict", bitpix=8),
        case("float32 of 16 bits", "contradict", datatype=16),
        case("no magic", "magic is missing", magic=b""),
        case("magic of the other version", "magic is missing", magic=b"n+2"),
        case("magic with a spare byte", "magic is missing", magic=b"n+1x"),
        case("header of a pair", ".hdr/.img pair", magic=b"ni1"),
        case("header of a NIfTI-2 pair", ".hdr/.img pair", 2, magic=b"ni2\0\r\n\x1a\n"),
        case("NIfTI-2 without its magic", "magic is missing", 2, magic=b""),
        case("NIfTI-2 sent as text", "line ends were converted", 2, magic=b"n+2\0\n\x1a\n\0"),
        case("header size 0", "no NIfTI header", sizeof_hdr=0),
        case("header size 349", "no NIfTI header", sizeof_hdr=349),
        case("vox_offset NaN", "vox_offset is nan", vox_offset=nan),
        case("vox_offset infinite", "vox_offset is inf", vox_offset=inf),
        case("vox_offset 0", "vox_offset is 0.0", vox_offset=0.0),
        case("vox_offset inside the header", "vox_offset is 348.0", vox_offset=348.0),
        case("vox_offset negative", "vox_offset is -352", 2, vox_offset=-352),
        case("vox_offset of 1e9", "vox_offset is 1000000000.0", vox_offset=1e9),
        case("vox_offset fractional", "vox_offset is 352.5", vox_offset=352.5),
        case("vox_offset behind the end", "truncated", vox_offset=65536.0),
        case("pixdim NaN", "voxel size", pixdim=(1.0, nan)),
        case("pixdim infinite", "voxel size", pixdim=(1.0, inf)),
        case("pixdim 0", "voxel size", pixdim=(1.0, 0.0)),
        case("pixdim negative", "voxel size", pixdim=(1.0, -0.9)),
        case("pixdim of 51 mm", "0.01 to 50", pixdim=(1.0, 51.0)),
        case("pixdim overflows", "voxel size", 2, pixdim=(1.0, 1e308)),
        case("no form", "neither qform nor sform", qform_code=0, sform_code=0),
        case("negative form codes", "neither qform nor sform", qform_code=-1, sform_code=-1),
        case("quaternion too long", "longer than 1", quaternion=(0.9, 0.9, 0.9)),
        case("quaternion a little too long", "longer than 1", quaternion=(1.00001, 0.0, 0.0)),
        case("quaternion overflows", "longer than 1", 2, quaternion=(1e300, 1e300, 0.0)),
        case("quaternion NaN", "qform holds NaN", quaternion=(nan,)),
        case("qoffset infinite", "qform holds NaN or infinity", sform_code=0, qoffset=(inf,)),
        case("qfac NaN", "qform holds NaN", sform_code=0, pixdim=(nan,)),
        case("sform NaN", "sform holds NaN", srow_y=(nan,)),
        case("sform infinite", "sform holds NaN or infinity", srow_z=(0.0, 0.0, 1.0, -inf)),
        case("sform of zeros", "differ", srow_x=(0.0,) * 3, srow_y=(0.0,) * 3, srow_z=(0.0,) * 3),
        case("sform overflows", "above 1e+06 mm", 2, srow_x=(1e300, 1e300, 1e300, 1e300)),
        case("a scan in another town", "above 1e+06 mm", srow_x=(-0.9, 0.16, 0.3, 1e30)),
        case("two parallel axes", "singular", **_parallel()),
        case("pixdim 0.002 off the sform", "0.9294", pixdim=(1.0, float(np.linalg.norm(OBLIQUE[:3, 0])) + 0.002)),
        case("metres in the sform", "differ", srow_x=(-0.0009, 0.0, 0.0), srow_y=(0.0, 0.001, 0.0)),
        case("slope infinite", "scl_slope inf", scl_slope=inf),
        case("intercept NaN", "scl_inter nan", scl_slope=2.0, scl_inter=nan),
        case("all values overflow", "NaN or infinite", scl_slope=3e38, scl_inter=3e38),
    ]


def _parallel() -> dict[str, Any]:
    x, y, z = (tuple(float(v) for v in row) for row in OBLIQUE[:3, [0, 0, 2]] * [1, 1.2043, 1])
    return {"srow_x": x, "srow_y": y, "srow_z": z, "qform_code": 0, "pixdim": _sizes(np.array([x, y, z]))}


def _sizes(columns: NDArray[Any]) -> tuple[float, ...]:
    return (1.0, *(float(v) for v in np.linalg.norm(columns, axis=0)))


def _plain_cases() -> list[Bad]:
    raw = nifti()
    cut = [Bad(f"cut to {n} bytes", lambda n=n: raw[:n], f"{n} bytes are no scan") for n in (0, 1, 10, 19)]
    cut += [
        Bad(f"cut to {n} bytes", lambda n=n: raw[:n], "truncated") for n in (20, 100, 347, 348, 351, 352, 353, 1500)
    ]
    nonfinite = voxels("f4")
    nonfinite[0, 0, :], nonfinite[1, 1, :4] = np.nan, np.inf  # 14 of 1320
    return [
        *cut,
        Bad("last byte cut", lambda: raw[:-1], "truncated"),
        Bad("NIfTI-2 cut in its header", lambda: nifti(version=2)[:400], "truncated"),
        Bad("gzip named .nii", lambda: packed(raw), "rename it to .nii.gz"),
        Bad("text", lambda: b"subject,lesion\nsub-01,left MCA\n" * 40, "no NIfTI header"),
        Bad("zeros", lambda: bytes(4000), "no NIfTI header"),
        Bad("DICOM", lambda: bytes(128) + b"DICM" + bytes(1000), "no NIfTI header"),
        Bad("tail of more than 64 KiB", lambda: raw + bytes(64 * 1024 + 1), "more than 64 KiB"),
        Bad("1.06 % not finite", lambda: nifti(nonfinite), "14 of 1320 voxels are NaN or infinite"),
        Bad("all NaN", lambda: nifti(np.full(SHAPE, np.nan, np.float64)), "1320 of 1320"),
    ]


def _gzip_cases() -> list[Bad]:
    raw = nifti()
    gz = packed(raw)
    size = len(gz)

    def case(name: str, says: str, build: Callable[[], bytes]) -> Bad:
        return Bad(name, build, says, ".nii.gz")

    cut = [case(f"gzip cut to {n} bytes", f"{n} bytes are no scan", lambda n=n: gz[:n]) for n in (0, 10, 19)]
    places = (20, 100, size // 4, size // 2, size * 9 // 10, size - 9, size - 8, size - 4, size - 1)
    cut += [case(f"gzip cut to {n} bytes", "truncated", lambda n=n: gz[:n]) for n in places]
    return [
        *cut,
        case("wrong checksum", "corrupt", lambda: flipped(gz, 8 * (size - 8))),
        case("wrong length", "corrupt", lambda: flipped(gz, 8 * (size - 4))),
        case("no gzip", "is not gzip data", lambda: raw),
        case("text in .gz", "is not gzip data", lambda: b"not a scan, but long enough"),
        case("zlib in .gz", "is not gzip data", lambda: zlib.compress(raw)),
        case("another compression method", "corrupt", lambda: gz[:2] + b"\x07" + gz[3:]),
        case("gzip header with a wrong checksum", "corrupt", lambda: gz[:3] + b"\x02" + gz[4:10] + b"ab" + gz[10:]),
        case("gzip name without end", "corrupt", lambda: gz[:3] + b"\x08" + gz[4:10] + b"n" * 2**20),
        case("bytes after the gzip data", "other bytes follow", lambda: gz + b"appended by a mailer"),
        case("second member cut", "truncated", lambda: gz + packed(bytes(1000))[:-5]),
        case("second member corrupt", "corrupt", lambda: gz + flipped(packed(bytes(1000)), 8 * 25)),
        case("tail of more than 64 KiB in gzip", "more than 64 KiB", lambda: packed(raw + bytes(64 * 1024 + 1))),
        case("tail bomb", "more than 64 KiB", lambda: packed(raw + bytes(20_000_000))),
        case("tail bomb in members", "more than 64 KiB", lambda: gz + packed(bytes(20_000_000))),
        case("giant axes in 7 KB", "3375000000 voxels", lambda: packed(raw, dim=(3, 1500, 1500, 1500))),
        case("more than deflate can hold", "gzip cannot hold them", lambda: packed(raw, dim=(3, 400, 400, 400))),
        case("more than there is", "truncated", lambda: packed(raw, dim=(3, 50, 50, 50))),
        case("two volumes in gzip", "one 3-D volume", lambda: packed(raw, dim=(4, 12, 11, 5, 2))),
        case("gzip in gzip", "no NIfTI header", lambda: packed(gz)),
        case("header extensions without end", "truncated", lambda: packed(raw, vox_offset=4_000_000.0)),
    ]


BAD: tuple[Bad, ...] = (*_header_cases(), *_plain_cases(), *_gzip_cases())
