"""Steps: the costly stations of a case, each with its place in the cache: brain, registration, bias field.

Comes in: native scans. Goes out: their brains, the transforms between them, and the scans without shading. A step is
computed again only where the bytes of its scans or its own settings changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from strokenet.data.case import read_label
from strokenet.data.errors import InputError
from strokenet.data.files import file_sha256
from strokenet.data.geometry import turn_to_ras, turned
from strokenet.prepare.bias import log_bias_field
from strokenet.prepare.brain import WEIGHTS, Brain, brain_by_network, brain_of_nonzero, make_brain
from strokenet.prepare.cache import array_sha256, cached_array, cached_json, key_of
from strokenet.prepare.config import PrepareConfig, time_of
from strokenet.prepare.itk import Matrix, resample_mask
from strokenet.prepare.record import FORMAT
from strokenet.prepare.register import RegisterConfig, Scan, brain_points, displacement_mm, register
from strokenet.prepare.scans import Native, how_far, same_grid


@dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """brains: of every scan on its own voxels. transforms: the reference's world -> the world of every scan, RAS mm.

    registrations: scan -> what is to be said of how it was registered; none of the reference.
    """

    brains: dict[str, Brain]
    transforms: dict[str, Matrix]
    registrations: dict[str, dict[str, Any]]


def find_brains(scans: Mapping[str, Native], reference: str, config: PrepareConfig, cache: Path) -> dict[str, Brain]:
    """The brain of every scan on its own voxels."""
    if isinstance(config.brain, Path):
        return _given_brain(config.brain, scans, reference)
    if config.brain == "none":
        return {name: brain_of_nonzero(scan.array, scan.geometry) for name, scan in scans.items()}
    brains = {}
    for name, scan in scans.items():
        key = key_of(FORMAT, WEIGHTS, scan.sha256)

        def compute(scan: Native = scan) -> NDArray[np.bool_]:
            return brain_by_network(scan.array, scan.geometry).mask

        brains[name] = make_brain(cached_array(cache, f"brain_{name}", key, compute), scan.geometry, "deepbet")
    return brains


def _given_brain(path: Path, scans: Mapping[str, Native], reference: str) -> dict[str, Brain]:
    """A given mask on the scan that it fits; on the others by the scanner's coordinates, until they are registered.

    Where it fits scans of both times it is taken to be the reference's: a head does not lie twice in one place.
    """
    label = read_label(path)
    turn = turn_to_ras(label.geometry)
    mask, geometry = turn.apply(label.array) != 0, turned(label.geometry, turn)
    fitting = [name for name, scan in scans.items() if same_grid(geometry, scan.geometry)]
    if not fitting:
        raise InputError(
            f"{path}: brain mask of {geometry.shape[::-1]} voxels lies on the grid of no scan "
            f"({how_far(geometry, scans)}); resample it to one of them"
        )
    time = time_of(reference if reference in fitting else fitting[0])
    brains = {}
    for name, scan in scans.items():
        own = name in fitting and time_of(name) == time
        there = mask if own else resample_mask(mask, geometry, scan.geometry, np.eye(4))
        brains[name] = make_brain(there, scan.geometry, "given" if own else "carried")
    return brains


def _carry_given(
    scans: Mapping[str, Native], brains: dict[str, Brain], transforms: Mapping[str, Matrix]
) -> dict[str, Brain]:
    """The given mask on the other scans, too, now that the motion between them is known."""
    carried = [name for name, brain in brains.items() if brain.method == "carried"]
    for name in carried:
        own = next(other for other in brains if brains[other].method == "given")
        between = transforms[own] @ np.linalg.inv(transforms[name])  # world of name -> reference -> world of own
        mask = resample_mask(brains[own].mask, scans[own].geometry, scans[name].geometry, between)
        brains = brains | {name: make_brain(mask, scans[name].geometry, "carried")}
    return brains


def find_transforms(
    scans: Mapping[str, Native], brains: dict[str, Brain], reference: str, config: PrepareConfig, cache: Path
) -> Found:
    """How the scans lie to each other, and with it the brain of a scan whose mask was given on another."""
    transforms: dict[str, Matrix] = {reference: np.eye(4)}
    registrations: dict[str, dict[str, Any]] = {}
    for name, to in pairs(scans, reference):
        fixed, moving = (
            Scan(array=scans[n].array, brain=brains[n].mask, geometry=scans[n].geometry) for n in (to, name)
        )
        mask = file_sha256(config.brain) if isinstance(config.brain, Path) else config.brain
        key = key_of(FORMAT, scans[to].sha256, scans[name].sha256, mask, asdict(config.registration))

        def compute(fixed: Scan = fixed, moving: Scan = moving) -> dict[str, Any]:
            return _registered(fixed, moving, config.registration)

        found = cached_json(cache, f"register_{name}", key, compute)
        matrix = np.asarray(found["matrix"], dtype=np.float64)
        transforms[name] = matrix @ transforms[to] if to != reference else matrix
        registrations[name] = found | {"fixed": to}
    return Found(brains=_carry_given(scans, brains, transforms), transforms=transforms, registrations=registrations)


def pairs(scans: Iterable[str], reference: str) -> list[tuple[str, str]]:
    """Which scan is registered to which, from the reference outwards: (moving, fixed).

    The T1 to the FLAIR of its own time; and one scan to its like of the other time, FLAIR to FLAIR where both times
    have one, else T1 to T1: like contrasts register best, and what is compared between the times then lies on each
    other. Only times without a like contrast are registered across contrasts.
    """
    names = list(scans)
    times = [[name for name in names if time_of(name) == time] for time in (1, 2)]
    edges = [(own[0], own[1]) for own in times if len(own) == 2]
    if all(times):
        between = (("flair", "flair_2"), ("t1", "t1_2"), (times[0][0], times[1][0]))
        edges.append(next(edge for edge in between if set(edge) <= set(names)))
    found, reached = [], [reference]
    for fixed in reached:  # it grows while it is walked
        for one, other in (*edges, *((b, a) for a, b in edges)):
            if one == fixed and other not in reached:
                reached.append(other)
                found.append((other, fixed))
    return found


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
