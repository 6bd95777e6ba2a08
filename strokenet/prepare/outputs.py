"""Outputs: the files that a case leaves, and the row that its record holds.

Comes in: the folder and a case. Goes out: paths; the PreparedCase of an earlier run, where all of it is still there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from strokenet.data.errors import InputError
from strokenet.prepare.config import ENDING, SCANS, Name
from strokenet.prepare.quality import CaseQuality
from strokenet.prepare.record import read_record, record_path


@dataclass(frozen=True, kw_only=True)
class PreparedCase:
    """A row of the table. images: files written, in channel order. label: its file. missing: scans that are not there.

    channels: the scans of its cohort, which number the files.

    part: "Tr" where the case can train, else "Ts". label_ml: of the label as it was drawn and as it is written, and of
    what was carried outside the brain (the keys "given", "kept", "outside_brain"); None without a label.
    """

    case_id: str
    part: Literal["Tr", "Ts"]
    images: tuple[Path, ...]
    label: Path | None
    missing: tuple[str, ...]
    channels: tuple[Name, ...]
    quality: CaseQuality
    label_ml: dict[str, float] | None
    seconds: float
    cached: bool = False


def output_files(out: Path, case_id: str, part: str, channels: tuple[Name, ...]) -> dict[str, Path]:
    """Scan name, or "label" -> the file that it is written to."""
    images = {name: out / f"images{part}" / f"{case_id}_{n:04d}{ENDING}" for n, name in enumerate(channels)}
    return images | {"label": out / f"labels{part}" / f"{case_id}{ENDING}"}


def brain_path(out: Path, case_id: str) -> Path:
    """Where the brain mask on the prepared grid lies."""
    return out / "prepare" / f"{case_id}_brain{ENDING}"


def picture_path(out: Path, case_id: str) -> Path:
    """Where the picture of a case lies."""
    return out / "qc" / f"{case_id}.png"


def removed_files(out: Path, case_id: str) -> tuple[Path, ...]:
    """All that a case may leave, however many channels its cohort has; its record and its cache excepted."""
    parts = [output_files(out, case_id, part, SCANS).values() for part in ("Tr", "Ts")]
    return (*(path for files in parts for path in files), brain_path(out, case_id), picture_path(out, case_id))


def remove_outputs(out: Path, case_id: str) -> None:
    """Takes away what an earlier run left for this case, its cache and its record excepted."""
    for path in removed_files(out, case_id):
        path.unlink(missing_ok=True)


def earlier_cases(out: Path) -> tuple[PreparedCase, ...]:
    """The cases that earlier runs have finished in this folder, whose images are still there, sorted."""
    found = []
    for path in sorted((out / "prepare").glob("*.json")):
        try:
            row = replace(case_of(out, read_record(path)), cached=True)
        except (InputError, KeyError, TypeError, AttributeError, IndexError):
            continue  # not finished, or of another version
        if all(image.is_file() for image in row.images):
            found.append(row)
    return tuple(found)


def case_of(out: Path, record: dict[str, Any]) -> PreparedCase:
    """The row that a record holds."""
    outputs = {name: out / path for name, path in record["outputs"].items()}
    images = tuple(outputs[name] for name in SCANS if name in outputs)
    return PreparedCase(
        case_id=record["case"],
        part="Tr" if images[0].parent.name == "imagesTr" else "Ts",
        images=images,
        label=outputs.get("label"),
        missing=tuple(record["missing"]),
        channels=tuple(name for name in SCANS if name in outputs or name in record["missing"]),
        quality=CaseQuality(**record["quality"]),
        label_ml=record["label_ml"],
        seconds=sum(record["seconds"].values()),
    )


def earlier_case(out: Path, case_id: str, key: str) -> PreparedCase | None:
    """The row of an earlier run of the same files and settings, where all that it wrote is still there."""
    try:
        record = read_record(record_path(out, case_id))
        row = replace(case_of(out, record), cached=True)
    except (InputError, KeyError, TypeError, AttributeError, IndexError):
        return None
    files = [*row.images, row.label, brain_path(out, case_id), picture_path(out, case_id)]
    whole = all(path is None or path.is_file() for path in files)
    return row if whole and record.get("key") == key else None
