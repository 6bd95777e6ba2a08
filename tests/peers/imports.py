"""Import: results folders of nnU-Net v2 that its own trainer wrote, each run by its nnUNetPredictor and by us.

The other stations hand the peer what our export wrote, so that a mistake which the export and the import share would
pass there. Here all is the peer's: fingerprint, plans, preprocessing, split, training and checkpoints. What is set is
what makes it take a minute: few features, a small patch, one short epoch.
"""

from __future__ import annotations

import ast
import inspect
import json
import math
import os
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import numpy as np
import torch

from strokenet.data.files import write_json
from strokenet.nnunet.importing import import_nnunet
from strokenet.nnunet.v2 import TRAINERS
from tests.nnunet.v2_folders import old_form
from tests.peers import peer
from tests.peers.cohort import Head, write_cohort
from tests.peers.fingerprint import synthetic_head
from tests.peers.inference import TIES, Answer, our_answer, peers_answer
from tests.peers.row import Row

# isort: split
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    nnUNetPlannerResEncM,
)
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

DATASET, CONFIGURATION = "Dataset931_Import", "3d_fullres"
CASES = 5  # the peer's split wants one a fold
HEAD_MM = (128, 144, 120)
SPACING_MM = [4.5, 4.0, 4.2]  # not the scans', so that images and logits are resampled
FEATURES, MAX_FEATURES, MEMORY_GB = 8, 32, 0.005
ITERATIONS = 50
ENOUGH = 100  # lesion voxels of the peer's mask: an empty one would be easy to repeat
NETWORK_METHOD = "build_network_architecture"


@dataclass(frozen=True, kw_only=True)
class _Model:
    """name: what is compared. source: the results folder. folds: those that are averaged."""

    name: str
    source: Path
    folds: tuple[int | str, ...]


def rows(full: bool) -> Iterator[Row]:
    """The trainers by their names; models of both kinds of network on a scan of their cohort."""
    yield _trainers_row()
    with TemporaryDirectory(dir=peer.FOLDER) as made:
        folder = Path(made)
        raw, cases = write_cohort(_drawn_head(), DATASET, cases=CASES, seed=0)
        scan = tuple(sorted((raw / "imagesTr").glob(f"{cases[0]}_*.nii.gz")))
        plain = _trained(ExperimentPlanner, "plain, two folds", (0, 1))
        for model in (plain, _in_old_form(plain, folder), _trained(nnUNetPlannerResEncM, "ResEnc, fold_all", ("all",))):
            yield from _answer_rows(model, scan, folder)
        for place in (peer.RAW, peer.PREPROCESSED, peer.RESULTS):
            shutil.rmtree(place / DATASET)


def _answer_rows(model: _Model, scan: Sequence[Path], folder: Path) -> Iterator[Row]:
    """Labels and probabilities, mirrored along all axes; no number where the peer's mask has next to no lesion."""
    place = folder / model.name
    import_nnunet(model.source, place)
    theirs = peers_answer(model.source, model.folds, scan, folder / "peer", mirrored=True)
    ours = our_answer(place, scan, mirrored=True, semantics="exact")
    on = f"{model.name}, planned and trained by nnU-Net"
    found = _lesion_voxels(theirs)
    row = partial(Row, on=on, note=f"the peer finds {found} of {theirs.mask.size} voxels to be lesion")
    apart = float((ours.mask != theirs.mask).sum())
    largest = float(np.abs(ours.probability - theirs.probability).max())
    told = ENOUGH <= found <= theirs.mask.size / 2
    yield row(check="import, labels", difference=apart if told else math.nan, tolerance=TIES, unit="voxels")
    yield row(check="import, probabilities", difference=largest if told else math.nan, tolerance=1e-3, unit="")


def _lesion_voxels(answer: Answer) -> int:
    return int((answer.mask > 0).sum())


def _trained(planner: type[ExperimentPlanner], name: str, folds: tuple[int | str, ...]) -> _Model:
    """The results folder of the peer's trainer, one a fold."""
    plans = _planned(planner)
    for fold in folds:
        trainer = _train(plans, fold)
    return _Model(name=name, source=Path(trainer.output_folder_base), folds=folds)


def _planned(planner: type[ExperimentPlanner]) -> Path:
    """The plans.json of the peer's planner for the cohort, whose cases are preprocessed by it once."""
    with peer.quiet():
        if not (peer.PREPROCESSED / DATASET / "dataset_fingerprint.json").is_file():
            DatasetFingerprintExtractor(DATASET, 1).run()
        planning = planner(DATASET, gpu_memory_target_in_gb=MEMORY_GB, overwrite_target_spacing=SPACING_MM)
        planning.UNet_base_num_features, planning.UNet_max_features_3d = FEATURES, MAX_FEATURES
        planning.plan_experiment()
        name = planning.plans_identifier
        if not (peer.PREPROCESSED / DATASET / planning.generate_data_identifier(CONFIGURATION)).is_dir():
            DefaultPreprocessor(verbose=False).run(DATASET, CONFIGURATION, name, num_processes=1)
    return peer.PREPROCESSED / DATASET / f"{name}.json"


def _train(plans: Path, fold: int | str) -> nnUNetTrainer:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(peer.cores())
    stored = json.loads(plans.read_text()) | {"continue_training": False}
    with peer.quiet(), mock.patch.dict(os.environ, {"nnUNet_n_proc_DA": "0"}):  # in this process: the seeds hold
        trainer = nnUNetTrainer(stored, CONFIGURATION, fold, peer.description(DATASET), torch.device("cpu"))
        trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 1, ITERATIONS, 1
        trainer.run_training()
    return trainer


def _in_old_form(model: _Model, folder: Path) -> _Model:
    """The same folder with the plans.json that v2 wrote before 2.5: the keys of the network, and no `architecture`."""
    source = folder / "old form"
    shutil.copytree(model.source, source)
    plans = json.loads((source / "plans.json").read_text())
    plans["configurations"] = {CONFIGURATION: plans["configurations"][CONFIGURATION]}
    old_form(plans)
    write_json(source / "plans.json", plans)
    return replace(model, name=f"{model.name}, plans of the old form", source=source)


def _drawn_head() -> Head:
    """An ellipsoid of noise with a lesion, in 1 mm voxels and intensities of about 0 to 1."""
    t1, flair, label = synthetic_head(np.random.default_rng(3), HEAD_MM, lesion=True)
    t1, flair, lesion = (volume.astype(np.float32) for volume in (t1 / 255, flair / 255, label == 1))
    return Head(t1=t1, flair=flair, lesion=lesion)


def _trainers_row() -> Row:
    """The names that the import takes for trainers of the plans' network, against the classes of that network."""
    classes = _trainer_classes()
    stock = {name for name in classes if _has_stock_network(name, classes)}
    wrong = sorted(stock ^ TRAINERS)
    return Row(
        check="import, v2 trainers",
        on=f"network of {len(classes)} classes by their name",
        difference=len(wrong),
        tolerance=0,
        unit="values",
        note=", ".join(wrong) or f"{len(stock)} build the plans' network, {len(classes) - len(stock)} another",
    )


def _has_stock_network(name: str, classes: dict[str, ast.ClassDef]) -> bool:
    """Whether no class between this one and nnUNetTrainer builds its own network."""
    if name == nnUNetTrainer.__name__:
        return True
    if name not in classes:
        return False
    methods = {node.name for node in classes[name].body if isinstance(node, ast.FunctionDef)}
    bases = [ast.unparse(base).split(".")[-1] for base in classes[name].bases]
    return NETWORK_METHOD not in methods and bool(bases) and all(_has_stock_network(base, classes) for base in bases)


def _trainer_classes() -> dict[str, ast.ClassDef]:
    """Every class in the peer's folder of trainers, from its source: some cannot be imported without timm."""
    files = sorted(Path(inspect.getfile(nnUNetTrainer)).parent.rglob("*.py"))
    nodes = chain.from_iterable(ast.walk(ast.parse(file.read_text())) for file in files)
    found = [node for node in nodes if isinstance(node, ast.ClassDef)]
    classes = {node.name: node for node in found}
    assert len(classes) == len(found)
    return classes
