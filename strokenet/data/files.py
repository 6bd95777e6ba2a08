"""Files: atomic writes and names that are safe to use as file names. The ground floor of the data station.

A reader of any file of ours sees the old content or the new one, never a half: the bytes go to a temporary name in the
same folder, are flushed to the disk, and take the final name in one rename.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from strokenet.data.errors import InputError

MAX_JSON_BYTES = 64 * 2**20
_RESERVED = {"con", "prn", "aux", "nul", *(f"{d}{i}" for d in ("com", "lpt") for i in range(1, 10))}


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yields a temporary path beside `path`; what was written there becomes `path` when the block ends well.

    The temporary name keeps the ending of `path`. On an error the temporary file is removed and `path` is untouched.
    durable: flush file and folder to the disk before and after the rename (False where only atomicity matters).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(6)}.{path.name}")
    try:
        yield temporary
        if durable:
            _flush(temporary)
        os.replace(temporary, path)
        if durable:
            _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `path`, which becomes `path` when the block ends well, and is gone otherwise.

    So are the folders above that were made for it. The caller flushes what it writes; here the rename is flushed.

    Raises:
        InputError: `path` is there and not an empty folder, is where the command runs, or its place cannot be written.
    """
    final = Path(os.path.abspath(path))  # "." and ".." have no name to put a temporary one beside
    temporary = final.with_name(f".{secrets.token_hex(6)}.{final.name}")
    made: list[Path] = []
    try:
        _require_free(final, path)
        made = [folder for folder in final.parents if not folder.exists()]
        temporary.mkdir(parents=True)
        yield temporary
        _flush(temporary)
        os.replace(temporary, final)
        _flush(final.parent)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error}); choose another -o") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for folder in made:
            with suppress(OSError):  # not empty: all went well, or someone else has put something there; or never made
                folder.rmdir()


def _require_free(folder: Path, given: Path) -> None:
    if folder.exists() and folder.samefile(Path.cwd()):
        raise InputError(f"{given}: is the folder that the command runs in; give the name of a new one as -o")
    empty = folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir())
    if os.path.lexists(folder) and not empty:
        raise InputError(f"{given}: is there already; choose another -o or remove it first")


def write_bytes(path: Path, content: bytes | memoryview, *, durable: bool = True) -> None:
    """Writes `content` to `path` atomically."""
    with replacing(path, durable=durable) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically. NaN and infinity are refused: JSON has none."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
        InputError: the file is missing, no regular file, larger than 64 MiB, or no JSON.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path}: is no regular file; give the path of a JSON file")
        if status.st_size > MAX_JSON_BYTES:
            raise InputError(f"{path}: larger than {MAX_JSON_BYTES // 2**20} MiB; a description file is smaller")
        content = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: not found; check the path") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from None
    try:
        return json.loads(content.decode("utf-8-sig"))  # some editors write a byte order mark
    except (ValueError, RecursionError) as error:  # ValueError: no UTF-8, no JSON, a number of 5000 digits
        raise InputError(f"{path}: no valid JSON ({error}); mend or recreate it") from None


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from None


def safe_name(name: str, what: str) -> str:
    """`name` when it can be a file's name on every system, else InputError.

    Refused: empty, over 200 bytes of UTF-8, path separators, `..`, a leading dot, control characters, reserved names.
    """
    problem = _name_problem(name)
    if problem:
        raise InputError(f"{what} {name!r} {problem}; rename it (letters, digits, '-', '_', '.' are always fine)")
    return name


def _name_problem(name: object) -> str | None:
    if not isinstance(name, str):
        return "is no text"
    if not name or name != name.strip():
        return "is empty or has surrounding blanks"
    if not name.isprintable():  # also lone surrogates, line separators and marks that reverse the direction of a name
        return "holds control characters"
    if len(name.encode()) > 200:  # systems allow 255, and endings and temporary names need their share
        return "has more than 200 bytes"
    if any(c in name for c in '/\\:*?"<>|') or name.startswith("."):
        return "holds a character that is not allowed in a file name"
    if name.split(".")[0].casefold() in _RESERVED:
        return "is a reserved name"
    return None


def _flush(path: Path) -> None:
    """fsync of a file or folder. A folder cannot be opened everywhere (Windows): then the rename is all we have."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
