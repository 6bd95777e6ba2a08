"""The io suite: scans read, masks and maps written, each compared before it is timed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bench import io, resample
from strokenet.data.header import Header

TINY = (9, 11, 7)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(io, "QUICK", TINY)


def test_reading_and_writing_are_measured_beside_nibabel() -> None:
    for comparison in io.comparisons(quick=True):
        measured = comparison.run()
        assert measured.what == comparison.what
        assert list(measured.times_ms) == ["strokenet", "nibabel"]
        assert measured.answers.startswith("equal")
        assert "MB" in measured.answers


@pytest.mark.parametrize("row", [0, 1, 2, 3])
def test_other_voxels_are_not_timed(row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mask, write_probability = io.write_mask, io.write_probability

    def no_mask(path: Path, mask: np.ndarray, reference: Header) -> None:
        write_mask(path, np.zeros_like(mask), reference)

    def no_map(path: Path, probability: np.ndarray, reference: Header) -> None:
        write_probability(path, 1 - probability, reference)

    monkeypatch.setattr(io, "write_mask", no_mask)
    monkeypatch.setattr(io, "write_probability", no_map)
    monkeypatch.setattr(io, "_smooth", lambda shape: np.linspace(-1, 1, int(np.prod(shape))).reshape(shape))
    if row < 2:
        by_nibabel = io._by_nibabel
        monkeypatch.setattr(io, "_by_nibabel", lambda path: by_nibabel(path) + 1)
    monkeypatch.setattr(io, "in_turn", None)
    with pytest.raises(AssertionError, match="other voxels"):
        io.comparisons(quick=True)[row].run()


def test_a_resampled_image_that_differs_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resample, "QUICK", (((6, 7, 8), (9, 7, 10)),))
    (comparison,) = resample.comparisons(quick=True)[:1]
    assert comparison.run().answers.startswith("largest difference")
    monkeypatch.setattr(resample, "_skimage", lambda channel, shape: np.zeros(shape))
    with pytest.raises(AssertionError, match="largest difference"):
        comparison.run()
