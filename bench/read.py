"""Reading one scan: ours checks every byte of it, nibabel believes the file."""

from __future__ import annotations

import tempfile
from pathlib import Path

import nibabel
import numpy as np
from scipy import ndimage

from bench.measure import Measurement, in_turn
from strokenet.data.nifti import read_volume

SHAPE = (182, 218, 182)


def run() -> list[Measurement]:
    """A smooth int16 volume of a brain's size, as .nii.gz and as .nii; the answers are compared first."""
    rng = np.random.default_rng(0)
    volume = ndimage.gaussian_filter(rng.normal(size=SHAPE), 2)
    image = nibabel.Nifti1Image((1e4 * volume).astype(np.int16), np.eye(4))
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        for ending in (".nii.gz", ".nii"):
            path = Path(folder) / f"scan{ending}"
            nibabel.save(image, path)

            def ours(path: Path = path) -> np.ndarray:
                return read_volume(path).array

            def peer(path: Path = path) -> np.ndarray:
                image = nibabel.load(path)
                return np.asarray(image.get_fdata(dtype=np.float32))  # type: ignore[attr-defined]

            assert np.array_equal(ours(), peer().transpose(2, 1, 0))
            size = path.stat().st_size / 1e6
            measured.append(
                in_turn("read", f"{SHAPE} int16 {ending}, {size:.1f} MB", {"strokenet": ours, "nibabel": peer})
            )
    return measured
