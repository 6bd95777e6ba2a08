"""Cohort: drawn stroke patients as an nnU-Net v2 raw folder, for a demo that needs no download and for tests.

Comes in: a CohortConfig. Goes out: dataset.json, imagesTr and labelsTr to train on, imagesTs and labelsTs held out.
One case reads top-down in draw_case: anatomy -> lesions -> contrast -> acquisition. Every case has its own Generator,
so that case 7 is the same patient in a cohort of 8 and in one of 800. The scans look skull-stripped, as the paper's are
before training (Meddahi 2024, IV.B). They prove that the method runs and learns, and nothing about real patients.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
from numpy.typing import NDArray

from strokenet.data.case import Case, case_from_images
from strokenet.data.dataset import CaseFiles, Dataset, read_dataset
from strokenet.data.errors import InputError
from strokenet.data.files import write_json
from strokenet.data.geometry import Geometry
from strokenet.data.nifti import write_image, write_mask
from strokenet.data.track import Track, silent
from strokenet.synth.acquisition import GRIDS, GridStyle, acquire, grid_around, resample
from strokenet.synth.anatomy import draw_anatomy
from strokenet.synth.contrast import CHANNELS, render
from strokenet.synth.lesions import draw_hyperintensities, draw_strokes, paint

LABELS = {"background": 0, "lesion": 1}
ENDING = ".nii.gz"
TRAIN, HELD_OUT = ("Tr", "train", 0), ("Ts", "test", 1)  # folder suffix, case prefix, part of the seed


@dataclass(frozen=True, kw_only=True)
class CohortConfig:
    """train: cases with labels to train on. held_out: cases to test with. seed: of the whole cohort."""

    train: int = 20
    held_out: int = 6
    seed: int = 0

    def __post_init__(self) -> None:
        if self.train < 1 or self.held_out < 0 or self.seed < 0:
            raise InputError(
                f"cohort of {self.train} training and {self.held_out} held-out cases, seed {self.seed}; at least 1, "
                "0 and 0 are needed"
            )


@dataclass(frozen=True, kw_only=True)
class Cohort:
    """dataset: the training part, as read from the folder. held_out: files of the test part, labels included."""

    dataset: Dataset
    held_out: tuple[CaseFiles, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class DrawnCase:
    """One drawn patient on the acquisition grid.

    image: (C, D, H, W) float32 in the order of CHANNELS, 0 outside the brain. label: (D, H, W) uint8, 1 in the whole
    stroke. hyperintensity: (D, H, W) bool, lesions that are no stroke and have label 0. stroke_ml: of every stroke on
    the fine grid, the main one first.
    """

    image: NDArray[np.float32]
    label: NDArray[np.uint8]
    hyperintensity: NDArray[np.bool_]
    geometry: Geometry
    stroke_ml: tuple[float, ...]


def draw_cohort(root: Path, config: CohortConfig, track: Track = silent) -> Cohort:
    """Draws and writes the cohort. The same config writes the same bytes, over what it wrote before.

    Raises:
        InputError: the folder holds scans of another cohort, which would be mixed with this one.
    """
    cases = [(TRAIN, index) for index in range(config.train)] + [(HELD_OUT, index) for index in range(config.held_out)]
    files = [_files(root, part, index) for part, index in cases]
    _refuse_others(root, files)
    for (part, index), paths in track(zip(cases, files, strict=True), total=len(cases), what="draw"):
        rng = np.random.default_rng([config.seed, part[2], index])
        write_case(paths, draw_case(rng, GRIDS[index % len(GRIDS)]))
    write_json(root / "dataset.json", _description(config))  # last: a folder without it is no dataset yet
    return Cohort(dataset=read_dataset(root), held_out=tuple(files[config.train :]))


def draw_case(rng: np.random.Generator, style: GridStyle) -> DrawnCase:
    """One patient with a stroke, scanned in this way."""
    healthy = draw_anatomy(rng)
    strokes = draw_strokes(rng, healthy)
    hyperintensities = draw_hyperintensities(rng, healthy, strokes)
    anatomy = paint(healthy, strokes, hyperintensities)
    grid = grid_around(rng, anatomy, style)
    brain = resample(anatomy.brain.astype(np.float32), anatomy, grid) > 0.5
    image = []
    for contrast in CHANNELS.values():
        signal = resample(render(rng, anatomy, contrast), anatomy, grid)
        image.append(acquire(rng, signal, brain, grid.spacing))
    stroke = brain & (resample(strokes.mask.astype(np.float32), anatomy, grid) > 0.5)
    return DrawnCase(
        image=np.stack(image),
        label=stroke.astype(np.uint8),
        hyperintensity=brain & ~stroke & (resample(hyperintensities, anatomy, grid) > 0.5),
        geometry=grid,
        stroke_ml=strokes.volumes_ml,
    )


def write_case(files: CaseFiles, drawn: DrawnCase) -> None:
    """The scans and the label of one case, each atomically."""
    case = _as_case(files.case_id, drawn)
    for path, image in zip(files.images, case.image, strict=True):
        write_image(path, image, case.header)
    if files.label is not None:
        write_mask(files.label, drawn.label, case.header)


def _as_case(case_id: str, drawn: DrawnCase) -> Case:
    """The case as the reader will see it; its header has both forms set, in scanner space and millimetres."""
    affine = drawn.geometry.affine[:, [2, 1, 0, 3]]  # (d, h, w) -> (i, j, k), as nibabel wants it
    images = {}
    for name, array in zip(CHANNELS, drawn.image, strict=True):
        image = nibabel.Nifti1Image(array.transpose(2, 1, 0), affine)
        image.set_sform(affine, code="scanner")
        image.set_qform(affine, code="scanner")
        image.header.set_xyzt_units("mm")
        images[name] = image
    return case_from_images(case_id, images)


def _files(root: Path, part: tuple[str, str, int], index: int) -> CaseFiles:
    folder, prefix, _ = part
    case_id = f"{prefix}_{index:03d}"
    names = [f"{case_id}_{channel:04d}{ENDING}" for channel in range(len(CHANNELS))]
    return CaseFiles(
        case_id=case_id,
        images=tuple(root / f"images{folder}" / name for name in names),
        label=root / f"labels{folder}" / f"{case_id}{ENDING}",
    )


def _refuse_others(root: Path, files: list[CaseFiles]) -> None:
    """Scans that this cohort will not write over: they would train or be tested with it."""
    own = {path for case in files for path in (*case.images, case.label)}
    others = [
        path for folder in ("images", "labels") for path in sorted(root.glob(f"{folder}T[rs]/*")) if path not in own
    ]
    if others:
        raise InputError(
            f"{root}: holds {len(others)} scans of another cohort, first {others[0].name}; give an empty folder"
        )


def _description(config: CohortConfig) -> dict[str, object]:
    return {
        "channel_names": {str(index): name for index, name in enumerate(CHANNELS)},
        "labels": LABELS,
        "numTraining": config.train,
        "file_ending": ENDING,
        "description": f"drawn heads with strokes, seed {config.seed}; no patient",
    }
