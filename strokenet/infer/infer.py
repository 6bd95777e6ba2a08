"""Inference, one page: read -> predict (preprocess, sliding window, restore, postprocess) -> write.

Comes in: a model folder and scans. Goes out: OUT/CASE.nii.gz on each scan's own grid, and results.json. In a process a
thread reads the next case while this one is computed, another writes the last; several processes may share the cases
(shard.py). A case that fails is reported, the others go on; one that is finished is left as it is (manifest.py). A
model trained with modality dropout takes cases that lack channels. Without files, from Python: predict.py.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from planner.plan import Plan
from strokenet.data.case import Case, read_case
from strokenet.data.dataset import CaseFiles, input_cases
from strokenet.data.errors import InputError
from strokenet.data.files import replacing
from strokenet.data.header import Header
from strokenet.data.track import Track, silent
from strokenet.infer.agreement import Agreement, agreement_of
from strokenet.infer.brain_box import check_brain_finder
from strokenet.infer.config import InferConfig, arithmetic, mask_rule, mirror_axes, window_rules
from strokenet.infer.engine import Engine
from strokenet.infer.manifest import FOLDER, FileState, finished_row, recipe, state_of, write_manifest
from strokenet.infer.outputs import (
    check_names,
    check_outputs,
    foreign_file,
    prepared_record,
    record_of,
    remove_maps_of_other_labels,
    remove_outputs,
    require_records,
    write_outputs,
)
from strokenet.infer.predict import Prediction, in_channel_order, predict_case
from strokenet.infer.result import (
    CaseResult,
    Results,
    failed,
    kept,
    left_alone,
    not_reached,
    used_channels,
)
from strokenet.model.checkpoint import Model, load_model, trained_dropout
from strokenet.model.device import choose_device
from strokenet.prepare.record import to_native
from strokenet.workspace import Workspace

__all__ = ["CaseResult", "InferConfig", "infer", "infer_folder", "infer_one"]

_log = logging.getLogger("strokenet")
_CHANNEL = re.compile(r"_\d{4}$")  # CASE_0000.nii.gz is CASE's first channel


def infer(
    model_root: Path, inputs: Sequence[CaseFiles], out: Path, config: InferConfig, track: Track = silent
) -> tuple[CaseResult, ...]:
    """Segments every case of this process's share and writes masks, manifests and results.json.

    Finished cases are left as they are, and so are files that someone has changed. What earlier runs left under the
    names of the others is removed first, and results.json follows the cases, or is written in the end where several
    processes share them: a run that ends in any way leaves only masks that the scans, the model and the settings make,
    and says what it did not reach (of a share: by having no row).

    Returns:
        a row a case of this share, in the order of the inputs.

    Raises:
        InputError: the model or --crop brain cannot be used, `out` cannot be written, or an output would replace an
            input or a file of a case that no run knows. A bad case does not raise.
    """
    check_names(inputs)
    if config.crop == "brain":
        check_brain_finder()
    own = config.shard.share(inputs) if config.shard else tuple(inputs)
    if config.shard:
        _log.info("part %s, as %s says: %d of %d cases", config.shard, config.shard.of, len(own), len(inputs))
    device = choose_device(config.device, local=config.shard.local if config.shard else 0)
    model = load_model(model_root, folds=config.folds, device=device)
    mirror_axes(model.plan, config.tta)  # this line and the next: what they refuse, before a case is computed
    mask_rule(model.plan, config)
    check_outputs(own, out, model.plan)
    if config.native and own:
        require_records(own, config.native_scan)
    made_by = recipe(model, _settings(model, config))
    done = {} if config.recompute else _done(out, own, made_by, config, model.plan)
    left = tuple(files for files in own if files.case_id not in done)
    results = Results(out, model, own, done, shared=config.shard is not None)
    _clear(out, left, model.plan, results)
    try:
        if left:
            _run(_Job(engine=Engine(model, config), out=out, made_by=made_by, track=track), left, results)
    finally:
        for case_id in results.begun - results.rows.keys():
            remove_outputs(out, case_id, model.plan)  # an interruption between writing and reporting
        results.finish()
    return tuple(results.rows[files.case_id] for files in own)


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
        InputError: a channel of the model is missing, one is given that it does not have, or a share is asked for.
    """
    if config.shard is not None:
        raise InputError(f"--shard {config.shard}: one case cannot be shared; give a folder of cases")
    plan, subsets = Workspace(model_root).read_plan(), trained_dropout(model_root, config.folds) > 0
    images = in_channel_order(files, plan, subsets=subsets)
    channels = tuple(images) if len(images) < len(plan.channels) else ()
    first = next(iter(images.values()))
    name = case_id or _CHANNEL.sub("", first.name.removesuffix(".gz").removesuffix(".nii"))
    one = CaseFiles(case_id=name, images=tuple(images.values()), label=None, channels=channels)
    return infer(model_root, (one,), out, config, track)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Job:
    """What every case of a run has in common. made_by: its recipe (manifest.py)."""

    engine: Engine
    out: Path
    made_by: str
    track: Track

    @property
    def model(self) -> Model:
        """The engine's."""
        return self.engine.model

    @property
    def config(self) -> InferConfig:
        """The engine's."""
        return self.engine.config


def _settings(model: Model, config: InferConfig) -> dict[str, object]:
    """What of the config decides about the files of a case, and the arithmetic that "auto" came to here."""
    named = asdict(replace(config, folds=None, device="", shard=None, recompute=False, precision="auto"))
    device = next(model.networks[0].parameters()).device
    return named | {"arithmetic": str(arithmetic(config, window_rules(model.plan, config), device))}


def _done(
    out: Path, inputs: Sequence[CaseFiles], made_by: str, config: InferConfig, plan: Plan
) -> dict[str, CaseResult]:
    """The cases that are not to be computed, by name: finished ones, and those with a file of someone's own."""
    rows: dict[str, CaseResult] = {}
    for files in inputs:
        case_id, channels = files.case_id, used_channels(files, plan)
        finished = finished_row(out, case_id, _scans(config, files), channels, made_by)
        foreign = foreign_file(out, case_id, plan) if finished is None else None
        row = kept(finished) if finished else left_alone(files, plan, foreign) if foreign else None
        if row is not None:
            rows[case_id] = row
        if row is not None and row.error:
            _log.warning("%s: %s", case_id, row.error)
    finished_count = sum(row.kept for row in rows.values())
    if finished_count:
        _log.info("%d of %d cases are finished, and nothing of theirs has changed", finished_count, len(inputs))
    return rows


def _clear(out: Path, inputs: Sequence[CaseFiles], plan: Plan, results: Results) -> None:
    """Nothing of an earlier run stays; and whether `out` can be written is known before the first case."""
    try:
        with replacing(out / FOLDER / "writable", durable=False) as trial:
            trial.touch()
        (out / FOLDER / "writable").unlink(missing_ok=True)
        for files in inputs:
            remove_outputs(out, files.case_id, plan)
        remove_maps_of_other_labels(out, inputs)
        results.start()
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror}); choose another -o") from None


def _run(job: _Job, inputs: Sequence[CaseFiles], results: Results) -> None:
    """Every case in order; the next one is read and the last one written by threads meanwhile."""
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        reads = [reader.submit(_read, job, files) for files in inputs[:1]]
        pending: tuple[CaseResult, Future[None]] | None = None
        try:
            for files, following in zip(
                job.track(inputs, total=len(inputs), what="infer"), [*inputs[1:], None], strict=True
            ):
                if following:
                    reads.append(reader.submit(_read, job, following))
                results.begun.add(files.case_id)
                result, write = _one(job, files, reads.pop(0), writer)
                if pending:
                    results.add(_written(job, *pending))
                pending = (result, write) if write else None
                if not write:
                    results.add(_recorded(job, result))
        finally:
            if pending:
                results.add(_written(job, *pending))


def _one(
    job: _Job, files: CaseFiles, read: Future[_Scanned], writer: ThreadPoolExecutor
) -> tuple[CaseResult, Future[None] | None]:
    """One case, its write begun; or the reason why not. seconds: from waiting for its scans to the finished mask."""
    model, config = job.model, job.config
    began = time.monotonic()
    try:
        scanned = read.result()
        case = scanned.case
        record = prepared_record(files, config.native_scan) if config.native else None
        prediction = predict_case(job.engine, case, job.track)
        agreement = _agreement(job, case, prediction)
        native = None if record is None else to_native(prediction.mask, record, config.native_scan)
    except Exception as error:  # whatever it is, the other cases go on; -v shows the traceback
        return failed(files, model.plan, _failure(files.case_id, error), time.monotonic() - began), None
    sizes = prediction.lesion_sizes
    result = CaseResult(
        case=case.case_id,
        status="ok",
        error=None,
        seconds=time.monotonic() - began,
        lesion_volume_ml=sum(sizes) * case.geometry.voxel_volume_mm3 / 1000,
        lesion_count=len(sizes),
        channels=case.channels,
        folds=model.folds,
        agreement=agreement,
    )
    return result, writer.submit(_write, job, result, scanned, prediction, native)


def _write(
    job: _Job,
    result: CaseResult,
    scanned: _Scanned,
    prediction: Prediction,
    native: tuple[NDArray[np.uint8], Header] | None,
) -> None:
    """The case's files, and last its manifest. Before them one without files: whose they are is never in doubt."""
    plan = job.model.plan
    write_manifest(job.out, asdict(not_reached(scanned.files, plan)), begun=True)
    maps = prediction.probability if job.config.probabilities else None
    written = write_outputs(job.out, scanned.case, prediction.mask, maps, plan, native)
    write_manifest(job.out, asdict(result), made_by=job.made_by, scans=scanned.states, files=written)


def _agreement(job: _Job, case: Case, together: Prediction) -> Agreement | None:
    """What the channels say alone, or None: it is a remark beside the mask, and costs nobody the mask."""
    try:
        return agreement_of(job.engine, case, together, job.track)
    except (InputError, MemoryError, RuntimeError) as error:
        _log.warning("%s: its channels were not compared: %s", case.case_id, _failure(case.case_id, error))
        return None


def _written(job: _Job, result: CaseResult, write: Future[None]) -> CaseResult:
    """The result once its files are there; where the disk refuses one of them the others go too."""
    try:
        write.result()
    except Exception as error:
        with suppress(OSError):
            remove_outputs(job.out, result.case, job.model.plan)
        lost = replace(result, status="failed", error=_failure(result.case, error), agreement=None)
        return _recorded(job, replace(lost, lesion_volume_ml=None, lesion_count=None))
    return result


def _recorded(job: _Job, result: CaseResult) -> CaseResult:
    """The same result, once its manifest says what became of the case."""
    with suppress(OSError):  # results.json says it too
        write_manifest(job.out, asdict(result))
    return result


def _failure(case_id: str, error: Exception) -> str:
    """The error in one line."""
    _log.debug("%s", case_id, exc_info=error)
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, InputError) else f"{type(error).__name__}: {text}"


@dataclass(frozen=True, kw_only=True, eq=False)
class _Scanned:
    """A case as it was read, and the files it came from as they were then."""

    files: CaseFiles
    case: Case
    states: tuple[FileState, ...]


def _read(job: _Job, files: CaseFiles) -> _Scanned:
    if files.problem is not None:
        raise InputError(files.problem)
    states = tuple(map(state_of, _scans(job.config, files)))
    images = dict(zip(used_channels(files, job.model.plan), files.images, strict=True))
    return _Scanned(files=files, case=read_case(files.case_id, images), states=states)


def _scans(config: InferConfig, files: CaseFiles) -> tuple[Path, ...]:
    """The files that a case is made from: its images, and for a native mask the record of `strokenet prepare`."""
    return (*files.images, record_of(files)) if config.native else files.images
