"""Record: OUT/prepare/CASE.json, all that was done to a case, and the way back that it holds.

Comes in: geometries and transforms. Goes out: plain JSON, in nibabel's i, j, k order and RAS mm, so that a reader needs
no code of ours; and `to_native`, which carries a mask from the prepared grid to the grid of a scan as it was given.

A transform {"from": "flair", "to": "t1", "matrix": 4 x 4, row after row} maps a point (x, y, z, 1) in the flair scan's
world to the same anatomy in the t1 scan's world. Voxels of t1 are found from those of flair by it, not the reverse.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from strokenet.data.description import json_object
from strokenet.data.errors import InputError
from strokenet.data.files import read_json
from strokenet.data.geometry import Geometry
from strokenet.data.header import Header, parse_header
from strokenet.data.nifti import geometry_of
from strokenet.prepare.itk import Matrix, resample_label

FORMAT = 2  # of the record and of all that is cached: another one is not read, and the case is prepared again


def record_path(out: Path, case_id: str) -> Path:
    """Where the record of a case lies."""
    return out / "prepare" / f"{case_id}.json"


def geometry_to_json(geometry: Geometry) -> dict[str, Any]:
    """shape, spacing_mm and affine in i, j, k order."""
    return {
        "shape": list(geometry.shape[::-1]),
        "spacing_mm": list(geometry.spacing[::-1]),
        "affine": geometry.affine[:, [2, 1, 0, 3]].tolist(),
    }


def geometry_from_json(fields: Any) -> Geometry:
    """The inverse of geometry_to_json; KeyError, TypeError or ValueError for anything else."""
    i, j, k = (int(n) for n in fields["shape"])
    x, y, z = (float(mm) for mm in fields["spacing_mm"])
    affine = np.asarray(fields["affine"], dtype=np.float64).reshape(4, 4)
    return Geometry(shape=(k, j, i), spacing=(z, y, x), affine=affine[:, [2, 1, 0, 3]])


def header_to_json(header: Header) -> str:
    """The bytes of the header, NIfTI-1 or -2, in base 64: its two forms and their codes, as the scanner set them."""
    return base64.b64encode(header.raw).decode("ascii")


def transform_to_json(source: str, target: str, matrix: Matrix) -> dict[str, Any]:
    """A transform that maps points of the source's world to the target's."""
    return {"from": source, "to": target, "matrix": matrix.tolist()}


def read_record(path: Path) -> dict[str, Any]:
    """The record of a case.

    Raises:
        InputError: it is missing or was not written by prepare.
    """
    record = json_object(read_json(path), str(path))
    if record.get("format") != FORMAT or not {"grid", "inputs", "transforms", "reference"} <= record.keys():
        raise InputError(f"{path}: is no record of `strokenet prepare`; prepare the case again")
    return record


def native_name(record: Mapping[str, Any], scan: str | None) -> str:
    """The scan whose grid is meant: the named one, or the reference.

    Raises:
        InputError: the case has no such scan.
    """
    name = scan or str(record["reference"])
    if name not in record["inputs"]:
        there = ", ".join(record["inputs"])
        raise InputError(f"record of {record.get('case')}: has no scan {name!r}; there are {there}: name one of them")
    return name


def to_native(
    mask: NDArray[np.integer], record: dict[str, Any], scan: str | None = None
) -> tuple[NDArray[np.uint8], Header]:
    """A mask on the prepared grid, carried to the grid of a scan as it was given.

    Each label goes by its linearly interpolated indicator, at least one half: on the reference's own voxels exact.

    Args:
        mask: (D, H, W), of the shape of the prepared images. record: of read_record. scan: "t1", "flair_2" ...; None:
            the reference.

    Returns:
        (D, H, W) uint8 in the stored order of the scan, and the header that the scan came with.

    Raises:
        InputError: the case has no such scan, the record is damaged, or the mask lies on another grid.
    """
    name, where = native_name(record, scan), f"record of {record.get('case')}"
    try:
        grid = geometry_from_json(record["grid"])
        header = parse_header(base64.b64decode(record["inputs"][name]["header"], validate=True), where)
        native = geometry_of(header)
        matrix = np.asarray(record["transforms"][name]["matrix"], dtype=np.float64).reshape(4, 4)
        back: Matrix = np.linalg.inv(matrix).astype(np.float64)  # native world -> reference world
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{where}: cannot be read ({error}); prepare the case again") from None
    if mask.shape != grid.shape:
        raise InputError(f"{where}: mask {mask.shape} lies not on the prepared grid {grid.shape}; give its own mask")
    carried = resample_label(mask.astype(np.int16), grid, native, back)
    return carried.astype(np.uint8), header
