"""Small masks on disk, in nibabel's own axis order, so that the reader under test is not the writer of the test."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import nibabel
import numpy as np
from numpy.typing import NDArray

SPACING_IJK = (1.0, 2.0, 3.0)


def write(path: Path, array: NDArray[np.generic], *, shift_mm: float = 0.0) -> Path:
    """A uint8 or int16 mask (i, j, k) with voxels of 1 x 2 x 3 mm."""
    affine = np.diag([*SPACING_IJK, 1.0])
    affine[0, 3] = shift_mm
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    return path


def folder(root: Path, masks: Mapping[str, NDArray[np.generic]]) -> Path:
    """CASE.nii.gz of every mask."""
    root.mkdir(parents=True, exist_ok=True)
    for case, mask in masks.items():
        write(root / f"{case}.nii.gz", mask)
    return root


def blob(*corners: tuple[int, int, int], size: int = 2, value: int = 1) -> NDArray[np.uint8]:
    """Cubes at these corners in a volume of (i, j, k) = (9, 8, 7)."""
    mask = np.zeros((9, 8, 7), np.uint8)
    for i, j, k in corners:
        mask[i : i + size, j : j + size, k : k + size] = value
    return mask
