"""Inputs: which scans belong to which case, in the three ways that they are given.

    --t1 F --flair F [--label F] [--case NAME]    one case
    FOLDER/PATIENT/{t1,flair,label}.nii.gz        a case a sub-folder (or .nii)
    TABLE.csv                                     columns case, t1, flair, label in any order; an empty cell is missing
    --t1-2, --flair-2; t1_2, flair_2              in each way: the scans of a second time, label is then what changed

Comes in: paths. Goes out: a CaseInputs each; no scan is opened. A case needs one scan of the first time at least: what
else is missing is recorded by prepare, not refused. Paths of a table are relative to the table's own folder.
"""

from __future__ import annotations

import csv
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from strokenet.data.description import ENDINGS
from strokenet.data.errors import InputError
from strokenet.data.files import safe_name
from strokenet.prepare.config import SCANS

COLUMNS = ("case", "t1", "flair", "label", "t1_2", "flair_2")
MAX_TABLE_BYTES = 16 * 2**20
SHOWN = 4  # files in a message
_log = logging.getLogger("strokenet")


@dataclass(frozen=True, kw_only=True)
class CaseInputs:
    """The files of one examination. t1, flair: at least one of them. label: None where there is none.

    t1_2, flair_2: of a second time, where there is one.
    """

    case_id: str
    t1: Path | None = None
    flair: Path | None = None
    label: Path | None = None
    t1_2: Path | None = None
    flair_2: Path | None = None

    def __post_init__(self) -> None:
        safe_name(self.case_id, "case")
        if self.t1 is None and self.flair is None:
            raise InputError(f"{self.case_id}: neither t1 nor flair is given; at least one scan is needed")

    @property
    def scans(self) -> dict[str, Path]:
        """Name -> file of the scans that are there, in the order of SCANS."""
        return {name: path for name in SCANS if (path := getattr(self, name)) is not None}


def read_inputs(source: Path) -> tuple[CaseInputs, ...]:
    """The cases of a folder of patients or of a table.

    Raises:
        InputError: it is neither, holds no case, or names one twice.
    """
    if source.is_dir():
        cases = _folder_cases(source)
    elif source.suffix.lower() == ".csv":
        cases = _table_cases(source)
    else:
        raise InputError(
            f"{source}: is neither a folder of PATIENT/{{t1,flair,label}}.nii.gz nor a .csv table with the columns "
            f"{','.join(COLUMNS)}; give one, or single files by --t1 and --flair"
        )
    return check_names(cases, str(source))


def one_case(scans: Mapping[str, Path], label: Path | None = None, case_id: str | None = None) -> tuple[CaseInputs]:
    """The case of single files. scans: name -> file.

    Where no name is given it is the first file's, or of PATIENT/t1.nii.gz the patient's.

    Raises:
        InputError: no scan of the first time is given, or the name is not one that a file may have.
    """
    first = scans.get("t1") or scans.get("flair")
    if first is None:
        raise InputError("neither t1 nor flair is given; at least one scan is needed")
    ending = next((end for end in ENDINGS if first.name.endswith(end)), first.suffix)
    stem = first.name.removesuffix(ending)
    if stem.lower() in SCANS:  # PATIENT/t1.nii.gz: every patient's is named so
        stem = first.absolute().parent.name
    name = case_id if case_id is not None else stem
    return (CaseInputs(case_id=name, label=label, **scans),)


def check_names(cases: tuple[CaseInputs, ...], where: str) -> tuple[CaseInputs, ...]:
    """The cases, when there is one and no two have one name.

    Raises:
        InputError: beginning with `where`.
    """
    if not cases:
        raise InputError(f"{where}: holds no case; PATIENT/t1.nii.gz or PATIENT/flair.nii.gz are needed")
    name, times = Counter(case.case_id.casefold() for case in cases).most_common(1)[0]
    if times > 1:  # "A" and "a" are one file on macOS and Windows
        raise InputError(f"{where}: {times} cases are named {name} (small and capital letters count as one); rename")
    return cases


def _folder_cases(folder: Path) -> tuple[CaseInputs, ...]:
    found = []
    for patient in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        files = {name: _scan(patient, name) for name in COLUMNS[1:]}
        if any(files[name] for name in SCANS):
            found.append(CaseInputs(case_id=patient.name, **files))
        elif others := sorted(path.name for path in patient.iterdir() if path.name.lower().endswith(ENDINGS)):
            _log.warning(
                "%s: left out: it holds %s, but no t1.nii.gz and no flair.nii.gz; rename its files, or name them in a "
                "table",
                *(patient, ", ".join(others[:SHOWN]) + (" ..." if len(others) > SHOWN else "")),
            )
    return tuple(found)


def _scan(patient: Path, name: str) -> Path | None:
    """PATIENT/name.nii.gz or .nii, whatever the case of its letters."""
    found = [path for path in sorted(patient.iterdir()) if path.name.lower() in {name + end for end in ENDINGS}]
    if len(found) > 1:
        raise InputError(f"{patient}: {found[0].name} and {found[1].name} are both the {name}; keep one of them")
    return found[0] if found else None


def _table_cases(table: Path) -> tuple[CaseInputs, ...]:
    try:
        if table.stat().st_size > MAX_TABLE_BYTES:
            raise InputError(f"{table}: larger than {MAX_TABLE_BYTES // 2**20} MiB; split it")
        lines = table.read_text(encoding="utf-8-sig").splitlines()  # some editors write a byte order mark
    except OSError as error:
        raise InputError(f"{table}: cannot be read ({error.strerror}); check the path and its permissions") from None
    except UnicodeDecodeError:
        raise InputError(f"{table}: is no UTF-8 text; save it as CSV (UTF-8)") from None
    separator = ";" if lines and ";" in lines[0] else ","  # spreadsheets write ";" where "," is the decimal mark
    try:
        rows = list(csv.DictReader(lines, delimiter=separator, strict=True))
    except csv.Error as error:
        raise InputError(f"{table}: no valid CSV ({error}); save it again") from None
    return tuple(_row_case(table, number, row) for number, row in enumerate(rows, start=2))


def _row_case(table: Path, number: int, row: Mapping[str | None, str | list[str] | None]) -> CaseInputs:
    where = f"{table}, line {number}"
    if None in row or None in row.values():
        raise InputError(f"{where}: has more or fewer cells than the header; complete it")
    cells = {str(name).strip().casefold(): str(cell).strip() for name, cell in row.items()}
    spare = sorted(set(cells) - set(COLUMNS))
    if spare or "case" not in cells:
        raise InputError(f"{table}: columns {', '.join(cells)}; allowed: {', '.join(COLUMNS)}, with case; correct them")
    files = {name: table.parent / cells[name] for name in COLUMNS[1:] if cells.get(name)}
    missing = next((path for path in files.values() if not path.is_file()), None)
    if missing is not None:
        raise InputError(f"{where}: {missing} not found; correct the path or leave the cell empty")
    try:
        return CaseInputs(case_id=cells["case"], **files)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
