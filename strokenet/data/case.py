"""Case: the scans of one examination on one grid, with their label if there is one.

Comes in: paths, nibabel images or arrays with an affine. Goes out: a Case whose channels and label lie on the same
voxels, checked in millimetres at the eight corners. Nothing is resampled here and nothing is believed by warning:
grids that differ are refused with the numbers.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.nifti1 import Nifti1Header, Nifti1Image
from nibabel.spatialimages import HeaderDataError, SpatialImage
from numpy.linalg import LinAlgError
from numpy.typing import NDArray

from strokenet.data.errors import InputError
from strokenet.data.geometry import Geometry, corner_distance_mm
from strokenet.data.header import Header
from strokenet.data.nifti import (
    MAX_NONFINITE,
    Volume,
    geometry_of,
    read_volume,
    single_file_header,
    zero_nonfinite,
)

CORNER_TOLERANCE_MM = 1e-3
LABEL_TOLERANCE = 1e-3  # a resampled or scaled label may miss its integer by this much
_log = logging.getLogger("strokenet")


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """One examination.

    channels: names in the order of the image's first axis. image: (C, D, H, W) float32.
    label: (D, H, W) int16, or None. geometry, header: of the first channel; masks are written on it.
    """

    case_id: str
    channels: tuple[str, ...]
    image: NDArray[np.float32]
    label: NDArray[np.int16] | None
    geometry: Geometry
    header: Header


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelMap:
    """array: (D, H, W) int16. geometry, header: as read."""

    array: NDArray[np.int16]
    geometry: Geometry
    header: Header


def read_case(
    case_id: str,
    channels: Mapping[str, Path],
    label: Path | None = None,
    labels: Mapping[str, int] | None = None,
) -> Case:
    """The case that these files hold.

    Args:
        channels: name -> file, in the order the network expects.
        label: the label map. labels: its name -> value, background included; None allows every value up to 255.

    Raises:
        InputError: a file cannot be used, or the grids differ.
    """
    image, geometry, header = _one_after_another(case_id, channels)
    truth = None if label is None else read_label(label, labels)
    if truth is not None:
        first = next(iter(channels.values()))
        _check_grid(case_id, f"label ({label})", truth.geometry, f"image ({first})", geometry)
    return Case(
        case_id=case_id,
        channels=tuple(channels),
        image=image,
        label=None if truth is None else truth.array,
        geometry=geometry,
        header=header,
    )


def read_label(path: Path, labels: Mapping[str, int] | None = None) -> LabelMap:
    """A label map of integers.

    Values within 1e-3 of an integer are rounded. A mask of 0 and 255 is taken as 0 and 1 where there is a single
    lesion label of value 1, and the log says so.

    Raises:
        InputError: the file cannot be used, or holds values that are no label.
    """
    volume = read_volume(path, max_nonfinite=0.0)
    return LabelMap(array=_label_values(path, volume.array, labels), geometry=volume.geometry, header=volume.header)


def case_from_images(
    case_id: str, images: Mapping[str, Any], label: Any = None, labels: Mapping[str, int] | None = None
) -> Case:
    """The case of images in memory: the same checks for the Python API.

    Args:
        images: name -> path, nibabel image, or (array (i, j, k), affine (4, 4)) in nibabel's axis order.
        label, labels: as in read_case; the label map may be given in the same three ways.

    Raises:
        InputError: an image cannot be used, or the grids differ.
    """
    if not images:
        raise InputError(f"{case_id}: no channel given; at least one scan is needed")
    volumes = {name: _volume(f"{case_id}: {name}", image, MAX_NONFINITE) for name, image in images.items()}
    first_name, first = next(iter(volumes.items()))
    for name, volume in volumes.items():
        _check_grid(case_id, name, volume.geometry, first_name, first.geometry)
    array = None
    if label is not None:
        truth = _volume(f"{case_id}: label", label, 0.0)
        _check_grid(case_id, "label", truth.geometry, first_name, first.geometry)
        array = _label_values(f"{case_id}: label", truth.array, labels)
    return Case(
        case_id=case_id,
        channels=tuple(images),
        image=np.stack([volume.array for volume in volumes.values()]),
        label=array,
        geometry=first.geometry,
        header=first.header,
    )


def with_channels(case: Case, channels: Sequence[str]) -> Case:
    """The case in these channels and this order; one that it lacks is an array of zeros."""
    image = np.zeros((len(channels), *case.geometry.shape), np.float32)
    for name, array in zip(case.channels, case.image, strict=True):
        image[list(channels).index(name)] = array
    return replace(case, channels=tuple(channels), image=image)


def _one_after_another(case_id: str, channels: Mapping[str, Path]) -> tuple[NDArray[np.float32], Geometry, Header]:
    """All channels, read into one array; beside it no more than one scan is held at a time."""
    if not channels:
        raise InputError(f"{case_id}: no channel given; at least one scan is needed")
    (first_name, first_path), *others = channels.items()
    first = read_volume(first_path)
    geometry, header = first.geometry, first.header
    if not others:
        return first.array[None], geometry, header
    image = np.empty((len(channels), *geometry.shape), np.float32)
    image[0] = first.array
    del first
    for index, (name, path) in enumerate(others, start=1):
        volume = read_volume(path)
        _check_grid(case_id, f"{name} ({path})", volume.geometry, f"{first_name} ({first_path})", geometry)
        image[index] = volume.array
        del volume
    return image, geometry, header


def _check_grid(case_id: str, name: str, geometry: Geometry, of_name: str, of: Geometry) -> None:
    if geometry.shape != of.shape:
        raise InputError(
            f"{case_id}: grid of {name}, {_ijk(geometry)} voxels, differs from {of_name}, {_ijk(of)}; "
            "resample one to the other or leave the case out"
        )
    distance = corner_distance_mm(geometry, of)
    if not distance < CORNER_TOLERANCE_MM:  # true for NaN
        raise InputError(
            f"{case_id}: grid of {name} lies up to {distance:.3g} mm away from {of_name} (allowed: below "
            f"{CORNER_TOLERANCE_MM:g}); resample one to the other or correct its header"
        )


def _ijk(geometry: Geometry) -> tuple[int, int, int]:
    k, j, i = geometry.shape
    return i, j, k


def _label_values(where: Path | str, array: NDArray[np.float32], labels: Mapping[str, int] | None) -> NDArray[np.int16]:
    allowed = set(range(256)) if labels is None else set(labels.values())
    found = _distinct(array)
    rounded = np.round(found)
    off = found[np.abs(found - rounded) > LABEL_TOLERANCE]
    if len(off):
        raise InputError(f"{where}: label values {_listed(off)} are no integers; round them or draw them again")
    unknown = [value for value in rounded.tolist() if value not in allowed]
    if unknown == [255] and allowed == {0, 1} and not (rounded == 1).any():
        _log.info("%s: 255 is taken as the lesion label 1", where)
        return (array > 127).astype(np.int16)
    if unknown:
        names = "0 to 255" if labels is None else ", ".join(f"{value} ({name})" for name, value in labels.items())
        raise InputError(
            f"{where}: label values {_listed(np.array(unknown))} are unknown; allowed: {names}, correct them"
        )
    return np.rint(array).astype(np.int16)


def _distinct(array: NDArray[np.float32]) -> NDArray[np.float32]:
    """The distinct values of a map that mostly holds zeros, ascending."""
    values = np.unique(array[array != 0])
    return values if len(values) and array.all() else np.union1d(values, np.float32(0))


def _listed(values: NDArray[np.floating[Any]]) -> str:
    shown = ", ".join(f"{value:g}" for value in values[:5])
    return f"{shown} and {len(values) - 5} more" if len(values) > 5 else shown


def _volume(where: str, image: Any, max_nonfinite: float) -> Volume:
    """A scan given as path, nibabel image or (array, affine), read by the rules of a file."""
    if isinstance(image, str | Path):
        return read_volume(Path(image), max_nonfinite=max_nonfinite)
    stored, affine, own = _in_memory(where, image)
    if stored.dtype.kind not in "buif" or stored.dtype.itemsize > 8:
        raise InputError(
            f"{where}: voxels of type {stored.dtype}; allowed: integers, float32, float64, convert the scan"
        )
    if stored.ndim < 3 or any(n != 1 for n in stored.shape[3:]):
        raise InputError(f"{where}: array of shape {stored.shape}; one 3-D volume is needed, take one out")
    with np.errstate(over="ignore"):
        array = stored.reshape(stored.shape[:3]).transpose(2, 1, 0)  # (i, j, k) -> (D, H, W)
        array = np.array(array, dtype=np.float32, order="C")  # a copy: the caller's array is not altered
    header = _header_of(where, array.shape[::-1], affine, own)
    zero_nonfinite(where, array, max_nonfinite)
    return Volume(array=array, geometry=geometry_of(header), header=header)


def _in_memory(where: str, image: Any) -> tuple[NDArray[Any], Any, Any]:
    """Array (i, j, k), scaled in float64 as in a file; affine (4, 4); header, None where there is none."""
    if isinstance(image, SpatialImage):
        own = image.header if isinstance(image, Nifti1Image) else None
        try:
            return np.asarray(image.dataobj), image.affine, own
        except (OSError, EOFError, zlib.error) as error:  # nibabel opens the file now
            raise InputError(f"{where}: voxels cannot be read ({error}); copy or export the file again") from None
    try:
        array, affine = image
        affine = np.array(affine, dtype=np.float64)
    except (TypeError, ValueError):
        kind = type(image).__name__
        raise InputError(f"{where}: got {kind}; give a path, a nibabel image, or (array, 4 x 4 affine)") from None
    if affine.shape != (4, 4) or not np.isfinite(affine).all():
        raise InputError(f"{where}: affine of shape {affine.shape} or with NaN; give 4 x 4 finite numbers in mm")
    return np.asarray(array), affine, None


def _header_of(where: str, shape: tuple[int, ...], affine: Any, own: Any) -> Header:
    """The header that a file of this image would have; version, forms and units of a NIfTI image are kept."""
    header = Nifti1Header() if own is None else own.copy()
    header.set_data_dtype(np.float32)
    try:
        header.set_data_shape(shape)
        moved = own is None or (affine is not None and not np.allclose(header.get_best_affine(), affine))
        with np.errstate(all="ignore"):  # NaN and giant numbers are refused by name below
            if moved:
                header.set_qform(affine, code="unknown")  # sets pixdim, too
                header.set_sform(affine, code="aligned")
    except (HeaderDataError, ValueError, LinAlgError) as error:
        raise InputError(f"{where}: shape {shape} and affine make no header ({error}); correct them") from None
    return single_file_header(header, where)
