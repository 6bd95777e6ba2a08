"""Claim: what a folder of results holds, written there first, so that no run goes on in the folder of another.

Comes in: the folder and all that its numbers depend on, as JSON values. Goes out: OUT/NAME.json, or a refusal.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from strokenet.data.errors import InputError
from strokenet.data.files import read_json, write_json

ROOT = Path(__file__).resolve().parents[2]


def claim(out: Path, name: str, asked: Mapping[str, Any]) -> None:
    """Writes OUT/name on the first run, and compares it on every other.

    Raises:
        InputError: `out` holds a run with another setting, which is named, or files of others.
    """
    path = out / name
    if not path.is_file():
        if out.is_dir() and any(out.iterdir()):
            raise InputError(f"{out}: is not empty and holds no earlier run; choose another folder")
        write_json(path, dict(asked))
        return
    before, now = read_json(path), json.loads(json.dumps(asked))  # as it comes back from a file: tuples are lists
    if changed := [name for name in now if before.get(name) != now[name]]:
        raise InputError(f"{out}: holds a run with another {', '.join(changed)}; choose another folder")


def digest_of_sizes(folder: Path) -> str:
    """Names and sizes of a folder's files: another set of them, or one that was replaced, is another."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return _digest(f"{path.relative_to(folder)} {path.stat().st_size}" for path in files)


def digest_of_code(rooms: Iterable[str]) -> str:
    """Every source in these folders of the project: stages of two versions of it are not one experiment."""
    files = sorted(path for room in rooms for path in (ROOT / room).rglob("*.py"))
    return _digest(f"{path.relative_to(ROOT)} {path.read_text()}" for path in files)


def _digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
