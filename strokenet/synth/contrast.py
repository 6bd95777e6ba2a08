"""Contrast: tissue shares to the intensities that T1 and FLAIR show.

Comes in: a painted Anatomy. Goes out: one volume a channel on the same fine grid, in units of healthy white matter.
Partial volume follows by itself: a voxel is the mean of its tissues. The numbers are our own choice, near what the
spin-echo and inversion-recovery equations give for the relaxation times of Stanisz 2005 (3 T: white matter T1 1084 ms,
T2 69 ms; grey matter 1820 and 99 ms): FLAIR at TR 9 s, TI 2.5 s, TE 0.1 s shows grey matter 1.1 times as bright as
white (1.2 here) and nulls CSF. Two choices make the task: hyperintensities are no darker on FLAIR than a stroke's
rim, and a cavity is on both as dark as sulci and ventricles, so that no threshold finds a stroke.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from strokenet.synth.anatomy import Anatomy, Tissue
from strokenet.synth.field import smooth_field


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """How one sequence shows the tissues.

    mean: tissue -> intensity, white matter 1. between_cases: relative standard deviation of a tissue's mean from case
    to case. texture: standard deviation within a tissue, white matter 1. blur_mm: Gaussian sigma of the sequence.
    """

    mean: Mapping[Tissue, float]
    between_cases: float
    texture: float
    blur_mm: float


T1 = Contrast(
    mean={
        Tissue.CSF: 0.25,
        Tissue.GREY: 0.70,
        Tissue.DEEP_GREY: 0.80,
        Tissue.WHITE: 1.00,
        Tissue.WMH: 0.86,
        Tissue.RIM: 0.56,
        Tissue.CAVITY: 0.32,
    },
    between_cases=0.03,
    texture=0.03,
    blur_mm=0.5,
)
FLAIR = Contrast(
    mean={
        Tissue.CSF: 0.22,
        Tissue.GREY: 1.20,
        Tissue.DEEP_GREY: 1.10,
        Tissue.WHITE: 1.00,
        Tissue.WMH: 1.85,
        Tissue.RIM: 1.65,
        Tissue.CAVITY: 0.30,
    },
    between_cases=0.04,
    texture=0.05,
    blur_mm=0.7,
)
CHANNELS: Mapping[str, Contrast] = {"T1": T1, "FLAIR": FLAIR}
TEXTURE_MM = 2.5


def render(rng: np.random.Generator, anatomy: Anatomy, contrast: Contrast) -> NDArray[np.float32]:
    """The volume that a sequence without bias and noise would give, (D, H, W) float32 on the anatomy's grid."""
    spread = 1 + contrast.between_cases * rng.standard_normal(len(Tissue))
    means = np.array([contrast.mean[tissue] for tissue in Tissue]) * spread
    image = np.tensordot(means.astype(np.float32), anatomy.tissue, 1)  # (T,) x (T, D, H, W) -> (D, H, W)
    image += np.float32(contrast.texture) * smooth_field(rng, anatomy.shape, TEXTURE_MM / anatomy.spacing_mm)
    return np.asarray(ndimage.gaussian_filter(image, contrast.blur_mm / anatomy.spacing_mm, truncate=3))
