"""Register: where the anatomy of one scan lies in another, by a rigid motion (Meddahi 2024, IV.B, step 3).

Comes in: a fixed and a moving scan, each with its brain mask. Goes out: a Registration, whose matrix maps every point
of the fixed scan's world to the same anatomy in the moving scan's world: the direction that resampling needs.
Nothing is resampled here. Mutual information (Mattes 2003) is followed down three levels of resolution by SimpleITK;
its random samples come from a seed and one thread, so that the same scans give the same matrix.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from strokenet.data.errors import InputError
from strokenet.data.geometry import Geometry
from strokenet.prepare.itk import Matrix, itk_threads, sitk, to_image, to_matrix, to_transform

MIN_BRAIN_VOXELS = 500  # fewer are no brain to register by


@dataclass(frozen=True, kw_only=True)
class RegisterConfig:
    """How to register.

    bins: of the joint histogram. shrink, smooth_mm, samples: a value a level, coarse to fine; samples is the share of
    the voxels that the metric looks at: all levels then see a few ten thousand points. step_mm: longest step of the
    descent, first and smallest. relaxation: factor of a step that turned back. iterations: at most, a level.
    margin_mm: the metric is taken in the fixed brain and this far around it: the skull pulls in a start that is far off
    (with 12 mm, starts of 15 mm and 15 degrees were lost), the neck moves by itself. seed: of the samples, at least 1
    (0 is ITK's clock). threads: more than one sums in another order, and the last digits of the matrix differ.
    """

    bins: int = 48
    shrink: tuple[int, ...] = (4, 2, 1)
    smooth_mm: tuple[float, ...] = (2.0, 1.0, 0.0)
    samples: tuple[float, ...] = (0.5, 0.2, 0.05)
    step_mm: tuple[float, float] = (2.0, 1e-3)
    relaxation: float = 0.6
    iterations: int = 200
    margin_mm: float = 25.0
    seed: int = 1
    threads: int = 1

    def __post_init__(self) -> None:
        if not len(self.shrink) == len(self.smooth_mm) == len(self.samples) >= 1:
            raise ValueError(
                f"levels {self.shrink}, {self.smooth_mm}, {self.samples}; one value each a level is needed"
            )
        if self.seed < 1 or self.threads < 1 or self.bins < 8 or self.iterations < 1:
            raise ValueError(f"seed {self.seed}, threads {self.threads}, bins {self.bins}; 1, 1 and 8 at least")


@dataclass(frozen=True, kw_only=True, eq=False)
class Scan:
    """A scan (D, H, W) float32 with its brain mask (D, H, W) bool and where both lie."""

    array: NDArray[np.float32]
    brain: NDArray[np.bool_]
    geometry: Geometry


@dataclass(frozen=True, kw_only=True, eq=False)
class Registration:
    """fixed_to_moving: (4, 4), (x, y, z, 1) RAS mm in the fixed scan's world -> the moving scan's world.

    start: which start was taken. metric_start, metric_end: minus the mutual information at the finest level, lower is
    better. iterations: of the last level. stop: why it ended. seconds: on the clock.
    """

    fixed_to_moving: Matrix
    start: str
    metric_start: float
    metric_end: float
    iterations: int
    stop: str
    seconds: float


def register(
    fixed: Scan, moving: Scan, config: RegisterConfig | None = None, *, start: Matrix | None = None
) -> Registration:
    """The rigid motion that brings the moving scan onto the fixed one.

    Args:
        start: (4, 4), fixed -> moving world in RAS mm, rigid. None: the better by the metric of the scanners' common
            coordinates, which hold within one examination, and of the shift that lays the brains' centres on each
            other, which holds where a header lost its place.

    Raises:
        InputError: SimpleITK is missing, a brain mask is empty, or the scans do not overlap.
    """
    config = config or RegisterConfig()
    for name, scan in (("fixed", fixed), ("moving", moving)):
        if int(scan.brain.sum()) < MIN_BRAIN_VOXELS:
            raise InputError(f"brain of the {name} scan has {int(scan.brain.sum())} voxels; give a brain mask")
    try:
        with itk_threads(config.threads):
            return _registration(fixed, moving, config, start)
    except RuntimeError as error:
        raise InputError(f"cannot be registered ({_reason(error)}); check that the scans show one head") from None


def _registration(fixed: Scan, moving: Scan, config: RegisterConfig, start: Matrix | None) -> Registration:
    began = time.perf_counter()
    images = to_image(fixed.array, fixed.geometry), to_image(moving.array, moving.geometry)
    region = to_image(_widened(fixed, config.margin_mm).astype(np.uint8), fixed.geometry)
    starts = _starts(fixed, moving) if start is None else {"given": start}
    metrics = {name: _metric(images, region, matrix, config) for name, matrix in starts.items()}
    name = min(metrics, key=lambda key: metrics[key])
    method = _method(region, config)
    euler = _euler(starts[name], fixed)
    method.SetInitialTransform(euler, inPlace=True)
    method.Execute(*images)
    matrix = to_matrix(euler)
    return Registration(
        fixed_to_moving=matrix,
        start=name,
        metric_start=metrics[name],
        metric_end=_metric(images, region, matrix, config),
        iterations=int(method.GetOptimizerIteration()),
        stop=" ".join(method.GetOptimizerStopConditionDescription().split()),
        seconds=time.perf_counter() - began,
    )


def displacement_mm(points: NDArray[np.float64], a: Matrix, b: Matrix) -> NDArray[np.float64]:
    """How far two motions send the same points apart. (N, 3) RAS mm -> (N,) mm."""
    difference = a - b
    return np.asarray(np.linalg.norm(points @ difference[:3, :3].T + difference[:3, 3], axis=1))


def brain_points(scan: Scan) -> NDArray[np.float64]:
    """World positions of the brain's voxels, (N, 3) RAS mm."""
    return np.asarray(np.argwhere(scan.brain) @ scan.geometry.affine[:3, :3].T + scan.geometry.affine[:3, 3])


def _starts(fixed: Scan, moving: Scan) -> dict[str, Matrix]:
    shift = np.eye(4)
    shift[:3, 3] = brain_points(moving).mean(0) - brain_points(fixed).mean(0)
    return {"scanner coordinates": np.eye(4), "brain centres": shift}


def _widened(scan: Scan, margin_mm: float) -> NDArray[np.bool_]:
    """The brain and all within margin_mm of it."""
    distance = ndimage.distance_transform_edt(~scan.brain, sampling=scan.geometry.spacing)
    return np.asarray(distance <= margin_mm)


def _euler(matrix: Matrix, fixed: Scan) -> Any:
    """The rigid ITK transform of the matrix, turning about the brain's centre: angles and shifts hardly interact."""
    centre = brain_points(fixed).mean(0) * (-1, -1, 1)  # LPS
    lps = to_transform(matrix)
    euler = sitk().Euler3DTransform()
    euler.SetCenter(centre.tolist())
    euler.SetMatrix(lps.GetMatrix(), 1e-4)
    shift = np.array(lps.TransformPoint(centre.tolist())) - centre
    euler.SetTranslation(shift.tolist())
    return euler


def _method(region: Any, config: RegisterConfig) -> Any:
    itk = sitk()
    method = itk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(config.bins)
    method.SetMetricFixedMask(region)
    method.SetMetricSamplingStrategy(method.RANDOM)
    method.SetMetricSamplingPercentagePerLevel(list(config.samples), config.seed)
    method.SetInterpolator(itk.sitkLinear)
    method.SetShrinkFactorsPerLevel(list(config.shrink))
    method.SetSmoothingSigmasPerLevel(list(config.smooth_mm))
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
    first, smallest = config.step_mm
    method.SetOptimizerAsRegularStepGradientDescent(
        learningRate=first, minStep=smallest, numberOfIterations=config.iterations, relaxationFactor=config.relaxation
    )
    method.SetOptimizerScalesFromPhysicalShift()
    return method


def _metric(images: tuple[Any, Any], region: Any, matrix: Matrix, config: RegisterConfig) -> float:
    """Minus the mutual information in the region, on the finest level's share of voxels; 0 where nothing overlaps."""
    itk = sitk()
    method = itk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(config.bins)
    method.SetMetricFixedMask(region)
    method.SetMetricSamplingStrategy(method.RANDOM)
    method.SetMetricSamplingPercentage(config.samples[-1], config.seed)
    method.SetInterpolator(itk.sitkLinear)
    method.SetInitialTransform(to_transform(matrix))
    try:
        return float(method.MetricEvaluate(*images))
    except RuntimeError:  # all samples lie outside the moving scan
        return 0.0


def _reason(error: RuntimeError) -> str:
    """The last line of ITK's message, which says what went wrong; those before it name its own files."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:200] if lines else "unknown"
