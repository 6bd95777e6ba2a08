"""A model of nnU-Net in our terms: what v1.py and v2.py read, and what importing.py writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from planner.plan import Plan
from strokenet.data.errors import InputError
from strokenet.model.checkpoint import expected_shapes

SHOWN = 3  # names in a message


@dataclass(frozen=True, kw_only=True, eq=False)
class ForeignModel:
    """A trained nnU-Net, read and checked.

    weights: fold ("0" .. or "all") -> parameters under our names. checkpoint: the kind of file they come from.
    notes: what the user should know, one line each.
    """

    generation: Literal["v1", "v2"]
    trainer: str
    configuration: str
    plan: Plan
    weights: Mapping[str, dict[str, Tensor]]
    checkpoint: Literal["final", "best"]
    notes: tuple[str, ...] = ()


def check_weights(where: str, weights: Mapping[str, Tensor], plan: Plan) -> None:
    """Names, shapes and numbers against the plan's network.

    Raises:
        InputError: a parameter is missing, unknown, of another shape, or holds NaN or infinity.
    """
    shapes = expected_shapes(plan)
    missing, unknown = sorted(set(shapes) - set(weights)), sorted(set(weights) - set(shapes))
    if missing or unknown:
        raise InputError(
            f"{where}: not the network of its plans: {len(missing)} parameters missing ({_first(missing)}), "
            f"{len(unknown)} unknown ({_first(unknown)}); only PlainConvUNet and ResidualEncoderUNet are read"
        )
    for name, shape in shapes.items():
        if tuple(weights[name].shape) != shape:
            raise InputError(
                f"{where}: {name} is {tuple(weights[name].shape)}, its plans and dataset.json ask for {shape}"
            )
        if not weights[name].is_floating_point() or not bool(weights[name].isfinite().all()):
            raise InputError(f"{where}: {name} holds NaN, infinity or whole numbers; the file is damaged")


def _first(names: list[str]) -> str:
    return f"{', '.join(names[:SHOWN]):.200}" or "none"
