"""An image and its label at the places of an affine map: linear for the image, the likeliest label for the label.

Comes in: one raw sample and the matrix that leads from a voxel of the patch to its place in the raw patch, both counted
from their centres. Goes out: the patch. Here is the form of GPUs, by torch's grid_sample of a volume, and the rule of
the label; sampling_cpu.py has the form of CPUs, of the same answer.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from planner.plan import Triple
from strokenet.train.patches import OUTSIDE_LABEL

TIE = 1e-4  # head start of the nearest label: decides ties, far below any real difference of scores


def sample_by_grid(
    image: Tensor, label: Tensor, matrix: NDArray[np.float64], heads: int, out: Tensor, out_label: Tensor
) -> None:
    """The form of GPUs, where it is one kernel; right everywhere. Nothing is read back, so that nobody waits.

    Args:
        image: (C, D', H', W') float32. label: (D', H', W') integers, -1 .. heads - 1. matrix: (3, 3), axes d, h, w.
        out: (C, D, H, W), to be written: linear, 0 beyond the raw patch. out_label: (D, H, W), -1 beyond it.
    """
    grid = sampling_grid(matrix, shape_of(out_label), shape_of(label), image.device)
    out.copy_(_at(image, grid, "bilinear"))
    out_label.copy_(sample_labels(label, grid, heads))


def sampling_grid(matrix: NDArray[np.float64], patch: Triple, raw: Triple, device: torch.device) -> Tensor:
    """Where each voxel looks in the raw patch: (D, H, W, 3) float32, -1 .. 1 from outer edge to edge, w h d."""
    axes = [torch.arange(edge, dtype=torch.float32, device=device) - (edge - 1) / 2 for edge in patch]
    grid = torch.empty(*patch, 3, device=device)
    for axis, (size, steps) in enumerate(zip(raw, matrix.tolist(), strict=True)):
        d, h, w = (values * (2 / size * step) for values, step in zip(axes, steps, strict=True))
        torch.add(d[:, None, None] + h[:, None], w, out=grid[..., 2 - axis])
    return grid


def sample_labels(label: Tensor, grid: Tensor, heads: int) -> Tensor:
    """The likeliest label at every place of the grid: each label's indicator is interpolated, the largest wins.

    A tie goes to the nearest voxel's label where that is among the tied, else to the smallest. Beyond the raw patch
    lies label -1.

    Args:
        label: (D', H', W'), -1 .. heads - 1. grid: (D, H, W, 3).

    Returns:
        (D, H, W), type of the label.
    """
    values = torch.arange(heads, device=label.device).view(-1, 1, 1, 1)
    inside = _at((label == values).float(), grid, "bilinear")  # (K, D, H, W)
    shifted = (label[None] - OUTSIDE_LABEL).float()  # so that what grid_sample pads with is -1
    nearest = _at(shifted, grid, "nearest")[0].to(label.dtype) + OUTSIDE_LABEL
    return likeliest(inside, nearest)


def likeliest(inside: Tensor, nearest: Tensor) -> Tensor:
    """The label of the largest score. inside: (K, ...), scores of 0 .. K - 1. nearest: labels. (...) -> (...)."""
    label = torch.full_like(nearest, OUTSIDE_LABEL)
    best = (1 - inside.sum(0)).add_(nearest == OUTSIDE_LABEL, alpha=TIE)
    for value, score in enumerate(inside):
        score.add_(nearest == value, alpha=TIE)
        label.masked_fill_(score > best, value)
        best = torch.maximum(best, score)
    return label


def _at(volumes: Tensor, grid: Tensor, mode: str) -> Tensor:
    """(C, D', H', W') at the places of the grid (D, H, W, 3): (C, D, H, W), 0 beyond."""
    return F.grid_sample(volumes[None], grid[None], mode=mode, padding_mode="zeros", align_corners=False)[0]


def shape_of(label: Tensor) -> Triple:
    """(D, H, W)."""
    d, h, w = label.shape
    return (d, h, w)
