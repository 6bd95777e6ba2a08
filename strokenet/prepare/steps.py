"""Steps: the costly stations of a case, each with its place in the cache: brain, registration, bias field.

Comes in: native scans. Goes out: their brains, the transforms between them, and the scans without shading. A step is
computed again only where the bytes of its scans or its own settings changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from strokenet.data.case import read_label
from strokenet.data.errors import InputError
from strokenet.data.geometry import turn_to_ras, turned
from strokenet.prepare.bias import log_bias_field
from strokenet.prepare.brain import WEIGHTS, Brain, brain_by_network, brain_of_nonzero, make_brain
from strokenet.prepare.cache import array_sha256, cached_array, cached_json, file_sha256, key_of
from strokenet.prepare.config import PrepareConfig
from strokenet.prepare.itk import Matrix, resample_mask
from strokenet.prepare.record import FORMAT
from strokenet.prepare.register import RegisterConfig, Scan, brain_points, displacement_mm, register
from strokenet.prepare.scans import Native, same_grid


@dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """brains: of every scan on its own voxels. transforms: the reference's world -> the world of every scan, RAS mm.

    registration: what is to be said of it, {} for one scan.
    """

    brains: dict[str, Brain]
    transforms: dict[str, Matrix]
    registration: dict[str, Any]


def find_brains(scans: Mapping[str, Native], config: PrepareConfig, cache: Path) -> dict[str, Brain]:
    """The brain of every scan on its own voxels."""
    if isinstance(config.brain, Path):
        return _given_brain(config.brain, scans)
    if config.brain == "none":
        return {name: brain_of_nonzero(scan.array, scan.geometry) for name, scan in scans.items()}
    brains = {}
    for name, scan in scans.items():
        key = key_of(FORMAT, WEIGHTS, scan.sha256)

        def compute(scan: Native = scan) -> NDArray[np.bool_]:
            return brain_by_network(scan.array, scan.geometry).mask

        brains[name] = make_brain(cached_array(cache, f"brain_{name}", key, compute), scan.geometry, "deepbet")
    return brains


def _given_brain(path: Path, scans: Mapping[str, Native]) -> dict[str, Brain]:
    """A given mask on the scan that it fits; on the other by the scanner's coordinates, until they are registered."""
    label = read_label(path)
    turn = turn_to_ras(label.geometry)
    mask, geometry = turn.apply(label.array) != 0, turned(label.geometry, turn)
    if not any(same_grid(geometry, scan.geometry) for scan in scans.values()):
        raise InputError(f"{path}: brain mask lies on the grid of no scan; resample it to one of them")
    brains = {}
    for name, scan in scans.items():
        own = same_grid(geometry, scan.geometry)
        there = mask if own else resample_mask(mask, geometry, scan.geometry, np.eye(4))
        brains[name] = make_brain(there, scan.geometry, "given" if own else "carried")
    return brains


def _carry_given(
    scans: Mapping[str, Native], brains: dict[str, Brain], transforms: Mapping[str, Matrix]
) -> dict[str, Brain]:
    """The given mask on the other scan, too, now that the motion between them is known."""
    carried = [name for name, brain in brains.items() if brain.method == "carried"]
    for name in carried:
        (own,) = (other for other in brains if other != name)
        between = transforms[own] @ np.linalg.inv(transforms[name])  # world of name -> reference -> world of own
        mask = resample_mask(brains[own].mask, scans[own].geometry, scans[name].geometry, between)
        brains = brains | {name: make_brain(mask, scans[name].geometry, "carried")}
    return brains


def find_transforms(
    scans: Mapping[str, Native], brains: dict[str, Brain], reference: str, config: PrepareConfig, cache: Path
) -> Found:
    """How the scans lie to each other, and with it the brain of a scan whose mask was given on the other."""
    transforms: dict[str, Matrix] = {reference: np.eye(4)}
    found: dict[str, Any] = {}
    for name in scans:
        if name == reference:
            continue
        fixed, moving = (
            Scan(array=scans[n].array, brain=brains[n].mask, geometry=scans[n].geometry) for n in (reference, name)
        )
        mask = file_sha256(config.brain) if isinstance(config.brain, Path) else config.brain
        key = key_of(FORMAT, scans[reference].sha256, scans[name].sha256, mask, asdict(config.registration))

        def compute(fixed: Scan = fixed, moving: Scan = moving) -> dict[str, Any]:
            return _registered(fixed, moving, config.registration)

        found = cached_json(cache, f"register_{name}", key, compute)
        transforms[name] = np.asarray(found["matrix"], dtype=np.float64)
    return Found(brains=_carry_given(scans, brains, transforms), transforms=transforms, registration=found)


def _registered(fixed: Scan, moving: Scan, config: RegisterConfig) -> dict[str, Any]:
    found = register(fixed, moving, config)
    moved = displacement_mm(brain_points(fixed), found.fixed_to_moving, np.eye(4))
    fields = {name: value for name, value in vars(found).items() if name != "fixed_to_moving"}
    return fields | {"matrix": found.fixed_to_moving.tolist(), "displacement_mm": float(moved.mean())}


def correct_bias(scan: Native, brain: Brain, config: PrepareConfig, cache: Path) -> NDArray[np.float32]:
    """The scan on its native grid without its bias field."""
    if not config.bias:
        return scan.array
    key = key_of(FORMAT, scan.sha256, array_sha256(brain.mask), asdict(config.n4))

    def compute() -> NDArray[np.float16]:  # a part in 2000: far below the noise, at half the disk
        return log_bias_field(scan.array, brain.mask, scan.geometry, config.n4).astype(np.float16)

    log_field = cached_array(cache, f"bias_{key_of(str(scan.path))[:8]}", key, compute)
    return np.asarray(scan.array * np.exp(-log_field.astype(np.float32)), dtype=np.float32)
