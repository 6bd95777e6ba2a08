"""Inference, one page: read -> preprocess -> sliding window -> restore -> postprocess -> write.

Comes in: a model folder and scans. Goes out: OUT/CASE.nii.gz on each scan's own grid, and results.json. One process: a
thread reads the next case while this one is computed, another writes the last. A case that fails is reported, the
others go on; nothing of an earlier run is left under the name of a case that failed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from kernels.components import label_components
from planner.plan import Plan, PostprocessRule
from strokenet import __version__
from strokenet.data.case import Case, read_case
from strokenet.data.dataset import CaseFiles, input_cases
from strokenet.data.errors import InputError
from strokenet.data.files import safe_name, write_json
from strokenet.data.nifti import write_mask, write_probability
from strokenet.data.track import Track, silent
from strokenet.infer.postprocess import lesion_probability, postprocess, softmax
from strokenet.infer.restore import place_back, resample_logits
from strokenet.infer.sliding_window import predict_logits
from strokenet.model.checkpoint import Model, load_model
from strokenet.model.device import Precision, choose_device, choose_dtype
from strokenet.preprocess.preprocess import Origin, preprocess
from strokenet.workspace import Workspace

_log = logging.getLogger("strokenet")


@dataclass(frozen=True, kw_only=True)
class InferConfig:
    """How to infer; None and "plan" take what the model's plan says.

    tta: mirrored copies averaged: none, the plan's axes, or full (all three; refused where training did not mirror
    along all). threshold, min_volume_mm3: replace the plan's rule. postprocess: False takes the most probable label
    and removes nothing. probabilities: also write OUT/probabilities/CASE.nii.gz.
    """

    tta: Literal["none", "plan", "full"] = "plan"
    precision: Precision = "auto"
    folds: tuple[str, ...] | None = None
    threshold: float | None = None
    min_volume_mm3: float | None = None
    postprocess: bool = True
    probabilities: bool = False
    device: str = "auto"


@dataclass(frozen=True, kw_only=True, eq=False)
class Prediction:
    """mask: (D, H, W) uint8 on the scan's grid. probability: (K, D, H, W) float32 there, background first."""

    mask: NDArray[np.uint8]
    probability: NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class CaseResult:
    """One row of results.json. error: one line, or None. lesion: all foreground labels together."""

    case: str
    status: Literal["ok", "failed", "skipped"]
    error: str | None
    seconds: float
    lesion_volume_ml: float | None
    lesion_count: int | None
    channels: tuple[str, ...]


def infer(
    model_root: Path, inputs: Sequence[CaseFiles], out: Path, config: InferConfig, track: Track = silent
) -> tuple[CaseResult, ...]:
    """Segments every case and writes masks and results.json (also when cases fail).

    Raises:
        InputError: the model cannot be used, or an output would replace an input. A bad case does not raise.
    """
    _refuse_overwriting(inputs, out)
    model = load_model(model_root, folds=config.folds, device=choose_device(config.device))
    mirror_axes(model.plan, config.tta)
    results: list[CaseResult] = []
    try:
        for result in _each(model, inputs, out, config, track):
            results.append(result)
            if result.error:
                _log.warning("%s failed: %s", result.case, result.error)
    finally:
        _write_results(out / "results.json", model, inputs, results)
    return tuple(results)


def infer_folder(
    model_root: Path, folder: Path, out: Path, config: InferConfig, track: Track = silent
) -> tuple[CaseResult, ...]:
    """`infer` on a folder that holds CASE_0000.nii.gz ... (or .nii), as nnU-Net's imagesTs."""
    plan = Workspace(model_root).read_plan()
    return infer(model_root, input_cases(folder, plan.channels), out, config, track)


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
    channels = Workspace(model_root).read_plan().channels
    given = {name.casefold(): path for name, path in files.items()}
    missing = [name for name in channels if name.casefold() not in given]
    unknown = [name for name in files if name.casefold() not in {channel.casefold() for channel in channels}]
    if missing or unknown:
        raise InputError(
            f"the model reads {', '.join(channels)}; missing: {missing or 'none'}, unknown: {unknown or 'none'}"
        )
    images = tuple(given[name.casefold()] for name in channels)
    name = safe_name(case_id or images[0].name.removesuffix(".gz").removesuffix(".nii"), "case")
    return infer(model_root, (CaseFiles(case_id=name, images=images, label=None),), out, config, track)


def predict(model: Model, case: Case, config: InferConfig, track: Track = silent) -> Prediction:
    """Mask and probability of one case, on its own grid. The stations by name, in order."""
    plan, device = model.plan, model.networks[0].decoder.seg_layers[-1].weight.device
    assert isinstance(device, torch.device)
    prepared = preprocess(case, plan)
    shape = prepared.image.shape[1:]
    peak = peak_memory_bytes(plan, shape)
    _log.info("%s: %s voxels on the plan's grid, about %.1f GB at peak", case.case_id, shape, peak / 1e9)
    logits = predict_logits(
        model.networks,
        torch.from_numpy(prepared.image),
        patch=plan.patch,
        mirror_axes=mirror_axes(plan, config.tta),
        dtype=choose_dtype(config.precision, device),
        device=device,
        track=track,
    )
    probability = _probability(logits.cpu().numpy(), plan, prepared.origin)
    mask = postprocess(probability, _rule(plan, config), case.geometry.voxel_volume_mm3)
    whole = place_back(probability, prepared.origin)
    whole[0] = 1 - whole[1:].sum(0)  # beyond the crop all is background
    return Prediction(mask=place_back(mask, prepared.origin), probability=whole)


def mirror_axes(plan: Plan, tta: Literal["none", "plan", "full"]) -> tuple[int, ...]:
    """Axes to mirror at test time: never one that training did not mirror.

    Raises:
        InputError: "full" for a model that was not mirrored along all three axes.
    """
    if tta == "none":
        return ()
    if tta == "full" and set(plan.mirror_axes) != {0, 1, 2}:
        raise InputError(f"--tta full: training mirrored along axes {plan.mirror_axes} alone; use --tta plan")
    return plan.mirror_axes


def peak_memory_bytes(plan: Plan, shape: Sequence[int]) -> int:
    """Estimate of one case's peak: image, logits and weights at the plan's spacing, and one tile's feature maps.

    shape: of the case on the plan's grid. Feature maps: the skips, and four maps of the full resolution in flight.
    """
    voxels = int(np.prod([max(n, p) for n, p in zip(shape, plan.patch, strict=True)]))
    grids = voxels * 4 * (2 * len(plan.channels) + 3 * plan.heads + 2)
    edges = np.array(plan.patch)
    tile = 4 * plan.network.features[0] * int(edges.prod())
    for features, stride in zip(plan.network.features, plan.network.strides, strict=True):
        edges = edges // np.array(stride)
        tile += features * int(edges.prod())
    return grids + 4 * tile


def _each(
    model: Model, inputs: Sequence[CaseFiles], out: Path, config: InferConfig, track: Track
) -> Iterator[CaseResult]:
    """Results in order; the next case is read and the last one written by threads meanwhile."""
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        reads = {0: reader.submit(_read, inputs[0], model.plan)} if inputs else {}
        pending: tuple[CaseResult, Future[None]] | None = None
        for index, files in enumerate(track(inputs, total=len(inputs), what="infer")):
            if index + 1 < len(inputs):
                reads[index + 1] = reader.submit(_read, inputs[index + 1], model.plan)
            began = time.monotonic()
            _remove_outputs(out, files.case_id, model.plan)
            result, write = _one(model, files, reads.pop(index), out, config, writer, track)
            if pending:
                yield _written(*pending)
            pending = None
            result = replace(result, seconds=time.monotonic() - began)
            if write is None:
                yield result
            else:
                pending = (result, write)
        if pending:
            yield _written(*pending)


def _one(
    model: Model,
    files: CaseFiles,
    read: Future[Case],
    out: Path,
    config: InferConfig,
    writer: ThreadPoolExecutor,
    track: Track,
) -> tuple[CaseResult, Future[None] | None]:
    """One case, its write begun; or the reason why not."""
    try:
        case = read.result()
        prediction = predict(model, case, config, track)
    except (InputError, OSError, MemoryError, RuntimeError, ValueError) as error:
        return _failed(files.case_id, model.plan, error), None
    write = writer.submit(_write, out, case, prediction, model.plan, config.probabilities)
    lesion = prediction.mask > 0
    result = CaseResult(
        case=case.case_id,
        status="ok",
        error=None,
        seconds=0.0,
        lesion_volume_ml=float(lesion.sum()) * case.geometry.voxel_volume_mm3 / 1000,
        lesion_count=len(label_components(lesion)[1]) - 1,
        channels=model.plan.channels,
    )
    return result, write


def _written(result: CaseResult, write: Future[None]) -> CaseResult:
    try:
        write.result()
    except OSError as error:
        return replace(result, status="failed", error=_one_line(error), lesion_volume_ml=None, lesion_count=None)
    return result


def _failed(case_id: str, plan: Plan, error: BaseException) -> CaseResult:
    _log.debug("%s", case_id, exc_info=error)
    return CaseResult(
        case=case_id,
        status="failed",
        error=_one_line(error),
        seconds=0.0,
        lesion_volume_ml=None,
        lesion_count=None,
        channels=plan.channels,
    )


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, InputError) else f"{type(error).__name__}: {text}"


def _read(files: CaseFiles, plan: Plan) -> Case:
    return read_case(files.case_id, dict(zip(plan.channels, files.images, strict=True)))


def _probability(logits: NDArray[np.float32], plan: Plan, origin: Origin) -> NDArray[np.float32]:
    """Logits on the plan's grid -> probabilities on the crop's. Two labels need one map: the lesion's."""
    if len(logits) != 2:
        return softmax(resample_logits(logits, plan, origin))
    difference = resample_logits(logits[1:] - logits[:1], plan, origin)
    lesion = lesion_probability(np.concatenate([np.zeros_like(difference), difference]))
    return np.stack([1 - lesion, lesion])


def _rule(plan: Plan, config: InferConfig) -> PostprocessRule:
    if not config.postprocess:
        return PostprocessRule()
    rule = plan.postprocess
    if config.threshold is not None:
        if plan.heads != 2:
            raise InputError(f"--threshold needs a model of one lesion label; this one has {plan.heads - 1}")
        rule = replace(rule, threshold=config.threshold)
    return replace(rule, min_volume_mm3=config.min_volume_mm3) if config.min_volume_mm3 is not None else rule


def _outputs(out: Path, case_id: str, plan: Plan) -> dict[str, Path]:
    """Every file that a case may write: the mask under "", the probabilities under their label's name."""
    names = [name for name, value in sorted(plan.labels.items(), key=lambda item: item[1]) if value]
    folder = out / "probabilities"
    single = len(names) == 1
    maps = {name: folder / (f"{case_id}.nii.gz" if single else f"{case_id}_{name}.nii.gz") for name in names}
    return {"": out / f"{case_id}.nii.gz", **maps}


def _remove_outputs(out: Path, case_id: str, plan: Plan) -> None:
    for path in _outputs(out, case_id, plan).values():
        path.unlink(missing_ok=True)


def _write(out: Path, case: Case, prediction: Prediction, plan: Plan, probabilities: bool) -> None:
    paths = _outputs(out, case.case_id, plan)
    for name in plan.labels if probabilities else ():
        if plan.labels[name]:
            write_probability(paths[name], prediction.probability[plan.labels[name]], case.header)
    write_mask(paths[""], prediction.mask, case.header)


def _write_results(path: Path, model: Model, inputs: Sequence[CaseFiles], results: Sequence[CaseResult]) -> None:
    """Cases that an interruption left undone are "skipped"."""
    done = {result.case for result in results}
    rows = [asdict(result) for result in results]
    for files in inputs:
        if files.case_id not in done:
            left = CaseResult(
                case=files.case_id,
                status="skipped",
                error="interrupted",
                seconds=0.0,
                lesion_volume_ml=None,
                lesion_count=None,
                channels=model.plan.channels,
            )
            rows.append(asdict(left))
    content: Mapping[str, object] = {
        "cases": rows,
        "model": model.root.name,
        "folds": model.folds,
        "version": __version__,
    }
    write_json(path, content)


def _refuse_overwriting(inputs: Sequence[CaseFiles], out: Path) -> None:
    masks = {(out / f"{files.case_id}.nii.gz").resolve() for files in inputs}
    for files in inputs:
        for image in files.images:
            if image.resolve() in masks:
                raise InputError(f"{image}: the output would replace this input; choose another -o")
