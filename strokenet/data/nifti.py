"""NIfTI: the bounded reader and the writer. The only place that turns NIfTI's i, j, k axes into the house's D, H, W.

A scan comes from a stranger, so that nothing is allocated, decompressed or believed before it was checked: the file,
its size, 352 or 544 bytes of header, every field that matters, and only then exactly the declared voxels, a short tail
and the gzip checksum. nibabel and SimpleITK both return a scan with a flipped bit, and SimpleITK a truncated one.
Comes in: a path. Goes out: float32 voxels, their Geometry, and the Header that the mask will be written with.
"""

from __future__ import annotations

import logging
import math
import stat
import struct
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from isal import igzip, igzip_lib, isal_zlib
from nibabel.nifti1 import header_dtype as HEADER_1
from nibabel.nifti2 import header_dtype as HEADER_2
from nibabel.quaternions import fillpositive, quat2mat
from numpy.typing import NDArray

from strokenet.data.errors import InputError
from strokenet.data.files import replacing
from strokenet.data.geometry import Geometry

MAX_EDGE = 2048
MAX_VOXELS = 2**28  # 1 GB as float32
MAX_OFFSET = 16 * 2**20  # header extensions beyond it are refused
MAX_TAIL = 64 * 2**10  # bytes after the voxels that are read on to reach the checksum
MAX_DEFLATE = 1032  # deflate cannot shrink by more: a smaller file cannot hold what its header declares
VERIFY_FIRST = 64 * 2**20  # larger voxel blocks are decompressed once for the checksum alone, before memory is taken
MAX_NONFINITE = 0.01  # share of NaN and infinite voxels that is zeroed with a warning
MIN_SPACING_MM, MAX_SPACING_MM = 0.01, 50.0
SPACING_TOLERANCE_MM = 1e-3
MIN_SINE = 1e-3  # volume of the affine's unit columns: 1 is orthogonal, below this it is singular

DTYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
REFUSED_DTYPES = {0: "unknown", 1: "binary", 32: "complex", 128: "RGB", 1536: "float128", 1792: "complex128"} | {
    2048: "complex256",
    2304: "RGBA",
}
MASK, PROBABILITY = 2, 16  # datatype codes of what is written
_CHUNK = 2**20
_GZIP_ERRORS: Any = (igzip_lib.IsalError, OSError)  # the stubs call IsalError an instance
_log = logging.getLogger("strokenet")


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


@dataclass(frozen=True, kw_only=True, eq=False)
class Volume:
    """One scan: array (D, H, W) float32, scaled; where it lies; and the header it came with."""

    array: NDArray[np.float32]
    geometry: Geometry
    header: Header


def geometry_of(header: Header) -> Geometry:
    """Shape, spacing and affine in the house's order D, H, W = k, j, i."""
    i, j, k = header.shape
    x, y, z = header.spacing
    affine = np.vstack([header.affine_rows, [0.0, 0.0, 0.0, 1.0]])
    return Geometry(shape=(k, j, i), spacing=(z, y, x), affine=affine[:, [2, 1, 0, 3]])


def read_header(path: Path, *, max_voxels: int = MAX_VOXELS) -> Header:
    """The checked header of a .nii or .nii.gz; no voxel is read.

    Raises:
        InputError: whatever is wrong with the file, its header, or its size for what the header declares.
    """
    with closing(_open(path)) as stream:
        return _header(path, stream, max_voxels)


def read_volume(path: Path, *, max_voxels: int = MAX_VOXELS, max_nonfinite: float = MAX_NONFINITE) -> Volume:
    """One 3-D scan, every byte of it checked.

    Args:
        path: .nii or .nii.gz, NIfTI-1 or -2, either byte order, integers or floats; trailing axes of 1 are dropped.
        max_voxels: larger scans are refused. max_nonfinite: share of NaN or infinite voxels that become 0 (a warning
            tells how many); more is an error.

    Raises:
        InputError: one line with the file, the reason and the mend. Nothing larger than the scan was allocated.
    """
    with closing(_open(path)) as stream:
        header = _header(path, stream, max_voxels)
        if _compressed(path) and header.data_bytes > VERIFY_FIRST:
            _read_data(path, stream, header, None)
            stream.close()
            stream = _open(path)
            _read_exactly(path, stream, len(header.raw))
        stored = np.empty(header.data_bytes, np.uint8)
        _read_data(path, stream, header, stored.data)
    i, j, k = header.shape
    array = _scaled(stored.view(header.dtype).reshape(k, j, i), header)  # i runs fastest on disk
    return Volume(array=_finite(path, array, max_nonfinite), geometry=geometry_of(header), header=header)


def write_mask(path: Path, mask: NDArray[np.uint8], reference: Header) -> None:
    """A mask (D, H, W) uint8 on the reference's grid, atomically; compressed where the name ends in .gz."""
    _write(path, mask, reference, MASK)


def write_probability(path: Path, probability: NDArray[np.float32], reference: Header) -> None:
    """A probability map (D, H, W) float32 on the reference's grid, atomically."""
    _write(path, probability, reference, PROBABILITY)


def parse_header(raw: bytes, where: str, *, max_voxels: int = MAX_VOXELS) -> Header:
    """The checked header of 348 (NIfTI-1) or 540 (NIfTI-2) bytes or more.

    Raises:
        InputError: beginning with `where`.
    """
    version, byte_order = _version(raw, where)
    layout = (HEADER_1 if version == 1 else HEADER_2).newbyteorder(byte_order)
    fields = np.frombuffer(raw, layout, count=1)[0]
    shape = _shape(fields["dim"], where, max_voxels)
    datatype = _datatype(fields, where)
    _check_magic(bytes(fields["magic"]), version, where)
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


def _compressed(path: Path) -> bool:
    return path.name.endswith(".gz")


def _open(path: Path) -> IO[bytes]:
    if not path.name.endswith((".nii", ".nii.gz")):
        raise InputError(f"{path}: is no .nii or .nii.gz file; convert it (DICOM: dcm2niix)")
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise InputError(f"{path}: is no regular file; give the path of a .nii or .nii.gz file")
        return igzip.open(path, "rb") if _compressed(path) else path.open("rb")
    except FileNotFoundError:
        raise InputError(f"{path}: not found") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be opened ({error.strerror}); check the path and its permissions") from None


def _header(path: Path, stream: IO[bytes], max_voxels: int) -> Header:
    size = path.stat().st_size
    if size < 20:
        raise InputError(f"{path}: {size} bytes are no scan; copy or export the file again")
    start = _read_exactly(path, stream, 352)
    long = struct.pack("<i", 540), struct.pack(">i", 540)
    raw = start + _read_exactly(path, stream, 544 - 352) if start[:4] in long else start
    header = parse_header(raw, str(path), max_voxels=max_voxels)
    declared = header.offset + header.data_bytes
    at_most = size * MAX_DEFLATE if _compressed(path) else size
    if declared > at_most:
        raise InputError(
            f"{path}: truncated, {header.shape} voxels of {header.dtype.name} need {declared} bytes and {size} bytes "
            f"{'of gzip cannot hold them' if _compressed(path) else 'are there'}; copy or export the file again"
        )
    if not _compressed(path) and size > declared + MAX_TAIL:
        raise InputError(_tail(path))
    return header


def _tail(path: Path) -> str:
    return f"{path}: more than {MAX_TAIL // 1024} KiB follow the voxels that the header declares; export it again"


def _read_exactly(path: Path, stream: IO[bytes], n: int) -> bytes:
    buffer = bytearray(n)
    _fill(path, stream, memoryview(buffer))
    return bytes(buffer)


def _fill(path: Path, stream: IO[bytes], buffer: memoryview) -> None:
    """Fills the buffer or raises: a stream that ends early is a truncated file."""
    done = 0
    try:
        while done < len(buffer):
            count = stream.readinto(buffer[done : done + _CHUNK])  # type: ignore[attr-defined]
            if not count:
                raise EOFError
            done += count
    except EOFError:
        raise InputError(f"{path}: truncated, the data ends early; copy or export the file again") from None
    except _GZIP_ERRORS as error:
        raise InputError(_bad_gzip(path, error)) from None


def _bad_gzip(path: Path, error: Exception) -> str:
    if "Not a gzipped file" in str(error):
        return f"{path}: ends in .gz but is not gzip data; rename it to .nii or compress it"
    return f"{path}: corrupt ({error}); copy or export the file again"


def _read_data(path: Path, stream: IO[bytes], header: Header, target: memoryview | None) -> None:
    """Extensions, the voxel block into target (None: thrown away), the tail, and with it the gzip checksum."""
    scratch = memoryview(bytearray(_CHUNK))
    _skip(path, stream, header.offset - len(header.raw), scratch)
    if target is None:
        _skip(path, stream, header.data_bytes, scratch)
    else:
        _fill(path, stream, target)
    left = MAX_TAIL + 1
    try:
        while left > 0 and (count := len(stream.read(left))):
            left -= count
    except EOFError:
        raise InputError(f"{path}: truncated, the gzip trailer is missing; copy or export the file again") from None
    except _GZIP_ERRORS as error:
        raise InputError(_bad_gzip(path, error)) from None
    if left <= 0:
        raise InputError(_tail(path))


def _skip(path: Path, stream: IO[bytes], n: int, scratch: memoryview) -> None:
    while n > 0:
        part = scratch[: min(n, len(scratch))]
        _fill(path, stream, part)
        n -= len(part)


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
        raise InputError(f"{where}: header declares {axes} axes; 3 are needed")
    if axes < 3:
        raise InputError(f"{where}: a {axes}-D image; 2d is not supported, a 3-D volume is needed")
    i, j, k, *rest = (int(n) for n in dim[1 : axes + 1])
    if not all(1 <= n <= MAX_EDGE for n in (i, j, k)):
        raise InputError(f"{where}: header declares {(i, j, k)} voxels; allowed: 1 to {MAX_EDGE} an axis")
    if any(n != 1 for n in rest):
        raise InputError(
            f"{where}: {axes}-D, header declares {(i, j, k, *rest)}; one 3-D volume is needed, "
            "take one out (fslsplit, or nibabel's slicer)"
        )
    if i * j * k > max_voxels:
        raise InputError(f"{where}: header declares {(i, j, k)}, {i * j * k} voxels; allowed: up to {max_voxels}")
    return i, j, k


def _datatype(fields: np.void, where: str) -> int:
    code, bits = int(fields["datatype"]), int(fields["bitpix"])
    if code not in DTYPES:
        name = REFUSED_DTYPES.get(code, "unknown")
        raise InputError(f"{where}: datatype {code} ({name}); integers of 8 to 64 bits, float32 and float64 are read")
    if bits != 8 * np.dtype(DTYPES[code]).itemsize:
        raise InputError(f"{where}: datatype {code} with {bits} bits a voxel contradict each other; export it again")
    return code


def _check_magic(magic: bytes, version: int, where: str) -> None:
    # numpy drops the zero bytes at the end of a bytes field
    wanted = b"n+1" if version == 1 else b"n+2\0\r\n\x1a\n"
    if magic.rstrip(b"\0") == wanted:
        return
    if magic[:3] in (b"ni1", b"ni2"):
        raise InputError(f"{where}: header of a .hdr/.img pair; convert it to a single .nii file")
    raise InputError(f"{where}: NIfTI magic is missing (Analyze file?); convert the scan to NIfTI")


def _offset(value: float, version: int, where: str) -> int:
    low = 352 if version == 1 else 544
    if not math.isfinite(value) or value != int(value) or not low <= value <= MAX_OFFSET:
        raise InputError(f"{where}: vox_offset is {value}; allowed: {low} to {MAX_OFFSET}")
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
    if bcd @ bcd > 1 + tolerance:
        raise InputError(f"{where}: the qform's quaternion {tuple(bcd)} is longer than 1; correct the header")
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
        raise InputError(f"{where}: scl_slope {slope}, scl_inter {intercept}; finite numbers are needed")
    return slope, intercept


def _scaled(stored: NDArray[np.generic], header: Header) -> NDArray[np.float32]:
    """(D, H, W) -> (D, H, W) float32: slope and intercept applied in float64, slice by slice."""
    if header.slope == 1 and header.intercept == 0:
        with np.errstate(over="ignore", invalid="ignore"):
            return stored.astype(np.float32, copy=False)
    array = np.empty(stored.shape, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for from_slice, to_slice in zip(stored, array, strict=True):
            to_slice[...] = from_slice.astype(np.float64) * header.slope + header.intercept
    return array


def _finite(path: Path, array: NDArray[np.float32], max_nonfinite: float) -> NDArray[np.float32]:
    finite = np.isfinite(array)
    bad = array.size - int(np.count_nonzero(finite))
    if not bad:
        return array
    share = f"{bad} of {array.size} voxels are NaN or infinite"
    if bad > max_nonfinite * array.size:
        allowed = f"allowed: up to {max_nonfinite:.0%}" if max_nonfinite else "none is allowed here"
        raise InputError(f"{path}: {share}; {allowed}, mend the scan or leave it out")
    _log.warning("%s: %s; they are set to 0", path, share)
    return np.where(finite, array, np.float32(0))


def _write(path: Path, array: NDArray[np.generic], reference: Header, datatype: int) -> None:
    if array.shape != reference.shape[::-1] or array.dtype != np.dtype(DTYPES[datatype]):
        raise ValueError(
            f"{path}: array {array.shape} {array.dtype}; {reference.shape[::-1]} {DTYPES[datatype]} is needed"
        )
    header = _header_for(reference, datatype)
    content = np.ascontiguousarray(array, dtype=reference.byte_order + DTYPES[datatype]).data
    with replacing(path) as temporary, temporary.open("wb") as file:
        if not _compressed(path):
            file.write(header)
            file.write(content)
            return
        packer = isal_zlib.compressobj(level=2, wbits=31)  # a gzip header with time 0: equal masks are equal files
        file.write(packer.compress(header))
        file.write(packer.compress(content))
        file.write(packer.flush())


def _header_for(reference: Header, datatype: int) -> bytes:
    """The reference's grid (qform, sform, codes, units: bit for bit) and nothing else of it: a header may hold names
    and dates of a patient. Four zero bytes at the end: no extensions."""
    from strokenet import __version__

    layout = (HEADER_1 if reference.version == 1 else HEADER_2).newbyteorder(reference.byte_order)
    old = np.frombuffer(reference.raw, layout, count=1)
    new = np.zeros(1, layout)
    kept = ("sizeof_hdr", "pixdim", "xyzt_units", "magic", "qform_code", "sform_code", "srow_x", "srow_y", "srow_z")
    quaternion = ("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z")
    for name in (*kept, *quaternion):
        new[name] = old[name]
    new["dim"][0] = [3, *reference.shape, 1, 1, 1, 1]
    new["datatype"], new["bitpix"] = datatype, 8 * np.dtype(DTYPES[datatype]).itemsize
    new["scl_slope"], new["cal_max"] = 1, 1
    new["descrip"] = f"strokenet {__version__}".encode()
    new["vox_offset"] = 352 if reference.version == 1 else 544
    return new.tobytes() + b"\0\0\0\0"
