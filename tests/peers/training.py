"""Training: the same plan, cases, split and number of steps; each side trains, and segments by its own inference.

Random numbers differ, so single runs do too: what is compared is the mean held-out Dice over three seeds a side. The
real trainer of the peer runs, on the CPU; only the length of its schedule is set, and that it augments in its own
process, so that its seed holds. Prints nothing itself: its progress goes to the log "strokenet.peers".
"""

from __future__ import annotations

import logging
import os
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import numpy as np
import torch

from planner.plan import NetworkPlan, Plan, PostprocessRule
from strokenet.data.files import write_json
from strokenet.data.splits import Split
from strokenet.evaluate.evaluate import evaluate_paths
from strokenet.infer.infer import InferConfig, infer_folder
from strokenet.preprocess.planning import PlanConfig, plan_workspace, preprocess_workspace
from strokenet.train.run import TrainConfig
from strokenet.train.train import train
from strokenet.workspace import Workspace
from tests.peers import cohort, peer
from tests.peers.row import Row
from tests.peers.translate import peer_plans

# isort: split
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

LONG = True  # run by hand: about a quarter of an hour on two cores
DATASET = "Dataset941_Cohort"
CONFIGURATION = "3d_fullres"
CASES, HELD_OUT = 6, 2
SEEDS = (0, 1, 2)
EPOCHS, ITERATIONS = 15, 100
ENOUGH, APART = 0.6, 0.05  # Dice
NETWORK = NetworkPlan(
    kind="plain",
    features=(8, 16, 32),
    strides=((1, 1, 1), (2, 2, 2), (2, 2, 2)),
    kernels=((3, 3, 3),) * 3,
    encoder_blocks=(2, 2, 2),
    decoder_convs=(2, 2),
    decoder_kernels=((3, 3, 3),) * 2,
)
PATCH = (24, 24, 24)
_log = logging.getLogger("strokenet.peers")


def rows(full: bool) -> Iterator[Row]:
    """None without the real scan that the cohort is made from."""
    yield from ()


def real_rows(full: bool) -> Iterator[Row]:
    """Three trainings a side, whatever `full` says; nothing where the real scans are not at hand."""
    data = peer.real_data()
    if data is None:
        return
    began = time.monotonic()
    with TemporaryDirectory() as folder:
        work = _Work.make(data, Path(folder))
        scores: dict[str, list[float]] = {"strokenet": [], "nnU-Net": []}
        for seed in SEEDS:
            for side, run in (("strokenet", _by_strokenet), ("nnU-Net", _by_the_peer)):
                scores[side].append(work.held_out_dice(run(work, seed)))
                _log.info("%s, seed %d: %.4f after %.0f s", side, seed, scores[side][-1], time.monotonic() - began)
    on = f"{CASES - HELD_OUT} cases, {len(SEEDS)} seeds, {EPOCHS} x {ITERATIONS} steps"
    yield from (_reached(side, dice, on) for side, dice in scores.items())
    yield _close(scores["strokenet"], scores["nnU-Net"], on)


def _reached(side: str, dice: Sequence[float], on: str) -> Row:
    return Row(
        check=f"training: {side}",
        on=on,
        difference=max(0.0, ENOUGH - min(dice)),
        tolerance=0,
        unit=f"Dice below {ENOUGH}",
        note=f"held-out Dice by seed {', '.join(f'{value:.3f}' for value in dice)}",
    )


def _close(ours: Sequence[float], theirs: Sequence[float], on: str) -> Row:
    a, b = float(np.mean(ours)), float(np.mean(theirs))
    return Row(
        check="training: difference of the means",
        on=on,
        difference=abs(a - b),
        tolerance=APART,
        unit="Dice",
        note=f"strokenet {a:.3f} (sd {np.std(ours, ddof=1):.3f}), nnU-Net {b:.3f} (sd {np.std(theirs, ddof=1):.3f})",
    )


@dataclass(frozen=True)
class _Work:
    """The cohort, planned and preprocessed on both sides. scans, labels: of the held-out cases."""

    root: Path
    workspace: Workspace
    plan: Plan
    scans: Path
    labels: Path

    @classmethod
    def make(cls, data: Path, root: Path) -> _Work:
        raw, cases = cohort.write_cohort(cohort.read_head(data), DATASET, cases=CASES, seed=0)
        workspace = Workspace(root / "workspace")
        planned = plan_workspace(raw, workspace.root, PlanConfig(orientation="as-stored", jobs=1))
        plan = _small(planned.plan)
        split = Split(train=cases[:-HELD_OUT], val=cases[-HELD_OUT:])
        workspace.write_plan(plan)
        workspace.write_splits([split])
        preprocess_workspace(workspace.root, jobs=1)
        _prepare_peer(plan, split)
        work = cls(root, workspace, plan, root / "scans", root / "labels")
        for source, target in ((raw / "imagesTr", work.scans), (raw / "labelsTr", work.labels)):
            target.mkdir()
            for case in split.val:
                for file in source.glob(f"{case}*"):
                    shutil.copy(file, target)
        return work

    def held_out_dice(self, predictions: Path) -> float:
        """Mean Dice of the held-out cases."""
        return evaluate_paths(predictions, self.labels).summary.all_cases["dice"].mean


def _small(plan: Plan) -> Plan:
    """The plan of the data with a network and a patch for two cores; mirrored and thresholded as the peer does."""
    return replace(
        plan, network=NETWORK, patch=PATCH, batch_size=2, mirror_axes=(0, 1, 2), postprocess=PostprocessRule()
    )


def _by_strokenet(work: _Work, seed: int) -> Path:
    """Trains, segments the held-out cases, and clears the fold for the next seed."""
    config = TrainConfig(
        fold="0", epochs=EPOCHS, iterations=ITERATIONS, val_iterations=1, seed=seed, device="cpu", precision="fp32"
    )
    result = train(work.workspace, config)
    out = work.root / f"strokenet_{seed}"
    infer_folder(work.workspace.root, work.scans, out, InferConfig(device="cpu"))
    shutil.rmtree(result.folder.root)
    return out


def _by_the_peer(work: _Work, seed: int) -> Path:
    """The same by the peer's trainer and predictor."""
    plans = peer_plans(work.plan) | {"continue_training": False}
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    with peer.quiet(), mock.patch.dict(os.environ, {"nnUNet_n_proc_DA": "0"}):
        trainer = nnUNetTrainer(plans, CONFIGURATION, 0, peer.description(DATASET), torch.device("cpu"))
        trainer.num_epochs, trainer.num_iterations_per_epoch = EPOCHS, ITERATIONS
        trainer.num_val_iterations_per_epoch = 1  # as on our side: it changes no weight
        trainer.run_training()
        out = work.root / f"nnunet_{seed}"
        out.mkdir()
        _predict(Path(trainer.output_folder_base), work.scans, out)
    shutil.rmtree(trainer.output_folder_base)
    return out


def _predict(model: Path, scans: Path, out: Path) -> None:
    predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), (0,), "checkpoint_final.pth")
    predictor.predict_from_files_sequential(str(scans), str(out))


def _prepare_peer(plan: Plan, split: Split) -> None:
    """The peer's folder of preprocessed cases, made by the peer from its form of our plan."""
    folder = peer.PREPROCESSED / DATASET
    write_json(folder / "nnUNetPlans.json", peer_plans(plan))
    write_json(folder / "dataset.json", peer.description(DATASET))
    write_json(folder / "dataset_fingerprint.json", {})  # only copied along
    write_json(folder / "splits_final.json", [{"train": list(split.train), "val": list(split.val)}])
    with peer.quiet():
        DefaultPreprocessor(verbose=False).run(DATASET, CONFIGURATION, "nnUNetPlans", num_processes=1)
