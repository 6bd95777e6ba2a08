"""Resampling one brain to another grid: ours, and scikit-image as nnU-Net calls it, channel by channel in float64.

Where there is a GPU the image lies on it: ours there, and scikit-image with its copies to the host and back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from skimage.transform import resize
from torch import Tensor

from bench.measure import CPU, Comparison, Measurement, in_turn
from kernels.resample import resample
from planner.plan import Triple

Pair = tuple[Triple, Triple]

SHAPES: tuple[Pair, ...] = (((140, 170, 140), (160, 192, 158)), ((48, 320, 288), (144, 220, 198)))
QUICK: tuple[Pair, ...] = (((70, 85, 70), (80, 96, 79)),)
TOLERANCE = 1e-5  # of the largest difference, for values of deviation 1


def comparisons(quick: bool) -> list[Comparison]:
    """Order 3, one channel of a brain's size, up and from thick slices."""
    rows = []
    for old, new in QUICK if quick else SHAPES:
        what = f"{old} to {new}, order 3"
        rows.append(Comparison(what=what, run=partial(_on_cpu, what, old, new)))
        if torch.cuda.is_available():
            what += ", on the GPU"
            rows.append(Comparison(what=what, run=partial(_on_gpu, what, old, new)))
    return rows


def _on_cpu(what: str, old: Triple, new: Triple) -> Measurement:
    image = _drawn(old)
    return _compared(
        what,
        lambda: resample(torch.from_numpy(image), new, order=3)[0],
        "scikit-image",
        lambda: _skimage(image[0], new),
        CPU,
    )


def _on_gpu(what: str, old: Triple, new: Triple) -> Measurement:
    image = torch.from_numpy(_drawn(old)).cuda()

    def peer() -> Tensor:
        return torch.from_numpy(_skimage(image[0].cpu().numpy(), new)).cuda()

    return _compared(what, lambda: resample(image, new, order=3)[0], "scikit-image, both copies", peer, image.device)


def _compared(
    what: str, ours: Callable[[], object], name: str, peer: Callable[[], object], device: torch.device
) -> Measurement:
    """Both in turn, after their answers were found to agree.

    Raises:
        AssertionError: they do not.
    """
    a, b = (torch.as_tensor(call()).cpu().numpy() for call in (ours, peer))
    difference = float(np.abs(a - b).max())
    assert difference < TOLERANCE, f"largest difference {difference:.1e}"
    measured = in_turn("resample", what, {"strokenet": ours, name: peer}, device=device, repeats=3)
    return replace(measured, answers=f"largest difference {difference:.1e}")


def _drawn(shape: Triple) -> NDArray[np.float32]:
    """(1, D, H, W)."""
    return np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32)


def _skimage(channel: NDArray[np.float32], shape: Triple) -> NDArray[np.float64]:
    """nnU-Net's call (acvl_utils, batchgenerators): float64, edge mode, no anti-aliasing, clipped."""
    resized = resize(channel.astype(float), shape, order=3, mode="edge", anti_aliasing=False)  # type: ignore[no-untyped-call]
    return np.asarray(resized)
