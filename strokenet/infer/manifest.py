"""Manifest: what the files of a case were made from, OUT/manifest/CASE.json.

A run goes on where another one ended, on one machine or on many. A case is finished when its manifest names the scans
that are there now, this model and these settings, and its files are still what was written. Each process writes the
manifests of its own cases alone, so that many may fill one folder; results.json is gathered from all of them.

A scan or a file is the same when its name, its size and its time of change are, or else its sha256.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from planner.plan import to_json
from strokenet import __version__
from strokenet.data.errors import InputError
from strokenet.data.files import file_sha256, read_json, write_json
from strokenet.model.checkpoint import Model
from strokenet.workspace import Workspace

FOLDER = "manifest"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class FileState:
    """A file as it was at one moment. name: without its folder."""

    name: str
    bytes: int
    changed_ns: int
    sha256: str


def manifest_path(out: Path, case_id: str) -> Path:
    """Where the manifest of a case lies."""
    return out / FOLDER / f"{case_id}.json"


def state_of(path: Path) -> FileState:
    """The file as it is now.

    Raises:
        InputError: it cannot be read.
    """
    status = _status(path)
    return FileState(name=path.name, bytes=status[0], changed_ns=status[1], sha256=file_sha256(path))


def is_same(path: Path, known: FileState) -> bool:
    """Whether the file is still as it was; its content is read only where its name or time is another."""
    try:
        size, changed_ns = _status(path)
        untouched = (path.name, changed_ns) == (known.name, known.changed_ns)
        return size == known.bytes and (untouched or file_sha256(path) == known.sha256)
    except InputError:
        return False


def recipe(model: Model, settings: Mapping[str, object]) -> str:
    """sha256 of all that a mask depends on beside the scans: plan, weights of the folds, settings, our version."""
    workspace = Workspace(model.root)
    files = [workspace.fold(fold).weights for fold in model.folds]
    weights = [file_sha256(file) for file in files if file is not None]
    parts = [to_json(model.plan), model.folds, weights, dict(settings), __version__]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def write_manifest(
    out: Path,
    row: Mapping[str, Any],
    *,
    made_by: str = "",
    scans: Sequence[FileState] = (),
    files: Iterable[Path] = (),
    begun: bool = False,
) -> None:
    """Writes what a case was made from, and its row of results.json.

    Args:
        made_by: its recipe; with scans and files of a case that has masks. files: below `out`, written already.
        begun: files of the case are about to be written; should that be cut off, what lies there is ours.
    """
    written = {path.relative_to(out).as_posix(): asdict(state_of(path)) for path in files}
    content = {
        "format": FORMAT,
        "row": dict(row),
        "begun": begun,
        "made_by": made_by,
        "scans": [asdict(scan) for scan in scans],
        "files": written,
    }
    write_json(manifest_path(out, str(row["case"])), content)


def manifests(out: Path) -> list[dict[str, Any]]:
    """The row of every case that has a readable manifest in `out`."""
    found = (read_manifest(out, path.stem) for path in sorted((out / FOLDER).glob("[!.]*.json")))
    return [content["row"] for content in found if content is not None]


def read_manifest(out: Path, case_id: str) -> dict[str, Any] | None:
    """The manifest of a case; None where there is none of ours, or a damaged one."""
    try:
        content = read_json(manifest_path(out, case_id))
    except InputError:
        return None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        return None
    row = content.get("row")
    return content if isinstance(row, dict) and row.get("case") == case_id else None


def finished_row(
    out: Path, case_id: str, images: Sequence[Path], channels: Sequence[str], made_by: str
) -> dict[str, Any] | None:
    """The row of a case that need not be computed again; None: it must be."""
    content = read_manifest(out, case_id)
    if content is None or content.get("made_by") != made_by or content["row"].get("status") != "ok":
        return None
    try:
        scans = [FileState(**scan) for scan in content["scans"]]
        files = {out / name: FileState(**state) for name, state in content["files"].items()}
        same_channels = content["row"]["channels"] == list(channels)
    except (KeyError, TypeError, AttributeError):
        return None
    same_scans = same_channels and len(scans) == len(images) and all(map(is_same, images, scans))
    same_files = bool(files) and all(is_same(path, state) for path, state in files.items())
    return content["row"] if same_scans and same_files else None


def is_ours(out: Path, case_id: str, path: Path) -> bool:
    """Whether a file of the case is what a run of ours has written, or what is left of one that was cut off."""
    content = read_manifest(out, case_id)
    if content is None or content.get("begun") is True:
        return content is not None
    try:
        return is_same(path, FileState(**content["files"][path.relative_to(out).as_posix()]))
    except (KeyError, TypeError):
        return False


def _status(path: Path) -> tuple[int, int]:
    """Size in bytes and time of change in ns."""
    try:
        status = path.stat()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from None
    return status.st_size, status.st_mtime_ns
