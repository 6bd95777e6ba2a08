"""The fingerprint: both sides look at the same raw dataset, from the files on.

Both draw the foreground voxels from RandomState(1234), the peer 100 million of a dataset. The short runs lower that
number on both sides, which changes neither the stream nor the arithmetic.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from planner.fingerprint import FOREGROUND_DRAWS, make_fingerprint, to_json
from strokenet.data.dataset import read_dataset
from strokenet.preprocess import cohort
from tests.peers import peer
from tests.peers.row import Row

# isort: split
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor

SHORT = 2_000_000  # draws of a dataset
EXACT = ("shapes_after_crop", "spacings", "median_relative_size_after_cropping")
LABELS = {"background": 0, "core": 1, "rim": 2}
_OBLIQUE = np.array(
    [[0.8, -0.6, 0, 3.0], [0.6, 0.8, 0, -20.0], [0, 0, 1, 5.5], [0, 0, 0, 1]]
)  # a rotation, and a shift


def rows(full: bool) -> Iterator[Row]:
    """A synthetic dataset of two channels and two labels; of its six cases one has no lesion, one lies oblique."""
    name = "Dataset901_Synthetic"
    _write_synthetic(name)
    yield from _compared(name, FOREGROUND_DRAWS if full else SHORT, "6 synthetic cases, one empty, one oblique")


def real_rows(full: bool) -> Iterator[Row]:
    """The real T1 + FLAIR case, as a dataset of one."""
    data = peer.real_data()
    assert data is not None
    name = "Dataset902_Real"
    _write_real(name, data / "open_ms" / "cross_sectional" / "patient07")
    yield from _compared(name, FOREGROUND_DRAWS if full else SHORT, "real T1 + FLAIR case")


def _compared(name: str, draws: int, on: str) -> Iterator[Row]:
    theirs, ours = _peer_fingerprint(name, draws), _our_fingerprint(name, draws)
    yield Row(
        check="fingerprint, sizes",
        on=on,
        difference=sum(peer.differing(theirs[field], ours[field]) for field in EXACT),
        tolerance=0,
        unit="values",
        note="shapes after cropping, spacings, share left by cropping",
    )
    differences = _relative_differences(theirs, ours)
    worst = max(differences, key=lambda field: differences[field])
    yield Row(
        check="fingerprint, intensities",
        on=f"{on}, {draws:.0e} draws",
        difference=differences[worst],
        tolerance=1e-5,
        unit="relative",
        note=f"largest: {worst}; the peer adds in float32 unless a case is empty, strokenet in float64",
    )


def _peer_fingerprint(name: str, draws: int) -> dict[str, Any]:
    with peer.quiet():
        extractor = DatasetFingerprintExtractor(name, 1)
        extractor.num_foreground_voxels_for_intensitystats = draws
        extractor.show_progress_bar = False
        return dict(extractor.run(overwrite_existing=True))


def _our_fingerprint(name: str, draws: int) -> dict[str, Any]:
    dataset = read_dataset(peer.RAW / name)
    with mock.patch.object(cohort, "FOREGROUND_DRAWS", draws):
        return to_json(make_fingerprint(cohort.survey_dataset(dataset, "as-stored", 1)))


def _relative_differences(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, float]:
    """A statistic of a channel, "std of channel 0" -> |ours - theirs| / |theirs|."""
    key = "foreground_intensity_properties_per_channel"
    per_channel = {str(channel): statistics for channel, statistics in theirs[key].items()}
    assert per_channel.keys() == ours[key].keys()
    return {
        f"{statistic} of channel {channel}": abs(ours[key][channel][statistic] - value) / abs(value)
        for channel, statistics in per_channel.items()
        for statistic, value in statistics.items()
    }


def _write_synthetic(name: str) -> None:
    rng = np.random.default_rng(7)
    root = peer.write_description(name, channels=("T1", "FLAIR"), labels=LABELS, cases=6)
    for n in range(6):
        shape = tuple((np.array([50, 58, 22]) + rng.integers(0, 6, 3)).tolist())
        affine = np.diag([*(np.array([1.0, 1.1, 2.2]) * rng.uniform(0.97, 1.03, 3)), 1.0])
        if n == 4:
            affine = _OBLIQUE @ affine
        t1, flair, label = synthetic_head(rng, shape, lesion=n != 3)
        for channel, image in enumerate((t1, flair)):
            peer.write_scan(root / "imagesTr" / f"case_{n:02d}_{channel:04d}.nii.gz", image, affine)
        peer.write_scan(root / "labelsTr" / f"case_{n:02d}.nii.gz", label, affine)


def synthetic_head(
    rng: np.random.Generator, shape: tuple[int, ...], *, lesion: bool
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.uint8]]:
    """T1, FLAIR and label (i, j, k): an ellipsoid in a zero background, with a core and a rim as lesions."""
    i, j, k = np.indices(shape)
    centre = (np.array(shape) - 1) / 2

    def ellipsoid(shift: float, radius: float) -> NDArray[np.bool_]:
        return np.asarray(
            sum(((x - c - shift) / (radius * n)) ** 2 for x, c, n in zip((i, j, k), centre, shape, strict=True)) < 1
        )

    head, core, rim = ellipsoid(0, 0.42), ellipsoid(2, 0.13), ellipsoid(-5, 0.06)
    label = np.zeros(shape, np.uint8)
    if lesion:
        label[core], label[rim] = 1, 2
    t1 = np.clip(100 + 30 * rng.normal(size=shape) + i - 35 * (label > 0), 1, 255)
    flair = 60 + 10 * rng.normal(size=shape) + k + 40 * (label > 0)
    return np.where(head, t1, 0).astype(np.float32), np.where(head, flair, 0).astype(np.float32), label


def _write_real(name: str, scans: Path) -> None:
    root = peer.write_description(name, channels=("T1", "FLAIR"), labels={"background": 0, "lesion": 1}, cases=1)
    shutil.copy(scans / "T1.nii.gz", root / "imagesTr" / "case_0000.nii.gz")
    shutil.copy(scans / "FLAIR.nii.gz", root / "imagesTr" / "case_0001.nii.gz")
    shutil.copy(scans / "lesion.nii.gz", root / "labelsTr" / "case.nii.gz")
