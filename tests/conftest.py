"""Fixtures that more than one room uses."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from strokenet.signals import STOPPING

if not torch.cuda.is_available():
    # Triton reads it where a kernel is defined, its own too, and torch.utils.flop_counter imports Triton: so here.
    os.environ["TRITON_INTERPRET"] = "1"

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure() -> None:
    """Signals as a terminal gives them: in the background Ctrl-C is ignored, and what runs there inherits it."""
    for number in STOPPING:
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


@pytest.fixture
def log_as_it_was() -> Iterator[None]:
    """The log as before, after a command that ran in this process has sent it to its own console."""
    log = logging.getLogger("strokenet")
    kept = (log.handlers[:], log.propagate, log.level)
    yield
    log.handlers[:], log.propagate, level = kept
    log.setLevel(level)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of the real scans; skips, with the reason, where they are not at hand."""
    folder = Path(os.environ.get("STROKENET_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "open_ms").is_dir():
        pytest.skip(f"no real scans at {folder}; set STROKENET_TEST_DATA to their folder")
    return folder


@pytest.fixture(autouse=True)
def float32_on_every_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What tests compare is of float32, also where `--precision auto` would find that the CPU computes in bfloat16."""
    monkeypatch.setattr("strokenet.model.device.cpu_has_bf16", lambda: False)
