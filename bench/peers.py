"""Where the peers are: the environment of tools/peers.sh, .venv-peers beside the project or in STROKENET_PEERS."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OF_HERE = {"PYTHONPATH": str(ROOT)}  # this checkout's code, whatever is installed
PLACES = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")  # nnU-Net's folders, by environment variable


def peers_folder() -> Path:
    """The environment, whether it is there or not."""
    return Path(os.environ.get("STROKENET_PEERS", ROOT / ".venv-peers"))


def peers_python() -> Path:
    """Its interpreter, whether it is there or not."""
    return peers_folder() / "bin" / "python"


def has_peer(package: str) -> bool:
    """Whether the peers' environment has a package; nothing of it is imported."""
    asks = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
    return peers_python().is_file() and subprocess.run([peers_python(), "-c", asks], check=False).returncode == 0


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
