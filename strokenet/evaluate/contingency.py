"""Evaluate, step 2a: which lesion of one mask lies on which of the other. Labelled once, asked by every detection rule.

Comes in: two masks on one grid. Goes out: a Contingency, the table of shared voxels without its zeros. A rule
(lesions.py, anima.py) turns it into a Verdict: of every lesion, whether it counts as found.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kernels.components import label_components
from strokenet.preprocess.crop import bounding_box


@dataclass(frozen=True, kw_only=True, eq=False)
class Contingency:
    """Table T of the lesions (26-connected components) of two masks: T[i, j] voxels in lesion i and in lesion j.

    Rows are the reference's lesions and columns the predicted ones, until it is transposed. Only entries above 0 are
    held, entry e being T[row[e], column[e]] = voxels[e]. The background of the contingency table in Commowick 2018 is
    not held, it is what a lesion's entries leave of its size.

    row_sizes (n,), column_sizes (m,): voxels of each lesion, 0 where it was left out. row, column, voxels: (e,) int64.
    """

    row_sizes: NDArray[np.int64]
    column_sizes: NDArray[np.int64]
    row: NDArray[np.int64]
    column: NDArray[np.int64]
    voxels: NDArray[np.int64]

    def transposed(self) -> Contingency:
        """The same with predicted lesions as rows."""
        return Contingency(
            row_sizes=self.column_sizes,
            column_sizes=self.row_sizes,
            row=self.column,
            column=self.row,
            voxels=self.voxels,
        )

    def at_least(self, voxels: int) -> Contingency:
        """Without lesions of fewer voxels: they become background, their size 0. The numbers of the others stay."""
        rows, columns = (np.where(s >= voxels, s, 0) for s in (self.row_sizes, self.column_sizes))
        kept = (rows[self.row] > 0) & (columns[self.column] > 0)
        return replace(
            self,
            row_sizes=rows,
            column_sizes=columns,
            row=self.row[kept],
            column=self.column[kept],
            voxels=self.voxels[kept],
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Verdict:
    """What a detection rule says of every lesion. A lesion that the rule leaves out is False in both of its arrays.

    found, missed: (n,) bool, lesions of the reference. confirmed, false: (m,) bool, predicted lesions.
    """

    found: NDArray[np.bool_]
    missed: NDArray[np.bool_]
    confirmed: NDArray[np.bool_]
    false: NDArray[np.bool_]


def contingency(prediction: NDArray[np.bool_], reference: NDArray[np.bool_]) -> Contingency:
    """The table of two masks (D, H, W) bool."""
    box = bounding_box(prediction | reference)
    predicted, true = prediction[box.slices], reference[box.slices]
    both = predicted & true
    column_sizes, columns = _components(predicted, both)
    row_sizes, rows = _components(true, both)
    entries, voxels = np.unique(rows * len(column_sizes) + columns, return_counts=True)
    row, column = np.divmod(entries, max(len(column_sizes), 1))
    return Contingency(
        row_sizes=row_sizes, column_sizes=column_sizes, row=row, column=column, voxels=voxels.astype(np.int64)
    )


def _components(mask: NDArray[np.bool_], both: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sizes of a mask's components (n,), and the component (from 0) of every voxel of both masks, in their order."""
    # Framed: cc3d's table of labels is too short for isolated voxels in a box of one or three voxels' thickness.
    labels, sizes = label_components(np.pad(mask, 1), connectivity=26)
    return sizes[1:], labels[1:-1, 1:-1, 1:-1][both].astype(np.int64) - 1
