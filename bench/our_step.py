"""Our training step for the bench: the one place that knows how a run builds it and what can be switched off."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from planner.plan import Plan
from strokenet.memory import keep_freed_memory
from strokenet.model.device import choose_dtype
from strokenet.model.network import UNet
from strokenet.train.feed import Batch
from strokenet.train.launch import make_steps
from strokenet.train.run import FoldCases, TrainConfig, start_run
from strokenet.train.step import Speedups
from strokenet.workspace import Workspace


@dataclass(frozen=True, kw_only=True)
class Switches:
    """The optimisations of a step, each on.

    bfloat16: the arithmetic of --precision auto where it is not float32. kept_memory: what `strokenet train` asks of
    glibc (strokenet/memory.py). The others are those of strokenet/train/step.py.
    """

    bfloat16: bool = True
    kept_memory: bool = True
    channels_last: bool = True
    bias_left_out: bool = True
    fused_update: bool = True
    graph: bool = True


def switched_off(device: torch.device) -> Iterator[tuple[str, Switches]]:
    """Each optimisation that does something on this device, and the switches without it."""
    for field in fields(Switches):
        if field.name == "bfloat16" and our_dtype(device) == torch.float32:
            continue
        if (field.name == "graph" and device.type != "cuda") or (field.name == "kept_memory" and device.type == "cuda"):
            continue
        yield field.name.replace("_", " "), replace(Switches(), **{field.name: False})


def our_dtype(device: torch.device) -> torch.dtype:
    """The arithmetic of a step with all switches on."""
    return choose_dtype("auto", device)


def our_step(
    workspace: Workspace,
    plan: Plan,
    weights: Mapping[str, Tensor],
    batch: Batch,
    *,
    device: str,
    switches: Switches,
) -> tuple[UNet, Callable[[], object]]:
    """The network that is trained, with these weights, and the call that does one step of it on this batch.

    batch: on the device already.
    """
    if switches.kept_memory:
        keep_freed_memory()
    config = TrainConfig(device=device, precision="auto" if switches.bfloat16 else "fp32")
    run = start_run(workspace, plan, config, FoldCases(train=(), val=()))
    run.network.load_state_dict(weights)
    run.network.train()
    speedups = Speedups(
        channels_last=switches.channels_last,
        without_bias=switches.bias_left_out,
        fused_update=switches.fused_update,
        graph=switches.graph,
    )
    steps = make_steps(run, speedups)
    steps.begin(config.lr)
    return run.network, lambda: steps(batch, 0)
