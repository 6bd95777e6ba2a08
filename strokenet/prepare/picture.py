"""Picture: one look that tells whether a case was prepared well.

Comes in: the scans on the reference's grid (D, H, W) in RAS order, and the brain. Goes out: a PNG with five slices.
Above, the reference with the brain's outline (orange) and the label's (blue); below, a row for every other scan, tiles
of both in turn: an edge that runs on across the tiles is registered. The patient's right is on the left.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from strokenet.data.files import replacing
from strokenet.data.geometry import Spacing
from strokenet.preprocess.crop import Box, bounding_box

BRAIN_COLOUR, LABEL_COLOUR = "#E69F00", "#56B4E9"  # Okabe and Ito (2008)
TILE_MM = 22.0
MARGIN_MM = 18.0
_SLICES = ((0, 0.3), (0, 0.5), (0, 0.7), (1, 0.5), (2, 0.4))  # axis, share of the brain's extent
_PLANES = ("axial", "coronal", "sagittal")
_PANEL, _DPI = 3.2, 100  # inches


def draw_preparation(
    scans: Mapping[str, NDArray[np.float32]],
    brain: NDArray[np.bool_],
    spacing: Spacing,
    path: Path,
    *,
    case: str,
    label: NDArray[np.bool_] | None = None,
) -> None:
    """Writes the picture atomically.

    Args:
        scans: name -> (D, H, W) on one grid, the reference first. brain, label: the same grid.
        spacing: mm (D, H, W). path: the PNG. case: title.
    """
    field = _around(brain, spacing)
    brain, label = brain[field.slices], None if label is None else label[field.slices]
    scans = {name: scan[field.slices] for name, scan in scans.items()}
    box = bounding_box(brain)
    shown = {name: _grey(scan, brain) for name, scan in scans.items()}
    reference, *others = shown.values()
    rows = 1 + len(others)
    figure = Figure(figsize=(_PANEL * len(_SLICES), _PANEL * rows + 0.6), facecolor="black", layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, len(_SLICES), squeeze=False)
    for column, (axis, share) in enumerate(_SLICES):
        index = int(box.start[axis] + share * (box.shape[axis] - 1))
        _show(grid[0, column], _cut(reference, axis, index), spacing, axis)
        _outline(grid[0, column], _cut(brain, axis, index), BRAIN_COLOUR)
        if label is not None:
            _outline(grid[0, column], _cut(label, axis, index), LABEL_COLOUR)
        grid[0, column].set_title(f"{_PLANES[axis]} {field.start[axis] + index + 1}", color="white", fontsize=9)
        for row, other in enumerate(others, start=1):
            tiles = _tiles(reference.shape, spacing)
            _show(grid[row, column], _cut(np.where(tiles, reference, other), axis, index), spacing, axis)
    first, *names = scans
    below = ", ".join(f"{first} / {name}" for name in names)
    title = f"{case}   brain on {first}" + (f"; below {below}" if names else "")
    figure.suptitle(title, color="white", fontsize=11, parse_math=False)
    with replacing(path, durable=False) as temporary:
        figure.savefig(temporary, dpi=_DPI)


def _around(brain: NDArray[np.bool_], spacing: Spacing) -> Box:
    """The brain's box with a margin that shows the skull."""
    box = bounding_box(brain)
    margins = [int(np.ceil(MARGIN_MM / mm)) for mm in spacing]
    d0, h0, w0 = (max(0, a - m) for a, m in zip(box.start, margins, strict=True))
    d1, h1, w1 = (min(n, b + m) for b, n, m in zip(box.stop, brain.shape, margins, strict=True))
    return Box(start=(d0, h0, w0), stop=(d1, h1, w1))


def _grey(scan: NDArray[np.float32], brain: NDArray[np.bool_]) -> NDArray[np.float32]:
    """0 to 1 between the brain's dark and bright ends, so that two contrasts can stand beside each other."""
    low, high = np.percentile(scan[brain], [1, 99]).tolist()
    return np.asarray(np.clip((scan - low * 0.5) / max(1.15 * high - low * 0.5, 1e-6), 0, 1), dtype=np.float32)


def _tiles(shape: tuple[int, ...], spacing: Spacing) -> NDArray[np.bool_]:
    d, h, w = (np.arange(n) * mm // TILE_MM for n, mm in zip(shape, spacing, strict=True))
    return np.asarray((d[:, None, None] + h[None, :, None] + w[None, None, :]) % 2 == 0)


def _cut(volume: NDArray[np.generic], axis: int, index: int) -> NDArray[np.generic]:
    """(D, H, W) -> (rows, columns) as seen: front or head at the top, right (sagittal: front) at the left."""
    return np.asarray(np.take(volume, index, axis)[::-1, ::-1])


def _show(axes: Axes, pixels: NDArray[np.generic], spacing: Spacing, axis: int) -> None:
    rows, columns = (mm for a, mm in enumerate(spacing) if a != axis)
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=1, aspect=rows / columns, interpolation="nearest")
    axes.set_axis_off()


def _outline(axes: Axes, mask: NDArray[np.generic], colour: str) -> None:
    if mask.any() and not mask.all() and min(mask.shape) > 1:  # one slice has no outline to draw
        axes.contour(mask, levels=[0.5], colors=colour, linewidths=1.0)
