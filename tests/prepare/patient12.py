"""Two times of a real patient through `prepare`, against the transforms that came with the scans.

    python -m tests.prepare.patient12 OUT [DATA]     open_ms/.../patient12, native grids, whole heads

The expert's mask of what changed lies in a third space; it is brought to the first FLAIR by the given transforms and
then is the label. It holds lesions that grew and lesions that faded: where it lies the FLAIRs differ, either way.
OUT/qc/patient12.png is to be looked at: the label is the blue line on the first FLAIR.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from strokenet.data.geometry import turn_to_ras, turned
from strokenet.data.nifti import header_of, read_volume, write_mask
from strokenet.infer.postprocess import common_field
from strokenet.prepare.inputs import CaseInputs
from strokenet.prepare.itk import Matrix, resample_mask
from strokenet.prepare.prepare import prepare_case
from strokenet.prepare.record import read_record, record_path
from strokenet.prepare.register import displacement_mm
from tests.prepare.starts import read_itk_text

CASE = "patient12"


def true_motions(folder: Path) -> dict[str, Matrix]:
    """Scan -> (4, 4), the world of the first FLAIR -> its world, RAS mm: T1 by the FLAIR of its study."""
    first, second = (read_itk_text(folder / f"study{n}_FLAIR_to_common_space.txt") for n in (1, 2))
    to_t1, to_t1_2 = (read_itk_text(folder / f"study{n}_T1W_intrastudy_to_FLAIR.txt") for n in (1, 2))
    flair_2 = second @ np.linalg.inv(first)  # each maps a point of the common space to its study
    return {"t1": to_t1, "flair_2": flair_2, "t1_2": to_t1_2 @ flair_2}


def carried_change(folder: Path, path: Path) -> None:
    """Writes the change mask on the voxels of the first FLAIR."""
    mask, flair = (read_volume(folder / name) for name in ("change_mask_common_space.nii.gz", "study1_FLAIR.nii.gz"))
    to_common = np.linalg.inv(read_itk_text(folder / "study1_FLAIR_to_common_space.txt")).astype(np.float64)
    turns = turn_to_ras(mask.geometry)
    inside = resample_mask(
        np.ascontiguousarray(turns.apply(mask.array) > 0), turned(mask.geometry, turns), flair.geometry, to_common
    )
    write_mask(path, inside.astype(np.uint8), header_of(flair.geometry))


def inputs(folder: Path, label: Path) -> CaseInputs:
    """The four scans and the carried mask."""
    names = {"t1": "study1_T1W", "flair": "study1_FLAIR", "t1_2": "study2_T1W", "flair_2": "study2_FLAIR"}
    return CaseInputs(case_id=CASE, label=label, **{n: folder / f"{file}.nii.gz" for n, file in names.items()})


def standardised(image: NDArray[np.float32], inside: NDArray[np.bool_]) -> NDArray[np.float32]:
    """In robust standard deviations about the median of the brain."""
    values = image[inside]
    middle = np.median(values)
    return np.asarray((image - middle) / (1.4826 * np.median(np.abs(values - middle))), dtype=np.float32)


def main(out: Path, folder: Path) -> None:
    """Prepares the case and writes a line a fact."""
    label = out / "change_on_flair.nii.gz"
    carried_change(folder, label)
    done = prepare_case(inputs(folder, label), out)
    record = read_record(record_path(out, CASE))
    brain = read_volume(out / "prepare" / f"{CASE}_brain.nii.gz")
    inside = brain.array > 0
    points = np.argwhere(inside) @ brain.geometry.affine[:3, :3].T + brain.geometry.affine[:3, 3]
    for name, truth in true_motions(folder).items():
        found = np.array(record["transforms"][name]["matrix"])
        error, identity = (displacement_mm(points, matrix, truth).mean() for matrix in (found, np.eye(4)))
        fixed = record["registration"][name]["fixed"]
        sys.stdout.write(f"{name} -> {fixed}: error to the first FLAIR {error:.3f} mm, identity {identity:.3f} mm\n")
    images = [read_volume(path).array for path in done.images]
    field = common_field(torch.from_numpy(np.stack(images))).numpy()
    sys.stdout.write(f"common field: {(field & inside).sum() / inside.sum():.4f} of the brain\n")
    assert done.label is not None
    change = read_volume(done.label).array > 0
    first, second = (standardised(images[n], inside & field) for n in (1, 3))
    brighter = second - first
    away = inside & field & ~change
    sys.stdout.write(
        f"change: {change.sum() * brain.geometry.voxel_volume_mm3 / 1000:.2f} ml, {(brighter[change] > 0).mean():.0%} "
        f"of it brighter than before; FLAIRs differ by {np.median(np.abs(brighter[change])):.2f} deviations (median) "
        f"in it, {np.median(np.abs(brighter[away])):.2f} elsewhere\n"
        f"{done.seconds:.0f} s; look at {out / 'qc' / f'{CASE}.png'}\n"
    )


if __name__ == "__main__":
    root = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).resolve().parents[3] / "shared" / "data"
    main(Path(sys.argv[1]), root / "open_ms" / "longitudinal" / "patient12")
