"""Bias: the slow shading that a receive coil lays over a scan, estimated and taken away (Meddahi 2024, IV.B, step 5).

Comes in: a scan on its native grid with its brain mask. Goes out: the logarithm of the field on that grid. The rule is
N4 (Tustison 2010), as SimpleITK has it. The field is estimated on voxels of about 5 mm, for it is far smoother than
that, and evaluated on the scan's own voxels from its B-splines; the scan itself is never made coarse.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from strokenet.data.errors import InputError
from strokenet.data.geometry import Geometry
from strokenet.prepare.itk import itk_threads, sitk, to_array, to_image
from strokenet.preprocess.crop import bounding_box


@dataclass(frozen=True, kw_only=True)
class BiasConfig:
    """How N4 works.

    coarse_mm: voxels that the field is estimated on; 4 mm would leave slices of 3 mm as they are, and take 2.5 times as
    long for the same field. iterations: a value a level; each level halves the mesh of the B-splines, which begins with
    one piece across the brain: three levels end at four pieces, some 40 mm each. A fourth takes ventricles, sulci and
    old strokes for shading: in six of six scans of tests/prepare/clinic.py it left more of it, of a T1 with little 2.3
    times what was there (three: 1.3). tolerance: change of the field at which a level ends. threads: of SimpleITK.
    """

    coarse_mm: float = 5.0
    iterations: tuple[int, ...] = (50, 50, 50)
    tolerance: float = 1e-3
    threads: int = 1

    def __post_init__(self) -> None:
        if not self.iterations or min(self.iterations) < 1 or not self.coarse_mm > 0 or self.threads < 1:
            raise ValueError(f"{self}; positive iterations, coarse_mm and threads are needed")


def log_bias_field(
    array: NDArray[np.float32], brain: NDArray[np.bool_], geometry: Geometry, config: BiasConfig | None = None
) -> NDArray[np.float32]:
    """Logarithm of the shading; the scan divided by its exponential is free of it.

    The mean over the brain is 0, so that the scan keeps its scale, and outside the brain the field keeps within the
    brain's range, where N4 would run off. Voxels that are not positive have no logarithm and are left out.

    Args:
        array: (D, H, W) float32. brain: (D, H, W) bool.

    Raises:
        InputError: N4 cannot work on it, e.g. because the brain holds a single value.
    """
    config = config or BiasConfig()
    inside = brain & (array > 0)
    if not inside.any() or np.ptp(array[inside]) == 0:
        raise InputError("bias field: the brain holds a single value; check the brain mask or use --no-bias")
    box = bounding_box(inside)
    try:
        log_field = _estimate(array[box.slices], inside[box.slices], geometry, config)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1][:200]
        raise InputError(f"bias field cannot be estimated ({reason}); check the brain mask or use --no-bias") from None
    values = log_field[inside[box.slices]]
    log_field = np.clip(log_field, values.min(), values.max()) - values.mean(dtype=np.float64).astype(np.float32)
    return np.pad(log_field, [(a, n - b) for a, b, n in zip(box.start, box.stop, array.shape, strict=True)], "edge")


def _estimate(
    array: NDArray[np.float32], inside: NDArray[np.bool_], geometry: Geometry, config: BiasConfig
) -> NDArray[np.float32]:
    """The field on the voxels of the brain's box; where the box lies does not matter to it."""
    itk = sitk()
    d, h, w = array.shape
    cropped = replace(geometry, shape=(d, h, w))
    image, mask = to_image(array, cropped), to_image(inside.astype(np.uint8), cropped)
    factors = [max(1, round(config.coarse_mm / size)) for size in image.GetSpacing()]
    n4 = itk.N4BiasFieldCorrectionImageFilter()
    n4.SetMaximumNumberOfIterations(list(config.iterations))
    n4.SetConvergenceThreshold(config.tolerance)
    with itk_threads(config.threads):
        n4.Execute(itk.Shrink(image, factors), itk.Shrink(mask, factors))
        return to_array(n4.GetLogBiasFieldAsImage(image))
