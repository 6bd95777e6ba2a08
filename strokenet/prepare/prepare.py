"""Prepare: the MRI preparation of the paper for one case, all stations by name (Meddahi 2024, IV.B).

Comes in: the scans of one examination, or of two at two times, as the scanner left them, each on its own grid, and the
label drawn on one of them. Goes out: stripped, bias-corrected scans on the reference's voxels, cropped to the brain,
with the label; a record of every transform; a picture. Read prepare_case: read -> brain -> register -> bias -> resample
-> write.

A voxel is interpolated once: native grid -> reference grid through the composed transform. The order differs from the
paper's list in one place: the field is estimated before that resampling, on native voxels, whose noise is white.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from strokenet import __version__
from strokenet.data.errors import InputError
from strokenet.data.files import file_sha256, write_json
from strokenet.data.nifti import geometry_of, header_of, write_image, write_mask
from strokenet.prepare.cache import key_of
from strokenet.prepare.config import CHANNEL_NAMES, SCANS, Name, PrepareConfig, time_of
from strokenet.prepare.grid import Prepared, on_one_grid
from strokenet.prepare.inputs import CaseInputs
from strokenet.prepare.itk import resample
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
from strokenet.prepare.record import FORMAT, geometry_to_json, header_to_json, record_path, transform_to_json
from strokenet.prepare.scans import Given, Native, read_given
from strokenet.prepare.steps import Found, correct_bias, find_brains, find_transforms
from strokenet.preprocess.crop import Box


class StepFailed(InputError):
    """A case that cannot be prepared. step: the station that failed."""

    def __init__(self, case_id: str, step: str, reason: str) -> None:
        self.case_id, self.step, self.reason = case_id, step, reason
        super().__init__(f"{case_id}: {step}: {reason}")

    def __reduce__(self) -> tuple[type[StepFailed], tuple[str, str, str]]:
        return StepFailed, (self.case_id, self.step, self.reason)  # it crosses the pipe of a worker process


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
        except Exception as error:  # whatever it is, it is named with its step, and the other cases go on
            reason = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
            raise StepFailed(self.case_id, name, reason) from error
        self.seconds[name] = round(time.perf_counter() - began, 3)


def prepare_case(
    inputs: CaseInputs, out: Path, config: PrepareConfig | None = None, channels: tuple[Name, ...] | None = None
) -> PreparedCase:
    """Prepares one case into `out`; what an earlier run of the same files and settings did is taken from there.

    Args:
        channels: the scans of the whole cohort, in the order of their numbers; None: the case's own. A case that lacks
            one cannot stand in an nnU-Net raw folder's imagesTr: its scans go to imagesTs, its label to labelsTs.

    Raises:
        StepFailed: naming the case and the step.
    """
    config, clock = config or PrepareConfig(), _Clock(inputs.case_id)
    channels = channels or tuple(name for name in SCANS if name in inputs.scans)
    cache, record = out / "prepare" / "cache" / inputs.case_id, record_path(out, inputs.case_id)
    with clock.step("read"):
        given = read_given(inputs, config)
        key = _case_key(given, config, channels)
    earlier = earlier_case(out, given.case_id, key)
    if earlier is not None:
        return earlier
    remove_outputs(out, given.case_id)
    write_json(record, {"format": FORMAT, "case": given.case_id, "finished": False})
    with clock.step("brain"):
        brains = find_brains(given.scans, given.reference, config, cache)
    with clock.step("register"):
        found = find_transforms(given.scans, brains, given.reference, config, cache)
    with clock.step("bias"):
        corrected = {name: correct_bias(s, found.brains[name], config, cache) for name, s in given.scans.items()}
    with clock.step("resample"):
        prepared = on_one_grid(given, found, corrected, zscore=config.zscore)
    with clock.step("write"):
        files = _write(out, given, prepared, channels)
    with clock.step("picture"):
        _draw(picture_path(out, given.case_id), given, found, corrected, prepared)
    content = {"key": key, "settings": config.to_json(), **_record(given, found, prepared)}
    content["missing"] = [name for name in channels if name not in given.scans]
    content["outputs"] = {name: path.relative_to(out).as_posix() for name, path in files.items()}
    content["seconds"] = clock.seconds
    write_json(record, content)  # last: until then it says that the case is not finished
    return case_of(out, content)


def _write(out: Path, given: Given, prepared: Prepared, channels: tuple[Name, ...]) -> dict[str, Path]:
    """Scan name, or "label" -> its file; and the brain mask."""
    part = "Tr" if given.label is not None and all(name in given.scans for name in channels) else "Ts"
    files, header = output_files(out, given.case_id, part, channels), header_of(prepared.grid)
    for name, image in prepared.images.items():
        write_image(files[name], image, header)
    write_mask(brain_path(out, given.case_id), prepared.inside.astype(np.uint8), header)
    if prepared.label is not None:
        write_mask(files["label"], prepared.label.astype(np.uint8), header)
    written = {*prepared.images, *(("label",) if prepared.label is not None else ())}
    return {name: path for name, path in files.items() if name in written}


def _record(given: Given, found: Found, prepared: Prepared) -> dict[str, Any]:
    """What CASE.json says of the scans and of all that was done to them."""
    label, brains, reference = given.label, found.brains, given.reference
    quality = _quality(given.case_id, found, prepared)
    return {
        "format": FORMAT,
        "version": __version__,
        "case": given.case_id,
        "reference": reference,
        "inputs": {name: _input_json(scan) for name, scan in given.scans.items()},
        "label": label and {"path": str(label.path), "sha256": label.sha256, "drawn_on": label.drawn_on},
        "transforms": {name: transform_to_json(reference, name, matrix) for name, matrix in found.transforms.items()},
        "registration": _registration_json(found),
        "crop": _crop_json(prepared.box),
        "grid": geometry_to_json(prepared.grid),
        "brain": {"source": " and ".join(prepared.sources)}
        | {name: {"ml": brain.volume_ml, "method": brain.method} for name, brain in brains.items()},
        "quality": asdict(quality),
        "label_ml": _label_json(prepared),
    }


def _label_json(prepared: Prepared) -> dict[str, float] | None:
    if prepared.label is None:
        return None
    kept = int(np.count_nonzero(prepared.label)) * prepared.grid.voxel_volume_mm3 / 1000
    return {"given": prepared.given_ml, "kept": kept, "outside_brain": prepared.outside_ml}


def _quality(case_id: str, found: Found, prepared: Prepared) -> CaseQuality:
    """The worst of the registrations; of the displacements those within a time."""
    registrations = found.registrations
    within = [r["displacement_mm"] for name, r in registrations.items() if time_of(name) == time_of(r["fixed"])]
    return CaseQuality(
        case_id=case_id,
        brain_ml=found.brains[prepared.sources[0]].volume_ml,
        metric=max((r["metric_end"] for r in registrations.values()), default=None),
        displacement_mm=max(within, default=None),
        agreement=prepared.agreement,
    )


def _registration_json(found: Found) -> dict[str, Any]:
    """The fields of the one registration that a time of two scans has; of more scans, scan -> fields."""
    if len(found.transforms) > 2:
        return dict(found.registrations)
    return {k: v for fields in found.registrations.values() for k, v in fields.items() if k != "fixed"}


def _draw(
    path: Path, given: Given, found: Found, corrected: Mapping[str, NDArray[np.float32]], prepared: Prepared
) -> None:
    """The picture of whole heads on the reference's grid, where a skull shows what was stripped."""
    reference, scans = given.reference, given.scans
    grid = scans[reference].geometry
    shown = {CHANNEL_NAMES[reference]: corrected[reference]}
    for name, array in corrected.items():
        if name != reference:
            moved = resample(array, scans[name].geometry, grid, found.transforms[name], interpolation="linear")
            shown[CHANNEL_NAMES[name]] = moved
    label = None
    if prepared.label is not None:
        label = np.zeros(grid.shape, bool)
        label[prepared.box.slices] = prepared.label != 0
    draw_preparation(shown, prepared.brain, grid.spacing, path, case=given.case_id, label=label)


def _crop_json(box: Box) -> dict[str, Any]:
    return {
        "start": list(box.start[::-1]),
        "stop": list(box.stop[::-1]),
        "of": "i, j, k of the reference turned to RAS",
    }


def _input_json(scan: Native) -> dict[str, Any]:
    return {
        "path": str(scan.path),
        "sha256": scan.sha256,
        "geometry": geometry_to_json(geometry_of(scan.header)),
        "header": header_to_json(scan.header),
    }


def _case_key(given: Given, config: PrepareConfig, channels: tuple[Name, ...]) -> str:
    """Key of all that the outputs of a case depend on."""
    content, label = {name: scan.sha256 for name, scan in given.scans.items()}, given.label
    mask = file_sha256(config.brain) if isinstance(config.brain, Path) else ""
    drawn = label and (label.sha256, label.drawn_on)
    return key_of(FORMAT, given.case_id, content, drawn, mask, config.to_json(), channels)
