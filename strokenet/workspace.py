"""The workspace: one folder that holds all that is known about one training. The only file that knows its paths.

    dataset.json       the raw dataset, resolved        plan.json      every decision
    fingerprint.json   what the data looks like         splits.json    the folds
    preprocessed/      one folder a case                fold_0/ ...    weights, resumable state, log, curve

A model is any folder with plan.json and fold_K/best.safetensors or last.safetensors; a workspace is one at any time.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from planner import fingerprint as fingerprints
from planner import plan as plans
from planner.fingerprint import Fingerprint
from planner.plan import Plan, PlanError
from strokenet.data import dataset as datasets
from strokenet.data import splits as split_files
from strokenet.data.dataset import Dataset
from strokenet.data.errors import InputError
from strokenet.data.files import read_json, write_json
from strokenet.data.splits import Split

NNUNET_PLANS = ("plans.json", "plans.pkl")  # of nnU-Net v2 and v1: what a folder of its results holds
FOLD = re.compile(r"fold_([0-9]{1,3}|all)")


@dataclass(frozen=True)
class FoldFolder:
    """The files of one trained fold."""

    root: Path

    @property
    def best(self) -> Path:
        """Weights of the epoch with the best moving average of the pseudo-Dice."""
        return self.root / "best.safetensors"

    @property
    def last(self) -> Path:
        """Weights of the last finished epoch, or of the step at which a run was stopped: what `infer` reads."""
        return self.root / "last.safetensors"

    @property
    def state(self) -> Path:
        """All that `--resume` needs; the weights files are derived from it."""
        return self.root / "state.pt"

    @property
    def previous_state(self) -> Path:
        """The state before that one, for a disk that lost the newest."""
        return self.root / "state.prev.pt"

    @property
    def log(self) -> Path:
        """One line an epoch."""
        return self.root / "log.csv"

    @property
    def curve(self) -> Path:
        """The log as a picture."""
        return self.root / "progress.png"

    @property
    def weights(self) -> Path | None:
        """The file that `infer` loads: last, else best, else None."""
        return next((file for file in (self.last, self.best) if file.is_file()), None)


@dataclass(frozen=True)
class Workspace:
    """Paths and records of one workspace or model folder."""

    root: Path

    @property
    def dataset_file(self) -> Path:
        return self.root / "dataset.json"

    @property
    def fingerprint_file(self) -> Path:
        return self.root / "fingerprint.json"

    @property
    def plan_file(self) -> Path:
        return self.root / "plan.json"

    @property
    def splits_file(self) -> Path:
        return self.root / "splits.json"

    @property
    def preprocessed(self) -> Path:
        return self.root / "preprocessed"

    def fold(self, fold: str) -> FoldFolder:
        """Folder of fold "0", "1" ... or "all"."""
        return FoldFolder(self.root / f"fold_{fold}")

    def trained_folds(self) -> tuple[str, ...]:
        """Names of the folds that have weights: numbers ascending, then "all"."""
        matches = [FOLD.fullmatch(path.name) for path in self.root.iterdir() if path.is_dir()]
        names = [match.group(1) for match in matches if match and self.fold(match.group(1)).weights]
        return tuple(sorted(names, key=lambda name: (name == "all", name.zfill(3))))

    @property
    def is_started(self) -> bool:
        """Whether a training has left something here: weights, or a state to resume from."""
        return self.root.is_dir() and (bool(self.trained_folds()) or any(self.root.glob("fold_*/state*.pt")))

    def read_plan(self) -> Plan:
        """Raises InputError where plan.json is missing or wrong, and where the folder is something like a workspace."""
        if not self.plan_file.is_file():
            raise InputError(f"{self.root}: {self._instead()}")
        try:
            return plans.from_json(read_json(self.plan_file))
        except PlanError as error:
            raise InputError(f"{self.plan_file}: {error}") from None

    def _instead(self) -> str:
        """What is here that is no workspace, and what to do about it."""
        above = Workspace(Path(os.path.normpath(self.root / "..")))
        if self.root.is_file():
            return f"is a file; give the folder of a model, {above.root}"
        if FOLD.fullmatch(self.root.resolve().name) and above.plan_file.is_file():
            return f"is a fold of a model; give {above.root}"
        if any((self.root / name).is_file() for name in NNUNET_PLANS):
            return f"is a results folder of nnU-Net; run `strokenet import-nnunet {self.root} -o MODEL` first"
        return f"no plan.json; run `strokenet plan DATASET -o {self.root}` first"

    def write_plan(self, plan: Plan) -> None:
        write_json(self.plan_file, plans.to_json(plan))

    def read_fingerprint(self) -> Fingerprint:
        """Raises InputError where fingerprint.json is missing or wrong."""
        try:
            return fingerprints.from_json(read_json(self.fingerprint_file))
        except PlanError as error:
            raise InputError(f"{self.fingerprint_file}: {error}") from None

    def write_fingerprint(self, fingerprint: Fingerprint) -> None:
        write_json(self.fingerprint_file, fingerprints.to_json(fingerprint))

    def read_dataset(self) -> Dataset:
        """Raises InputError where dataset.json is missing or wrong."""
        if not self.dataset_file.is_file():
            raise InputError(f"{self.root}: no dataset.json; run `strokenet plan DATASET -o {self.root}` first")
        return datasets.from_json(read_json(self.dataset_file), self.root)

    def write_dataset(self, dataset: Dataset) -> None:
        write_json(self.dataset_file, datasets.to_json(dataset, self.root))

    def read_splits(self) -> tuple[Split, ...]:
        """The folds; empty for a dataset of one subject."""
        return split_files.splits_from_json(read_json(self.splits_file))

    def write_splits(self, splits: Sequence[Split]) -> None:
        write_json(self.splits_file, split_files.splits_to_json(tuple(splits)))
