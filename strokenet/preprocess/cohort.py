"""Survey and preprocess every case of a dataset: the two loops that `strokenet plan` and `strokenet preprocess` run."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Mapping
from functools import partial

from planner.fingerprint import FOREGROUND_DRAWS, CaseSummary
from planner.plan import Orientation, Plan
from strokenet.data.case import Case, read_case
from strokenet.data.dataset import CaseFiles, Dataset
from strokenet.data.errors import InputError
from strokenet.data.nifti import geometry_of, read_header
from strokenet.data.track import Track, silent
from strokenet.preprocess.jobs import for_each_case, worker_count
from strokenet.preprocess.preprocess import case_turn, preprocess
from strokenet.preprocess.resample import new_shape
from strokenet.preprocess.store import Store, case_key, stored_bytes
from strokenet.preprocess.survey import survey

_log = logging.getLogger("strokenet")


def survey_dataset(
    dataset: Dataset, orientation: Orientation, jobs: int | None = None, track: Track = silent
) -> tuple[CaseSummary, ...]:
    """A summary of every case, in the order of the dataset.

    Args:
        jobs: worker processes; None: as many as CPUs and free memory allow.

    Raises:
        CasesFailed: naming every case that cannot be used.
    """
    draws = FOREGROUND_DRAWS // len(dataset.cases)
    function = partial(_survey_one, dataset.channels, dataset.labels, orientation, draws)
    items = {files.case_id: files for files in dataset.cases}
    workers = worker_count(jobs, len(items), max(_bytes_needed(files, None) for files in dataset.cases))
    summaries = for_each_case(function, items, jobs=workers, what="survey", track=track)
    return tuple(summaries.values())


def preprocess_dataset(
    dataset: Dataset, plan: Plan, store: Store, jobs: int | None = None, track: Track = silent
) -> tuple[str, ...]:
    """Prepares every case by the plan and stores it; cases that are stored already, and still true, are left alone.

    Args:
        jobs: worker processes; None: as many as CPUs and free memory allow.

    Returns:
        the ids of the cases that were made now.

    Raises:
        CasesFailed: naming every case that cannot be used; the others are stored.
    """
    items = {files.case_id: files for files in dataset.cases if not _is_stored(store, plan, files)}
    if len(items) < len(dataset.cases):
        _log.info("%d of %d cases are preprocessed already", len(dataset.cases) - len(items), len(dataset.cases))
    if not items:
        return ()
    _tell_disk(plan, store, items)
    function = partial(_preprocess_one, plan, dataset.labels, store)
    workers = worker_count(jobs, len(items), max(_bytes_needed(files, plan) for files in items.values()))
    return tuple(for_each_case(function, items, jobs=workers, what="preprocess", track=track))


def _survey_one(
    channels: tuple[str, ...], labels: Mapping[str, int], orientation: Orientation, draws: int, files: CaseFiles
) -> CaseSummary:
    return survey(_read(files, channels, labels), orientation=orientation, draws=draws)


def _preprocess_one(plan: Plan, labels: Mapping[str, int], store: Store, files: CaseFiles) -> None:
    key = case_key(plan, files)  # before reading: a scan that changes meanwhile then counts as changed
    store.write(preprocess(_read(files, plan.channels, labels), plan), key)


def _read(files: CaseFiles, channels: tuple[str, ...], labels: Mapping[str, int]) -> Case:
    if files.label is None:
        raise InputError(f"{files.case_id}: no label; training needs one, add it or leave the case out")
    return read_case(files.case_id, dict(zip(channels, files.images, strict=True)), files.label, labels)


def _is_stored(store: Store, plan: Plan, files: CaseFiles) -> bool:
    try:
        return store.complete(files.case_id, case_key(plan, files))
    except InputError:
        return False  # a scan is gone: preprocessing the case will say so, under its name


def _voxels(files: CaseFiles, plan: Plan | None) -> tuple[int, int]:
    """Voxels of a case as stored and as resampled, not cropped: an upper bound. 0 where the scan cannot be read."""
    try:
        geometry = geometry_of(read_header(files.images[0]))
        stored = math.prod(geometry.shape)
        if plan is None:
            return stored, 0
        turn = case_turn(geometry, plan.orientation).then(plan.transpose)
        d, h, w = (geometry.shape[axis] for axis in turn.order)
        return stored, math.prod(new_shape((d, h, w), turn.permute(geometry.spacing), plan.spacing))
    except InputError:
        return 0, 0


def _bytes_needed(files: CaseFiles, plan: Plan | None) -> int:
    """Memory that a case takes at its peak, in bytes: image, its crop, its resampled form, and float64 work space."""
    stored, resampled = _voxels(files, plan)
    channels = len(files.images)
    return stored * (8 * channels + 8) + resampled * (4 * channels + 4) + 32 * max(stored, resampled)


def _tell_disk(plan: Plan, store: Store, items: Mapping[str, CaseFiles]) -> None:
    """Says how much disk the store will take at most, and warns where that is more than there is."""
    needed = sum(stored_bytes(_voxels(files, plan)[1], len(files.images)) for files in items.values())
    store.root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(store.root).free
    say = _log.warning if needed > free else _log.info
    say("preprocessed cases take at most %s; %s are free at %s", _size(needed), _size(free), store.root)


def _size(count: int) -> str:
    """Bytes in words."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{math.ceil(count / 1e6)} MB"
