"""A small cohort for the training station, made from one real scan pair: T1, FLAIR and a lesion mask of open_ms.

Each case is the same head under another affine turn, contrast, bias and noise, on a coarse grid, with one to three
lesions put in at random places of the brain beside its own. All of it follows from the seed and the number of the case.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation

from tests.peers import peer

Volume = NDArray[np.float32]

CHANNELS = ("T1", "FLAIR")
LABELS = {"background": 0, "lesion": 1}
SCAN = Path("open_ms", "cross_sectional", "patient07")
GRID_MM = 4.0
DEGREES, SCALE, SHIFT_MM = 12.0, 0.1, 6.0  # of the affine turn, both ways
AXES_MM = (8.0, 18.0)  # half axes of a lesion
LESIONS = (1, 4)  # from, up to but not including


@dataclass(frozen=True, eq=False)
class Head:
    """The scan pair (i, j, k) in mm, intensities 0 .. 1 within the brain, 0 outside, and its own lesions, 0 .. 1."""

    t1: Volume
    flair: Volume
    lesion: Volume


def read_head(data: Path) -> Head:
    """The real pair, blurred so that the coarse grid does not skip over detail."""
    t1, flair, lesion = (_read(data / SCAN / f"{name}.nii.gz") for name in (*CHANNELS, "lesion"))
    brain = (t1 > 0) & (flair > 0)
    blurred = [_unit(ndimage.gaussian_filter(np.where(brain, v, 0), GRID_MM / 3), brain) for v in (t1, flair)]
    return Head(t1=blurred[0], flair=blurred[1], lesion=lesion)


def write_cohort(head: Head, name: str, *, cases: int, seed: int) -> tuple[Path, tuple[str, ...]]:
    """A raw dataset of `cases` cases in the folder of raw datasets: its folder and its case ids."""
    root = peer.write_description(name, channels=CHANNELS, labels=LABELS, cases=cases)
    ids = tuple(f"head_{number:02d}" for number in range(cases))
    affine = np.diag([GRID_MM, GRID_MM, GRID_MM, 1.0])
    for number, case in enumerate(ids):
        *channels, label = make_case(head, np.random.default_rng((seed, number)))
        for place, volume in enumerate(channels):
            peer.write_scan(root / "imagesTr" / f"{case}_{place:04d}.nii.gz", volume, affine)
        peer.write_scan(root / "labelsTr" / f"{case}.nii.gz", label, affine)
    return root, ids


def make_case(head: Head, rng: np.random.Generator) -> tuple[Volume, Volume, NDArray[np.uint8]]:
    """T1, FLAIR (float32, 0 outside the brain) and label (uint8), (i, j, k) on the grid of GRID_MM."""
    places = _places(head.t1.shape, rng)
    t1, flair, lesion = (
        ndimage.map_coordinates(volume, places, order=1, output=np.float32)
        for volume in (head.t1, head.flair, head.lesion)
    )
    brain = ndimage.binary_opening((t1 > 0.05) & (flair > 0.05))
    added = _lesions(brain, rng)
    t1 = t1 * (1 - 0.45 * added)
    flair = flair + (1.05 - flair) * 0.75 * added
    label = (np.maximum(lesion, added) >= 0.5) & brain
    return _scanned(t1, brain, rng), _scanned(flair, brain, rng), label.astype(np.uint8)


def _read(path: Path) -> Volume:
    return np.asarray(nibabel.Nifti1Image.from_filename(path).dataobj, np.float32)


def _unit(volume: Volume, brain: NDArray[np.bool_]) -> Volume:
    """Scaled so that the 99th percentile of the brain is 1, without what is negative."""
    return np.asarray(np.clip(volume / np.percentile(volume[brain], 99), 0, 1.5), np.float32)


def _places(shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.float64]:
    """Where the grid's voxels lie in the scan, whose voxels are 1 mm: (3, i, j, k)."""
    turn = Rotation.from_euler("xyz", rng.uniform(-DEGREES, DEGREES, 3), degrees=True).as_matrix()
    matrix = turn @ np.diag(rng.uniform(1 - SCALE, 1 + SCALE, 3)) * GRID_MM
    size = [int(np.ceil(edge / GRID_MM)) for edge in shape]
    grid = np.indices(size).reshape(3, -1) - (np.array(size)[:, None] - 1) / 2
    centre = (np.array(shape) - 1) / 2 + rng.uniform(-SHIFT_MM, SHIFT_MM, 3)
    return np.asarray(matrix @ grid + centre[:, None]).reshape(3, *size)


def _lesions(brain: NDArray[np.bool_], rng: np.random.Generator) -> Volume:
    """Ellipsoids with centres well inside the brain: 1 inside, 0 outside, about a voxel of edge between."""
    grid = np.indices(brain.shape).reshape(3, -1) * GRID_MM
    inner = np.argwhere(ndimage.binary_erosion(brain, iterations=3))
    total = np.zeros(brain.shape, np.float32)
    for _ in range(int(rng.integers(*LESIONS))):
        centre = inner[int(rng.integers(len(inner)))][:, None] * GRID_MM
        axes = rng.uniform(*AXES_MM, 3)
        offset = Rotation.random(random_state=int(rng.integers(2**31))).as_matrix() @ (grid - centre)
        radius = np.linalg.norm(offset / axes[:, None], axis=0)
        edge = (1 - radius) * axes.mean() / GRID_MM + 0.5  # voxels from the surface, 0.5 on it
        total = np.maximum(total, np.clip(edge, 0, 1).reshape(brain.shape).astype(np.float32))
    return total


def _scanned(volume: Volume, brain: NDArray[np.bool_], rng: np.random.Generator) -> Volume:
    """Another contrast, a smooth bias and noise, in arbitrary units; 0 outside the brain."""
    ramps = np.meshgrid(*(np.linspace(-1, 1, edge) for edge in volume.shape), indexing="ij")
    bias = np.exp(sum(weight * ramp for weight, ramp in zip(rng.uniform(-0.15, 0.15, 3), ramps, strict=True)))
    seen = volume ** rng.uniform(0.85, 1.2) * bias + rng.normal(0, 0.02, volume.shape)
    return np.where(brain, np.clip(seen, 1e-3, None) * rng.uniform(200, 900), 0).astype(np.float32)
