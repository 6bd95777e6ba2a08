"""The preprocessed cases on disk: one folder a case, plain .npy files, read by memory map.

    CASE/image.npy             (C, D, H, W) float32
    CASE/label.npy             (D, H, W) int16
    CASE/foreground_1.npy ...  (n, 3) int32, one file a label value
    CASE/manifest.json         written last: the size of every file, and the key of what they were made from

Each file is written atomically. A case counts only when its manifest does: what was interrupted, or made from another
plan or other scans, is made again, and nothing else is. A patch reads only the pages it touches.
"""

from __future__ import annotations

import hashlib
import json
import tokenize
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.plan import Plan, to_json
from strokenet.data.dataset import CaseFiles
from strokenet.data.errors import InputError
from strokenet.data.files import read_json, replacing, safe_name, write_json
from strokenet.preprocess.preprocess import Prepared

LAYOUT = 1  # raised when the files or the way they are made change: all stored cases are then made again
MANIFEST = "manifest.json"
_UNREADABLE = (OSError, ValueError, EOFError, SyntaxError, tokenize.TokenError, MemoryError)


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredCase:
    """One case, read by memory map.

    image: (C, D, H, W) float32. label: (D, H, W) int16, -1 outside the head.
    foreground: label value -> (n, 3) int32 voxels, in memory.
    """

    case_id: str
    image: NDArray[np.float32]
    label: NDArray[np.int16]
    foreground: dict[int, NDArray[np.int32]]


def plan_key(plan: Plan) -> str:
    """The fields of a plan that preprocessing reads, as a sha256. Intensity counts only where a channel is ct."""
    fields = to_json(plan)
    names = ("channels", "labels", "orientation", "transpose", "spacing", "normalisation", "use_mask_for_norm")
    read = {name: fields[name] for name in names}
    read["intensity"] = [s for s, n in zip(fields["intensity"], plan.normalisation, strict=True) if n == "ct"]
    return _sha256([LAYOUT, read])


def case_key(plan: Plan, files: CaseFiles) -> str:
    """What a stored case depends on: the plan's key, then one of its scans by name, size and time of change.

    Raises:
        InputError: a scan is not there.
    """
    scans = files.images if files.label is None else (*files.images, files.label)
    try:
        seen = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in scans]
    except OSError as error:
        raise InputError(f"{files.case_id}: cannot read {error.filename} ({error.strerror})") from None
    return f"{plan_key(plan)}-{_sha256(seen)}"


@dataclass(frozen=True)
class Store:
    """The folder of all preprocessed cases of a workspace."""

    root: Path

    def folder(self, case_id: str) -> Path:
        """Where the files of a case lie."""
        return self.root / safe_name(case_id, "case")

    def write(self, prepared: Prepared, key: str) -> None:
        """Writes a case with its label; the manifest goes first and comes back last.

        Raises:
            ValueError: the case has no label.
        """
        if prepared.label is None:
            raise ValueError(f"{prepared.case_id}: only cases with a label are stored")
        folder = self.folder(prepared.case_id)
        (folder / MANIFEST).unlink(missing_ok=True)
        arrays: dict[str, NDArray[Any]] = {"image.npy": prepared.image.numpy(), "label.npy": prepared.label}
        for value, voxels in prepared.foreground.items():
            arrays[f"foreground_{value}.npy"] = voxels.astype(np.int32)
        for left in folder.glob("*.npy"):  # of another plan, or a temporary file of a run that was killed
            if left.name not in arrays:
                left.unlink()
        for name, array in arrays.items():
            with replacing(folder / name) as temporary:
                np.save(temporary, np.ascontiguousarray(array), allow_pickle=False)
        sizes = {name: (folder / name).stat().st_size for name in arrays}
        write_json(folder / MANIFEST, {"key": key, "files": sizes})

    def complete(self, case_id: str, key: str) -> bool:
        """True when the case is whole and was made from what `key` stands for."""
        manifest = self._manifest(case_id)
        return manifest is not None and manifest["key"] == key and self._sizes_agree(case_id, manifest)

    def case_ids(self) -> tuple[str, ...]:
        """Names of the cases that have a manifest, sorted."""
        return tuple(sorted(path.parent.name for path in self.root.glob(f"*/{MANIFEST}")))

    def open(self, case_id: str, plan: Plan | None = None) -> StoredCase:
        """Maps a case. With a plan, it must be the one that the case was made by (the scans need not be there).

        Raises:
            InputError: the case was never finished, was made by another plan, or a file of it is damaged.
        """
        manifest = self._manifest(case_id)
        if manifest is None:
            raise InputError(f"{case_id}: not preprocessed in {self.root}; run preprocess again")
        if plan is not None and not manifest["key"].startswith(plan_key(plan)):
            raise InputError(f"{case_id}: preprocessed by another plan; run preprocess again")
        if not self._sizes_agree(case_id, manifest):
            raise InputError(f"{case_id}: a file in {self.folder(case_id)} is missing or cut; run preprocess again")
        image = self._read(case_id, "image.npy", np.dtype(np.float32), 4)
        label = self._read(case_id, "label.npy", np.dtype(np.int16), 3)
        if image.shape[1:] != label.shape:
            raise InputError(f"{case_id}: image {image.shape[1:]}, label {label.shape}; run preprocess again")
        foreground = {
            int(name.removeprefix("foreground_").removesuffix(".npy")): self._read(
                case_id, name, np.dtype(np.int32), 2, mapped=False
            )
            for name in sorted(manifest["files"])
            if name.startswith("foreground_")
        }
        return StoredCase(case_id=case_id, image=image, label=label, foreground=foreground)

    def _manifest(self, case_id: str) -> dict[str, Any] | None:
        """The manifest, or None where there is none that can be read."""
        try:
            manifest = read_json(self.folder(case_id) / MANIFEST)
        except (InputError, OSError):
            return None
        known = isinstance(manifest, dict) and isinstance(manifest.get("key"), str)
        return manifest if known and _plain_sizes(manifest.get("files")) else None

    def _sizes_agree(self, case_id: str, manifest: dict[str, Any]) -> bool:
        folder = self.folder(case_id)
        paths = ((folder / name, size) for name, size in manifest["files"].items())
        return all(path.is_file() and path.stat().st_size == size for path, size in paths)

    def _read(self, case_id: str, name: str, dtype: np.dtype[Any], rank: int, *, mapped: bool = True) -> NDArray[Any]:
        path = self.folder(case_id) / name
        try:
            array = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
        except _UNREADABLE as error:
            raise InputError(f"{case_id}: {path} is damaged ({_line(error)}); run preprocess again") from None
        if array.dtype != dtype or array.ndim != rank or not array.flags.c_contiguous:
            raise InputError(f"{case_id}: {path} holds {array.dtype} {array.shape}; run preprocess again")
        return np.asarray(array)


def stored_bytes(voxels: int, channels: int) -> int:
    """Disk that a case of so many resampled voxels takes: float32 channels and an int16 label."""
    return voxels * (4 * channels + 2)


def _plain_sizes(files: Any) -> bool:
    return (
        isinstance(files, dict)
        and {"image.npy", "label.npy"} <= set(files)
        and all(_is_ours(name) and isinstance(size, int) for name, size in files.items())
    )


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _is_ours(name: str) -> bool:
    value = name.removeprefix("foreground_").removesuffix(".npy")
    return name in ("image.npy", "label.npy") or (name == f"foreground_{value}.npy" and value.isdecimal())


def _line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
