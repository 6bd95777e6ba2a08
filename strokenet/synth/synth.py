"""Synth: a semi-synthetic stroke cohort as a folder.

    atlas    OUT/dataset.json  imagesTr/CASE_0000.nii.gz (T1)  labelsTr/CASE.nii.gz     an nnU-Net raw folder
    clinic   OUT/patients/CASE/{t1,flair,label}.nii.gz          the folder that `strokenet prepare OUT/patients` takes
    both     OUT/cohort.json (what was drawn and achieved)  OUT/truth/CASE.json
    clinic   OUT/truth/CASE_{t1,flair}_{brain,bias}.nii.gz, and in CASE.json the matrix from FLAIR to T1
    times 2  OUT/patients/CASE/{t1_2,flair_2}.nii.gz, their truth, whether and how the case changed; label is the change

Comes in: a SynthConfig. Goes out: a SynthCohort. The clinic's T1 and FLAIR lie on two grids, which an nnU-Net raw
folder does not allow: its cases are written as `prepare` takes them, and `prepare` writes the raw folder. The folder
appears whole or not at all. Its heads are real only in their shape: they prove a method, and nothing about patients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from strokenet.data.description import ENDINGS
from strokenet.data.errors import InputError
from strokenet.data.files import new_folder, write_json
from strokenet.data.nifti import header_of, write_image, write_mask
from strokenet.data.track import Track, silent
from strokenet.preprocess.jobs import for_each_case, worker_count
from strokenet.synth.burden import Achieved, Burden, achieved, draw_burden
from strokenet.synth.signal import Domain
from strokenet.synth.styles import STYLES, CaseRecipe, Style, SynthCase, draw_synth_case

LABELS = {"background": 0, "lesion": 1}
ENDING = ".nii.gz"
CASE_BYTES = 1_200 * 2**20  # memory that a case takes at its peak
DOMAINS: tuple[Domain, ...] = ("natural", "random")


@dataclass(frozen=True, kw_only=True)
class SynthConfig:
    """cases: how many. label_maps, lesions: folders; None: drawn heads, drawn strokes. seed: of the whole cohort.

    times: examinations of a patient, 2 in style clinic alone.
    """

    cases: int
    style: Style = "atlas"
    domain: Domain = "natural"
    label_maps: Path | None = None
    lesions: Path | None = None
    times: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.cases < 1 or self.seed < 0:
            raise InputError(f"{self.cases} cases, seed {self.seed}; at least 1 and 0 are needed")
        if self.style not in STYLES:
            raise InputError(f"style {self.style!r}; allowed: {', '.join(STYLES)}")
        if self.domain not in DOMAINS:
            raise InputError(f"domain {self.domain!r}; allowed: {', '.join(DOMAINS)}")
        if self.times not in (1, 2) or (self.times == 2 and self.style != "clinic"):
            raise InputError(f"{self.times} times in style {self.style}; allowed: 1, and in style clinic 2")


@dataclass(frozen=True, kw_only=True)
class SynthRow:
    """One case as it was written. burden, volume_ml: of the strokes of the first time, drawn from Table I and marked.

    changed_ml: new tissue of the second time, 0 in an unchanged case; None with one time.
    """

    case_id: str
    burden: Burden
    volume_ml: float
    changed_ml: float | None = None


@dataclass(frozen=True, kw_only=True)
class SynthCohort:
    """root: the folder. rows: a case each, in order. achieved: to be seen beside Table I."""

    root: Path
    rows: tuple[SynthRow, ...]
    achieved: Achieved


def synthesise(root: Path, config: SynthConfig, *, jobs: int | None = None, track: Track = silent) -> SynthCohort:
    """Draws the cohort into `root`, which appears when all cases are written.

    Args:
        jobs: worker processes; None: one a CPU, fewer where memory is short. The cohort does not depend on it.

    Raises:
        InputError: the folder is there and not empty, or holds no label map or mask where one was named.
        CasesFailed: a case could not be drawn; nothing is left.
    """
    items = {recipe.case_id: recipe for recipe in recipes(config)}
    with new_folder(root) as folder:
        workers = worker_count(jobs, len(items), CASE_BYTES)
        volumes = for_each_case(partial(_make, root=folder), items, jobs=workers, what="draw", track=track)
        rows = tuple(
            SynthRow(
                case_id=case_id, burden=recipe.burden, volume_ml=volumes[case_id][0], changed_ml=volumes[case_id][1]
            )
            for case_id, recipe in items.items()
        )
        cohort = SynthCohort(root=root, rows=rows, achieved=_achieved(rows))
        write_json(folder / "cohort.json", _to_json(cohort, config))
        if config.style == "atlas":
            write_json(folder / "dataset.json", _description(config))
    return cohort


def recipes(config: SynthConfig) -> tuple[CaseRecipe, ...]:
    """What every case is made from; a case is the same in a longer cohort."""
    heads = _scans(config.label_maps, "FreeSurfer label map") if config.label_maps is not None else ()
    masks = _scans(config.lesions, "lesion mask in MNI space") if config.lesions is not None else ()
    return tuple(
        CaseRecipe(
            case_id=f"{config.style}_{index:04d}",
            style=config.style,
            domain=config.domain,
            seed=config.seed,
            index=index,
            burden=draw_burden(config.seed, index),
            label_maps=heads,
            masks=masks,
            times=config.times,
        )
        for index in range(config.cases)
    )


def _scans(folder: Path, what: str) -> tuple[Path, ...]:
    """The NIfTI files of a folder and its sub-folders, sorted."""
    found = tuple(path for path in sorted(folder.rglob("*")) if path.name.lower().endswith(tuple(ENDINGS)))
    if not found:
        raise InputError(f"{folder}: holds no {what} (.nii.gz or .nii); give a folder of them")
    return found


def write_synth_case(root: Path, case_id: str, case: SynthCase) -> None:
    """The files of one case, each atomically."""
    headers = {name: header_of(scan.geometry) for name, scan in case.scans.items()}
    truth = root / "truth"
    if not case.matrices:
        write_image(root / "imagesTr" / f"{case_id}_0000{ENDING}", case.scans["t1"].image, headers["t1"])
        write_mask(root / "labelsTr" / f"{case_id}{ENDING}", case.label, headers["t1"])
        write_json(truth / f"{case_id}.json", {"case": case_id, **case.facts})
        return
    patient = root / "patients" / case_id
    for name, scan in case.scans.items():
        write_image(patient / f"{name}{ENDING}", scan.image, headers[name])
        write_mask(truth / f"{case_id}_{name}_brain{ENDING}", case.brains[name].astype(np.uint8), headers[name])
        write_image(truth / f"{case_id}_{name}_bias{ENDING}", scan.bias, header_of(scan.bias_geometry))
    write_mask(patient / f"label{ENDING}", case.label, headers[case.marked])
    # as in prepare/record.py: a point (x, y, z, 1) of the FLAIR's world -> the same anatomy in another scan's world
    transforms = {n: {"from": "flair", "to": n, "matrix": matrix.tolist()} for n, matrix in case.matrices.items()}
    several = {"transforms": transforms} if len(transforms) > 1 else {}
    content = {"case": case_id, **case.facts, "transform": transforms["t1"], **several}
    write_json(truth / f"{case_id}.json", content)


def _make(recipe: CaseRecipe, root: Path) -> tuple[float, float | None]:
    """Draws and writes a case; its strokes of the first time in ml, and what changed until the second."""
    case = draw_synth_case(recipe)
    write_synth_case(root, recipe.case_id, case)
    return case.stroke_ml, case.volume_ml if recipe.times == 2 else None


def _achieved(rows: Sequence[SynthRow]) -> Achieved:
    return achieved([row.volume_ml for row in rows], [row.burden for row in rows])


def _to_json(cohort: SynthCohort, config: SynthConfig) -> dict[str, object]:
    given = asdict(config)
    for name in ("label_maps", "lesions"):
        given[name] = None if given[name] is None else Path(given[name]).name  # where it lay is nobody's business
    cases = [{"case": row.case_id, **asdict(row.burden), **_volumes(row)} for row in cohort.rows]
    if config.times == 1:
        del given["times"]  # written as before there were two
    return {"config": given, "achieved": asdict(cohort.achieved), "cases": cases}


def _volumes(row: SynthRow) -> dict[str, object]:
    if row.changed_ml is None:
        return {"label_ml": row.volume_ml}
    return {"stroke_ml": row.volume_ml, "label_ml": row.changed_ml, "changed": row.changed_ml > 0}


def _description(config: SynthConfig) -> dict[str, object]:
    heads = "drawn heads" if config.label_maps is None else "heads from label maps"
    strokes = "drawn strokes" if config.lesions is None else "strokes from real masks"
    return {
        "channel_names": {"0": "T1"},
        "labels": LABELS,
        "numTraining": config.cases,
        "file_ending": ENDING,
        "description": f"semi-synthetic: {heads}, {strokes}, seed {config.seed}; no patient",
    }
