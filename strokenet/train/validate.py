"""Validation while training: drawn patches after every epoch, whole volumes now and then.

Comes in: the network as it stands. Goes out: numbers for the log; nothing here changes the network. The peer's
"pseudo-Dice" is the Dice of all validation patches taken together, a label at a time, so that small lesions in empty
patches do not divide by zero; whole volumes are scored case by case on the plan's grid.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from strokenet.data.track import Track
from strokenet.infer.sliding_window import predict_logits
from strokenet.preprocess.store import StoredCase
from strokenet.train.feed import Feed
from strokenet.train.loss import deep_supervision_loss
from strokenet.train.run import Run

_log = logging.getLogger("strokenet")

Stopped = Callable[[], bool]


@dataclass(frozen=True, kw_only=True)
class PatchScore:
    """loss: mean over the batches. dice: the pseudo-Dice, NaN where no label occurs in reference or prediction."""

    loss: float
    dice: float


def validate_patches(run: Run, feed: Feed, track: Track, stopped: Stopped) -> PatchScore | None:
    """Scores the epoch's validation patches, which are the same whenever they are asked for; None where stopped."""
    steps = range(run.config.val_iterations)
    losses = []
    counts = torch.zeros(3, run.plan.heads - 1, dtype=torch.int64, device=run.device)
    run.network.eval()
    with torch.inference_mode(), closing(feed.batches("val", run.progress.epoch, steps)) as batches:
        for batch in track(batches, total=len(steps), what="validation patches"):
            if stopped():
                return None
            with run.autocast():
                levels = run.network.forward_levels(batch.image)
            losses.append(deep_supervision_loss(levels, batch.label, batch_dice=run.plan.batch_dice, part=run.part))
            counts += confusion(levels[0].argmax(1), batch.label, run.plan.foreground)
    dice = dice_by_label(run.ranks.total(counts).cpu())  # read here, and nothing before it: a GPU is not waited for
    present = dice[~dice.isnan()]
    loss = run.ranks.mean(torch.stack(losses).cpu().double().mean())
    return PatchScore(loss=float(loss), dice=float(present.mean()) if len(present) else math.nan)


def validate_volumes(run: Run, cases: Sequence[StoredCase], track: Track, stopped: Stopped) -> float | None:
    """Mean over the cases of the Dice of whole volumes; None where stopped.

    A label that is in neither reference nor prediction counts 1, as in evaluate. NaN where a volume could not be
    computed (most likely for lack of memory): that must not end a training.
    """
    scores: list[float] = []
    failed = False
    run.network.eval()
    rounds = run.ranks.rounds(cases)
    for case in track(rounds, total=len(rounds), what="validation volumes"):
        if stopped():
            return None
        if case is None or failed:
            continue
        try:
            scores.append(_volume_dice(run, case, track))
        except (RuntimeError, MemoryError, OSError) as error:
            line = " ".join(str(error).split())[:200] or type(error).__name__
            _log.warning("%s: whole-volume validation failed (%s); training goes on without it", case.case_id, line)
            failed = True
    total, count = run.ranks.total(
        torch.tensor([math.nan if failed else sum(scores), len(scores)], dtype=torch.float64)
    )
    return float(total / count)


def confusion(predicted: Tensor, label: Tensor, foreground: Sequence[int]) -> Tensor:
    """Voxels counted: (3, K-1) int64, rows true positive, false positive, false negative; a column a label.

    On the device of the labels, and not waited for.
    """
    columns = []
    for value in foreground:
        p, g = predicted == value, label == value
        both = (p & g).sum()
        columns.append(torch.stack((both, p.sum() - both, g.sum() - both)))
    return torch.stack(columns, 1)


def dice_by_label(counts: Tensor) -> Tensor:
    """2 TP / (2 TP + FP + FN) of every label, float64; NaN where the label is in neither. counts: see confusion."""
    true_positive, false_positive, false_negative = counts.double()
    size: Tensor = 2 * true_positive + false_positive + false_negative
    dice: Tensor = 2 * true_positive / size
    return dice


def _volume_dice(run: Run, case: StoredCase, track: Track) -> float:
    image = torch.from_numpy(np.array(case.image))
    logits = predict_logits([run.network], image, patch=run.plan.patch, dtype=run.dtype, device=run.device, track=track)
    label = torch.from_numpy(np.array(case.label)).to(run.device)  # -1 outside the head is no label's value
    counts = confusion(logits.argmax(0), label, run.plan.foreground).cpu()
    return float(dice_by_label(counts).nan_to_num(1.0).mean())
