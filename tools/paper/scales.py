"""Scales: the protocol of the paper in four sizes. Each is one frozen record; no other file decides a size.

`full` has the paper's numbers. The others are coarser or shorter, and keep its ratios: 80/20 splits, a schedule of
Fig. 2 and one three times as long that is stopped at five sixths (3,000 epochs, used at 2,500), fine-tuning for half of
Fig. 2's. All plans have the scale's own spacing, alike for both networks: the released ones have 1 mm, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from strokenet.data.errors import InputError
from strokenet.prepare.bias import BiasConfig
from strokenet.prepare.config import PrepareConfig
from strokenet.prepare.register import RegisterConfig

FINETUNE_LR = 1e-5  # Meddahi 2024, VI.B step 5
LEAST_CASES = 2  # of a cohort: fewer cannot be split


@dataclass(frozen=True, kw_only=True)
class Scale:
    """One size of the protocol.

    machine: what it is meant for, in words. atlas, clinic: cases to draw. spacing_mm: of both plans, along every axis.
    gpu_memory_gb: of the planner, None for nnU-Net's own. narrower: features of the networks are nnU-Net's divided by
    it. short_epochs: schedule of Fig. 2. long_epochs, stop_epoch: schedule of Fig. 3 and where its model is taken.
    finetune_epochs: schedule of the fine-tuning at the paper's rate. other_lr: rate of a second fine-tuning of the
    same length, which is ours and not the paper's; None for none. iterations, val_iterations: steps an epoch.
    """

    name: str
    machine: str
    atlas: int
    clinic: int
    spacing_mm: float
    short_epochs: int
    long_epochs: int
    stop_epoch: int
    finetune_epochs: int
    iterations: int
    val_iterations: int
    other_lr: float | None = None
    gpu_memory_gb: float | None = None
    narrower: int = 1
    prepare: PrepareConfig = field(default_factory=PrepareConfig)

    def __post_init__(self) -> None:
        if min(self.atlas, self.clinic) < LEAST_CASES:
            raise InputError(f"{self.name}: {self.atlas} and {self.clinic} cases; {LEAST_CASES} of each are needed")
        if not 1 <= self.stop_epoch <= self.long_epochs or not self.spacing_mm > 0 or self.narrower < 1:
            raise InputError(
                f"{self.name}: stop_epoch {self.stop_epoch} of {self.long_epochs}, spacing {self.spacing_mm} mm, "
                f"narrower {self.narrower}; 1 to long_epochs, above 0 and at least 1 are needed"
            )


_ROUGH = PrepareConfig(  # a quick look at every step
    registration=RegisterConfig(shrink=(4,), smooth_mm=(2.0,), samples=(0.05,), iterations=20),
    n4=BiasConfig(coarse_mm=10.0, iterations=(5,)),
)

SCALES: Mapping[str, Scale] = {
    scale.name: scale
    for scale in (
        Scale(
            name="smoke",
            machine="two cores, about two minutes: shows that every stage runs, and nothing else",
            atlas=3,
            clinic=2,
            spacing_mm=5.0,
            short_epochs=2,
            long_epochs=6,
            stop_epoch=5,
            finetune_epochs=1,
            iterations=3,
            val_iterations=1,
            other_lr=1e-3,
            narrower=4,
            prepare=_ROUGH,
        ),
        Scale(
            name="cpu",
            machine="two cores, about an hour",
            atlas=40,
            clinic=25,
            spacing_mm=3.0,
            short_epochs=20,
            long_epochs=60,
            stop_epoch=50,
            finetune_epochs=10,
            iterations=100,
            val_iterations=10,
            other_lr=1e-3,
            gpu_memory_gb=0.05,  # patches of 7 cm; of whole heads at 4 mm, 300 steps found no lesion
            narrower=2,
        ),
        Scale(
            name="gpu",
            machine="one large GPU, about 20 minutes",
            atlas=100,
            clinic=47,
            spacing_mm=1.0,
            short_epochs=20,
            long_epochs=60,
            stop_epoch=50,
            finetune_epochs=10,
            iterations=100,
            val_iterations=10,
            other_lr=1e-3,
            gpu_memory_gb=4.0,  # smaller patches, more steps
        ),
        Scale(
            name="full",
            machine="the paper's size: days on one GPU",
            atlas=655,
            clinic=47,
            spacing_mm=1.0,
            short_epochs=1000,
            long_epochs=3000,
            stop_epoch=2500,
            finetune_epochs=500,
            iterations=250,
            val_iterations=50,
        ),
    )
}
