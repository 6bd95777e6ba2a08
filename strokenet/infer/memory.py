"""Memory: what one case will take at its peak, said before it is taken, and what is free where it is taken."""

from __future__ import annotations

import math

import torch

from planner.plan import Plan
from strokenet.data.geometry import Geometry
from strokenet.memory import available_bytes
from strokenet.preprocess.preprocess import case_turn

FLOAT = 4  # bytes
TILE_MAPS = 7  # full-resolution maps of features[0] in flight: skip, concat (2), convolution and its reordered copies


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be taken on a device, what torch keeps for later among them; None where nobody can tell."""
    if device.type != "cuda":
        return available_bytes()
    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def peak_memory_bytes(plan: Plan, geometry: Geometry, batch: int = 1) -> int:
    """Bytes at the peak of one case, were nothing cropped away: this scan and the next, then the larger of two steps.

    Sliding window: image, logits and weights on the plan's grid, feature maps of `batch` tiles. Restore: logits on the
    plan's grid, one map in float64 on both, and probabilities on the scan's.
    """
    scan, grid = math.prod(geometry.shape), _grid_voxels(plan, geometry)
    channels, heads = len(plan.channels), plan.heads
    scans = 2 * FLOAT * channels * scan
    window = FLOAT * grid * (2 * channels + heads + 2) + batch * _tile_bytes(plan)
    restore = FLOAT * (grid * (channels + heads + 1 + 4) + scan * (3 * heads + 4))
    return scans + max(window, restore)


def _grid_voxels(plan: Plan, geometry: Geometry) -> int:
    """Voxels of the whole scan on the plan's grid, grown to a patch at least."""
    turn = case_turn(geometry, plan.orientation).then(plan.transpose)
    axes = zip(turn.permute(geometry.shape), turn.permute(geometry.spacing), plan.spacing, plan.patch, strict=True)
    return math.prod(max(edge, math.ceil(n * own / target)) for n, own, target, edge in axes)


def _tile_bytes(plan: Plan) -> int:
    """Feature maps of one tile: every level's skip, and the maps in flight at the full resolution."""
    edges, maps = list(plan.patch), 0
    full = math.prod(edges)
    for features, stride in zip(plan.network.features, plan.network.strides, strict=True):
        edges = [edge // step for edge, step in zip(edges, stride, strict=True)]
        maps += features * math.prod(edges)
    return FLOAT * (maps + full * (TILE_MAPS * plan.network.features[0] + 3 * plan.heads))
