"""`prepare` on a drawn clinic cohort, against all that was drawn.

    python -m tests.prepare.clinic OUT [N] [DATA]     N (20) cases of `strokenet synth --style clinic`, seed 1000

Heads from the label maps of SynthSeg, strokes from the masks of SOOP. A line a case: mean error of the registration
beside that of doing nothing; Dice of the brain with the drawn one at two surfaces, how much of the tissue it loses and
how much of it is bone, skin or air; what N4 leaves of the drawn bias field (1: all of it); Dice of the label after it
was carried to the prepared grid and back by `to_native`, on FLAIR voxels and, prepared again, on T1 voxels.

The drawn brain's outer surface (EXTRACTED_LEVEL of synth/labelmap.py) was fitted to deepbet on three cases, a single
number. Dice at it says how well shapes agree on other heads; Dice at SURFACE_LEVEL, set before deepbet was run, says
how far the two notions of a brain are apart. What is lost of the tissue, and bone, do not depend on either.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import numpy as np

from strokenet.data.case import read_label
from strokenet.data.geometry import Geometry
from strokenet.data.overlap import dice
from strokenet.prepare.config import PrepareConfig
from strokenet.prepare.inputs import CaseInputs
from strokenet.prepare.prepare import prepare_case
from strokenet.prepare.record import read_record, record_path, to_native
from strokenet.prepare.register import Scan, brain_points, displacement_mm
from strokenet.prepare.scans import Native, read_scan
from strokenet.prepare.steps import correct_bias, find_brains
from strokenet.synth.head import Head, Mask, Matter, among
from strokenet.synth.labelmap import BRAIN
from strokenet.synth.scanner import at_points
from strokenet.synth.styles import CaseRecipe, SynthCase, draw_patient, draw_synth_case
from strokenet.synth.synth import SynthConfig, recipes, write_synth_case

SEED = 1000
HEAD = {*BRAIN, Matter.CSF, Matter.WMH, Matter.RIM, Matter.CAVITY, Matter.ARTERY, Matter.VEIN, Matter.NERVE}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One case. *_mm: registration. dice_*: of the T1's brain. lost, outside: shares of the tissue, of the found brain.

    bias_*: deviation of the logarithm of the remaining field over that of the drawn one. back_*: Dice of the label.
    """

    error_mm: float
    identity_mm: float
    dice_extracted: float
    dice_surface: float
    tissue_lost: float
    outside: float
    bias_t1: float
    bias_flair: float
    back_flair: float
    back_t1: float
    seconds: float


def try_case(recipe: CaseRecipe, out: Path) -> Row:
    """Draws, writes and prepares one case, and compares."""
    case = draw_synth_case(recipe)
    write_synth_case(out, recipe.case_id, case)
    folder = out / "patients" / recipe.case_id
    inputs = CaseInputs(case_id=recipe.case_id, **{n: folder / f"{n}.nii.gz" for n in ("t1", "flair", "label")})
    config = PrepareConfig()
    done = prepare_case(inputs, out / "prepared", config)
    scans = {name: read_scan(path) for name, path in inputs.scans.items()}
    cache = out / "prepared" / "prepare" / "cache" / recipe.case_id
    brains = {name: brain.mask for name, brain in find_brains(scans, "flair", config, cache).items()}
    record = read_record(record_path(out / "prepared", recipe.case_id))
    flair = scans["flair"]
    points = brain_points(Scan(array=flair.array, brain=brains["flair"], geometry=flair.geometry))
    found = np.asarray(record["transforms"]["t1"]["matrix"])
    left = {name: _bias_left(scans[name], case, name, config, cache) for name in scans}
    return Row(
        error_mm=float(displacement_mm(points, found, case.matrices["t1"]).mean()),
        identity_mm=float(displacement_mm(points, np.eye(4), case.matrices["t1"]).mean()),
        **_brain(recipe, case, scans["t1"].geometry, brains["t1"]),
        bias_t1=left["t1"],
        bias_flair=left["flair"],
        back_flair=_round_trip(inputs, out / "prepared"),
        back_t1=_on_t1(inputs, out / "prepared_on_t1"),
        seconds=done.seconds,
    )


def _brain(recipe: CaseRecipe, case: SynthCase, grid: Geometry, found: Mask) -> dict[str, float]:
    """The found brain of the T1 beside the drawn one. The patient is drawn again: a recipe says all."""
    head = draw_patient(np.random.default_rng([recipe.seed, 3, recipe.index]), recipe).head
    to_head = np.linalg.inv(case.matrices["t1"]).astype(np.float64)

    def there(inside: Mask) -> Mask:
        return np.asarray(at_points(inside.astype(np.float32), head.affine, grid, to_head) > 0.5)

    tissue, skull = there(among(head.matter, BRAIN)), there(~among(head.matter, HEAD))
    return {
        "dice_extracted": dice(found, case.brains["t1"]),
        "dice_surface": dice(found, there(_to_surface(head))),
        "tissue_lost": float((tissue & ~found).sum() / tissue.sum()),
        "outside": float((skull & found).sum() / found.sum()),
    }


def _to_surface(head: Head) -> Mask:
    """The brain as lesions know it, of the shape of head.matter: up to SURFACE_LEVEL."""
    whole = np.zeros(head.matter.shape, bool)
    whole[head.box] = head.anatomy.depth_mm > 0
    return whole


def _bias_left(scan: Native, case: SynthCase, name: str, config: PrepareConfig, cache: Path) -> float:
    """What is left of the drawn field inside the drawn brain."""
    brain = find_brains({name: scan}, name, config, cache)[name]
    given, corrected = (np.maximum(a, 1e-6) for a in (scan.array, correct_bias(scan, brain, config, cache)))
    drawn = case.scans[name]
    field = np.log(np.maximum(at_points(drawn.bias, drawn.bias_geometry.affine, scan.geometry, np.eye(4)), 1e-6))
    inside = case.brains[name] & (scan.array > 0)
    return float((field - np.log(given / corrected))[inside].std() / field[inside].std())


def _round_trip(inputs: CaseInputs, prepared: Path) -> float:
    """The prepared label carried back to the FLAIR that it was drawn on, against what was drawn."""
    record = read_record(record_path(prepared, inputs.case_id))
    assert inputs.label is not None
    carried = read_label(prepared / record["outputs"]["label"]).array
    back, _ = to_native(carried, record, "flair")
    return dice(back != 0, read_label(inputs.label).array != 0)


def _on_t1(inputs: CaseInputs, prepared: Path) -> float:
    prepare_case(inputs, prepared, PrepareConfig(reference="t1", bias=False))
    return _round_trip(inputs, prepared)


def table(rows: Mapping[str, Row]) -> str:
    """A line a case, then the median and the worst of each column."""
    names = [field.name for field in fields(Row)]
    values = np.array([astuple(row) for row in rows.values()])
    high_is_good = np.array([name.startswith(("dice", "back")) for name in names])
    worst = np.where(high_is_good, values.min(0), values.max(0))
    lines = {**{k: astuple(v) for k, v in rows.items()}, "median": np.median(values, 0), "worst": worst}
    head = f"{'':12}" + "".join(f"{name:>15}" for name in names)
    return "\n".join([head, *(f"{k:12}" + "".join(f"{x:15.3f}" for x in v) for k, v in lines.items())])


def main(out: Path, count: int, data: Path) -> None:
    """Writes a line a case as it comes, and the table at the end."""
    config = SynthConfig(
        cases=count,
        style="clinic",
        label_maps=data / "synthseg" / "label_maps",
        lesions=data / "lesions_soop",
        seed=SEED,
    )
    rows = {}
    for recipe in recipes(config):
        rows[recipe.case_id] = try_case(recipe, out)
        sys.stdout.write(f"{recipe.case_id}: {rows[recipe.case_id]}\n")
        sys.stdout.flush()
    sys.stdout.write(table(rows) + "\n")


if __name__ == "__main__":
    root = Path(sys.argv[3]) if len(sys.argv) > 3 else Path(__file__).resolve().parents[3] / "shared" / "data"
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 20, root)
