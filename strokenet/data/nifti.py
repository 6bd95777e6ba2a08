"""NIfTI: the bounded reader and the writer. The only place that turns NIfTI's i, j, k axes into the house's D, H, W.

A scan comes from a stranger, so that nothing is allocated, decompressed or believed before it was checked: the file,
its size, 352 or 544 bytes of header, every field that matters, and only then exactly the declared voxels, a short tail
and the gzip checksum. nibabel and SimpleITK both return a scan with a flipped bit, and SimpleITK a truncated one.
Comes in: a path. Goes out: float32 voxels, their Geometry, and the Header that the mask will be written with.
"""

from __future__ import annotations

import logging
import stat
import struct
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from isal import igzip, igzip_lib, isal_zlib
from nibabel.nifti1 import Nifti1Header
from numpy.typing import NDArray

from strokenet.data.errors import InputError
from strokenet.data.files import replacing
from strokenet.data.geometry import Geometry
from strokenet.data.header import DTYPES, MAX_VOXELS, layout_of, parse_header
from strokenet.data.header import Header as Header  # what a Volume carries, for those who only read

MAX_TAIL = 64 * 2**10  # bytes after the voxels that are read on to reach the checksum
MAX_DEFLATE = 1032  # deflate cannot shrink by more: a smaller file cannot hold what its header declares
VERIFY_FIRST = 64 * 2**20  # larger voxel blocks are decompressed once for the checksum alone, before memory is taken
MAX_NONFINITE = 0.01  # share of NaN and infinite voxels that is zeroed with a warning
MASK, FLOAT32 = 2, 16  # datatype codes of what is written
_CHUNK = 2**20
# a gzip header of more than 512 KiB (a name without end) is an OverflowError; the stubs call IsalError an instance
_GZIP_ERRORS: Any = (igzip_lib.IsalError, OSError, OverflowError)
_log = logging.getLogger("strokenet")


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


def header_of(geometry: Geometry) -> Header:
    """A NIfTI-1 header of a grid that no file came with: both forms set, in scanner space and mm."""
    affine = geometry.affine[:, [2, 1, 0, 3]]  # (d, h, w) -> (i, j, k)
    header = Nifti1Header()
    header.set_data_dtype(np.float32)
    header.set_data_shape(geometry.shape[::-1])
    header.set_qform(affine, code="scanner")  # sets pixdim, too
    header.set_sform(affine, code="scanner")
    header.set_xyzt_units("mm")
    return single_file_header(header, "grid")


def single_file_header(header: Nifti1Header, where: str) -> Header:
    """The checked header of a .nii that this nibabel header describes; its values are stored as they are.

    Raises:
        InputError: beginning with `where`.
    """
    header["sizeof_hdr"], header["magic"] = header.sizeof_hdr, header.single_magic
    header["vox_offset"] = header.single_vox_offset
    header["scl_slope"], header["scl_inter"] = 1, 0
    return parse_header(header.binaryblock + b"\0\0\0\0", where)


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
    header = read_header(path, max_voxels=max_voxels)
    if _compressed(path) and header.data_bytes > VERIFY_FIRST:
        _read_body(path, header, None)
    stored = np.empty(header.data_bytes, np.uint8)
    _read_body(path, header, stored.data)
    i, j, k = header.shape
    array = _scaled(stored.view(header.dtype).reshape(k, j, i), header)  # i runs fastest on disk
    zero_nonfinite(str(path), array, max_nonfinite)
    return Volume(array=array, geometry=geometry_of(header), header=header)


def write_mask(path: Path, mask: NDArray[np.uint8], reference: Header) -> None:
    """A mask (D, H, W) uint8 on the reference's grid, atomically; compressed where the name ends in .gz."""
    _write(path, mask, reference, MASK)


def write_image(path: Path, image: NDArray[np.float32], reference: Header) -> None:
    """A scan (D, H, W) float32 on the reference's grid, atomically."""
    _write(path, image, reference, FLOAT32)


def write_probability(path: Path, probability: NDArray[np.float32], reference: Header) -> None:
    """A probability map (D, H, W) float32 on the reference's grid, atomically."""
    _write(path, probability, reference, FLOAT32)


def zero_nonfinite(where: str, array: NDArray[np.float32], max_share: float = MAX_NONFINITE) -> None:
    """Sets NaN and infinity to 0, in place, and warns how many there were.

    Raises:
        InputError: beginning with `where`; more than max_share of the voxels are not finite.
    """
    finite = np.isfinite(array)
    bad = array.size - int(np.count_nonzero(finite))
    if not bad:
        return
    share = f"{bad} of {array.size} voxels are NaN or infinite"
    if bad > max_share * array.size:
        allowed = f"allowed: up to {max_share:.0%}" if max_share else "none is allowed here"
        raise InputError(f"{where}: {share}; {allowed}, mend the scan or leave it out")
    _log.warning("%s: %s; they are set to 0", where, share)
    np.copyto(array, 0, where=~finite)


def _compressed(path: Path) -> bool:
    return path.name.endswith(".gz")


def _open(path: Path) -> IO[bytes]:
    """The bytes of the scan, decompressed; refused before a byte is read where this can be no scan."""
    if not path.name.endswith((".nii", ".nii.gz")):
        raise InputError(f"{path}: is no .nii or .nii.gz file; convert it (DICOM: dcm2niix)")
    try:
        status = path.stat()
    except FileNotFoundError:
        raise InputError(f"{path}: not found; check the path") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be opened ({error.strerror}); check the path and its permissions") from None
    except ValueError as error:  # a zero byte or half a surrogate in the name
        raise InputError(f"{path}: cannot be a file's name ({error}); check the path") from None
    if not stat.S_ISREG(status.st_mode):  # a pipe would block, a device never end
        raise InputError(f"{path}: is no regular file; give the path of a .nii or .nii.gz file")
    if status.st_size < 20:
        raise InputError(f"{path}: {status.st_size} bytes are no scan; copy or export the file again")
    return _stream(path)


def _stream(path: Path) -> IO[bytes]:
    try:
        with path.open("rb") as file:
            start = file.read(2)
        if not _compressed(path):
            return path.open("rb")
        if start != b"\x1f\x8b":
            raise InputError(f"{path}: ends in .gz but is not gzip data; rename it to .nii or compress it")
        stream: IO[bytes] = igzip.open(path, "rb")
        return stream
    except OSError as error:
        raise InputError(f"{path}: cannot be opened ({error.strerror}); check the path and its permissions") from None


def _header(path: Path, stream: IO[bytes], max_voxels: int) -> Header:
    """The header at the start of the stream, and whether the file is large enough for what it declares."""
    size = path.stat().st_size
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
        raise InputError(_corrupt(path, error)) from None


def _corrupt(path: Path, error: Exception) -> str:
    if "Not a gzipped file" in str(error):  # the first member was one: checked when the file was opened
        return f"{path}: corrupt (other bytes follow the gzip data); copy or export the file again"
    return f"{path}: corrupt ({error}); copy or export the file again"


def _read_body(path: Path, header: Header, target: memoryview | None) -> None:
    """All after the header: extensions, the voxel block into target (None: thrown away), the tail and the checksum."""
    with closing(_open(path)) as stream:
        if _read_exactly(path, stream, len(header.raw)) != header.raw:
            raise InputError(f"{path}: changed while it was read; read it again")
        scratch = memoryview(bytearray(_CHUNK))
        _skip(path, stream, header.offset - len(header.raw), scratch)
        if target is None:
            _skip(path, stream, header.data_bytes, scratch)
        else:
            _fill(path, stream, target)
        _read_tail(path, stream)


def _read_tail(path: Path, stream: IO[bytes]) -> None:
    """Reads on to the end, with which the gzip checksum is compared."""
    left = MAX_TAIL + 1
    try:
        while left > 0 and (count := len(stream.read(left))):
            left -= count
    except EOFError:
        raise InputError(f"{path}: truncated, the gzip trailer is missing; copy or export the file again") from None
    except _GZIP_ERRORS as error:
        raise InputError(_corrupt(path, error)) from None
    if left <= 0:
        raise InputError(_tail(path))


def _skip(path: Path, stream: IO[bytes], n: int, scratch: memoryview) -> None:
    while n > 0:
        part = scratch[: min(n, len(scratch))]
        _fill(path, stream, part)
        n -= len(part)


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

    layout = layout_of(reference.version, reference.byte_order)
    old = np.frombuffer(reference.raw, layout, count=1)
    new = np.zeros(1, layout)
    kept = ("sizeof_hdr", "pixdim", "xyzt_units", "magic", "qform_code", "sform_code", "srow_x", "srow_y", "srow_z")
    quaternion = ("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z")
    end_of_line = ("eol_check",) if reference.version == 2 else ()  # the second half of NIfTI-2's magic
    for name in (*kept, *quaternion, *end_of_line):
        new[name] = old[name]
    new["dim"][0] = [3, *reference.shape, 1, 1, 1, 1]
    new["datatype"], new["bitpix"] = datatype, 8 * np.dtype(DTYPES[datatype]).itemsize
    new["scl_slope"], new["cal_max"] = 1, 1
    new["descrip"] = f"strokenet {__version__}".encode()
    new["vox_offset"] = 352 if reference.version == 1 else 544
    return new.tobytes() + b"\0\0\0\0"
