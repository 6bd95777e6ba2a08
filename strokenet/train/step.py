"""A step of training: forward, loss, backward, clip, update; as torch writes it, and fast.

    what                    reference                       fast
    layers                  torch's, contiguous             the training form (model/training.py)
    clip and update         norm read by the host, SGD      one fused pass; a bad gradient is skipped on the device
    loss                    read by the host                on a GPU read two steps later, when it is there anyway
    launches                one by one                      on a GPU a CUDA graph of the whole step, from the fourth on
    torch.compile           no                              on demand, without it where it fails

Same mathematics: in float32 the two differ by rounding (tests/train/test_step.py). How steps are started, one by one or
queued and recorded, is launch.py's.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from strokenet.model.device import is_out_of_memory
from strokenet.model.training import TrainingForm
from strokenet.train.loss import deep_supervision_loss, level_weights
from strokenet.train.run import Run

_log = logging.getLogger("strokenet")

GRADIENT_NORM = 12.0

Compute = Callable[[Tensor, Tensor], Tensor]  # image, label -> (2,) float32: the loss, and 1 where the step was good


@dataclass(frozen=True, kw_only=True)
class Speedups:
    """What makes a step fast, each for itself, so that it can be measured without (`python -m bench step`).

    graph: on NVIDIA GPUs only (launch.py).
    """

    channels_last: bool = True
    without_bias: bool = True
    fused_update: bool = True
    graph: bool = True
    compile: bool = False


REFERENCE = Speedups(channels_last=False, without_bias=False, fused_update=False, graph=False)


def make_step(run: Run, speedups: Speedups) -> Compute:
    """The step of a run whose state is restored. Brings the network and the optimizer into their form."""
    weights = level_weights(len(run.network.decoder.seg_layers))
    levels: nn.Module = TrainingForm(
        run.network,
        channels_last=speedups.channels_last,
        without_bias=speedups.without_bias,
        unread_heads=sum(weight == 0 for weight in weights),
    )
    levels = run.ranks.wrap(Compiled(levels) if speedups.compile else levels)
    arrange(run.optimizer, fused=speedups.fused_update)
    return FusedStep(run, levels) if speedups.fused_update else PlainStep(run, levels)


def arrange(optimizer: torch.optim.SGD, *, fused: bool) -> None:
    """Brings momentum into the layout of its parameter, as the fused update reads it; where there is none yet, zeros.

    The first update is the same from zeros, and one that is skipped must not leave momentum undefined. The learning
    rate of a state that a recording left (launch.py) is a number again.
    """
    for group in optimizer.param_groups:
        group.update(fused=fused, foreach=None, lr=float(group["lr"]))
        for parameter in group["params"]:
            momentum = optimizer.state.get(parameter, {}).get("momentum_buffer")
            if momentum is None and not (fused and parameter.requires_grad):
                continue
            arranged = torch.zeros_like(parameter)
            if momentum is not None:
                arranged.copy_(momentum)
            optimizer.state[parameter]["momentum_buffer"] = arranged


def set_rate(optimizer: torch.optim.SGD, lr: float) -> None:
    """The learning rate of the steps to come, in place where a recording reads it."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


class PlainStep:
    """The step as torch writes it, read by the host in between: what the fast one is compared with."""

    def __init__(self, run: Run, levels: nn.Module):
        self._run, self._levels = run, levels

    def __call__(self, image: Tensor, label: Tensor) -> Tensor:
        """image: (N, C, D, H, W) float32. label: (N, D, H, W) int64. -> see Compute."""
        loss = _loss(self._run, self._levels, image, label)
        value = float(self._run.ranks.mean(loss.detach()))  # the same on all ranks: they skip together
        good = math.isfinite(value) and self._update(loss)
        return torch.tensor([value, good], dtype=torch.float32)

    def _update(self, loss: Tensor) -> bool:
        """False where the gradient is not finite: the weights are then as before.

        float16 overflows now and then: the scaler skips such a step itself and lowers its scale, and that is fine.
        Below a scale of 1 it is no overflow any more.
        """
        run = self._run
        run.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        run.scaler.unscale_(run.optimizer)
        finite = math.isfinite(float(nn.utils.clip_grad_norm_(run.network.parameters(), GRADIENT_NORM)))
        overflow = not finite and run.scaler.is_enabled() and run.scaler.get_scale() >= 1
        if finite or run.scaler.is_enabled():
            run.scaler.step(run.optimizer)
            run.scaler.update()
        return finite or overflow


class FusedStep:
    """The step without a word from the host: the norm of the gradient scales it, or stops it, inside the fused update.

    The scale is that of torch's clip_grad_norm_, max(1, (norm + 1e-6) / 12), by which the update divides.
    """

    def __init__(self, run: Run, levels: nn.Module):
        self._run, self._levels = run, levels
        self._parameters = [parameter for parameter in run.network.parameters() if parameter.requires_grad]

    def __call__(self, image: Tensor, label: Tensor) -> Tensor:
        """image: (N, C, D, H, W) float32. label: (N, D, H, W) int64. -> see Compute."""
        loss = _loss(self._run, self._levels, image, label)
        value = self._run.ranks.mean(loss.detach())  # the same on all ranks: they skip together
        good = (self._update_scaled if self._run.scaler.is_enabled() else self._update)(loss, value)
        return torch.stack([value, good.float()])

    def _update(self, loss: Tensor, value: Tensor) -> Tensor:
        """Whether it was done: 0-dimensional, bool, on the device. value: of the whole batch's loss."""
        optimizer = self._run.optimizer
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        good = value.isfinite() & norm.isfinite()
        optimizer.grad_scale = ((norm + 1e-6) / GRADIENT_NORM).clamp_min(1.0)  # type: ignore[attr-defined]
        optimizer.found_inf = 1.0 - good.float()  # type: ignore[attr-defined]
        optimizer.step()
        return good

    def _update_scaled(self, loss: Tensor, value: Tensor) -> Tensor:
        """As above in float16, by torch's scaler; an overflow counts as good as long as the scale is 1 or more."""
        scaler, optimizer = self._run.scaler, self._run.optimizer
        large_scale = scaler.scale(torch.ones_like(value)) >= 1
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(self._parameters, GRADIENT_NORM)
        scaler.step(optimizer)
        scaler.update()
        return value.isfinite() & (norm.isfinite() | large_scale)


def _loss(run: Run, levels: nn.Module, image: Tensor, label: Tensor) -> Tensor:
    run.optimizer.zero_grad(set_to_none=True)
    with run.autocast():
        logits = levels(image)
    return deep_supervision_loss(logits, label, batch_dice=run.plan.batch_dice, part=run.part)


class Compiled(nn.Module):
    """A module by torch.compile; as it is, from the first call on that compiling fails."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module
        self._compiled: Callable[[Tensor], object] | None = torch.compile(module, dynamic=False)

    def forward(self, image: Tensor) -> object:
        """What the module answers."""
        if self._compiled is not None:
            try:
                return self._compiled(image)
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                reason = next(iter(str(error).splitlines()), "") or type(error).__name__
                _log.warning("--compile: torch.compile failed and the run goes on without it (%s)", reason)
                self._compiled = None
        return self.module(image)
