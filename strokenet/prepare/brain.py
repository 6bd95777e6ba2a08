"""Brain: which voxels are brain (Meddahi 2024, IV.B, step 2: skull and skin are taken away).

Comes in: a scan (D, H, W) in RAS order. Goes out: its Brain, one piece without holes on the scan's own voxels. Three
ways: the two networks of deepbet (Fisch 2024; PyPI, MIT), a mask that the user has, or all voxels that are not zero.
Of deepbet only the weights are used, TorchScript files whose sha256 is checked before they are loaded: its own code
wants a table library and a display for the same 40 lines. The paper's animaAtlasBasedBrainExtraction needs binaries.
"""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from kernels.components import label_components
from kernels.holes import fill_holes
from strokenet.data.errors import InputError
from strokenet.data.files import file_sha256
from strokenet.data.geometry import Geometry
from strokenet.preprocess.crop import Box, bounding_box

WEIGHTS = {  # file of deepbet 1.0.2 -> sha256
    "bbox_model.pt": "39a7b2b5f799faa1391ea97bfcdc0b9299f20d84f2316a4ff8918dc4685e40aa",
    "model.pt": "de8ee7c69654d0dd3935dc4a5d84571d8ecf4637a6bfc01df399c4c2bc86e0fd",
}
COARSE, FINE = (128, 128, 128), (256, 256, 256)  # what the two networks were trained on (deepbet, run_model)
RANGE = (0.005, 0.995)  # quantiles of the coarse scan that become 0 and 1
STANDARD = (0.226, 0.449)  # standard deviation and mean of the networks' input
SLICE_SHARE = 0.02  # a slice that the coarse mask fills less than this is outside the box
MARGIN = 0.1  # of the box's size, added at either end
CPU = torch.device("cpu")
_DEPRECATED = "`torch.jit.load` is deprecated. Please switch to `torch.export`."


class NoBrain(InputError):
    """No brain was found in a scan."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Brain:
    """mask: (D, H, W) bool. volume_ml: its volume. method: how it was found."""

    mask: NDArray[np.bool_]
    volume_ml: float
    method: str


def brain_by_network(array: NDArray[np.float32], geometry: Geometry, device: torch.device = CPU) -> Brain:
    """The brain as deepbet's networks see it: a coarse one finds the box, a fine one the mask.

    Args:
        array: (D, H, W) float32, any contrast, D to the head, H to the front, W to the right.
        device: where the networks compute.

    Raises:
        NoBrain: no brain was found. InputError: deepbet is missing or not the version whose weights are known.
    """
    folder = weights_folder()
    volume = torch.from_numpy(np.array(array.transpose(2, 1, 0)))  # (D, H, W) -> (W, H, D), a copy: x, y, z of RAS
    coarse = functional.interpolate(volume[None, None], COARSE, mode="nearest-exact")[0, 0]
    low, high = (float(value) for value in np.quantile(coarse.numpy(), RANGE))
    if not high > low:
        raise NoBrain("no brain found, the scan is almost empty; check the scan or give a brain mask")
    box = _box(_predict(folder / "bbox_model.pt", coarse, low, high, device) > 0.5, array.shape[::-1])
    inside = volume[box.slices]
    fine = functional.interpolate(inside[None, None], FINE, mode="nearest-exact")[0, 0]
    probability = torch.from_numpy(_predict(folder / "model.pt", fine, low, high, device))
    back = functional.interpolate(probability[None, None], box.shape, mode="nearest-exact")[0, 0]
    mask = np.zeros(array.shape, bool)
    mask.transpose(2, 1, 0)[box.slices] = back.numpy() > 0.5
    return make_brain(mask, geometry, "deepbet")


def brain_of_nonzero(array: NDArray[np.float32], geometry: Geometry) -> Brain:
    """The brain of a scan that was stripped before: its voxels that are not zero."""
    return make_brain(array != 0, geometry, "none")


def make_brain(mask: NDArray[np.bool_], geometry: Geometry, method: str) -> Brain:
    """The largest piece (26-connected) of a mask, its holes filled.

    Raises:
        NoBrain: the mask is empty.
    """
    labels, sizes = label_components(mask)
    if len(sizes) < 2:
        raise NoBrain(f"no brain found ({method}); check the scan or give a brain mask")
    piece = fill_holes(labels == 1 + int(np.argmax(sizes[1:])))
    volume_ml = float(piece.sum()) * geometry.voxel_volume_mm3 / 1000
    return Brain(mask=piece, volume_ml=volume_ml, method=method)


def weights_folder() -> Path:
    """The folder of deepbet's weights, beside its package; every file has the known sha256.

    Raises:
        InputError: deepbet is not installed, or a file is missing or another one.
    """
    found = importlib.util.find_spec("deepbet")  # does not import it
    if found is None or found.origin is None:
        raise InputError(
            'deepbet, which finds the brain, is not installed; run `pip install "strokenet[mri]"`, or do without it '
            "(prepare: --brain MASK or none; infer: --crop nonzero)"
        )
    folder = Path(found.origin).parents[1] / "data" / "models"
    for name, known in WEIGHTS.items():
        check_sha256(folder / name, known)
    return folder


def check_sha256(path: Path, known: str) -> None:
    """Refuses a file that is not the known one: TorchScript is a program, and is run only where it was looked at.

    Raises:
        InputError: the file is missing or has another sha256.
    """
    try:
        found = file_sha256(path)
    except InputError as error:
        raise InputError(f"{error}, or run `pip install deepbet==1.0.2`") from None
    if found != known:
        raise InputError(f"{path}: sha256 {found[:12]} is not {known[:12]}; run `pip install deepbet==1.0.2`")


def _predict(weights: Path, volume: torch.Tensor, low: float, high: float, device: torch.device) -> NDArray[np.float32]:
    """Probability of brain. (W, H, D) float32 of any intensity -> (W, H, D)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, message=_DEPRECATED.replace(".", r"\."))
        network = torch.jit.load(str(weights), map_location=device).eval()  # type: ignore[no-untyped-call]
    scaled = ((volume - low) / (high - low)).clamp(0, 1)
    deviation, mean = STANDARD
    scaled = (scaled - scaled.mean()) / scaled.std() * deviation + mean
    with torch.inference_mode():
        return np.asarray(network(scaled[None, None].to(device))[0, 1].cpu().numpy(), dtype=np.float32)


def _box(coarse: NDArray[np.bool_], shape: tuple[int, ...]) -> Box:
    """The box of the largest piece of the coarse mask with a margin, in voxels of a volume of this shape."""
    labels, sizes = label_components(coarse)
    piece = labels == 1 + int(np.argmax(sizes[1:])) if len(sizes) > 1 else np.zeros_like(coarse)
    full = [piece.mean(axis=tuple(b for b in range(3) if b != axis)) > SLICE_SHARE for axis in range(3)]
    if not all(used.any() for used in full):
        raise NoBrain("no brain found (deepbet); check the scan or give a brain mask")
    box = bounding_box(full[0][:, None, None] & full[1][None, :, None] & full[2][None, None, :])
    start, stop = [], []
    for a, b, n, m in zip(box.start, box.stop, shape, coarse.shape, strict=True):
        margin = MARGIN * (b - a)
        start.append(max(0, int(np.floor((a - margin) * n / m))))
        stop.append(min(n, int(np.ceil((b + margin) * n / m))))
    return Box(start=(start[0], start[1], start[2]), stop=(stop[0], stop[1], stop[2]))
