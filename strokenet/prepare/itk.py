"""SimpleITK at arm's length: the only file where the house's D, H, W and RAS meet ITK's x, y, z and LPS.

Comes in: arrays (D, H, W) with their Geometry, and transforms as 4 x 4 matrices in RAS mm. Goes out: ITK images and
transforms, and back. ITK takes index (x, y, z) = (w, h, d), and its world runs to the left and to the back: x and y of
every point change their sign. SimpleITK is an extra (`strokenet[mri]`) and is imported on the first call.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from strokenet.data.errors import InputError
from strokenet.data.geometry import Geometry

Matrix = NDArray[np.float64]
Interpolation = Literal["linear", "cubic"]
_FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])  # RAS <-> LPS, its own inverse


def sitk() -> Any:
    """The module SimpleITK.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module("SimpleITK")
    except ImportError:
        raise InputError('SimpleITK is not installed; run `pip install "strokenet[mri]"`') from None


@contextmanager
def itk_threads(count: int) -> Iterator[None]:
    """ITK works in this many threads within the block.

    It is set for the process and set back: a filter's own number does not reach the filters that it uses inside, and
    the sums of several threads differ in the last digits from run to run.
    """
    process = sitk().ProcessObject
    before = process.GetGlobalDefaultNumberOfThreads()
    process.SetGlobalDefaultNumberOfThreads(count)
    try:
        yield
    finally:
        process.SetGlobalDefaultNumberOfThreads(before)


def to_image(array: NDArray[Any], geometry: Geometry) -> Any:
    """The ITK image of an array (D, H, W). The voxel sizes are those of the affine, so that no point moves.

    Raises:
        ValueError: the array has not the geometry's shape.
    """
    if array.shape != geometry.shape:
        raise ValueError(f"array {array.shape}; the geometry's shape {geometry.shape} is needed")
    image = sitk().GetImageFromArray(np.ascontiguousarray(array))
    affine = _FLIP @ geometry.affine[:, [2, 1, 0, 3]]  # (w, h, d, 1) -> LPS mm
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    image.SetSpacing(sizes.tolist())
    image.SetDirection((affine[:3, :3] / sizes).ravel().tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    return image


def to_array(image: Any) -> NDArray[np.float32]:
    """The voxels (D, H, W) of an ITK image, a copy: a view of an image that nobody holds is a view of freed memory."""
    return np.asarray(sitk().GetArrayFromImage(image), dtype=np.float32)


def to_transform(matrix: Matrix) -> Any:
    """The ITK transform of a 4 x 4 matrix in RAS mm; it maps the same points to the same points."""
    lps = _FLIP @ matrix @ _FLIP
    transform = sitk().AffineTransform(3)
    transform.SetMatrix(lps[:3, :3].ravel().tolist())
    transform.SetTranslation(lps[:3, 3].tolist())
    return transform


def to_matrix(transform: Any) -> Matrix:
    """The 4 x 4 matrix in RAS mm of an affine ITK transform: read off where it sends the origin and the axes."""
    origin = np.array(transform.TransformPoint((0.0, 0.0, 0.0)))
    lps = np.eye(4)
    lps[:3, 3] = origin
    for axis in range(3):
        lps[:3, axis] = np.array(transform.TransformPoint(np.eye(3)[axis].tolist())) - origin
    return np.asarray(_FLIP @ lps @ _FLIP)


def resample(
    array: NDArray[np.float32],
    geometry: Geometry,
    grid: Geometry,
    grid_to_array: Matrix,
    *,
    interpolation: Interpolation,
    threads: int = 1,
) -> NDArray[np.float32]:
    """The array on another grid, interpolated once; 0 where the grid leaves the array.

    Args:
        array: (D, H, W) float32 on `geometry`. grid: where the result lies.
        grid_to_array: (4, 4), a point in the grid's world (RAS mm) -> the same anatomy in the array's world.
        interpolation: "linear", or "cubic": B-spline of order 3, clipped to the array's own range, which it would
            overshoot at edges.

    Returns:
        (D, H, W) float32 of grid.shape.
    """
    itk = sitk()
    filter_ = itk.ResampleImageFilter()
    filter_.SetReferenceImage(_empty(grid))
    filter_.SetTransform(to_transform(grid_to_array))
    filter_.SetInterpolator(itk.sitkLinear if interpolation == "linear" else itk.sitkBSpline3)
    filter_.SetDefaultPixelValue(0.0)
    filter_.SetOutputPixelType(itk.sitkFloat32)
    with itk_threads(threads):
        result = to_array(filter_.Execute(to_image(array, geometry)))
    return np.clip(result, min(0.0, float(array.min())), max(0.0, float(array.max())), out=result)


def resample_mask(
    mask: NDArray[np.bool_], geometry: Geometry, grid: Geometry, grid_to_array: Matrix, *, threads: int = 1
) -> NDArray[np.bool_]:
    """A mask on another grid: inside where its linearly interpolated indicator is at least one half.

    The volume of a lesion survives this better than the nearest voxel, which moves the border by up to half a voxel of
    the coarser grid; on the very same voxels it is exact. A voxel that is twice as long as the mask's or more is looked
    at in as many places along it, and their mean decides: what lies between two thick slices is not lost.
    """
    parts = _parts(geometry, grid, grid_to_array)
    fine, indicator = divided(grid, parts), mask.astype(np.float32)
    share = resample(indicator, geometry, fine, grid_to_array, interpolation="linear", threads=threads)
    if parts != (1, 1, 1):
        d, h, w = grid.shape
        share = share.reshape(d, parts[0], h, parts[1], w, parts[2]).mean((1, 3, 5))
    return np.asarray(share >= 0.5 - 1e-4)  # a voxel between two keeps its share of 1/2 whatever float32 makes of it


def _parts(geometry: Geometry, grid: Geometry, grid_to_array: Matrix) -> tuple[int, int, int]:
    """How many voxels of the array lie along an edge of the grid's voxels, at least 1, of each axis D, H, W."""
    to_voxels = np.linalg.inv(geometry.affine[:3, :3]) @ grid_to_array[:3, :3] @ grid.affine[:3, :3]
    d, h, w = (max(1, round(float(n))) for n in np.linalg.norm(to_voxels, axis=0))
    return d, h, w


def divided(grid: Geometry, parts: tuple[int, int, int]) -> Geometry:
    """The grid whose voxels fill those of `grid`, so many along each axis D, H, W."""
    if parts == (1, 1, 1):
        return grid
    each = np.array(parts)
    affine = grid.affine.copy()
    affine[:3, :3] = grid.affine[:3, :3] / each
    affine[:3, 3] = grid.affine[:3] @ [*((1 - each) / (2 * each)), 1]  # the first part's middle
    d, h, w = (int(n) for n in np.array(grid.shape) * each)
    z, y, x = (float(mm) for mm in np.array(grid.spacing) / each)
    return replace(grid, shape=(d, h, w), spacing=(z, y, x), affine=affine)


def resample_label(
    label: NDArray[np.int16], geometry: Geometry, grid: Geometry, grid_to_array: Matrix, *, threads: int = 1
) -> NDArray[np.int16]:
    """A label map on another grid, each value as `resample_mask` carries it. (D, H, W) -> grid.shape.

    Where two labels share a half each, the higher value is taken.
    """
    carried = np.zeros(grid.shape, np.int16)
    for value in np.unique(label[label != 0]):  # ascending
        carried[resample_mask(label == value, geometry, grid, grid_to_array, threads=threads)] = value
    return carried


def _empty(grid: Geometry) -> Any:
    return to_image(np.zeros(grid.shape, np.uint8), grid)
