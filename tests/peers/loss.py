"""The loss: the same logits of every level and the same label, through the loss that the peer's trainer builds.

A network of two stages is left out: the peer takes the weight from the only level of its decoder, so that its loss is
not a number. strokenet gives that level weight 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from planner.plan import NetworkKind, NetworkPlan, Plan, PostprocessRule, Triple
from strokenet.train.loss import deep_supervision_loss, downsample_label
from tests.peers import peer
from tests.peers.network import relative_difference
from tests.peers.row import Row
from tests.peers.translate import peer_plans
from tests.plans import STATS, tiny_plan

# isort: split
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as trainer_module

EPOCHS = 10
CONFIGURATION = "3d_fullres"


def rows(full: bool) -> Iterator[Row]:
    """The loss of random logits and its gradient, with and without batch Dice."""
    for batch_dice in (False, True):
        yield from _loss_rows(batch_dice, 200 if full else 40)


@dataclass(frozen=True, kw_only=True)
class _Compared:
    """loss: of the loss, or of 1 where that is less. gradient: of the largest of its level. labels: voxels that differ,
    on any level. voxels: compared. empty: whether the label has no lesion.
    """

    loss: float
    gradient: float
    labels: int
    voxels: int
    empty: bool


def _loss_rows(batch_dice: bool, count: int) -> Iterator[Row]:
    compared = [_compare(batch_dice, seed) for seed in range(count)]
    on = f"{count} random batches, batch Dice {'on' if batch_dice else 'off'}"
    empty = sum(one.empty for one in compared)
    yield Row(
        check="loss",
        on=on,
        difference=max(one.loss for one in compared),
        tolerance=1e-6,
        unit="relative",
        note=f"all levels; {empty} without lesion",
    )
    yield Row(
        check="loss, gradient of the logits",
        on=on,
        difference=max(one.gradient for one in compared),
        tolerance=1e-6,
        unit="of the largest gradient",
    )
    yield Row(
        check="labels of the coarse levels",
        on=on,
        difference=sum(one.labels for one in compared),
        tolerance=0,
        unit="values",
        note=f"{sum(one.voxels for one in compared)} voxels",
    )


def _compare(batch_dice: bool, seed: int) -> _Compared:
    rng = np.random.default_rng(seed)
    plan = replace(random_plan(rng, "plain"), batch_dice=batch_dice)
    trainer = peer_trainer(plan)
    generator = torch.Generator().manual_seed(seed)
    label = random_label(rng, plan, empty=seed % 5 == 0)
    targets = peer_targets(trainer, label)
    logits = [4 * torch.randn(len(label), plan.heads, *target.shape[2:], generator=generator) for target in targets]
    if seed % 10 == 0:  # sure that there is no lesion, and right: what smooths the Dice then decides
        for level in logits:
            level[:, 0] += 30
    their_logits, our_logits = ([level.clone().requires_grad_() for level in logits] for _ in range(2))
    theirs = trainer.loss(their_logits, targets)
    ours = deep_supervision_loss(our_logits, label, batch_dice=batch_dice)
    theirs.backward()
    ours.backward()  # type: ignore[no-untyped-call]
    own_targets = [downsample_label(label, tuple(target.shape[2:])) for target in targets]
    return _Compared(
        loss=abs(float(theirs.detach()) - float(ours.detach())) / max(1.0, abs(float(theirs.detach()))),
        gradient=_gradient_difference(their_logits, our_logits),
        labels=sum(peer.differing(target[:, 0], own) for target, own in zip(targets, own_targets, strict=True)),
        voxels=sum(target.numel() for target in targets),
        empty=not label.any(),
    )


def _gradient_difference(theirs: list[Tensor], ours: list[Tensor]) -> float:
    """Of the largest gradient of its level; the coarsest level has none on either side."""
    pairs = [(a.grad, b.grad) for a, b in zip(theirs, ours, strict=True)]
    if any((a is None) != (b is None) for a, b in pairs):
        return float("inf")
    return max(relative_difference(a, b) for a, b in pairs if a is not None and b is not None)


def peer_trainer(plan: Plan) -> Any:
    """The peer's trainer, initialised on the CPU with a schedule of ten epochs; it looks for no cases."""
    description = {
        "channel_names": {str(place): name for place, name in enumerate(plan.channels)},
        "labels": dict(plan.labels),
        "file_ending": ".nii.gz",
    }
    plans = {**peer_plans(plan), "continue_training": False}
    with peer.quiet(), mock.patch.object(trainer_module, "infer_dataset_class", return_value=None):
        trainer = trainer_module.nnUNetTrainer(plans, CONFIGURATION, 0, description, torch.device("cpu"))
        trainer.num_epochs = EPOCHS
        trainer.initialize()
    return trainer


def peer_targets(trainer: Any, label: Tensor) -> list[Tensor]:
    """The label at every decoder level, by the peer's transform. (N, D, H, W) -> (N, 1, D_l, H_l, W_l) each."""
    transform = DownsampleSegForDSTransform(trainer._get_deep_supervision_scales())
    samples = [transform(segmentation=sample[None].to(torch.int16))["segmentation"] for sample in label]
    return [torch.stack(level) for level in zip(*samples, strict=True)]


def random_label(rng: np.random.Generator, plan: Plan, *, empty: bool) -> Tensor:
    """(N, D, H, W) int64: noise of labels in a random half of the voxels, background elsewhere."""
    shape = (plan.batch_size, *plan.patch)
    label = np.where(rng.random(shape) < 0.5, rng.integers(0, plan.heads, shape), 0)
    return torch.from_numpy(np.zeros_like(label) if empty else label)


def random_plan(rng: np.random.Generator, kind: NetworkKind) -> Plan:
    """3 to 5 stages, 1 to 3 channels and lesion labels, a batch of 2 or 3 patches of at most 30,000 voxels.

    The bottleneck keeps 4 voxels an axis, as in every plan: of fewer, one decides for itself where the weights go.
    """
    while True:
        stages = int(rng.integers(3, 6))
        strides = ((1, 1, 1), *(_triple(rng.choice([1, 2, 2], 3)) for _ in range(stages - 1)))
        divisor = np.prod(np.array(strides), 0)
        patch = _triple(divisor * rng.integers(4, 7, 3))
        if np.prod(patch) <= 30_000:
            break
    network = NetworkPlan(
        kind=kind,
        features=tuple(min(8 * 2**level, 32) for level in range(stages)),
        strides=strides,
        kernels=((3, 3, 3),) * stages,
        encoder_blocks=tuple(int(n) for n in rng.integers(1, 3, stages)),
        decoder_convs=(1,) * (stages - 1),
        decoder_kernels=((3, 3, 3),) * (stages - 1),
    )
    channels, lesions = int(rng.integers(1, 4)), int(rng.integers(1, 4))
    return tiny_plan(
        channels=tuple(f"channel_{n}" for n in range(channels)),
        labels={"background": 0, **{f"lesion_{value}": value for value in range(1, lesions + 1)}},
        normalisation=("zscore",) * channels,
        use_mask_for_norm=(False,) * channels,
        intensity=(STATS,) * channels,
        patch=patch,
        batch_size=int(rng.integers(2, 4)),
        network=network,
        postprocess=PostprocessRule(),
    )


def _triple(values: Any) -> Triple:
    d, h, w = (int(value) for value in values)
    return (d, h, w)
