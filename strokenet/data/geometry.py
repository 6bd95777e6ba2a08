"""Geometry: where the voxels of an array lie in the scanner, in millimetres.

Arrays of the house are (C, D, H, W), where D, H, W are the NIfTI k, j, i axes; shape, spacing and affine here follow
that order. Comes in: what data/nifti.py reads. Goes out: comparisons in mm, and the Turn that takes a stored array to
RAS (or to any axis order) and back without touching a value.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from nibabel.orientations import io_orientation
from numpy.typing import NDArray

Triple = tuple[int, int, int]
Spacing = tuple[float, float, float]
Scalar = TypeVar("Scalar", bound=np.generic)


@dataclass(frozen=True, kw_only=True, eq=False)
class Geometry:
    """Grid of one volume.

    shape: voxels (D, H, W). spacing: mm (D, H, W), the stored voxel sizes.
    affine: (4, 4) float64, (d, h, w, 1) -> world mm in RAS+ (x to the right, y to the front, z up).
    """

    shape: Triple
    spacing: Spacing
    affine: NDArray[np.float64]

    def __post_init__(self) -> None:
        if self.affine.shape != (4, 4) or not np.isfinite(self.affine).all():
            raise ValueError(f"affine of shape {self.affine.shape}; a finite (4, 4) matrix is needed")
        if min(self.shape) < 1 or not all(np.isfinite(s) and s > 0 for s in self.spacing):
            raise ValueError(f"shape {self.shape}, spacing {self.spacing}; positive numbers are needed")

    @property
    def voxel_volume_mm3(self) -> float:
        """Product of the spacing, not the affine's determinant: a rounded oblique affine would shift it at random."""
        return float(np.prod(np.asarray(self.spacing, dtype=np.float64)))


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A change of axes without interpolation: new axis a is old axis order[a], reversed when flip[a]."""

    order: Triple
    flip: tuple[bool, bool, bool]

    def apply(self, array: NDArray[Scalar]) -> NDArray[Scalar]:
        """(..., D, H, W) -> (..., *turned), a view."""
        lead = array.ndim - 3
        turned = array.transpose(*range(lead), *(lead + axis for axis in self.order))
        return np.asarray(turned[self._steps()])

    def invert(self, array: NDArray[Scalar]) -> NDArray[Scalar]:
        """(..., *turned) -> (..., D, H, W), a view: invert(apply(x)) is x."""
        lead = array.ndim - 3
        unflipped = np.asarray(array[self._steps()])
        back = np.argsort(self.order)
        return unflipped.transpose(*range(lead), *(lead + int(axis) for axis in back))

    def _steps(self) -> Any:
        return (..., *(slice(None, None, -1 if f else 1) for f in self.flip))

    def permute(self, values: tuple[float, float, float]) -> tuple[float, float, float]:
        """A per-axis quantity (shape, spacing) in the turned order."""
        a, b, c = self.order
        return (values[a], values[b], values[c])

    def then(self, order: Triple) -> Turn:
        """This turn followed by a transposition of the turned axes."""
        a, b, c = order
        return Turn(
            order=(self.order[a], self.order[b], self.order[c]), flip=(self.flip[a], self.flip[b], self.flip[c])
        )


AS_STORED = Turn(order=(0, 1, 2), flip=(False, False, False))


def turn_to_ras(geometry: Geometry) -> Turn:
    """The turn after which D runs to the head (S), H to the front (A) and W to the right (R).

    An oblique grid goes to the nearest axis-aligned order (nibabel's closest canonical rule); nothing is resampled.
    """
    closest = io_orientation(geometry.affine[:, [2, 1, 0, 3]])  # rows: stored i, j, k -> (world axis, direction)
    order, flip = [0, 0, 0], [False, False, False]
    for stored_ijk, (world, direction) in enumerate(closest):
        target = 2 - int(world)  # world x, y, z are W, H, D of the house
        order[target], flip[target] = 2 - stored_ijk, bool(direction < 0)
    return Turn(order=(order[0], order[1], order[2]), flip=(flip[0], flip[1], flip[2]))


def turned(geometry: Geometry, turn: Turn) -> Geometry:
    """The geometry of turn.apply(array): same place in the world."""
    shape = tuple(geometry.shape[a] for a in turn.order)
    step = np.zeros((4, 4))  # turned voxel -> stored voxel
    step[3, 3] = 1
    for axis, (old, flip) in enumerate(zip(turn.order, turn.flip, strict=True)):
        step[old, axis] = -1 if flip else 1
        step[old, 3] = geometry.shape[old] - 1 if flip else 0
    return Geometry(
        shape=(shape[0], shape[1], shape[2]),
        spacing=turn.permute(geometry.spacing),
        affine=geometry.affine @ step,
    )


def corners_mm(geometry: Geometry) -> NDArray[np.float64]:
    """World positions of the centres of the 8 corner voxels, (8, 3) mm."""
    ends = [(0, n - 1) for n in geometry.shape]
    voxels = np.array([(*corner, 1) for corner in itertools.product(*ends)], dtype=np.float64)
    return np.asarray((voxels @ geometry.affine.T)[:, :3])


def corner_distance_mm(a: Geometry, b: Geometry) -> float:
    """Largest distance between matching corners of two grids of equal shape, in mm."""
    return float(np.linalg.norm(corners_mm(a) - corners_mm(b), axis=1).max())
