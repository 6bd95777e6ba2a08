"""Outputs: the files that inference leaves for a case, and the promises about them.

    OUT/CASE.nii.gz                  the mask
    OUT/results.json                 every case's status, volume and error; cases of earlier runs keep their rows
    OUT/manifest/CASE.json           what they were made from (manifest.py)
    OUT/native/CASE.nii.gz           on request: the mask on the voxels of the scan that `strokenet prepare` was given
    OUT/probabilities/CASE.nii.gz    on request: the lesion's probability; with several labels CASE_labelN.nii.gz each

Never over an input, never half-written, and nothing of an earlier run under the name of a case that is segmented now.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.plan import Plan
from strokenet.data.case import Case
from strokenet.data.dataset import CaseFiles
from strokenet.data.errors import InputError
from strokenet.data.files import read_json, safe_name
from strokenet.data.header import Header
from strokenet.data.nifti import write_mask, write_probability
from strokenet.infer.manifest import is_ours, manifest_path, manifests
from strokenet.prepare.itk import sitk
from strokenet.prepare.record import native_name, read_record, record_path

RESULTS = "results.json"
_LABEL = re.compile(r"_label[0-9]+$")
MASK, NATIVE = 0, -1  # keys of the masks among a case's files; the other keys are label values


def output_files(out: Path, case_id: str, plan: Plan) -> dict[int, Path]:
    """Every file that a case may leave: its masks, and label value -> that label's probability map."""
    single = len(plan.foreground) == 1
    names = {value: case_id if single else f"{case_id}_label{value}" for value in plan.foreground}
    maps = {value: out / "probabilities" / f"{name}.nii.gz" for value, name in names.items()}
    masks = {MASK: out / f"{case_id}.nii.gz", NATIVE: out / "native" / f"{case_id}.nii.gz"}
    return masks | maps


def earlier_rows(out: Path) -> dict[str, dict[str, Any]]:
    """The rows of all runs into `out`, by case: of its manifests, and of results.json where a case has none."""
    return result_rows(out) | _by_case(manifests(out))


def result_rows(out: Path) -> dict[str, dict[str, Any]]:
    """The rows of the results.json that lies in `out`, by case; none where there is no such file of ours."""
    try:
        content = read_json(out / RESULTS)
    except (InputError, OSError):
        return {}
    rows = content.get("cases") if isinstance(content, dict) else None
    return _by_case(rows) if isinstance(rows, list) else {}


def _by_case(rows: Sequence[Any]) -> dict[str, dict[str, Any]]:
    known = [row for row in rows if isinstance(row, dict) and isinstance(row.get("status"), str)]
    return {row["case"]: row for row in known if isinstance(row.get("case"), str)}


def check_names(inputs: Sequence[CaseFiles]) -> None:
    """Refuses a run that would write one file twice, or leave the folder of its outputs.

    Raises:
        InputError: no case, a case id that is no file name, or two cases of one name.
    """
    if not inputs:
        raise InputError("no case to segment; give at least one")
    for files in inputs:
        safe_name(files.case_id, "case")
    # "A" and "a" are one file on macOS and Windows
    name, times = Counter(files.case_id.casefold() for files in inputs).most_common(1)[0]
    if times > 1:
        raise InputError(f"case {name}: {times} cases have this name (small and capital letters count as one); rename")


def check_outputs(inputs: Sequence[CaseFiles], out: Path, plan: Plan) -> None:
    """Refuses a run that would replace an input, or a file of a case that no run of ours knows.

    Raises:
        InputError: an output that is an input, or a file under an output's name whose case nothing in `out` names.
    """
    images = {_identity(image): image for files in inputs for image in files.images if image.exists()}
    ours = earlier_rows(out)
    for files in inputs:
        for path in output_files(out, files.case_id, plan).values():
            if path.exists() and _identity(path) in images:
                raise InputError(f"{images[_identity(path)]}: the output would replace this input; choose another -o")
            if path.exists() and files.case_id not in ours:
                raise InputError(f"{path}: is there, and {RESULTS} beside it names no such case; choose another -o")


def foreign_file(out: Path, case_id: str, plan: Plan) -> Path | None:
    """A file under the name of an output that is not as a run of ours has left it: someone's work; None: there is none.

    A mask that an expert has corrected, or drawn where a case had failed; and all of an older version's, which kept no
    manifests and cannot tell.
    """
    there = (path for path in output_files(out, case_id, plan).values() if path.exists())
    return next((path for path in there if not is_ours(out, case_id, path)), None)


def remove_outputs(out: Path, case_id: str, plan: Plan) -> None:
    """Takes away whatever lies under the names of a case's outputs, and its manifest."""
    for path in (*output_files(out, case_id, plan).values(), manifest_path(out, case_id)):
        path.unlink(missing_ok=True)


def remove_maps_of_other_labels(out: Path, inputs: Sequence[CaseFiles]) -> None:
    """Takes away the probability maps of these cases, also those of a model with more labels, or with one."""
    now = {files.case_id for files in inputs}
    known = now | set(earlier_rows(out))
    for path in (out / "probabilities").glob("*.nii.gz"):
        stem = path.name.removesuffix(".nii.gz")
        if stem in now or (stem not in known and _LABEL.sub("", stem) in now):
            path.unlink(missing_ok=True)


def write_outputs(
    out: Path,
    case: Case,
    mask: NDArray[np.uint8],
    probability: NDArray[np.float32] | None,
    plan: Plan,
    native: tuple[NDArray[np.uint8], Header] | None = None,
) -> tuple[Path, ...]:
    """Writes what is given of the probability maps and the native mask, and then the mask: where it is, all is.

    mask: (D, H, W). probability: (K, D, H, W), background first. native: (D, H, W) with the header of its own grid.
    Returns the files that it wrote.
    """
    files = output_files(out, case.case_id, plan)
    written = [*(plan.foreground if probability is not None else ()), *([NATIVE] if native else []), MASK]
    if probability is not None:
        for value in plan.foreground:
            write_probability(files[value], probability[value], case.header)
    if native is not None:
        write_mask(files[NATIVE], *native)
    write_mask(files[MASK], mask, case.header)
    return tuple(files[key] for key in written)


def require_records(inputs: Sequence[CaseFiles], scan: str | None) -> None:
    """Refuses --native where every case would fail.

    Raises:
        InputError: SimpleITK is not installed, no case comes from `strokenet prepare`, or none has the named scan.
    """
    sitk()
    problems = []
    for files in inputs:
        try:
            prepared_record(files, scan)
            return
        except InputError as error:
            problems.append(error)
    raise problems[0]


def record_of(files: CaseFiles) -> Path:
    """Where `strokenet prepare` leaves the record of a case beside its scans."""
    return record_path(files.images[0].absolute().parent.parent, files.case_id)


def prepared_record(files: CaseFiles, scan: str | None) -> dict[str, Any]:
    """What `strokenet prepare` has recorded of a case: the way back to the scan as it was given (Meddahi 2024, IV.D).

    Args:
        scan: the one to whose grid the mask will go; None: the reference.

    Raises:
        InputError: the case has no record, a damaged one, or no such scan.
    """
    path = record_of(files)
    if not path.is_file():
        raise InputError(f"--native: {path} is not there; give scans where `strokenet prepare` left them")
    record = read_record(path)
    native_name(record, scan)
    return record


def _identity(path: Path) -> tuple[int, int]:
    """Device and inode: one file whatever links and spellings lead to it."""
    status = path.stat()
    return status.st_dev, status.st_ino
