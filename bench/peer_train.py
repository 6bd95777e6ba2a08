"""The peers' side of step, data and epoch: nnU-Net's trainer, its transforms and loader, and MONAI's DynUNet.

    .venv-peers/bin/python -m bench.peer_train JOB      started by the suites (remote.py), which set nnU-Net's folders

nnU-Net is what it is: its trainer builds network, loss, optimiser, transforms and loaders from a plans.json of our
plan, and its own methods do the step and the epoch. cuDNN's settings are those of its command. MONAI is a library:
its network, without deep supervision as NVIDIA's recipe has it, and its loss get nnU-Net's optimiser.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as trainer_module
from safetensors.torch import load_file
from torch import Tensor, nn

from bench.drawn import BATCH, WEIGHTS
from bench.phases import timed_steps
from bench.remote import Contender, Job, Turn, describe, epoch_turn, serve
from planner.plan import Plan
from strokenet.nnunet.export import CONFIGURATION, dataset_json, plans_json
from strokenet.preprocess.store import Store
from strokenet.workspace import Workspace

MOMENTUM, WEIGHT_DECAY, LEARNING_RATE = 0.99, 3e-5, 1e-2  # nnU-Net's, for MONAI's network
DICE_SMOOTH = 1e-5


def _nnunet_step(job: Job) -> Contender:
    """The trainer's train_step on one batch, which is on the device already. answer: its loss, all levels, float32."""
    plan, device, batch = _plan(job), torch.device(job.device), load_file(Path(job.folder) / BATCH)
    trainer = _trainer(job, plan)
    network = getattr(trainer.network, "_orig_mod", trainer.network)  # the one that torch.compile wraps
    weights = load_file(Path(job.folder) / WEIGHTS)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(weights[name])
    given = {"data": batch["image"].to(device), "target": _targets(trainer, batch["label"], device)}
    trainer.on_train_epoch_start()

    @torch.no_grad()
    def answer() -> dict[str, float]:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return {"loss": float(trainer.loss(network(given["data"]), given["target"]))}

    return Contender(answer=answer, turn=timed_steps(lambda: trainer.train_step(given), device))


def _targets(trainer: Any, label: Tensor, device: torch.device) -> list[Tensor]:
    """The label at every decoder level, by the peer's transform. (N, D, H, W) -> (N, 1, D_l, H_l, W_l) each."""
    transform = DownsampleSegForDSTransform(trainer._get_deep_supervision_scales())
    samples = [transform(segmentation=sample[None])["segmentation"] for sample in label]
    return [torch.stack(level).to(device) for level in zip(*samples, strict=True)]


def _monai_step(job: Job) -> Contender:
    """DynUNet, DiceCELoss and SGD, in float16 with a scaler on a GPU. answer: the loss in float32, its 1 taken off."""
    from monai.losses.dice import DiceCELoss

    plan, device, batch = _plan(job), torch.device(job.device), load_file(Path(job.folder) / BATCH)
    network = _dynunet(plan, load_file(Path(job.folder) / WEIGHTS)).to(device).train()
    image, label = batch["image"].to(device), batch["label"][:, None].to(device)  # (N, 1, D, H, W)
    loss = DiceCELoss(
        include_background=False,
        to_onehot_y=True,
        softmax=True,
        batch=plan.batch_dice,
        smooth_nr=DICE_SMOOTH,
        smooth_dr=DICE_SMOOTH,
    )
    optimizer = torch.optim.SGD(network.parameters(), LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True)
    torch.backends.cudnn.benchmark = half = device.type == "cuda"
    scaler = torch.amp.GradScaler(device.type, enabled=half)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=torch.float16 if half else torch.bfloat16, enabled=half):
            value = loss(network(image), label)
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()

    @torch.no_grad()
    def answer() -> dict[str, float]:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return {"loss_without_deep_supervision": float(loss(network(image), label)) - 1}

    return Contender(answer=answer, turn=timed_steps(step, device))


def _dynunet(plan: Plan, weights: Mapping[str, Tensor]) -> Any:
    """MONAI's network of the plan's shape with our weights; it has no biases where fresh ones are 0."""
    from monai.networks.nets.dynunet import DynUNet

    of = plan.network
    network = DynUNet(
        spatial_dims=3,
        in_channels=len(plan.channels),
        out_channels=plan.heads,
        kernel_size=of.kernels,
        strides=of.strides,
        upsample_kernel_size=of.strides[1:],
        filters=of.features,
        deep_supervision=False,
    )
    blocks = [network.input_block, *network.downsamples, network.bottleneck]
    pairs = [(block, f"encoder.stages.{level}.0") for level, block in enumerate(blocks)]
    pairs += [(up.conv_block, f"decoder.stages.{number}") for number, up in enumerate(network.upsamples)]
    named: dict[nn.Parameter, str] = {}
    for block, name in pairs:
        for place, (conv, norm) in enumerate(((block.conv1, block.norm1), (block.conv2, block.norm2))):
            named[conv.conv.weight] = f"{name}.convs.{place}.conv.weight"
            named |= {norm.weight: f"{name}.convs.{place}.norm.weight", norm.bias: f"{name}.convs.{place}.norm.bias"}
    for number, up in enumerate(network.upsamples):
        named[up.transp_conv.conv.weight] = f"decoder.transpconvs.{number}.weight"
    head, last = network.output_block.conv.conv, len(network.upsamples) - 1
    named |= {head.weight: f"decoder.seg_layers.{last}.weight", head.bias: f"decoder.seg_layers.{last}.bias"}
    with torch.no_grad():
        for parameter in network.parameters():  # all of them: what is not named fails here
            parameter.copy_(weights[named[parameter]])
    return network


def _nnunet_augment(job: Job) -> Contender:
    """The trainer's training transforms on the raw batch; a sample is copied before its clock starts."""
    plan, raw = _plan(job), load_file(Path(job.folder) / BATCH)
    trainer = _trainer(job, plan)
    turn_by, flat, first_patch, mirror_axes = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    assert tuple(first_patch) == tuple(raw["label"].shape[1:]), (first_patch, raw["label"].shape)
    transforms = trainer.get_training_transforms(
        plan.patch, turn_by, None, mirror_axes, flat, use_mask_for_norm=list(plan.use_mask_for_norm)
    )
    numbers = iter(range(2**31))

    def sample() -> tuple[Tensor, Tensor, float]:
        place = next(numbers) % len(raw["image"])
        given = {"image": raw["image"][place].clone(), "segmentation": raw["label"][place][None].clone()}
        began = time.perf_counter()
        made = transforms(**given)
        return made["image"], made["segmentation"][0], time.perf_counter() - began

    def answer() -> dict[str, float]:
        made = [sample()[:2] for _ in range(len(raw["image"]))]
        return describe(*(torch.stack(of) for of in zip(*made, strict=True)))

    return Contender(answer=answer, turn=lambda count: Turn(ms=1000 * sum(sample()[2] for _ in range(count)) / count))


def _nnunet_loader(job: Job) -> Contender:
    """Samples of the cohort by the trainer's own loader in this process, without the labels of the coarser levels."""
    plan = _plan(job)
    _write_cohort(job, plan)
    trainer = _trainer(job, plan, cohort=True)
    trainer.enable_deep_supervision = False
    with mock.patch.dict(os.environ, {"nnUNet_n_proc_DA": "0"}):
        batches, _ = trainer.get_dataloaders()

    def turn(count: int) -> Turn:
        done, began = 0, time.perf_counter()
        while done < count:
            done += len(next(batches)["data"])
        return Turn(ms=1000 * (time.perf_counter() - began) / done)

    def answer() -> dict[str, float]:
        batch = next(batches)
        return describe(batch["data"], batch["target"][:, 0])

    return Contender(answer=answer, turn=turn)


class _Timed:
    """A loader of the trainer's; waited: seconds in which its next batch was not there."""

    def __init__(self, batches: Iterator[Any]):
        self._batches, self.waited = batches, 0.0

    def __next__(self) -> Any:
        began = time.perf_counter()
        batch = next(self._batches)
        self.waited += time.perf_counter() - began
        return batch


def _nnunet_epoch(job: Job) -> Contender:
    """Epochs as the trainer's run_training has them, with its own loaders and worker processes."""
    plan = _plan(job)
    _write_cohort(job, plan)
    trainer = _trainer(job, plan, cohort=True)
    trainer.num_iterations_per_epoch = job.settings["iterations"]
    trainer.num_val_iterations_per_epoch = job.settings["val_iterations"]
    trainer.on_train_start()
    loaders = _Timed(trainer.dataloader_train), _Timed(trainer.dataloader_val)
    trainer.dataloader_train, trainer.dataloader_val = loaders

    def turn(count: int) -> Turn:
        waited, began = sum(loader.waited for loader in loaders), time.perf_counter()
        seconds = [_one_epoch(trainer) for _ in range(count)]
        wall = time.perf_counter() - began
        return epoch_turn(seconds, sum(loader.waited for loader in loaders) - waited, wall)

    return Contender(answer=dict, turn=turn)


def _one_epoch(trainer: Any) -> float:
    """The trainer's methods in the order of its own loop. Seconds between the two times that it logs."""
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    steps = range(trainer.num_iterations_per_epoch)
    trainer.on_train_epoch_end([trainer.train_step(next(trainer.dataloader_train)) for _ in steps])
    with torch.no_grad():
        trainer.on_validation_epoch_start()
        steps = range(trainer.num_val_iterations_per_epoch)
        trainer.on_validation_epoch_end([trainer.validation_step(next(trainer.dataloader_val)) for _ in steps])
    trainer.on_epoch_end()
    ended, began = (trainer.logger.get_value(f"epoch_{name}_timestamps", step=-1) for name in ("end", "start"))
    return float(ended - began)


def _plan(job: Job) -> Plan:
    return Workspace(Path(job.folder)).read_plan()


def _trainer(job: Job, plan: Plan, *, cohort: bool = False) -> Any:
    """nnU-Net's trainer, initialised; without a cohort it looks for none."""
    if job.device == "cuda":  # as nnUNetv2_train sets them
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = False, True
    plans: dict[str, Any] = {**plans_json(plan), "continue_training": False}
    trainer = trainer_module.nnUNetTrainer(plans, CONFIGURATION, 0, dataset_json(plan), torch.device(job.device))
    if cohort:
        trainer.initialize()
    else:
        with mock.patch.object(trainer_module, "infer_dataset_class", return_value=None):
            trainer.initialize()
    return trainer


def _write_cohort(job: Job, plan: Plan) -> None:
    """The workspace's cases in nnU-Net's own files: the same voxels, compressed in its own blocks."""
    workspace, stored = Workspace(Path(job.folder)), plans_json(plan)
    root = Path(str(nnUNet_preprocessed)) / plan.dataset
    folder = root / stored["configurations"][CONFIGURATION]["data_identifier"]
    folder.mkdir(parents=True)
    for name in (store := Store(workspace.preprocessed)).case_ids():
        case = store.open(name, plan)
        image, label = np.array(case.image), np.array(case.label)[None]  # (1, D, H, W)
        places = DefaultPreprocessor._sample_foreground_locations(label, list(plan.foreground))
        shapes = [comp_blosc2_params(of.shape, plan.patch, of.itemsize) for of in (image, label)]
        (blocks, chunks), (blocks_label, chunks_label) = shapes
        nnUNetDatasetBlosc2.save_case(
            image,
            label,
            {"class_locations": places},
            str(folder / name),
            chunks=chunks,
            blocks=blocks,
            chunks_seg=chunks_label,
            blocks_seg=blocks_label,
        )
    (split,) = workspace.read_splits()
    files: dict[str, Any] = {
        "splits_final.json": [{"train": list(split.train), "val": list(split.val)}],
        "dataset_fingerprint.json": {},  # only copied along
    }
    for file, content in files.items():
        (root / file).write_text(json.dumps(content))


if __name__ == "__main__":
    serve(
        {
            "nnunet step": _nnunet_step,
            "monai step": _monai_step,
            "nnunet augment": _nnunet_augment,
            "nnunet loader": _nnunet_loader,
            "nnunet epoch": _nnunet_epoch,
        }
    )
