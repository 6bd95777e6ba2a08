"""Cohort: many cases, each by prepare.py, as one nnU-Net raw folder.

    OUT/dataset.json   imagesTr/CASE_0000.nii.gz ...   labelsTr/CASE.nii.gz     cases that can train
    OUT/imagesTs, labelsTs      cases without a label, or without one of the scans: for `strokenet infer OUT/imagesTs`
    OUT/prepare.json            a row a case, with its flags, and the cases that failed, with the step
    OUT/prepare/CASE.json, CASE_brain.nii.gz, cache/      OUT/qc/CASE.png

Comes in: the CaseInputs. Goes out: a Preparation. Channels are the scans that the cohort has, T1 before FLAIR, the
first time before the second: a cohort of T1 alone has one channel. A case that fails does not stop the others. Cases
that earlier runs have put into OUT stay in it, in its tables, and must have the same channels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from strokenet.data.errors import InputError
from strokenet.data.files import write_json
from strokenet.data.track import Track, silent
from strokenet.prepare.config import CHANNEL_NAMES, ENDING, LABELS, SCANS, Name, PrepareConfig
from strokenet.prepare.inputs import CaseInputs, check_names
from strokenet.prepare.outputs import PreparedCase, earlier_cases, remove_outputs, removed_files
from strokenet.prepare.prepare import StepFailed, prepare_case
from strokenet.prepare.quality import flag_outliers
from strokenet.prepare.record import record_path
from strokenet.preprocess.workers import CaseFailure, in_process, in_processes

LOST_ML = 0.05  # of the label, from here on it is told
CHANGED = 0.2  # and so is a label whose volume differs by more than this share from what was drawn
SHOWN = 5  # names in a message
_log = logging.getLogger("strokenet")
_Outcome = PreparedCase | StepFailed


@dataclass(frozen=True, kw_only=True)
class Failed:
    """A case that could not be prepared: the step, and why in one line."""

    case_id: str
    step: str
    error: str


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """cases: prepared, in the order of the inputs. failed: the others. earlier: of earlier runs into the same folder.

    flags: case id -> what to look at, of cases and earlier ones. channels: names in order.
    """

    cases: tuple[PreparedCase, ...]
    earlier: tuple[PreparedCase, ...]
    failed: tuple[Failed, ...]
    flags: dict[str, tuple[str, ...]]
    channels: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        """0 all good, 3 some cases failed, 4 none succeeded."""
        return 0 if not self.failed else 3 if self.cases else 4


def prepare_cohort(
    cases: Sequence[CaseInputs],
    out: Path,
    config: PrepareConfig | None = None,
    *,
    jobs: int = 1,
    track: Track = silent,
) -> Preparation:
    """Prepares every case into `out`, and describes the folder in dataset.json and prepare.json.

    Args:
        jobs: worker processes; each takes about 2 GB and one thread beside torch's.

    Raises:
        InputError: no case, two of one name, a mask given for several cases, or `out` holds files of others or cases
            with other channels.
    """
    config = config or PrepareConfig()
    check_names(tuple(cases), "inputs")
    if isinstance(config.brain, Path) and len(cases) > 1:
        raise InputError(f"{config.brain}: one brain mask for {len(cases)} cases; give deepbet or none, or one case")
    _check_outputs(cases, out, config)
    earlier = _earlier(cases, out)
    channels = _channels(cases, out, earlier)
    results = _run(cases, partial(_attempt, out=out, config=config, channels=channels), jobs, track)
    failed = tuple(result for result in results if isinstance(result, Failed))
    for case in failed:
        _withdraw(out, case.case_id)  # also where a worker was killed
    rows = tuple(result for result in results if isinstance(result, PreparedCase))
    preparation = Preparation(
        cases=rows,
        failed=failed,
        earlier=earlier,
        flags=_flags((*rows, *earlier)),
        channels=tuple(CHANNEL_NAMES[name] for name in channels),
    )
    write_json(out / "prepare.json", _to_json(preparation, out))
    if rows or earlier:
        write_json(out / "dataset.json", _description(preparation, out))
    return preparation


def _run(
    cases: Sequence[CaseInputs], function: Callable[[CaseInputs], _Outcome], jobs: int, track: Track
) -> tuple[PreparedCase | Failed, ...]:
    """What became of every case, in their order."""
    items = {case.case_id: case for case in cases}
    workers = min(jobs, len(items))
    outcomes = in_processes(function, items, workers) if workers > 1 else in_process(function, items)
    results: dict[str, PreparedCase | Failed] = {}
    with closing(outcomes):
        for case_id, outcome in track(outcomes, total=len(items), what="prepare"):
            result = outcome if isinstance(outcome, CaseFailure) else outcome.value
            results[case_id] = result if isinstance(result, PreparedCase) else _failed(case_id, result)
    return tuple(results[case_id] for case_id in items)


def _attempt(inputs: CaseInputs, out: Path, config: PrepareConfig, channels: tuple[Name, ...]) -> _Outcome:
    """The row, or the failure as a value: a worker's exception would lose the step."""
    try:
        return prepare_case(inputs, out, config, channels)
    except StepFailed as error:
        return error


def _failed(case_id: str, failure: StepFailed | CaseFailure) -> Failed:
    if isinstance(failure, StepFailed):
        return Failed(case_id=case_id, step=failure.step, error=failure.reason)
    return Failed(case_id=case_id, step="process", error=failure.message)


def _withdraw(out: Path, case_id: str) -> None:
    """Takes away what a case has left that failed now, of an earlier run, too: it is not what was asked for."""
    remove_outputs(out, case_id)
    record_path(out, case_id).unlink(missing_ok=True)


def _check_outputs(cases: Sequence[CaseInputs], out: Path, config: PrepareConfig) -> None:
    """Refuses to remove or replace an input, or a file that no earlier run left."""
    if (out / "dataset.json").exists() and not (out / "prepare.json").exists():
        raise InputError(f"{out / 'dataset.json'}: is there, and no prepare.json of ours beside it; choose another -o")
    given = [path for case in cases for path in (*case.scans.values(), case.label, config.brain)]
    inputs = {path.resolve() for path in given if isinstance(path, Path)}
    for case in cases:
        for path in removed_files(out, case.case_id):
            if path.resolve() in inputs:
                raise InputError(f"{path}: the output would replace this input; choose another -o, or copy it first")
            if path.exists() and not record_path(out, case.case_id).exists():
                raise InputError(f"{path}: is there, and no prepare/{case.case_id}.json; choose another -o")


def _earlier(cases: Sequence[CaseInputs], out: Path) -> tuple[PreparedCase, ...]:
    """The cases of earlier runs that are none of these; they are named, for they will train, too."""
    now = {case.case_id for case in cases}
    rows = tuple(row for row in earlier_cases(out) if row.case_id not in now)
    if rows:
        names = ", ".join(row.case_id for row in rows[:SHOWN]) + (" ..." if len(rows) > SHOWN else "")
        _log.warning(
            "%s: keeps the cases of earlier runs, %d: %s; where not wanted, remove their files or choose another -o",
            *(out, len(rows), names),
        )
    return rows


def _channels(cases: Sequence[CaseInputs], out: Path, earlier: Sequence[PreparedCase]) -> tuple[Name, ...]:
    """The scans of the folder: of these cases, or where others are in it already, theirs.

    Raises:
        InputError: a scan is given that those do not have; their files are numbered without it.
    """
    wanted: tuple[Name, ...] = tuple(name for name in SCANS if any(name in case.scans for case in cases))
    if not earlier:
        return wanted
    there = earlier[0].channels
    if not set(wanted) <= set(there):
        old, new = (", ".join(CHANNEL_NAMES[name] for name in names) for names in (there, wanted))
        raise InputError(
            f"{out}: holds {len(earlier)} other cases with channels {old}; these have {new}; choose another -o, or "
            "prepare all of them in one run"
        )
    return there


def _flags(rows: Sequence[PreparedCase]) -> dict[str, tuple[str, ...]]:
    flags = flag_outliers([row.quality for row in rows])
    for row in rows:
        flags[row.case_id] += tuple(f"{CHANNEL_NAMES[n]} is missing: the case is in imagesTs" for n in row.missing)
        flags[row.case_id] += _label_flags(row.label_ml)
    return flags


def _label_flags(ml: Mapping[str, float] | None) -> tuple[str, ...]:
    """What has become of a label on its way to the grid, and to the brain."""
    lines = []
    if ml is not None and ml["outside_brain"] > LOST_ML:
        lines.append(f"{ml['outside_brain']:.2f} ml of the label lie outside the brain, where the scans are 0")
    if ml is not None and ml["given"] > 0 == ml["kept"]:
        lines.append(f"nothing is left of the label, {ml['given']:.2f} ml: the case says that there is no lesion")
    elif ml is not None and abs(ml["kept"] - ml["given"]) > max(LOST_ML, CHANGED * ml["given"]):
        lines.append(f"the label has {ml['kept']:.2f} ml on the new grid; {ml['given']:.2f} ml were drawn")
    return tuple(lines)


def _description(preparation: Preparation, out: Path) -> dict[str, Any]:
    return {
        "channel_names": {str(n): name for n, name in enumerate(preparation.channels)},
        "labels": LABELS,
        "numTraining": len(list((out / "labelsTr").glob(f"*{ENDING}"))),
        "file_ending": ENDING,
        "description": "prepared by strokenet: registered, brain extracted, bias corrected, cropped",
    }


def _to_json(preparation: Preparation, out: Path) -> dict[str, Any]:
    rows = [
        {
            "case": row.case_id,
            "status": "ok",
            "part": row.part,
            "images": [path.relative_to(out).as_posix() for path in row.images],
            "missing": list(row.missing),
            **{name: value for name, value in asdict(row.quality).items() if name != "case_id"},
            "label_ml": row.label_ml,
            "seconds": row.seconds,
            "flags": list(preparation.flags[row.case_id]),
        }
        for row in (*preparation.cases, *preparation.earlier)
    ]
    failed = [
        {"case": row.case_id, "status": "failed", "step": row.step, "error": row.error} for row in preparation.failed
    ]
    return {"channels": list(preparation.channels), "cases": rows + failed}
