"""Header: the fields of a NIfTI header, believed only after each was checked.

Comes in: 352 or 544 bytes. Goes out: a Header whose shape, voxel type, place and scaling can be used without another
look. nibabel takes empty axes, NaN in an affine and RGB for normal; SimpleITK an offset behind the end of the file.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Literal

import numpy as np
from nibabel.nifti1 import header_dtype as HEADER_1
from nibabel.nifti2 import header_dtype as HEADER_2
from nibabel.quaternions import fillpositive, quat2mat
from numpy.typing import NDArray

from strokenet.data.errors import InputError

MAX_EDGE = 2048
MAX_VOXELS = 2**28  # 1 GB as float32
MAX_OFFSET = 16 * 2**20  # header extensions beyond it are refused
MIN_SPACING_MM, MAX_SPACING_MM = 0.01, 50.0
MAX_POSITION_MM = 1e6  # a scan one kilometre from the scanner's centre; far larger numbers would overflow later
SPACING_TOLERANCE_MM = 1e-3
MIN_SINE = 1e-3  # volume of the affine's unit columns: 1 is orthogonal, below this it is singular

DTYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
REFUSED_DTYPES = {0: "unknown", 1: "binary", 32: "complex", 128: "RGB", 1536: "float128", 1792: "complex128"} | {
    2048: "complex256",
    2304: "RGBA",
}


@dataclass(frozen=True, kw_only=True)
class Header:
    """A checked NIfTI header.

    version: 1 or 2. byte_order: "<" or ">". shape, spacing (mm): of the i, j, k axes. offset: first voxel's byte.
    slope, intercept: value = slope * stored + intercept (1 and 0 where the file has none). raw: the bytes as read.
    affine_rows: (i, j, k, 1) -> RAS mm, three rows: the sform where its code is set, else the qform.
    """

    version: Literal[1, 2]
    byte_order: Literal["<", ">"]
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    datatype: int
    offset: int
    slope: float
    intercept: float
    affine_rows: tuple[tuple[float, float, float, float], ...]
    raw: bytes

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """Type of the stored voxels, in their byte order."""
        return np.dtype(self.byte_order + DTYPES[self.datatype])

    @property
    def voxels(self) -> int:
        """Number of voxels."""
        return math.prod(self.shape)

    @property
    def data_bytes(self) -> int:
        """Bytes of the voxel block, not compressed."""
        return self.voxels * self.dtype.itemsize


def parse_header(raw: bytes, where: str, *, max_voxels: int = MAX_VOXELS) -> Header:
    """The checked header of 348 (NIfTI-1) or 540 (NIfTI-2) bytes or more.

    Raises:
        InputError: beginning with `where`.
    """
    version, byte_order = _version(raw, where)
    fields = np.frombuffer(raw, layout_of(version, byte_order), count=1)[0]
    shape = _shape(fields["dim"], where, max_voxels)
    datatype = _datatype(fields, where)
    _check_magic(fields, version, where)
    offset = _offset(float(fields["vox_offset"]), version, where)
    spacing = _spacing(fields["pixdim"], where)
    affine = _affine(fields, spacing, where)
    slope, intercept = _scaling(float(fields["scl_slope"]), float(fields["scl_inter"]), where)
    return Header(
        version=version,
        byte_order=byte_order,
        shape=shape,
        spacing=spacing,
        datatype=datatype,
        offset=offset,
        slope=slope,
        intercept=intercept,
        affine_rows=tuple((float(a), float(b), float(c), float(d)) for a, b, c, d in affine[:3]),
        raw=raw,
    )


def layout_of(version: Literal[1, 2], byte_order: Literal["<", ">"]) -> np.dtype[np.void]:
    """Names and places of the header's fields."""
    layout: np.dtype[np.void] = (HEADER_1 if version == 1 else HEADER_2).newbyteorder(byte_order)
    return layout


def _version(raw: bytes, where: str) -> tuple[Literal[1, 2], Literal["<", ">"]]:
    if struct.unpack("<i", raw[:4])[0] == 348:
        return 1, "<"
    if struct.unpack(">i", raw[:4])[0] == 348:
        return 1, ">"
    if struct.unpack("<i", raw[:4])[0] == 540:
        return 2, "<"
    if struct.unpack(">i", raw[:4])[0] == 540:
        return 2, ">"
    gzip = " (it is gzip data: rename it to .nii.gz)" if raw[:2] == b"\x1f\x8b" else ""
    raise InputError(f"{where}: no NIfTI header{gzip}; convert the scan to NIfTI")


def _shape(dim: NDArray[np.integer], where: str, max_voxels: int) -> tuple[int, int, int]:
    axes = int(dim[0])
    if not 1 <= axes <= 7:
        raise InputError(f"{where}: header declares {axes} axes; 3 are needed, export it again as one 3-D volume")
    if axes < 3:
        raise InputError(f"{where}: a {axes}-D image; 2d is not supported, a 3-D volume is needed")
    i, j, k, *rest = (int(n) for n in dim[1 : axes + 1])
    if not all(1 <= n <= MAX_EDGE for n in (i, j, k)):
        raise InputError(
            f"{where}: header declares {(i, j, k)} voxels; allowed: 1 to {MAX_EDGE} an axis, crop or export it again"
        )
    if any(n != 1 for n in rest):
        raise InputError(
            f"{where}: {axes}-D, header declares {(i, j, k, *rest)}; one 3-D volume is needed, "
            "take one out (fslsplit, or nibabel's slicer)"
        )
    if i * j * k > max_voxels:
        raise InputError(
            f"{where}: header declares {(i, j, k)}, {i * j * k} voxels; allowed: {max_voxels}, crop or resample it"
        )
    return i, j, k


def _datatype(fields: np.void, where: str) -> int:
    code, bits = int(fields["datatype"]), int(fields["bitpix"])
    if code not in DTYPES:
        name = REFUSED_DTYPES.get(code, "unknown")
        raise InputError(
            f"{where}: datatype {code} ({name}); allowed: integers of 8 to 64 bits, float32, float64; convert the scan"
        )
    if bits != 8 * np.dtype(DTYPES[code]).itemsize:
        raise InputError(f"{where}: datatype {code} with {bits} bits a voxel contradict each other; export it again")
    return code


def _check_magic(fields: np.void, version: int, where: str) -> None:
    magic = bytes(fields["magic"])  # numpy drops the zero bytes at the end
    if version == 2 and magic == b"n+2" and fields["eol_check"].tobytes() != b"\r\n\x1a\n":
        raise InputError(
            f"{where}: its line ends were converted, as by a transfer in text mode; copy it again as binary"
        )
    if magic == (b"n+1" if version == 1 else b"n+2"):
        return
    if magic[:3] in (b"ni1", b"ni2"):
        raise InputError(f"{where}: header of a .hdr/.img pair; convert it to a single .nii file")
    raise InputError(f"{where}: NIfTI magic is missing (Analyze file?); convert the scan to NIfTI")


def _offset(value: float, version: int, where: str) -> int:
    low = 352 if version == 1 else 544
    if not math.isfinite(value) or value != int(value) or not low <= value <= MAX_OFFSET:
        raise InputError(
            f"{where}: vox_offset is {value}; allowed: whole numbers from {low} to {MAX_OFFSET}, export it again"
        )
    return int(value)


def _spacing(pixdim: NDArray[np.floating], where: str) -> tuple[float, float, float]:
    x, y, z = (float(p) for p in pixdim[1:4])
    if not all(MIN_SPACING_MM <= p <= MAX_SPACING_MM for p in (x, y, z)):  # false for NaN
        raise InputError(
            f"{where}: voxel size {(x, y, z)} mm; allowed: {MIN_SPACING_MM:g} to {MAX_SPACING_MM:g}, correct pixdim"
        )
    return x, y, z


def _affine(fields: np.void, spacing: tuple[float, float, float], where: str) -> NDArray[np.float64]:
    """(4, 4) of the best form; checked to be finite, to agree with pixdim, and to be invertible."""
    if int(fields["sform_code"]) > 0:
        name, affine = "sform", _sform(fields)
        if int(fields["qform_code"]) > 0:
            _qform(fields, spacing, where)  # it will be copied to the mask, so that it must make sense too
    elif int(fields["qform_code"]) > 0:
        name, affine = "qform", _qform(fields, spacing, where)
    else:
        raise InputError(
            f"{where}: neither qform nor sform is set, so that left and right are unknown; set one in the header"
        )
    if not np.isfinite(affine).all():
        raise InputError(f"{where}: the {name} holds NaN or infinity; correct the header")
    if np.abs(affine).max() > MAX_POSITION_MM:
        raise InputError(f"{where}: the {name} holds numbers above {MAX_POSITION_MM:g} mm; correct the header")
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    if np.abs(sizes - spacing).max() > SPACING_TOLERANCE_MM:
        given, affines = (tuple(round(float(v), 4) for v in values) for values in (spacing, sizes))
        raise InputError(
            f"{where}: pixdim {given} mm and the {name}'s {affines} mm differ; correct the wrong one in the header"
        )
    if abs(np.linalg.det(affine[:3, :3] / sizes)) < MIN_SINE:
        raise InputError(f"{where}: the {name} is singular (two axes run in one direction); correct the header")
    return affine


def _sform(fields: np.void) -> NDArray[np.float64]:
    rows = [fields["srow_x"], fields["srow_y"], fields["srow_z"], [0, 0, 0, 1]]
    return np.array(rows, dtype=np.float64)


def _qform(fields: np.void, spacing: tuple[float, float, float], where: str) -> NDArray[np.float64]:
    """The NIfTI standard's method 2: a rotation from the quaternion b, c, d, then pixdim, then the offset."""
    bcd = np.array([fields["quatern_b"], fields["quatern_c"], fields["quatern_d"]], dtype=np.float64)
    offset = np.array([fields["qoffset_x"], fields["qoffset_y"], fields["qoffset_z"]], dtype=np.float64)
    handedness = float(fields["pixdim"][0])
    if not (np.isfinite(bcd).all() and np.isfinite(offset).all() and math.isfinite(handedness)):
        raise InputError(f"{where}: the qform holds NaN or infinity; correct the header")
    tolerance = 3 * np.finfo(np.float32).eps
    if np.abs(bcd).max() > 2 or bcd @ bcd >= 1 + tolerance:  # the first keeps the second from overflowing
        raise InputError(f"{where}: the qform's quaternion {tuple(bcd.tolist())} is longer than 1; correct the header")
    affine = np.eye(4)
    affine[:3, :3] = quat2mat(fillpositive(bcd, tolerance)) * spacing
    if handedness < 0:
        affine[:3, 2] *= -1
    affine[:3, 3] = offset
    return affine


def _scaling(slope: float, intercept: float, where: str) -> tuple[float, float]:
    if slope == 0 or math.isnan(slope):
        return 1.0, 0.0  # the standard's "no scaling"; some writers say it by NaN
    if not (math.isfinite(slope) and math.isfinite(intercept)):
        raise InputError(
            f"{where}: scl_slope {slope}, scl_inter {intercept}; finite numbers are needed, correct the header"
        )
    return slope, intercept
