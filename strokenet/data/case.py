"""Case: the scans of one examination on one grid, with their label if there is one.

Comes in: paths, nibabel images or arrays with an affine. Goes out: a Case whose channels and label lie on the same
voxels, checked in millimetres at the eight corners. Nothing is resampled here and nothing is believed by warning:
grids that differ are refused with the numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from strokenet.data.errors import InputError
from strokenet.data.geometry import Geometry, corner_distance_mm
from strokenet.data.nifti import Header, Volume, geometry_of, parse_header, read_volume

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
    volumes = _one_after_another(case_id, channels)
    truth = None if label is None else read_label(label, labels)
    if truth is not None:
        first = next(iter(channels.values()))
        _check_grid(case_id, f"label ({label})", truth.geometry, f"image ({first})", volumes[2])
    image, header, geometry = volumes
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
    """
    volumes = {name: _volume(f"{case_id}: {name}", image) for name, image in images.items()}
    first_name, first = next(iter(volumes.items()))
    for name, volume in volumes.items():
        _check_grid(case_id, name, volume.geometry, first_name, first.geometry)
    array = None
    if label is not None:
        truth = _volume(f"{case_id}: label", label)
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


def _one_after_another(case_id: str, channels: Mapping[str, Path]) -> tuple[NDArray[np.float32], Header, Geometry]:
    """All channels, read into one array so that no more than one scan is held twice."""
    if not channels:
        raise InputError(f"{case_id}: no channel given; at least one scan is needed")
    (_, first_path), *others = channels.items()
    first = read_volume(first_path)
    if not others:
        return first.array[None], first.header, first.geometry
    image = np.empty((len(channels), *first.array.shape), np.float32)
    image[0] = first.array
    for index, (name, path) in enumerate(others, start=1):
        volume = read_volume(path)
        _check_grid(
            case_id, f"{name} ({path})", volume.geometry, f"{next(iter(channels))} ({first_path})", first.geometry
        )
        image[index] = volume.array
    return image, first.header, first.geometry


def _check_grid(case_id: str, name: str, geometry: Geometry, of_name: str, of: Geometry) -> None:
    if geometry.shape != of.shape:
        raise InputError(
            f"{case_id}: grid of {name}, {_ijk(geometry)} voxels, differs from {of_name}, {_ijk(of)}; "
            "resample one to the other or leave the case out"
        )
    distance = corner_distance_mm(geometry, of)
    if distance >= CORNER_TOLERANCE_MM:
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
        raise InputError(f"{where}: label values {_listed(off)} are no integers; a label map of integers is needed")
    unknown = [value for value in rounded.tolist() if value not in allowed]
    if unknown == [255] and allowed == {0, 1} and not (rounded == 1).any():
        _log.info("%s: 255 is taken as the lesion label 1", where)
        return (array > 127).astype(np.int16)
    if unknown:
        names = "0 to 255" if labels is None else ", ".join(f"{value} ({name})" for name, value in labels.items())
        raise InputError(f"{where}: label values {_listed(np.array(unknown))} are unknown; allowed: {names}")
    return np.rint(array).astype(np.int16)


def _distinct(array: NDArray[np.float32]) -> NDArray[np.float32]:
    """The distinct values of a map that mostly holds zeros, ascending."""
    values = np.unique(array[array != 0])
    return values if len(values) and array.all() else np.union1d(values, np.float32(0))


def _listed(values: NDArray[np.floating[Any]]) -> str:
    shown = ", ".join(f"{value:g}" for value in values[:5])
    return f"{shown} and {len(values) - 5} more" if len(values) > 5 else shown


def _volume(where: str, image: Any) -> Volume:
    if isinstance(image, str | Path):
        return read_volume(Path(image))
    if isinstance(image, tuple):
        array, affine = image
        image = nibabel.Nifti1Image(np.asarray(array, dtype=np.float32), affine)
    array = np.asarray(image.dataobj, dtype=np.float32)
    array = array.reshape(array.shape[:3]) if array.ndim > 3 and array.size == np.prod(array.shape[:3]) else array
    if array.ndim != 3:
        raise InputError(f"{where}: {array.ndim}-D array of shape {array.shape}; one 3-D volume is needed")
    if not np.isfinite(array).all():
        raise InputError(f"{where}: holds NaN or infinity; replace them before")
    header = _header_of(where, array, image)
    volume = np.ascontiguousarray(array.transpose(2, 1, 0))  # (i, j, k) -> (D, H, W)
    return Volume(array=volume, geometry=geometry_of(header), header=header)


def _header_of(where: str, array: NDArray[np.float32], image: Any) -> Header:
    """The header a file of this image would have; forms and units of a NIfTI image are kept."""
    own = image.header if isinstance(image, nibabel.Nifti1Image) and array.ndim == len(image.shape) else None
    copy = nibabel.Nifti1Image(array, image.affine, own)  # Nifti2Image is a Nifti1Image: its header is converted
    copy.set_data_dtype(np.float32)
    header = copy.header.copy()
    header["vox_offset"], header["magic"] = 352, b"n+1"
    header["scl_slope"], header["scl_inter"] = 1, 0
    return parse_header(header.binaryblock + b"\0\0\0\0", where)
