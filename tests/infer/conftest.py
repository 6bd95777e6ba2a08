"""What the tests of inference from files to files share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.infer.models import write_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model folder with one fold of random weights."""
    write_model(tmp_path / "model")
    return tmp_path / "model"
