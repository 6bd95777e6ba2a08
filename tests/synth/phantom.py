"""A small head as a label map, and masks in MNI space: so that tests of synth need no download and take seconds."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
from numpy.typing import NDArray

SHAPE, SPACING = (44, 52, 44), 2.5  # x, y, z


def phantom() -> NDArray[np.int32]:
    """(x, y, z) in RAS: skin, fat, bone, CSF, cortex, white matter and ventricles, with a cerebellum and a stem."""
    x, y, z = (np.arange(n) - (n - 1) / 2 for n in SHAPE)
    x, y, z = x[:, None, None], y[None, :, None], z[None, None, :]
    radius = np.sqrt((x / 20.5) ** 2 + (y / 24.5) ** 2 + (z / 20.5) ** 2)
    labels = np.zeros(SHAPE, np.int32)
    for edge, number in ((1.0, 511), (0.95, 507), (0.88, 515), (0.8, 24)):
        labels[radius < edge] = number
    left = np.broadcast_to(x < 0, SHAPE)
    for edge, numbers in ((0.72, (3, 42)), (0.58, (2, 41))):
        for side, number in zip((left, ~left), numbers, strict=True):
            labels[(radius < edge) & side] = number
    low = (z < -6) & (y < -4)
    labels[low & (radius < 0.72)] = 8
    labels[(np.abs(x) < 3) & (np.abs(y + 4) < 3) & (z < -4) & (radius < 0.75)] = 16
    horn = (np.abs(np.abs(x) - 4) < 1.6) & (np.abs(y) < 8) & (np.abs(z - 2) < 3)
    labels[horn & left], labels[horn & ~left] = 4, 43
    return labels


def write_phantom(path: Path, labels: NDArray[np.int32] | None = None) -> Path:
    """The phantom as a file in LIA order, as FreeSurfer stores its maps."""
    affine = np.diag([SPACING, SPACING, SPACING, 1.0])
    image = nibabel.Nifti1Image(phantom() if labels is None else labels, affine)
    turn = nibabel.orientations.ornt_transform(
        nibabel.orientations.io_orientation(affine), nibabel.orientations.axcodes2ornt(("L", "I", "A"))
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image.as_reoriented(turn), path)
    return path


def write_mask_mni(path: Path, centre_mm: tuple[float, float, float], radius_mm: float) -> Path:
    """A ball in MNI space, as an LAS file of 1 mm; centre (x, y, z) mm."""
    affine = np.array([[-1.0, 0, 0, 80], [0, 1, 0, -112], [0, 0, 1, -72], [0, 0, 0, 1]])
    i, j, k = np.meshgrid(*(np.arange(n) for n in (161, 190, 160)), indexing="ij")
    x, y, z = 80 - i, j - 112, k - 72
    off = (x - centre_mm[0]) ** 2 + (y - centre_mm[1]) ** 2 + (z - centre_mm[2]) ** 2
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image((off <= radius_mm**2).astype(np.uint8), affine), path)
    return path
