"""Triton kernels run on the GPU where there is one, and by Triton's interpreter elsewhere."""

from __future__ import annotations

import importlib.util

import pytest
import torch


@pytest.fixture
def triton_device() -> torch.device:
    """Where a Triton kernel can run; skips, with the reason, where Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed; it has wheels for Linux alone")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
