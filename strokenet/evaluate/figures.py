"""Evaluate: the scores as pictures. A box plot of groups (the paper's Fig. 6), and a case with its outlines.

Comes in: numbers, or scans and masks (D, H, W) in RAS order with their spacing. Goes out: PNG files, written
atomically. Nothing is smoothed: a voxel is drawn in its physical shape, an outline runs along the edges of the voxels,
and every panel has the same scale in mm. Colours are Okabe and Ito's (2008), which colour-blind readers tell apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from kernels.components import label_components
from strokenet.data.files import replacing
from strokenet.data.geometry import Spacing, Triple
from strokenet.data.overlap import dice
from strokenet.preprocess.crop import Box, bounding_box

_GROUP_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_JITTER_SEED = 0
REFERENCE_COLOUR = "#56B4E9"  # sky blue
PREDICTION_COLOUR = "#E69F00"  # orange
_LINES = {"reference": (REFERENCE_COLOUR, 4), "prediction": (PREDICTION_COLOUR, 2)}  # pixels: both show on one edge
_PLANES = {"axial": "RLAP", "coronal": "RLSI", "sagittal": "APSI"}  # across D, H, W; sides: left, right, top, bottom
_BACKGROUND = 0.05  # of the brightest: darker is not head, and is cut off
_MARGIN_MM = 9.0  # room for the letters
_WIDTH, _HEIGHT = 13.0, 12.0  # inches that the panels share
_GAP, _LEFT, _TOP, _BOTTOM = 0.3, 0.4, 0.75, 0.45  # inches
_DPI = 150


def draw_boxes(groups: Mapping[str, Sequence[float]], path: Path, *, metric: str = "Dice", unit: str = "") -> None:
    """A box per group with the cases as points over it, as PNG.

    The box spans the quartiles, the thick line is the median, the white diamond the mean; whiskers reach the last case
    within 1.5 times the box (Tukey). No case is hidden: every one is a point.

    Args:
        groups: name -> one finite value a case; a group without cases keeps its place. path: the PNG.
        metric, unit: name of the axis. Dice and other shares (no unit) are drawn from 0 to 1.

    Raises:
        ValueError: there is no group, or a value is not finite.
    """
    values = {name: np.asarray(cases, dtype=np.float64) for name, cases in groups.items()}
    if not values or not all(np.isfinite(cases).all() for cases in values.values()):
        raise ValueError(f"{metric}: groups {list(groups)}; at least one group and finite values are needed")
    figure = Figure(figsize=(2.2 + 1.5 * len(values), 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for place, cases in enumerate(values.values()):
        _draw_box(axes, place, cases, _GROUP_COLOURS[place % len(_GROUP_COLOURS)])
    labels = [f"{name}\nn = {len(cases)}" for name, cases in values.items()]
    axes.set_xticks(range(len(values)), labels, parse_math=False)
    axes.set_xlim(-0.6, len(values) - 0.4)
    axes.set_ylabel(f"{metric} ({unit})" if unit else metric, parse_math=False)
    if not unit and all(((cases >= 0) & (cases <= 1)).all() for cases in values.values()):
        axes.set_ylim(-0.03, 1.03)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(handles=_box_legend(), loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize=8)
    with replacing(path, durable=False) as temporary:
        figure.savefig(temporary, dpi=_DPI)


@dataclass(frozen=True, kw_only=True)
class _Plane:
    """A slice across one axis (0 D, 1 H, 2 W) of a volume in RAS order; of it, only the field is shown."""

    name: str
    axis: int
    index: int
    of: int
    field: Box
    spacing: Spacing

    def cut(self, volume: NDArray[np.generic]) -> NDArray[np.generic]:
        """(D, H, W) -> (rows, columns) as seen: front or head at the top, right (sagittal: front) at the left."""
        rows, columns = (part for axis, part in enumerate(self.field.slices) if axis != self.axis)
        return np.asarray(np.take(volume, self.index, self.axis)[rows, columns][::-1, ::-1])

    @property
    def pixel_mm(self) -> tuple[float, float]:
        """Size of a pixel (rows, columns)."""
        rows, columns = (mm for axis, mm in enumerate(self.spacing) if axis != self.axis)
        return rows, columns

    @property
    def title(self) -> str:
        """What is shown, slices counted from 1."""
        return f"{self.name}, slice {self.index + 1} of {self.of}"

    @property
    def size_mm(self) -> tuple[float, float]:
        """Size of what is shown (rows, columns)."""
        rows, columns = (n for axis, n in enumerate(self.field.shape) if axis != self.axis)
        return rows * self.pixel_mm[0], columns * self.pixel_mm[1]


def draw_overlay(
    channels: Mapping[str, NDArray[np.float32]],
    spacing: Spacing,
    path: Path,
    *,
    case: str,
    reference: NDArray[np.bool_] | None = None,
    prediction: NDArray[np.bool_] | None = None,
) -> None:
    """Three planes of a case with the outlines of its masks, a row a channel, as PNG.

    Each plane is the one that shows most of the largest lesion of the reference (of the prediction where the reference
    is empty), or the middle of the volume. Shown in the radiological convention: the patient's right is on the left.

    Args:
        channels: name -> scan (D, H, W), RAS order: D to the head, H to the front, W to the right.
        spacing: mm (D, H, W). path: the PNG. case: its name, for the title.
        reference, prediction: (D, H, W) bool, or None. The title gives their Dice where there are both.

    Raises:
        ValueError: there is no channel, or the shapes differ.
    """
    masks = {name: mask for name, mask in (("reference", reference), ("prediction", prediction)) if mask is not None}
    shape = _common_shape(case, list(channels.values()), list(masks.values()))
    planes = _planes(shape, spacing, list(channels.values()), list(masks.values()))
    figure, grid = _panels(planes, list(channels))
    for panels, scan in zip(grid, channels.values(), strict=True):
        window = _window(scan)
        for axes, plane in zip(panels, planes, strict=True):
            _draw_scan(axes, plane, scan, window)
            for name, mask in masks.items():
                _draw_outline(axes, plane, mask, *_LINES[name])
            _draw_letters(axes, plane)
    score = ""
    if reference is not None and prediction is not None:
        score = f"   Dice {dice(prediction, reference):.3f}"
    _write_frame(figure, f"{case}{score}", list(masks))
    with replacing(path, durable=False) as temporary:
        figure.savefig(temporary, dpi=_DPI)


def _draw_box(axes: Axes, place: int, cases: NDArray[np.float64], colour: str) -> None:
    if not len(cases):
        axes.text(place, 0.5, "no case", ha="center", transform=axes.get_xaxis_transform(), color="0.4")
        return
    axes.boxplot(
        [cases],
        positions=[place],
        widths=0.5,
        showfliers=False,
        showmeans=len(cases) > 1,
        patch_artist=True,
        manage_ticks=False,
        boxprops={"facecolor": f"{colour}40", "edgecolor": colour},
        medianprops={"color": colour, "linewidth": 3},
        whiskerprops={"color": colour},
        capprops={"color": colour},
        meanprops={"marker": "D", "markerfacecolor": "white", "markeredgecolor": "black", "markersize": 6, "zorder": 5},
    )
    half = 0.16 if len(cases) > 1 else 0.0
    spread = np.random.default_rng(_JITTER_SEED).permutation(np.linspace(-half, half, len(cases)))
    axes.scatter(place + spread, cases, s=18, color=colour, edgecolor="white", linewidth=0.5, alpha=0.9, zorder=4)


def _box_legend() -> list[Line2D]:
    return [
        Line2D([], [], linestyle="", marker="o", markersize=4, color="0.3", label="case"),
        Line2D([], [], linewidth=3, color="0.3", label="median"),
        Line2D([], [], linestyle="", marker="D", markerfacecolor="white", markeredgecolor="black", label="mean"),
    ]


def _common_shape(case: str, scans: Sequence[NDArray[np.float32]], masks: Sequence[NDArray[np.bool_]]) -> Triple:
    shapes = [volume.shape for volume in (*scans, *masks)]
    if not scans or len(set(shapes)) != 1 or len(shapes[0]) != 3:
        raise ValueError(f"{case}: shapes {shapes}; channels (one or more) and masks of one shape (D, H, W) are needed")
    d, h, w = shapes[0]
    return d, h, w


def _planes(
    shape: Triple, spacing: Spacing, scans: Sequence[NDArray[np.float32]], masks: Sequence[NDArray[np.bool_]]
) -> tuple[_Plane, ...]:
    where, field = _places(shape, masks), _field(shape, spacing, scans, masks)
    return tuple(
        _Plane(name=name, axis=axis, index=where[axis], of=shape[axis], field=field, spacing=spacing)
        for axis, name in enumerate(_PLANES)
    )


def _places(shape: Triple, masks: Sequence[NDArray[np.bool_]]) -> Triple:
    """The slice an axis that shows most of the largest lesion of the first mask that has one; of equals the middle."""
    mask = next((mask for mask in masks if mask.any()), None)
    if mask is None:
        d, h, w = (n // 2 for n in shape)
        return d, h, w
    labels, sizes = label_components(mask)
    largest = labels == 1 + int(np.argmax(sizes[1:]))
    areas = (np.count_nonzero(largest, axis=axes) for axes in ((1, 2), (0, 2), (0, 1)))
    best = (np.flatnonzero(area == area.max()) for area in areas)
    d, h, w = (int(places[len(places) // 2]) for places in best)
    return d, h, w


def _field(
    shape: Triple, spacing: Spacing, scans: Sequence[NDArray[np.float32]], masks: Sequence[NDArray[np.bool_]]
) -> Box:
    """The box of the head and the lesions with a margin: the air around a head would only make it small."""
    seen = np.zeros(shape, bool)
    for scan in scans:
        seen |= scan > _BACKGROUND * np.percentile(scan, 99.5)
    for mask in masks:
        seen |= mask
    box = bounding_box(seen)
    margins = [int(np.ceil(_MARGIN_MM / mm)) for mm in spacing]
    d0, h0, w0 = (max(0, a - m) for a, m in zip(box.start, margins, strict=True))
    d1, h1, w1 = (min(n, b + m) for b, n, m in zip(box.stop, shape, margins, strict=True))
    return Box(start=(d0, h0, w0), stop=(d1, h1, w1))


def _window(scan: NDArray[np.float32]) -> tuple[float, float]:
    """Intensities shown as black and white: percentiles of what is not background."""
    seen = scan[scan != 0]
    if not len(seen):
        return 0.0, 1.0
    low, high = np.percentile(seen, [1, 99.5]).tolist()
    return (low, high) if high > low else (low - 1.0, low + 1.0)


def _panels(planes: Sequence[_Plane], channels: Sequence[str]) -> tuple[Figure, list[list[Axes]]]:
    """A figure whose panels all have the same scale: their places are computed in inches, not left to a layout."""
    row_mm = max(plane.size_mm[0] for plane in planes)
    scale = min(_WIDTH / sum(plane.size_mm[1] for plane in planes), _HEIGHT / (len(channels) * row_mm))  # inches a mm
    row = row_mm * scale
    wide = _LEFT + sum(plane.size_mm[1] * scale + _GAP for plane in planes)
    tall = _TOP + len(channels) * (row + _GAP) + _BOTTOM
    figure = Figure(figsize=(wide, tall), facecolor="black")
    FigureCanvasAgg(figure)
    grid = []
    for index, name in enumerate(channels):
        middle, left, panels = tall - _TOP - index * (row + _GAP) - row / 2, _LEFT, []
        for plane in planes:
            up, across = (mm * scale for mm in plane.size_mm)
            panels.append(figure.add_axes((left / wide, (middle - up / 2) / tall, across / wide, up / tall)))
            if index == 0:
                _write(figure, left + across / 2, tall - _TOP + 0.1, plane.title, size=9)
            left += across + _GAP
        _write(figure, _LEFT / 2, middle, name, size=11, rotation=90)
        grid.append(panels)
    return figure, grid


def _draw_scan(axes: Axes, plane: _Plane, scan: NDArray[np.float32], window: tuple[float, float]) -> None:
    """Pixels in their physical shape: the axes of the panel are mm, from the upper left corner."""
    rows, columns = plane.size_mm
    low, high = window
    axes.imshow(
        plane.cut(scan),
        cmap="gray",
        vmin=low,
        vmax=high,
        extent=(0.0, columns, rows, 0.0),
        aspect="equal",
        interpolation="nearest",
    )
    axes.set_axis_off()


def _draw_outline(axes: Axes, plane: _Plane, mask: NDArray[np.bool_], colour: str, width_px: int) -> None:
    edges = _outline(plane.cut(mask) != 0) * plane.pixel_mm[::-1]  # (n, 2, 2), x before y
    axes.add_collection(
        LineCollection(
            list(edges),
            colors=colour,
            linewidths=width_px * 72 / _DPI,
            capstyle="projecting",
            antialiaseds=False,
        ),
        autolim=False,
    )


def _outline(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The pixel edges between inside and outside, (n, 2, 2): two ends (x, y), in pixels from the upper left corner."""
    padded = np.pad(mask, 1)
    y, x = np.nonzero(padded[1:, 1:-1] != padded[:-1, 1:-1])
    horizontal = np.stack([np.stack([x, y], 1), np.stack([x + 1, y], 1)], 1)
    y, x = np.nonzero(padded[1:-1, 1:] != padded[1:-1, :-1])
    vertical = np.stack([np.stack([x, y], 1), np.stack([x, y + 1], 1)], 1)
    return np.concatenate([horizontal, vertical]).astype(np.float64)


def _draw_letters(axes: Axes, plane: _Plane) -> None:
    """Where the patient's sides are: R, L, A(nterior), P(osterior), S(uperior), I(nferior)."""
    places = ((0.01, 0.5), (0.99, 0.5), (0.5, 0.99), (0.5, 0.01))
    aligned = (("left", "center"), ("right", "center"), ("center", "top"), ("center", "bottom"))
    for letter, (x, y), (ha, va) in zip(_PLANES[plane.name], places, aligned, strict=True):
        axes.text(x, y, letter, ha=ha, va=va, transform=axes.transAxes, color="white", fontsize=9, weight="bold")


def _write_frame(figure: Figure, title: str, masks: Sequence[str]) -> None:
    """Title, legend and the convention, in white on black."""
    wide, tall = figure.get_size_inches()
    _write(figure, wide / 2, tall - 0.25, title, size=13)
    lines = [Line2D([], [], color=_LINES[name][0], linewidth=_LINES[name][1] * 0.75, label=name) for name in masks]
    if lines:
        place = (_LEFT / wide, 0.2 / tall)
        figure.legend(
            handles=lines,
            loc="center left",
            bbox_to_anchor=place,
            ncols=2,
            frameon=False,
            fontsize=9,
            labelcolor="white",
        )
    note = "radiological convention: the patient's right is on the left"
    figure.text(1 - _GAP / wide, 0.2 / tall, note, ha="right", va="center", fontsize=8, color="white")


def _write(figure: Figure, x: float, y: float, text: str, *, size: float, rotation: float = 0) -> None:
    """White text centred at a place in inches. A name is no formula: a "$" in it stays a "$"."""
    wide, tall = figure.get_size_inches()
    figure.text(
        *(x / wide, y / tall, text),
        ha="center",
        va="center",
        rotation=rotation,
        fontsize=size,
        color="white",
        parse_math=False,
    )
