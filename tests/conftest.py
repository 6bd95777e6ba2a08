"""Fixtures that more than one room uses."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of the real scans; skips, with the reason, where they are not at hand."""
    folder = Path(os.environ.get("STROKENET_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "open_ms").is_dir():
        pytest.skip(f"no real scans at {folder}; set STROKENET_TEST_DATA to their folder")
    return folder
