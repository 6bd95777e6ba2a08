"""What the loops over a dataset say of it."""

from __future__ import annotations

import logging
from pathlib import Path

import nibabel
import numpy as np
import pytest

from strokenet.data.dataset import CaseFiles
from strokenet.preprocess import cohort
from strokenet.preprocess.store import Store
from tests.plans import tiny_plan


@pytest.mark.parametrize(
    ("needed", "said"),
    [
        *((1, "at most 1 MB; "), (16_500_000, "at most 17 MB; "), (999_000_000, "at most 999 MB; ")),
        *((1_000_000_000, "at most 1.0 GB; "), (23_456_000_000, "at most 23.5 GB; ")),
    ],
)
def test_disk_is_told_in_megabytes_below_a_gigabyte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, needed: int, said: str
) -> None:
    scan = tmp_path / "a_0000.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.ones((4, 5, 6), np.float32), np.eye(4)), scan)
    monkeypatch.setattr(cohort, "stored_bytes", lambda *_: needed)
    with caplog.at_level(logging.INFO, "strokenet"):
        cohort._tell_disk(
            tiny_plan(), Store(tmp_path / "store"), {"a": CaseFiles(case_id="a", images=(scan, scan), label=None)}
        )
    assert said in caplog.text
    assert f"free at {tmp_path / 'store'}" in caplog.text
