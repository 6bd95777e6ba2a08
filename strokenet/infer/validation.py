"""Cross-validation: every case by a network that has not seen it (Isensee 2021, Methods).

Comes in: a workspace with trained folds. Goes out: what `infer` writes, for the validation cases of each fold by that
fold's network alone; results.json names the fold of every case. Thresholds are fitted on this, never on cases that the
network was trained on.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from strokenet.data.errors import InputError
from strokenet.data.track import Track, silent
from strokenet.infer.infer import CaseResult, InferConfig, infer
from strokenet.workspace import Workspace


def infer_validation(root: Path, out: Path, config: InferConfig, track: Track = silent) -> tuple[CaseResult, ...]:
    """Segments the validation cases of the workspace's folds, each by its own fold's network.

    Args:
        config: its folds say which; None: every numbered fold that is trained.

    Raises:
        InputError: no fold is trained, one has no validation cases ("all" trains on every case), or as of `infer`.
    """
    workspace = Workspace(root)
    files = {case.case_id: case for case in workspace.read_dataset().cases}
    splits = workspace.read_splits()
    wanted = config.folds or tuple(fold for fold in workspace.trained_folds() if fold != "all")
    known = {str(number): split for number, split in enumerate(splits)}
    if not wanted or not set(wanted) <= known.keys():
        raise InputError(
            f"{root}: --validation needs trained folds with validation cases, not {', '.join(wanted) or 'none'}; "
            f"there are {', '.join(known) or 'none'}, run `strokenet train {root} --fold 0`"
        )
    results: list[CaseResult] = []
    for fold in wanted:
        cases = tuple(files[case_id] for case_id in known[fold].val if case_id in files)
        if cases:
            results += infer(root, cases, out, replace(config, folds=(fold,)), track)
    return tuple(results)
