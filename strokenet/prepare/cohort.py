"""Cohort: many cases, each by prepare.py, as one nnU-Net raw folder.

    OUT/dataset.json   imagesTr/CASE_0000.nii.gz ...   labelsTr/CASE.nii.gz     cases that can train
    OUT/imagesTs, labelsTs      cases without a label, or without one of the scans: for `strokenet infer OUT/imagesTs`
    OUT/prepare.json            a row a case, with its flags, and the cases that failed, with the step
    OUT/prepare/CASE.json, CASE_brain.nii.gz, cache/      OUT/qc/CASE.png

Comes in: the CaseInputs. Goes out: a Preparation. Channels are the scans that the cohort has, T1 before FLAIR, the
first time before the second: a cohort of T1 alone has one channel. A case that fails does not stop the others.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from strokenet.prepare.outputs import PreparedCase, output_files, remove_outputs
from strokenet.prepare.prepare import StepFailed, prepare_case
from strokenet.prepare.quality import flag_outliers
from strokenet.prepare.record import record_path
from strokenet.preprocess.workers import CaseFailure, in_process, in_processes

LOST_ML = 0.05  # label outside the brain's box from here on is told
_Outcome = PreparedCase | StepFailed


@dataclass(frozen=True, kw_only=True)
class Failed:
    """A case that could not be prepared: the step, and why in one line."""

    case_id: str
    step: str
    error: str


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """cases: prepared, in the order of the inputs. failed: the others. flags: case id -> what to look at.

    channels: names in order.
    """

    cases: tuple[PreparedCase, ...]
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
        InputError: no case, two of one name, a mask given for several cases, or `out` holds files of others.
    """
    config = config or PrepareConfig()
    check_names(tuple(cases), "inputs")
    if isinstance(config.brain, Path) and len(cases) > 1:
        raise InputError(f"{config.brain}: one brain mask for {len(cases)} cases; give deepbet or none, or one case")
    channels: tuple[Name, ...] = tuple(name for name in SCANS if any(name in case.scans for case in cases))
    _check_outputs(cases, out, channels)
    function = partial(_attempt, out=out, config=config, channels=channels)
    items = {case.case_id: case for case in cases}
    workers = min(jobs, len(items))
    outcomes = in_processes(function, items, workers) if workers > 1 else in_process(function, items)
    done: dict[str, PreparedCase] = {}
    failed: dict[str, Failed] = {}
    with closing(outcomes):
        for case_id, outcome in track(outcomes, total=len(items), what="prepare"):
            result = outcome if isinstance(outcome, CaseFailure) else outcome.value
            if isinstance(result, PreparedCase):
                done[case_id] = result
            else:
                failed[case_id] = _failed(case_id, result)
    rows = tuple(done[case_id] for case_id in items if case_id in done)
    preparation = Preparation(
        cases=rows,
        failed=tuple(failed[case_id] for case_id in items if case_id in failed),
        flags=_flags(rows),
        channels=tuple(CHANNEL_NAMES[name] for name in channels),
    )
    write_json(out / "prepare.json", _to_json(preparation, out))
    if rows:
        write_json(out / "dataset.json", _description(preparation, out))
    return preparation


def _attempt(inputs: CaseInputs, out: Path, config: PrepareConfig, channels: tuple[Name, ...]) -> _Outcome:
    """The row, or the failure as a value: a worker's exception would lose the step."""
    try:
        return prepare_case(inputs, out, config, channels)
    except StepFailed as error:
        remove_outputs(out, inputs.case_id)  # of an earlier run: they are not what this one was asked for
        return error


def _failed(case_id: str, failure: StepFailed | CaseFailure) -> Failed:
    if isinstance(failure, StepFailed):
        return Failed(case_id=case_id, step=failure.step, error=failure.reason)
    return Failed(case_id=case_id, step="process", error=failure.message)


def _check_outputs(cases: Sequence[CaseInputs], out: Path, channels: tuple[Name, ...]) -> None:
    """Refuses to write over an input, or over a file that no earlier run left."""
    inputs = {path.resolve() for case in cases for path in (*case.scans.values(), case.label) if path is not None}
    for case in cases:
        for part in ("Tr", "Ts"):
            for path in output_files(out, case.case_id, part, channels).values():
                if path.resolve() in inputs:
                    raise InputError(f"{path}: the output would replace this input; choose another -o")
                if path.exists() and not record_path(out, case.case_id).exists():
                    raise InputError(f"{path}: is there, and no prepare/{case.case_id}.json; choose another -o")


def _flags(rows: Sequence[PreparedCase]) -> dict[str, tuple[str, ...]]:
    flags = flag_outliers([row.quality for row in rows])
    for row in rows:
        missing = tuple(f"{CHANNEL_NAMES[name]} is missing: the case is in imagesTs" for name in row.missing)
        lost = (f"{row.label_lost_ml:.2f} ml of the label lie outside the brain's box",)
        flags[row.case_id] += missing + (lost if row.label_lost_ml > LOST_ML else ())
    return flags


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
            "label_lost_ml": row.label_lost_ml,
            "seconds": row.seconds,
            "flags": list(preparation.flags[row.case_id]),
        }
        for row in preparation.cases
    ]
    failed = [
        {"case": row.case_id, "status": "failed", "step": row.step, "error": row.error} for row in preparation.failed
    ]
    return {"channels": list(preparation.channels), "cases": rows + failed}
