"""Preprocess: from a case to what the network sees, in nnU-Net's order (Isensee 2021, Methods).

    Case --turn--> --crop to nonzero--> --normalise--> --resample--> Prepared

Turned first (orientation, then the plan's axis order), so that everything after speaks the network's axes. Normalised
before it is resampled, because a resampled mask no longer fits the image (nnU-Net v1 had it the other way round, and so
have the plans imported from it). Training and inference share this one path, which runs where it is told to: in
training on the CPU, in inference where the network is. Origin is what infer/restore.py needs to take a result back to
the stored grid.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from planner.plan import Orientation, Plan, Spacing, Triple
from strokenet.data.case import Case
from strokenet.data.errors import InputError
from strokenet.data.geometry import AS_STORED, Geometry, Turn, turn_to_ras
from strokenet.preprocess.crop import Box, nonzero_box
from strokenet.preprocess.normalise import normalise
from strokenet.preprocess.resample import new_shape, resample_image, resample_label

OUTSIDE = -1  # label of background voxels outside the nonzero mask
LOCATIONS = 10_000  # voxels remembered of each label, or LOCATIONS_SHARE of them where that is more
LOCATIONS_SHARE = 0.01
CPU = torch.device("cpu")
LOCATIONS_SEED = 1234  # nnU-Net's, the same for every case: the drawn voxels are then equal to its own


@dataclass(frozen=True, kw_only=True, eq=False)
class Origin:
    """Where a prepared image comes from.

    The way back: resample to box.shape (plan.spacing -> turn.permute(geometry.spacing)), put that into `box` of a
    volume of turn.permute(geometry.shape), turn.invert.

    geometry: the stored grid. turn: stored axes -> network axes. box: the crop, in network axes.
    """

    geometry: Geometry
    turn: Turn
    box: Box


@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """A case as the network sees it; all arrays in network axes.

    image: (C, D, H, W) float32, where it was asked for. label: (D, H, W) int16 with -1 outside the head, None at
    inference. foreground: label value -> voxels (n, 3) int64 of it, for oversampling; empty at inference. inside:
    (*origin.box.shape) bool, beside the image: what counts as inside the head on the scan's own voxels.
    """

    case_id: str
    image: Tensor
    label: NDArray[np.int16] | None
    foreground: dict[int, NDArray[np.int64]]
    inside: Tensor
    origin: Origin


def preprocess(case: Case, plan: Plan, device: torch.device = CPU) -> Prepared:
    """The case prepared by the plan, its image on `device`.

    Raises:
        InputError: the channels are not the plan's, or the case cannot be brought to the plan's grid.
    """
    if case.channels != plan.channels:
        raise InputError(
            f"{case.case_id}: channels {list(case.channels)}; the plan needs {list(plan.channels)}, in this order; "
            "read the case with these"
        )
    turn = case_turn(case.geometry, plan.orientation).then(plan.transpose)
    image = turned_image(case.image, turn, device)
    spacing = turn.permute(case.geometry.spacing)
    box, inside = nonzero_box(image)
    label = None
    if case.label is not None:
        label = cropped_label(np.asarray(turn.apply(case.label), dtype=np.int16), box, inside.cpu().numpy())
        # a labelled voxel counts as inside even where the image is zero
        inside = torch.from_numpy(label >= 0).to(device)
    try:
        shape = new_shape(box.shape, spacing, plan.spacing)
        image = _on_plan_grid(image[:, *box.slices], inside, shape, spacing, plan)
    except InputError as error:
        raise InputError(f"{case.case_id}: {error}") from None
    if label is not None:
        label = resample_label(label, shape, spacing, plan.spacing)
    return Prepared(
        case_id=case.case_id,
        image=image,
        label=label,
        foreground={} if label is None else foreground_locations(label, plan.foreground),
        inside=inside,
        origin=Origin(geometry=case.geometry, turn=turn, box=box),
    )


def turned_image(image: NDArray[np.float32], turn: Turn, device: torch.device) -> Tensor:
    """A case's image on a device, in network axes. (C, D, H, W) -> (C, *turned) float32."""
    return torch.from_numpy(np.ascontiguousarray(turn.apply(image), dtype=np.float32)).to(device)


def _on_plan_grid(image: Tensor, inside: Tensor, shape: Triple, spacing: Spacing, plan: Plan) -> Tensor:
    """Normalised and resampled, in the plan's order. image (C, *box), inside (*box) -> (C, *shape) float32."""
    if plan.normalise == "before-resampling":
        return resample_image(normalise(image, inside, plan), shape, spacing, plan.spacing)
    weight = resample_image(inside[None].float(), shape, spacing, plan.spacing, order=1)
    return normalise(resample_image(image, shape, spacing, plan.spacing), weight[0] >= 0.5, plan)


def case_turn(geometry: Geometry, orientation: Orientation) -> Turn:
    """The turn that an orientation asks for: to RAS, or none."""
    return turn_to_ras(geometry) if orientation == "RAS" else AS_STORED


def cropped_label(label: NDArray[np.int16], box: Box, inside: NDArray[np.bool_]) -> NDArray[np.int16]:
    """The label in the box, -1 where it is background and outside the mask. (D, H, W) -> (box) int16, a copy."""
    cropped = np.array(label[box.slices], dtype=np.int16, order="C")
    cropped[(cropped == 0) & ~inside] = OUTSIDE
    return cropped


def foreground_locations(label: NDArray[np.int16], values: Iterable[int]) -> dict[int, NDArray[np.int64]]:
    """Random voxels of each label, without repetition: what patches are centred on to oversample the lesion.

    Of n voxels max(min(10000, n), 1 %) are drawn, label after label from one generator of a fixed seed.

    Args:
        label: (D, H, W). values: label values in ascending order.

    Returns:
        value -> (n, 3) int64 voxels (d, h, w); (0, 3) where the case has none.
    """
    random = np.random.RandomState(LOCATIONS_SEED)
    locations = {}
    for value in values:
        found = np.argwhere(label == value)
        n = max(min(LOCATIONS, len(found)), int(np.ceil(len(found) * LOCATIONS_SHARE)))
        locations[value] = found[random.choice(len(found), n, replace=False)] if n else found
    return locations
