"""The live peer's surroundings: import this before nnunetv2, nnunet, batchgenerators or acvl_utils.

The peers read folders and process counts from environment variables, some of them at import. Importing this module
points all of them at one temporary folder a process tree, whatever the user has set, so that no run of ours can write
into a user's nnU-Net folders; it is removed when the process that made it ends.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from strokenet.data.files import write_json

ROOT = Path(__file__).resolve().parents[2]
DISTRIBUTIONS = (
    "nnunetv2",
    "nnunet",
    "monai",
    "dynamic_network_architectures",
    "batchgenerators",
    "batchgeneratorsv2",
    "acvl_utils",
)
_MADE_BY_PARENT = "STROKENET_PEER_FOLDER"
PLACES = {  # where nnunetv2 and, below, nnunet read and write
    "nnUNet_raw": "raw",
    "nnUNet_preprocessed": "preprocessed",
    "nnUNet_results": "results",
    "nnUNet_raw_data_base": "v1_raw",
    "RESULTS_FOLDER": "v1_results",
}
SETTINGS = {"nnUNet_def_n_proc": "1", "nnUNet_n_proc_DA": "1"}  # the work is small: one process a pool


def _set_up() -> Path:
    """The folder of this process tree. A worker that a run of ours has spawned takes its parent's."""
    made = os.environ.get(_MADE_BY_PARENT)
    if made is not None and Path(made).is_dir():
        return Path(made)
    folder = Path(tempfile.mkdtemp(prefix="strokenet-peer-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ[_MADE_BY_PARENT] = str(folder)
    for variable, place in PLACES.items():
        (folder / place).mkdir()
        os.environ[variable] = str(folder / place)
    os.environ.update(SETTINGS)
    for variable in ("nnUNet_extTrainer", "nnUNet_compile"):
        os.environ.pop(variable, None)
    return folder


FOLDER = _set_up()
RAW, PREPROCESSED, RESULTS = FOLDER / "raw", FOLDER / "preprocessed", FOLDER / "results"


def missing() -> str | None:
    """Why the live peer cannot be run here, in one line; None where it can."""
    absent = [name for name in DISTRIBUTIONS if find_spec(name) is None]
    if not absent:
        return None
    return f"not installed: {', '.join(absent)}; run tools/peers.sh, then .venv-peers/bin/python -m pytest tests/peers"


def real_data() -> Path | None:
    """The folder of the real scans (STROKENET_TEST_DATA, default ../shared/data); None where it is not at hand."""
    folder = Path(os.environ.get("STROKENET_TEST_DATA", ROOT.parent / "shared" / "data"))
    return folder if (folder / "open_ms").is_dir() else None


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Swallows what the peers print, warn and log below an error."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def differing(theirs: Any, ours: Any) -> int:
    """How many values of two arrays are not equal; all of them where the shapes differ."""
    a, b = np.asarray(theirs), np.asarray(ours)
    return int((a != b).sum()) if a.shape == b.shape else max(a.size, b.size, 1)


def write_scan(path: Path, voxels: NDArray[Any], affine: NDArray[np.float64] | None = None) -> None:
    """A NIfTI file of voxels (i, j, k), its folder made; without an affine 1 mm, axes along the world's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4) if affine is None else affine), path)


def write_description(name: str, *, channels: Sequence[str], labels: Mapping[str, int], cases: int) -> Path:
    """The folder of a raw dataset (DatasetXXX_Name) of both sides' format, with its dataset.json and no scan yet."""
    root = RAW / name
    for part in ("imagesTr", "labelsTr"):
        (root / part).mkdir(parents=True, exist_ok=True)
    write_json(
        root / "dataset.json",
        {
            "channel_names": {str(place): channel for place, channel in enumerate(channels)},
            "labels": dict(labels),
            "numTraining": cases,
            "file_ending": ".nii.gz",
        },
    )
    return root


def description(name: str) -> dict[str, Any]:
    """The dataset.json of a raw dataset, as the peer wants it handed over."""
    return dict(json.loads((RAW / name / "dataset.json").read_text()))
