"""Threshold, 26-connected components, volume filter: ours, and the usual ways to write it.

On a CPU in milliseconds, arrays in and out. Where there is a GPU the map lies on it: ours there, CuPy and cuCIM where
they are installed, and cc3d with its copies to the host and back.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import cc3d
import numpy as np
import torch
import torch.utils.dlpack
from numpy.typing import NDArray
from scipy import ndimage
from skimage import measure
from torch import Tensor

from bench.ceilings import ceilings
from bench.measure import Comparison, Measurement, in_turn, in_turn_on_gpu
from kernels.components import lesion_mask
from planner.plan import Triple

Mask = NDArray[np.uint8]

HUNDREDS = "some hundred blobs and specks"
HUNDREDS_OF_LESIONS: Triple = (182, 218, 182)
SHAPE: Triple = (197, 233, 189)
QUICK: Triple = (99, 117, 95)
THRESHOLD = np.float32(0.2)
SMALLEST = 5  # voxels of 1 mm3: more than 4 mm3
OWN_MEMORY = ("CuPy", "cuCIM")  # contenders whose memory torch does not see


def comparisons(quick: bool) -> list[Comparison]:
    """A map with some hundred blobs and specks, then masks from empty to full, these on a GPU, too, where one is."""
    blobs, shape = (QUICK, QUICK) if quick else (HUNDREDS_OF_LESIONS, SHAPE)
    repeats = 1 if quick else 7
    what = f"{blobs}, {HUNDREDS}"
    rows = [Comparison(what=what, run=partial(_on_cpu, what, partial(_blobs, blobs), repeats))]
    for kind in masks((8, 8, 8)):
        what, drawn = f"{shape}, {kind}", partial(_flat, kind, shape)
        rows.append(Comparison(what=what, run=partial(_on_cpu, what, drawn, min(repeats, 3))))
        if torch.cuda.is_available():
            what += ", on the GPU"
            rows.append(Comparison(what=what, run=partial(_on_gpu, what, drawn)))
    return rows


def _blobs(shape: Triple) -> NDArray[np.float32]:
    noise = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=shape).astype(np.float32), 1.5)
    return np.asarray(np.clip(0.5 + (noise - 0.2) * 2, 0, 1), dtype=np.float32)


def _flat(kind: str, shape: Triple) -> NDArray[np.float32]:
    """0.9 in the mask and 0.1 beside it."""
    return np.asarray(np.where(_masks(shape)[kind], np.float32(0.9), np.float32(0.1)))


def masks(shape: tuple[int, int, int]) -> dict[str, NDArray[np.bool_]]:
    """What a labelling meets, and what is hard for it: kind -> (D, H, W)."""
    rng = np.random.default_rng(0)
    noise = ndimage.gaussian_filter(rng.normal(size=shape).astype(np.float32), 1.5)
    return {
        "empty": np.zeros(shape, bool),
        "30 lesions": _boxes(shape, 30, rng),
        "blobs, 1 %": noise > np.quantile(noise, 0.99),
        "random 10 %": rng.random(shape) < 0.1,
        "random 50 %": rng.random(shape) < 0.5,
        "full": np.ones(shape, bool),
        "serpentine": serpentine(shape),
    }


_masks = functools.lru_cache(maxsize=1)(masks)


def serpentine(shape: tuple[int, int, int]) -> NDArray[np.bool_]:
    """One path, a voxel wide, through every second row of every second slice. (D, H, W)."""
    depth, height, width = shape
    mask = np.zeros(shape, bool)
    mask[::2, ::2] = True
    rows = range(0, height, 2)
    for row in rows[:-1]:  # from a row to the next by turns at its end and at its start
        mask[::2, row + 1, width - 1 if row % 4 == 0 else 0] = True
    last = width - 1 if len(rows) % 2 else 0
    for z in range(0, depth - 2, 2):  # every second slice is walked from its last row to its first
        mask[z + 1, rows[-1], last] |= z % 4 == 0
        mask[z + 1, 0, 0] |= z % 4 != 0
    return mask


def _boxes(shape: tuple[int, int, int], count: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Boxes of 1 to 12 voxels an edge, which may touch, in the middle half of the volume."""
    mask = np.zeros(shape, bool)
    for _ in range(count):
        first = [int(rng.integers(edge // 4, edge - edge // 4)) for edge in shape]
        mask[tuple(slice(at, at + int(rng.integers(1, 13))) for at in first)] = True
    return mask


def _on_cpu(what: str, drawn: Callable[[], NDArray[np.float32]], repeats: int) -> Measurement:
    probability = drawn()
    contenders: dict[str, Callable[[], Mask]] = {
        "strokenet": lambda: _ours(probability),
        "cc3d.dust": lambda: _dust(probability),
        "scipy.ndimage": lambda: _labelled(_scipy, probability),
        "scikit-image": lambda: _labelled(_skimage, probability),
    }
    _compare(contenders)
    return replace(in_turn("post", what, contenders, repeats=repeats), answers=_answers(probability))


def _on_gpu(what: str, drawn: Callable[[], NDArray[np.float32]]) -> Measurement:
    """GPU time from the map on the device to the mask on the device. The floor: the map read, the mask written."""
    probability = drawn()
    on_gpu = torch.from_numpy(probability).cuda()
    contenders: dict[str, Callable[[], Tensor]] = {
        "strokenet": lambda: _ours_on_gpu(on_gpu),
        "strokenet, CUDA graph": _captured(on_gpu),
    }
    if _labels("cupyx.scipy.ndimage"):
        contenders["CuPy"] = lambda: _cupy(on_gpu)
    if _labels("cucim.skimage.measure"):
        contenders["cuCIM"] = lambda: _cucim(on_gpu)
    contenders["cc3d.dust, both copies"] = lambda: torch.from_numpy(_dust(on_gpu.cpu().numpy())).cuda()
    _compare({name: partial(_to_host, call) for name, call in contenders.items()})
    measured = in_turn_on_gpu("post", what, contenders)
    return replace(
        measured,
        answers=_answers(probability),
        floor_ms=1000 * 5 * probability.size / ceilings(torch.float32, on_gpu.device).bytes,
        peaks_gb={name: peak for name, peak in measured.peaks_gb.items() if name not in OWN_MEMORY},
    )


def _labels(name: str) -> bool:
    """Whether a peer's module and its `label` can be imported; where not, for want of a library say, it is said."""
    try:
        return callable(importlib.import_module(name).label)
    except (ImportError, AttributeError) as error:
        print(f"{name}: not a contender here ({error})")
        return False


def _to_host(call: Callable[[], Tensor]) -> Mask:
    return np.asarray(call().cpu().numpy())


def _compare(contenders: Mapping[str, Callable[[], Mask]]) -> None:
    expected = next(iter(contenders.values()))()
    for name, call in contenders.items():
        if not np.array_equal(call(), expected):
            raise RuntimeError(f"post: {name} gives another mask than ours")


def _answers(probability: NDArray[np.float32]) -> str:
    count = int(cc3d.connected_components(_ours(probability), return_N=True)[1])
    return f"equal, {count} lesions left"


def _ours(probability: NDArray[np.float32]) -> Mask:
    return lesion_mask(probability, threshold=0.2, voxel_volume_mm3=1.0, min_volume_mm3=4.0)


def _ours_on_gpu(probability: Tensor) -> Tensor:
    return lesion_mask(probability, threshold=0.2, voxel_volume_mm3=1.0, min_volume_mm3=4.0)


def _captured(probability: Tensor) -> Callable[[], Tensor]:
    """Ours as one CUDA graph: its replay, which returns the same buffer each time."""
    _ours_on_gpu(probability)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mask = _ours_on_gpu(probability)

    def replay() -> Tensor:
        graph.replay()
        return mask

    return replay


def _dust(probability: NDArray[np.float32]) -> Mask:
    above = probability > THRESHOLD
    return np.asarray(cc3d.dust(above, threshold=SMALLEST, connectivity=26)).astype(np.uint8)


def _labelled(label: Callable[[NDArray[np.bool_]], NDArray[Any]], probability: NDArray[np.float32]) -> Mask:
    labels = label(probability > THRESHOLD)
    keep = np.bincount(labels.ravel()) >= SMALLEST
    keep[0] = False
    return np.asarray(keep[labels]).astype(np.uint8)


def _scipy(mask: NDArray[np.bool_]) -> NDArray[Any]:
    return np.asarray(ndimage.label(mask, np.ones((3, 3, 3)))[0])


def _skimage(mask: NDArray[np.bool_]) -> NDArray[Any]:
    return np.asarray(measure.label(mask, connectivity=3))  # type: ignore[no-untyped-call]


def _cupy(probability: Tensor) -> Tensor:
    import cupy
    from cupyx.scipy import ndimage as gpu_ndimage

    labels, count = gpu_ndimage.label(cupy.from_dlpack(probability) > THRESHOLD, cupy.ones((3, 3, 3)))
    return _kept_by_cupy(labels, int(count))


def _cucim(probability: Tensor) -> Tensor:
    import cupy
    from cucim.skimage import measure as gpu_measure

    above = cupy.from_dlpack(probability) > THRESHOLD
    labels, count = gpu_measure.label(above, connectivity=3, return_num=True)
    return _kept_by_cupy(labels, int(count))


def _kept_by_cupy(labels: Any, count: int) -> Tensor:
    import cupy

    keep = cupy.bincount(labels.ravel(), minlength=count + 1) >= SMALLEST
    keep[0] = False
    return torch.utils.dlpack.from_dlpack(keep[labels].astype(cupy.uint8))
