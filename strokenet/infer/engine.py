"""Engine: a model ready to segment case after case, and how much of its device it may fill.

Comes in: a Model and an InferConfig. Goes out: logits of preprocessed images. The networks are in their inference form
(model/inference.py), on a GPU recorded as graphs (model/graphed.py), or for `exact` as they were trained; tiles and
their mirror images go through them in batches.

Where memory runs out the engine steps down a ladder, says so, stays there for the cases to come, and begins the image
again, or the whole case where it was its maps that did not fit: fewer tiles at a time, then sums and maps in the
machine's memory, then everything on the CPU. The same sums are made on every rung; what differs is the order of a
convolution's own additions, and on the CPU its arithmetic, where that of the GPU would be slow there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from strokenet.data.track import Track, silent
from strokenet.infer.config import InferConfig, arithmetic, mirror_axes, window_rules
from strokenet.infer.sliding_window import Network, predict_logits
from strokenet.model.checkpoint import Model
from strokenet.model.device import choose_dtype, is_out_of_memory
from strokenet.model.graphed import Graphed
from strokenet.model.inference import InferenceNetwork, TrainedForm

_log = logging.getLogger("strokenet")
CPU = torch.device("cpu")
Result = TypeVar("Result")
LARGEST_BATCH = 8  # of tiles on a GPU: one tile in all its mirror images


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One way to compute. batch: tiles a call. sums_on: where image and sums lie. device: where the networks run."""

    device: torch.device
    batch: int
    sums_on: torch.device

    def __str__(self) -> str:
        if self.device == CPU:
            return "on the CPU"
        tiles = "one tile" if self.batch == 1 else f"{self.batch} tiles"
        return f"{tiles} at a time" + ("" if self.sums_on == self.device else ", sums in the machine's memory")


def ladder(device: torch.device) -> tuple[Rung, ...]:
    """The ways to compute, the fastest first. A CPU gains nothing from a batch, and has nowhere else to go."""
    on_cpu = Rung(device=CPU, batch=1, sums_on=CPU)
    if device.type == "cpu":
        return (on_cpu,)
    batches, batch = [], LARGEST_BATCH
    while batch:
        batches.append(Rung(device=device, batch=batch, sums_on=device))
        batch //= 2
    return (*batches, Rung(device=device, batch=1, sums_on=CPU), on_cpu)


class Engine:
    """A model, its config, and the rung of the ladder that its cases fit on."""

    def __init__(self, model: Model, config: InferConfig, rungs: tuple[Rung, ...] | None = None):
        """rungs: by default those of the device on which the model is."""
        device = model.networks[0].decoder.seg_layers[-1].weight.device
        assert isinstance(device, torch.device)
        self.model, self.config = model, config
        self.rules = window_rules(model.plan, config)
        self.rungs = rungs or ladder(device)
        self._networks = self._forms(arithmetic(config, self.rules, device), device)

    @property
    def rung(self) -> Rung:
        """How the next case will be computed."""
        return self.rungs[0]

    def logits(self, image: Tensor, track: Track = silent) -> Tensor:
        """What the networks say of a preprocessed image: (C, D, H, W) float32 -> (K, D, H, W), as predict_logits.

        Raises:
            RuntimeError: memory ran out on the last rung (torch.OutOfMemoryError is one).
        """
        return self.within_memory(lambda: self._on_rung(image, track), fewer_tiles=True)

    @property
    def place(self) -> torch.device:
        """Where a case's image and maps lie: beside the sums, but on a GPU that has float64 alone, else on the CPU."""
        return self.rung.sums_on if self.rung.sums_on.type == "cuda" else CPU

    def within_memory(self, work: Callable[[], Result], *, fewer_tiles: bool = False) -> Result:
        """What `work` returns, which begins again one rung lower wherever memory runs out.

        fewer_tiles: of the networks' own work. Else those rungs are passed over that leave the maps where they are.

        Raises:
            RuntimeError: memory ran out on the last rung.
        """
        while True:
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                lower = [rung for rung in self.rungs[1:] if fewer_tiles or rung.sums_on != self.rung.sums_on]
                if not lower or not is_out_of_memory(error):
                    raise
                failed = error.with_traceback(None)  # its frames hold the tensors that are in the way
            self._step_down(failed, tuple(lower))

    def _on_rung(self, image: Tensor, track: Track) -> Tensor:
        plan, rung = self.model.plan, self.rung
        with _searching():
            return predict_logits(
                self._networks,
                image,
                patch=plan.patch,
                mirror_axes=mirror_axes(plan, self.config.tta),
                rules=self.rules,
                device=rung.device,
                batch=rung.batch,
                sums_on=rung.sums_on,
                track=track,
            )

    def _step_down(self, error: Exception, lower: tuple[Rung, ...]) -> None:
        rung = lower[0]
        for network in self._networks:
            if isinstance(network, Graphed):
                network.forget()
        _log.warning("memory ran out (%s); goes on %s", str(error).split(".")[0] or type(error).__name__, rung)
        if rung.device != self.rung.device:
            self._networks = ()  # first, to make room
            self._networks = self._forms(_dtype_on(rung.device, self.config, self.rules.exact), rung.device)
        self.rungs = lower
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _forms(self, dtype: torch.dtype, device: torch.device) -> tuple[Network, ...]:
        if self.rules.exact:
            return tuple(TrainedForm(network, dtype, device) for network in self.model.networks)
        forms = tuple(InferenceNetwork(network, dtype, device) for network in self.model.networks)
        return tuple(map(Graphed, forms)) if device.type == "cuda" else forms


def _dtype_on(device: torch.device, config: InferConfig, exact: bool) -> torch.dtype:
    """The arithmetic of a model that comes to the CPU from a GPU: float32 where less was no wish of speed alone."""
    if exact or config.precision in ("fp32", "fp16"):
        return torch.float32
    return choose_dtype(config.precision, device)


@contextmanager
def _searching() -> Iterator[None]:
    """cuDNN looks for its fastest convolution: the patch never changes, so the search pays. Its other flags stay."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
