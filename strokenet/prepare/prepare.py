"""Prepare: the MRI preparation of the paper for one case, all stations by name (Meddahi 2024, IV.B).

Comes in: the scans of one examination as the scanner left them, each on its own grid, and the label drawn on one of
them. Goes out: stripped, bias-corrected scans on the reference's voxels, cropped to the brain, with the label; a record
of every transform; a picture. Read prepare_case: read -> brain -> register -> bias -> resample -> write.

A voxel is interpolated once: native grid -> reference grid through the composed transform. The order differs from the
paper's list in one place: the field is estimated before that resampling, on native voxels, whose noise is white.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from strokenet.data.errors import InputError
from strokenet.data.files import write_json
from strokenet.data.geometry import Geometry
from strokenet.data.nifti import write_image, write_mask
from strokenet.prepare.brain import Brain
from strokenet.prepare.cache import file_sha256, key_of
from strokenet.prepare.config import CHANNEL_NAMES, SCANS, Name, PrepareConfig
from strokenet.prepare.inputs import CaseInputs
from strokenet.prepare.itk import Matrix, resample, resample_label, resample_mask
from strokenet.prepare.outputs import (
    PreparedCase,
    brain_path,
    case_of,
    earlier_case,
    output_files,
    picture_path,
    remove_outputs,
)
from strokenet.prepare.picture import draw_preparation
from strokenet.prepare.quality import CaseQuality
from strokenet.prepare.record import FORMAT, geometry_to_json, header_of, record_path, transform_to_json
from strokenet.prepare.scans import DrawnLabel, Native, read_drawn_label, read_scan
from strokenet.prepare.steps import carry_given, correct_bias, find_brains, find_transforms
from strokenet.preprocess.crop import Box, bounding_box


class StepFailed(InputError):
    """A case that cannot be prepared. step: the station that failed."""

    def __init__(self, case_id: str, step: str, reason: str) -> None:
        self.case_id, self.step, self.reason = case_id, step, reason
        super().__init__(f"{case_id}: {step}: {reason}")

    def __reduce__(self) -> tuple[type[StepFailed], tuple[str, str, str]]:
        return StepFailed, (self.case_id, self.step, self.reason)  # it crosses the pipe of a worker process


@dataclass(frozen=True, kw_only=True, eq=False)
class _Prepared:
    """What is written. images, inside, label: on the grid (D, H, W). brain: before the crop. source: whose brain it is.

    lost_ml: of the label outside the box. agreement: Dice of both scans' brains, None for one scan.
    """

    images: dict[str, NDArray[np.float32]]
    label: NDArray[np.int16] | None
    inside: NDArray[np.bool_]
    brain: NDArray[np.bool_]
    source: str
    box: Box
    grid: Geometry
    lost_ml: float
    agreement: float | None


class _Clock:
    """Names the step that fails, and measures every step."""

    def __init__(self, case_id: str) -> None:
        self.case_id = case_id
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        except (InputError, OSError, RuntimeError, MemoryError) as error:
            reason = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
            raise StepFailed(self.case_id, name, reason) from error
        self.seconds[name] = round(time.perf_counter() - began, 3)


def prepare_case(
    inputs: CaseInputs, out: Path, config: PrepareConfig | None = None, channels: tuple[Name, ...] = SCANS
) -> PreparedCase:
    """Prepares one case into `out`; what an earlier run of the same files and settings did is taken from there.

    Args:
        channels: the scans of the whole cohort, in the order of their numbers. A case that lacks one cannot stand in an
            nnU-Net raw folder's imagesTr: its scans go to imagesTs, its label to labelsTs.

    Raises:
        StepFailed: naming the case and the step.
    """
    config, clock = config or PrepareConfig(), _Clock(inputs.case_id)
    cache = out / "prepare" / "cache" / inputs.case_id
    with clock.step("read"):
        scans = {name: read_scan(path) for name, path in inputs.scans.items()}
        reference = config.reference if config.reference in scans else next(iter(scans))
        label = None if inputs.label is None else read_drawn_label(inputs.label, scans, reference, config.label_on)
        key = _case_key(inputs, scans, label, config, channels)
    earlier = earlier_case(out, inputs.case_id, key)
    if earlier is not None:
        return earlier
    remove_outputs(out, inputs.case_id)
    write_json(record_path(out, inputs.case_id), {"format": FORMAT, "case": inputs.case_id, "finished": False})
    with clock.step("brain"):
        brains = find_brains(scans, config, cache)
    with clock.step("register"):
        transforms, found = find_transforms(scans, brains, reference, config, cache)
        brains = carry_given(scans, brains, transforms)
    with clock.step("bias"):
        corrected = {name: correct_bias(scan, brains[name], config, cache) for name, scan in scans.items()}
    with clock.step("resample"):
        prepared = _resampled(scans, corrected, brains, transforms, reference, label, config)
    missing = tuple(name for name in channels if name not in scans)
    part = "Tr" if label is not None and not missing else "Ts"
    files = output_files(out, inputs.case_id, part, channels)
    with clock.step("write"):
        header = header_of(prepared.grid)
        for name, image in prepared.images.items():
            write_image(files[name], image, header)
        write_mask(brain_path(out, inputs.case_id), prepared.inside.astype(np.uint8), header)
        if prepared.label is not None:
            write_mask(files["label"], prepared.label.astype(np.uint8), header)
    with clock.step("picture"):
        _draw(picture_path(out, inputs.case_id), inputs.case_id, corrected, scans, transforms, reference, prepared)
    quality = CaseQuality(
        case_id=inputs.case_id,
        brain_ml=brains[prepared.source].volume_ml,
        metric=found.get("metric_end"),
        displacement_mm=found.get("displacement_mm"),
        agreement=prepared.agreement,
    )
    record = {
        "format": FORMAT,
        "key": key,
        "version": _version(),
        "case": inputs.case_id,
        "settings": config.to_json(),
        "reference": reference,
        "inputs": {name: _input_json(scan) for name, scan in scans.items()},
        "label": label and {"path": str(label.path), "sha256": label.sha256, "drawn_on": label.drawn_on},
        "missing": list(missing),
        "outputs": {name: path.relative_to(out).as_posix() for name, path in files.items() if path.exists()},
        "transforms": {name: transform_to_json(reference, name, matrix) for name, matrix in transforms.items()},
        "registration": found,
        "crop": _crop_json(prepared.box),
        "grid": geometry_to_json(prepared.grid),
        "brain": {"source": prepared.source} | {n: {"ml": b.volume_ml, "method": b.method} for n, b in brains.items()},
        "quality": asdict(quality),
        "label_lost_ml": prepared.lost_ml,
        "seconds": clock.seconds,
    }
    write_json(record_path(out, inputs.case_id), record)  # last: until then it says that the case is not finished
    return case_of(out, record)


def _resampled(
    scans: Mapping[str, Native],
    corrected: Mapping[str, NDArray[np.float32]],
    brains: Mapping[str, Brain],
    transforms: Mapping[str, Matrix],
    reference: str,
    label: DrawnLabel | None,
    config: PrepareConfig,
) -> _Prepared:
    """Native grids -> the reference's grid in the brain's box. The T1's brain is the mask of all (IV.B, step 4)."""
    whole = scans[reference].geometry
    carried = {
        name: resample_mask(brains[name].mask, scan.geometry, whole, transforms[name]) for name, scan in scans.items()
    }
    source = "t1" if "t1" in scans else reference
    box = _box(carried[source])
    grid, inside = _cropped(whole, box), carried[source][box.slices]
    images = {
        name: _finished(array, scans[name].geometry, grid, transforms[name], inside, config)
        for name, array in corrected.items()
    }
    kept, lost_ml = _carry_label(label, scans, transforms, reference, box)
    return _Prepared(
        images=images,
        label=kept,
        inside=inside,
        brain=carried[source],
        source=source,
        box=box,
        grid=grid,
        lost_ml=lost_ml,
        agreement=_dice(carried["t1"], carried["flair"]) if len(carried) == 2 else None,
    )


def _box(brain: NDArray[np.bool_]) -> Box:
    """The brain's tight box: no margin, as the paper's (and what lies outside is 0)."""
    if not brain.any():
        raise InputError("the brain of one scan lies outside the other; check that the scans show one head")
    return bounding_box(brain)


def _cropped(geometry: Geometry, box: Box) -> Geometry:
    affine = geometry.affine.copy()
    affine[:3, 3] = geometry.affine[:3] @ [*box.start, 1]
    return replace(geometry, shape=box.shape, affine=affine)


def _finished(
    array: NDArray[np.float32],
    geometry: Geometry,
    grid: Geometry,
    grid_to_array: Matrix,
    inside: NDArray[np.bool_],
    config: PrepareConfig,
) -> NDArray[np.float32]:
    """A corrected native scan on the prepared grid, 0 outside the brain.

    Cubic: linear interpolation blurs what lies between two voxels, and network input is resampled once more later. On
    its own voxels a scan is taken as it is, because a B-spline would give it back only up to rounding.
    """
    if np.array_equal(grid_to_array, np.eye(4)):
        place = np.linalg.inv(geometry.affine) @ grid.affine
        start = np.rint(place[:3, 3]).astype(int)
        image = array[tuple(slice(a, a + n) for a, n in zip(start.tolist(), grid.shape, strict=True))]
    else:
        image = resample(array, geometry, grid, grid_to_array, interpolation="cubic")
    if config.zscore:
        values = image[inside].astype(np.float64)
        image = ((image - values.mean()) / (values.std() + 1e-8)).astype(np.float32)
    return np.where(inside, image, np.float32(0))


def _carry_label(
    label: DrawnLabel | None,
    scans: Mapping[str, Native],
    transforms: Mapping[str, Matrix],
    reference: str,
    box: Box,
) -> tuple[NDArray[np.int16] | None, float]:
    """The label in the box, and how much of it the box cuts off, ml."""
    if label is None:
        return None, 0.0
    array, name = label.array, label.drawn_on
    grid = scans[reference].geometry
    whole = array if name == reference else resample_label(array, scans[name].geometry, grid, transforms[name])
    kept = np.ascontiguousarray(whole[box.slices])
    lost = int(np.count_nonzero(whole)) - int(np.count_nonzero(kept))
    return kept, lost * grid.voxel_volume_mm3 / 1000


def _draw(
    path: Path,
    case_id: str,
    corrected: Mapping[str, NDArray[np.float32]],
    scans: Mapping[str, Native],
    transforms: Mapping[str, Matrix],
    reference: str,
    prepared: _Prepared,
) -> None:
    """The picture of whole heads on the reference's grid, where a skull shows what was stripped."""
    grid = scans[reference].geometry
    shown = {CHANNEL_NAMES[reference]: corrected[reference]}
    for name, array in corrected.items():
        if name != reference:
            moved = resample(array, scans[name].geometry, grid, transforms[name], interpolation="linear")
            shown[CHANNEL_NAMES[name]] = moved
    label = None
    if prepared.label is not None:
        label = np.zeros(grid.shape, bool)
        label[prepared.box.slices] = prepared.label != 0
    draw_preparation(shown, prepared.brain, grid.spacing, path, case=case_id, label=label)


def _crop_json(box: Box) -> dict[str, Any]:
    return {
        "start": list(box.start[::-1]),
        "stop": list(box.stop[::-1]),
        "of": "i, j, k of the reference turned to RAS",
    }


def _input_json(scan: Native) -> dict[str, Any]:
    return {"path": str(scan.path), "sha256": scan.sha256, "geometry": geometry_to_json(scan.stored)}


def _dice(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    return 2 * float(np.count_nonzero(a & b)) / max(1, int(a.sum()) + int(b.sum()))


def _case_key(
    inputs: CaseInputs,
    scans: Mapping[str, Native],
    label: DrawnLabel | None,
    config: PrepareConfig,
    channels: tuple[Name, ...],
) -> str:
    """Key of all that the outputs of a case depend on."""
    content = {name: scan.sha256 for name, scan in scans.items()}
    mask = file_sha256(config.brain) if isinstance(config.brain, Path) else ""
    return key_of(
        FORMAT, inputs.case_id, content, label and (label.sha256, label.drawn_on), mask, config.to_json(), channels
    )


def _version() -> str:
    from strokenet import __version__

    return __version__
