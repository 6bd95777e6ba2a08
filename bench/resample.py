"""Resampling one brain to another grid: ours, and scikit-image as nnU-Net calls it, channel by channel in float64."""

from __future__ import annotations

import numpy as np
import torch
from skimage.transform import resize

from bench.measure import Measurement, in_turn
from kernels.resample import resize_image

SHAPES = (((140, 170, 140), (160, 192, 158)), ((48, 320, 288), (144, 220, 198)))


def run() -> list[Measurement]:
    """Order 3, one channel of a brain's size, up and from thick slices; the answers are compared first."""
    rng = np.random.default_rng(0)
    measured = []
    for old, new in SHAPES:
        image = rng.normal(size=(1, *old)).astype(np.float32)

        def ours(image: np.ndarray = image, new: tuple[int, int, int] = new) -> np.ndarray:
            return resize_image(torch.from_numpy(image), new, order=3).numpy()

        def peer(image: np.ndarray = image, new: tuple[int, int, int] = new) -> np.ndarray:
            return _skimage(image[0], new)

        difference = float(np.abs(ours()[0] - peer()).max())
        what = f"{old} to {new}, order 3 (largest difference {difference:.1e})"
        measured.append(in_turn("resample", what, {"strokenet": ours, "scikit-image": peer}, repeats=3))
    return measured


def _skimage(channel: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """nnU-Net's call (acvl_utils, batchgenerators): float64, edge mode, no anti-aliasing, clipped."""
    resized = resize(channel.astype(float), shape, order=3, mode="edge", anti_aliasing=False)  # type: ignore[no-untyped-call]
    return np.asarray(resized)
