"""Reading and writing a scan: ours checks every byte that it reads and flushes what it writes, nibabel does neither."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import nibabel
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from bench.measure import Comparison, Measurement, in_turn
from planner.plan import Triple
from strokenet.data.geometry import Geometry
from strokenet.data.nifti import header_of, read_volume, write_mask, write_probability

SHAPE: Triple = (182, 218, 182)
QUICK: Triple = (91, 109, 91)


def comparisons(quick: bool) -> list[Comparison]:
    """Reading a smooth int16 volume of a brain's size; writing a mask and a probability map of that size."""
    shape, repeats = (QUICK, 3) if quick else (SHAPE, 7)
    rows: dict[str, Callable[[str, Triple, int], Measurement]] = {
        f"reading {shape} int16 .nii.gz": partial(_reading, ".nii.gz"),
        f"reading {shape} int16 .nii": partial(_reading, ".nii"),
        f"writing a mask {shape} uint8 .nii.gz": partial(_writing, "mask"),
        f"writing a probability map {shape} float32 .nii.gz": partial(_writing, "map"),
    }
    return [Comparison(what=what, run=partial(run, what, shape, repeats)) for what, run in rows.items()]


def _reading(ending: str, what: str, shape: Triple, repeats: int) -> Measurement:
    image = nibabel.Nifti1Image((1e4 * _smooth(shape)).astype(np.int16), np.eye(4))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"scan{ending}"
        nibabel.save(image, path)

        def ours() -> NDArray[np.float32]:
            return read_volume(path).array

        def peer() -> NDArray[np.float32]:
            return _by_nibabel(path)

        assert np.array_equal(ours(), peer().transpose(2, 1, 0)), "the two read other voxels"
        measured = in_turn("io", what, {"strokenet": ours, "nibabel": peer}, repeats=repeats)
        return replace(measured, answers=f"equal; {_size(path)}")


def _writing(kind: str, what: str, shape: Triple, repeats: int) -> Measurement:
    """kind: "mask" or "map". Either file is read again by nibabel and compared."""
    probability = (1 / (1 + np.exp(-200 * (_smooth(shape) - 0.06)))).astype(np.float32)  # (D, H, W)
    mask = (probability > 0.5).astype(np.uint8)
    header = header_of(Geometry(shape=shape, spacing=(1.0, 1.0, 1.0), affine=np.eye(4)))
    written: NDArray[np.uint8] | NDArray[np.float32] = mask if kind == "mask" else probability
    with tempfile.TemporaryDirectory() as folder:
        own, other = (Path(folder) / f"{name}.nii.gz" for name in ("strokenet", "nibabel"))

        def ours() -> None:
            if kind == "mask":
                write_mask(own, mask, header)
            else:
                write_probability(own, probability, header)

        def peer() -> None:
            nibabel.save(nibabel.Nifti1Image(written.transpose(2, 1, 0), np.eye(4)), other)

        ours()
        peer()
        for path in (own, other):
            assert np.array_equal(_by_nibabel(path).transpose(2, 1, 0), written), f"{path.stem} wrote other voxels"
        measured = in_turn("io", what, {"strokenet": ours, "nibabel": peer}, repeats=repeats)
        return replace(measured, answers=f"equal when read again; {_size(own)}, nibabel's {_size(other)}")


def _smooth(shape: Triple) -> NDArray[np.float64]:
    """Tissue without an anatomy: noise, smoothed."""
    return np.asarray(ndimage.gaussian_filter(np.random.default_rng(0).normal(size=shape), 2))


def _by_nibabel(path: Path) -> NDArray[np.float32]:
    """(i, j, k)."""
    image = nibabel.load(path)
    return np.asarray(image.get_fdata(dtype=np.float32))  # type: ignore[attr-defined]


def _size(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:.3g} MB"
