"""Inference, one page: read -> predict (preprocess, sliding window, restore, postprocess) -> write.

Comes in: a model folder and scans. Goes out: OUT/CASE.nii.gz on each scan's own grid, and results.json. One process: a
thread reads the next case while this one is computed, another writes the last. A case that fails is reported, the
others go on. A model trained with modality dropout takes cases that lack channels. Without files, from Python:
predict.py.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from kernels.components import label_components
from planner.plan import Plan
from strokenet import __version__
from strokenet.data.case import Case, read_case
from strokenet.data.dataset import CaseFiles, input_cases
from strokenet.data.errors import InputError
from strokenet.data.files import write_json
from strokenet.data.track import Track, silent
from strokenet.infer.agreement import Agreement, agreement_of
from strokenet.infer.outputs import (
    MASK,
    RESULTS,
    check_outputs,
    earlier_rows,
    output_files,
    prepared_record,
    remove_maps_of_other_labels,
    remove_outputs,
    require_records,
    write_outputs,
)
from strokenet.infer.predict import InferConfig, Prediction, in_channel_order, mask_rule, mirror_axes, predict
from strokenet.model.checkpoint import Model, load_model, trained_dropout
from strokenet.model.device import choose_device
from strokenet.prepare.record import to_native
from strokenet.workspace import Workspace

__all__ = ["CaseResult", "InferConfig", "infer", "infer_folder", "infer_one"]

_log = logging.getLogger("strokenet")
_CHANNEL = re.compile(r"_\d{4}$")  # CASE_0000.nii.gz is CASE's first channel


@dataclass(frozen=True, kw_only=True)
class CaseResult:
    """One row of results.json. error: one line, or None. lesion: all foreground labels together.

    folds: whose networks made the mask; () where none did.
    channels: those that were used. agreement: None where it was not asked (agreement.py:agreement_of).
    """

    case: str
    status: Literal["ok", "failed", "skipped"]
    error: str | None
    seconds: float
    lesion_volume_ml: float | None
    lesion_count: int | None
    channels: tuple[str, ...]
    folds: tuple[str, ...] = ()
    agreement: Agreement | None = None


def infer(
    model_root: Path, inputs: Sequence[CaseFiles], out: Path, config: InferConfig, track: Track = silent
) -> tuple[CaseResult, ...]:
    """Segments every case and writes masks and results.json.

    What earlier runs left under these cases' names is removed first, and results.json is up to date after every case:
    a run that ends in any way leaves only masks of its own, and says which cases it did not reach.

    Raises:
        InputError: the model cannot be used, `out` cannot be written, or an output would replace an input. A bad
            case does not raise.
    """
    model = load_model(model_root, folds=config.folds, device=choose_device(config.device))
    mirror_axes(model.plan, config.tta)  # this line and the next: what they refuse, before a case is computed
    mask_rule(model.plan, config)
    check_outputs(inputs, out, model.plan)
    if config.native:
        require_records(inputs, config.native_scan)
    earlier = _earlier(out, inputs, model)
    _clear(out, inputs, model, earlier)
    results: dict[str, CaseResult] = {}

    def report(result: CaseResult) -> None:
        results[result.case] = result
        if result.error:
            _log.warning("%s failed: %s", result.case, result.error)
        with suppress(OSError):  # the write at the end is the one that must succeed
            _write_results(out, model, inputs, [*earlier, *map(asdict, results.values())])

    try:
        _run(model, inputs, out, config, track, report)
    finally:
        for files in inputs:
            if files.case_id not in results:
                remove_outputs(out, files.case_id, model.plan)  # an interruption between writing and reporting
        _write_results(out, model, inputs, [*earlier, *map(asdict, results.values())])
    return tuple(results.values())


def infer_folder(
    model_root: Path, folder: Path, out: Path, config: InferConfig, track: Track = silent
) -> tuple[CaseResult, ...]:
    """`infer` on a folder that holds CASE_0000.nii.gz ... (or .nii), as nnU-Net's imagesTs."""
    plan = Workspace(model_root).read_plan()
    if out.resolve() == folder.resolve():
        raise InputError(f"{out}: holds the scans; give another folder for the masks with -o")
    subsets = trained_dropout(model_root, config.folds) > 0
    return infer(model_root, input_cases(folder, plan.channels, subsets=subsets), out, config, track)


def infer_one(
    model_root: Path,
    files: Mapping[str, Path],
    out: Path,
    config: InferConfig,
    track: Track = silent,
    case_id: str | None = None,
) -> tuple[CaseResult, ...]:
    """`infer` on one case given as channel name -> file; names are compared without regard to case.

    Raises:
        InputError: a channel of the model is missing, or one is given that it does not have.
    """
    plan, subsets = Workspace(model_root).read_plan(), trained_dropout(model_root, config.folds) > 0
    images = in_channel_order(files, plan, subsets=subsets)
    channels = tuple(images) if len(images) < len(plan.channels) else ()
    first = next(iter(images.values()))
    name = case_id or _CHANNEL.sub("", first.name.removesuffix(".gz").removesuffix(".nii"))
    one = CaseFiles(case_id=name, images=tuple(images.values()), label=None, channels=channels)
    return infer(model_root, (one,), out, config, track)


def _earlier(out: Path, inputs: Sequence[CaseFiles], model: Model) -> list[dict[str, Any]]:
    """Rows of earlier runs into this folder, of other cases, whose masks are still there."""
    now = {files.case_id for files in inputs}
    rows = {case: row for case, row in earlier_rows(out).items() if case not in now}
    return [row for case, row in rows.items() if output_files(out, case, model.plan)[MASK].is_file()]


def _clear(out: Path, inputs: Sequence[CaseFiles], model: Model, earlier: Sequence[Mapping[str, Any]]) -> None:
    """Nothing of an earlier run stays; and whether `out` can be written is known before the first case."""
    try:
        for files in inputs:
            remove_outputs(out, files.case_id, model.plan)
        remove_maps_of_other_labels(out, inputs)
        _write_results(out, model, inputs, earlier)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror}); choose another -o") from None


def _run(
    model: Model,
    inputs: Sequence[CaseFiles],
    out: Path,
    config: InferConfig,
    track: Track,
    report: Callable[[CaseResult], None],
) -> None:
    """Every case in order; the next one is read and the last one written by threads meanwhile."""
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        reads = [reader.submit(_read, inputs[0], model.plan)]
        pending: tuple[CaseResult, Future[None]] | None = None
        try:
            for files, following in zip(
                track(inputs, total=len(inputs), what="infer"), [*inputs[1:], None], strict=True
            ):
                if following:
                    reads.append(reader.submit(_read, following, model.plan))
                result, write = _one(model, files, reads.pop(0), out, config, writer, track)
                if pending:
                    report(_written(*pending, out, model.plan))
                pending = (result, write) if write else None
                if not write:
                    report(result)
        finally:
            if pending:
                report(_written(*pending, out, model.plan))


def _one(
    model: Model,
    files: CaseFiles,
    read: Future[Case],
    out: Path,
    config: InferConfig,
    writer: ThreadPoolExecutor,
    track: Track,
) -> tuple[CaseResult, Future[None] | None]:
    """One case, its write begun; or the reason why not. seconds: from waiting for its scans to the finished mask."""
    began = time.monotonic()
    try:
        case = read.result()
        record = prepared_record(files, config.native_scan) if config.native else None
        prediction = predict(model, case, config, track)
        agreement = _agreement(model, case, prediction, config, track)
        native = None if record is None else to_native(prediction.mask, record, config.native_scan)
    except Exception as error:  # whatever it is, the other cases go on; -v shows the traceback
        return _undone(files, model.plan, _failure(files.case_id, error), time.monotonic() - began), None
    lesion = prediction.mask > 0
    result = CaseResult(
        case=case.case_id,
        status="ok",
        error=None,
        seconds=time.monotonic() - began,
        lesion_volume_ml=float(np.count_nonzero(lesion)) * case.geometry.voxel_volume_mm3 / 1000,
        lesion_count=len(label_components(lesion)[1]) - 1,
        channels=case.channels,
        folds=model.folds,
        agreement=agreement,
    )
    maps = prediction.probability if config.probabilities else None
    return result, writer.submit(write_outputs, out, case, prediction.mask, maps, model.plan, native)


def _agreement(model: Model, case: Case, together: Prediction, config: InferConfig, track: Track) -> Agreement | None:
    """What the channels say alone, or None: it is a remark beside the mask, and costs nobody the mask."""
    try:
        return agreement_of(model, case, together, config, track)
    except (InputError, MemoryError, RuntimeError) as error:
        _log.warning("%s: its channels were not compared: %s", case.case_id, _failure(case.case_id, error))
        return None


def _written(result: CaseResult, write: Future[None], out: Path, plan: Plan) -> CaseResult:
    """The result once its files are there; where the disk refuses one of them the others go too."""
    try:
        write.result()
    except Exception as error:
        with suppress(OSError):
            remove_outputs(out, result.case, plan)
        return replace(
            result,
            status="failed",
            error=_failure(result.case, error),
            lesion_volume_ml=None,
            lesion_count=None,
            agreement=None,
        )
    return result


def _undone(
    files: CaseFiles, plan: Plan, error: str, seconds: float = 0.0, status: Literal["failed", "skipped"] = "failed"
) -> CaseResult:
    return CaseResult(
        case=files.case_id,
        status=status,
        error=error,
        seconds=seconds,
        lesion_volume_ml=None,
        lesion_count=None,
        channels=_channels(files, plan),
    )


def _channels(files: CaseFiles, plan: Plan) -> tuple[str, ...]:
    return files.channels or plan.channels


def _failure(case_id: str, error: Exception) -> str:
    """The error in one line."""
    _log.debug("%s", case_id, exc_info=error)
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, InputError) else f"{type(error).__name__}: {text}"


def _read(files: CaseFiles, plan: Plan) -> Case:
    if files.problem is not None:
        raise InputError(files.problem)
    return read_case(files.case_id, dict(zip(_channels(files, plan), files.images, strict=True)))


def _write_results(out: Path, model: Model, inputs: Sequence[CaseFiles], rows: Sequence[Mapping[str, Any]]) -> None:
    """results.json; cases without a row yet are "skipped"."""
    done = {row["case"] for row in rows}
    left = [files for files in inputs if files.case_id not in done]
    skipped = [asdict(_undone(f, model.plan, "not reached, the run was ended", status="skipped")) for f in left]
    content: Mapping[str, object] = {
        "cases": [*rows, *skipped],
        "model": model.root.resolve().name,
        "folds": model.folds,
        "version": __version__,
    }
    write_json(out / RESULTS, content)
