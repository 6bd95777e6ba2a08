"""Signal: how bright every matter of a head is on T1 and FLAIR, and the volume that a perfect scanner would give.

Comes in: a Head and its lesions. Goes out: (D, H, W) float32 in units of healthy white matter. Partial volume comes
from a blur: blurring the image of means is blurring the share of every matter, because the blur is linear.

T1: means of the prior published with SynthSeg (Billot 2023, prior_means_t1.npy, divided by white matter's). Its 25
columns carry no names; we read the last 11 as labels 502 to 530 in order (vessels, vitreous, soft tissue, ..., cortical
bone darkest), the first ones as background, CSF, white matter, cortex, cerebellum, thalamus, striatum, pallidum, stem,
and hippocampus, which is the order of brightness that T1 shows. Stroke and hyperintensities: as in contrast.py.

FLAIR: the inversion-recovery spin-echo equation, PD (1 - 2 exp(-TI/T1) + exp(-TR/T1)) exp(-TE/T2), at TR 9 s, TI 2.5 s,
TE 0.1 s. Relaxation at 3 T: white matter, grey matter, muscle, blood, nerve, cord after Stanisz 2005; fat and marrow
after de Bazelaire 2004. The others are our own plausible values: deep nuclei between grey and white, pallidum shortened
by iron, vitreous and ventricles near water, bone nearly without protons, gliosis as water-rich white matter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from strokenet.synth.anatomy import Floats
from strokenet.synth.field import smooth_field
from strokenet.synth.head import TISSUE_MATTER, Head, Matter, among

Sequence = Literal["T1", "FLAIR"]
Domain = Literal["natural", "random"]

PRIOR_WHITE = 160.3  # the prior's white matter, in its own units
TR_MS, TI_MS, TE_MS = 9000.0, 2500.0, 100.0
BETWEEN_CASES = 0.04  # relative standard deviation of a matter's mean from case to case
TEXTURE_MM, OUTER_TEXTURE_MM = 2.4, 3.0  # in the brain; in the soft tissue around it, which has strands
BLUR_MM = 0.55  # Gaussian: partial volume of a voxel of 1 mm, 0.29 mm, and the sequence's own point spread
RANDOM_MEAN, RANDOM_STD = (0.05, 1.6), (0.0, 0.12)  # of domain "random"; white matter is drawn as well
RANDOM_APART = 0.18  # and the parts of a lesion at least so far from white matter: else nobody could find it
FAT_SATURATED, FAT_LEFT = 0.5, 0.35  # share of the FLAIR scans with fat saturation, and what it leaves of fat


class Relaxation(NamedTuple):
    """T1 and T2 in ms, proton density relative to water."""

    t1_ms: float
    t2_ms: float
    density: float


RELAXATION: Mapping[Matter, Relaxation] = {
    Matter.AIR: Relaxation(1000, 10, 0.0),
    Matter.CSF: Relaxation(4000, 1000, 1.0),
    Matter.VENTRICLE: Relaxation(4100, 1000, 1.0),
    Matter.CHOROID: Relaxation(2000, 120, 0.9),
    Matter.CORTEX: Relaxation(1820, 99, 0.82),
    Matter.WHITE: Relaxation(1084, 69, 0.70),
    Matter.THALAMUS: Relaxation(1400, 80, 0.77),
    Matter.STRIATUM: Relaxation(1500, 82, 0.80),
    Matter.PALLIDUM: Relaxation(1200, 62, 0.74),
    Matter.HIPPOCAMPUS: Relaxation(1750, 102, 0.82),
    Matter.CEREBELLAR_GREY: Relaxation(1750, 94, 0.82),
    Matter.CEREBELLAR_WHITE: Relaxation(1120, 71, 0.71),
    Matter.STEM: Relaxation(1150, 73, 0.72),
    Matter.ARTERY: Relaxation(1932, 275, 0.08),  # flow void
    Matter.EYE: Relaxation(4000, 900, 1.0),
    Matter.SOFT: Relaxation(700, 60, 0.75),  # muscle and fat in turn
    Matter.MUSCLE: Relaxation(1412, 50, 0.80),
    Matter.MUCOSA: Relaxation(1600, 90, 0.85),
    Matter.SKIN: Relaxation(900, 45, 0.70),
    Matter.CORD: Relaxation(993, 78, 0.70),
    Matter.VEIN: Relaxation(1932, 90, 0.40),  # half a flow void
    Matter.BONE: Relaxation(400, 25, 0.15),
    Matter.MARROW: Relaxation(586, 49, 0.70),
    Matter.NERVE: Relaxation(1083, 78, 0.70),
    Matter.FAT: Relaxation(382, 68, 0.80),
    Matter.WMH: Relaxation(1350, 125, 0.80),
    Matter.RIM: Relaxation(1450, 120, 0.84),
    Matter.CAVITY: Relaxation(3700, 600, 1.0),
}
T1_MEANS: Mapping[Matter, float] = {
    Matter.AIR: 0.0,
    Matter.CSF: 44.4 / PRIOR_WHITE,
    Matter.VENTRICLE: 44.4 / PRIOR_WHITE,
    Matter.CHOROID: 86.8 / PRIOR_WHITE,
    Matter.CORTEX: 96.3 / PRIOR_WHITE,
    Matter.WHITE: 1.0,
    Matter.THALAMUS: 129.5 / PRIOR_WHITE,
    Matter.STRIATUM: 124.1 / PRIOR_WHITE,
    Matter.PALLIDUM: 151.8 / PRIOR_WHITE,
    Matter.HIPPOCAMPUS: 116.1 / PRIOR_WHITE,
    Matter.CEREBELLAR_GREY: 88.2 / PRIOR_WHITE,
    Matter.CEREBELLAR_WHITE: 136.0 / PRIOR_WHITE,
    Matter.STEM: 142.5 / PRIOR_WHITE,
    Matter.ARTERY: 126.4 / PRIOR_WHITE,
    Matter.EYE: 18.1 / PRIOR_WHITE,
    Matter.SOFT: 93.9 / PRIOR_WHITE,
    Matter.MUSCLE: 117.1 / PRIOR_WHITE,
    Matter.MUCOSA: 69.9 / PRIOR_WHITE,
    Matter.SKIN: 113.7 / PRIOR_WHITE,
    Matter.CORD: 68.2 / PRIOR_WHITE,
    Matter.VEIN: 48.4 / PRIOR_WHITE,
    Matter.BONE: 30.2 / PRIOR_WHITE,
    Matter.MARROW: 94.2 / PRIOR_WHITE,
    Matter.NERVE: 144.5 / PRIOR_WHITE,
    Matter.FAT: (93.9 + 48.6) / PRIOR_WHITE,  # soft tissue's mean and one standard deviation
    Matter.WMH: 0.80,
    Matter.RIM: 0.54,
    Matter.CAVITY: 0.30,
}
# standard deviation within a matter, white matter 1: the prior's, less its noise in the brain
T1_TEXTURE = {
    Matter.FAT: 0.08,
    Matter.SOFT: 0.30,
    Matter.MARROW: 0.20,
    Matter.SKIN: 0.20,
    Matter.MUSCLE: 0.15,
    Matter.MUCOSA: 0.15,
}
FLAIR_TEXTURE = {
    Matter.FAT: 0.10,
    Matter.SOFT: 0.30,
    Matter.MARROW: 0.15,
    Matter.SKIN: 0.10,
    Matter.MUSCLE: 0.10,
    Matter.MUCOSA: 0.15,
}
BRAIN_TEXTURE, NO_TEXTURE = 0.025, (Matter.AIR, Matter.CSF, Matter.VENTRICLE, Matter.EYE, Matter.BONE)
FAT = (Matter.FAT, Matter.SOFT, Matter.MARROW, Matter.SKIN)
OUTER = (Matter.SOFT, Matter.MARROW, Matter.SKIN, Matter.MUSCLE, Matter.MUCOSA, Matter.FAT)


@dataclass(frozen=True, kw_only=True)
class Look:
    """How one scan shows every matter: mean and standard deviation within it, (len(Matter),) each, white near 1."""

    mean: NDArray[np.float32]
    texture: NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, eq=False)
class Overlay:
    """Lesions over a head, float32 of anatomy.shape each: share of hyperintensities, share of strokes, and how much of
    the stroke's tissue is fluid."""

    hyperintensity: NDArray[np.float32]
    stroke: NDArray[np.float32]
    cavity: NDArray[np.float32]


def flair_means() -> dict[Matter, float]:
    """The inversion-recovery equation for every matter, white matter 1; the magnitude, as scans are stored."""
    white = _inversion_recovery(RELAXATION[Matter.WHITE])
    return {matter: abs(_inversion_recovery(of)) / white for matter, of in RELAXATION.items()}


def draw_look(rng: np.random.Generator, sequence: Sequence, domain: Domain) -> Look:
    """The look of one scan: the sequence's with a little of the case's own, or anything ("random", Billot 2023)."""
    if domain == "random":
        return _random_look(rng)
    means, textures = (T1_MEANS, T1_TEXTURE) if sequence == "T1" else (flair_means(), FLAIR_TEXTURE)
    saturated = rng.random() < FAT_SATURATED
    mean = np.array([means.get(matter, 0.0) for matter in Matter])
    texture = np.array([0.0 if m in NO_TEXTURE else textures.get(m, BRAIN_TEXTURE) for m in Matter])
    if sequence == "FLAIR" and saturated:
        mean[list(FAT)] *= FAT_LEFT
        texture[list(FAT)] *= FAT_LEFT
    mean *= 1 + BETWEEN_CASES * rng.standard_normal(len(Matter))
    mean[Matter.VENTRICLE] = mean[Matter.CSF]
    return Look(mean=mean.astype(np.float32), texture=texture.astype(np.float32))


def signal(rng: np.random.Generator, head: Head, lesions: Overlay, look: Look) -> NDArray[np.float32]:
    """The head with its lesions as this look shows it, blurred to partial volume: (D, H, W) float32, 0 or more."""
    image = look.mean[head.matter]
    grain = look.texture[head.matter]
    mixed = head.inner == Matter.MIXED
    if mixed.any():
        own = list(TISSUE_MATTER.values())
        shares = head.anatomy.tissue[list(TISSUE_MATTER)]
        for whole, of in ((image, look.mean), (grain, look.texture)):  # (4,) x (4, D, H, W) -> (D, H, W)
            np.copyto(whole[head.box], np.tensordot(of[own], shares, 1), where=mixed)
    image[head.box] = _over(image[head.box], lesions, look)
    grain *= _texture(rng, head)
    image += grain
    image = ndimage.gaussian_filter(image, BLUR_MM / head.anatomy.spacing_mm, truncate=3, output=image)
    return np.asarray(np.maximum(image, 0, out=image))


def _over(image: Floats, lesions: Overlay, look: Look) -> NDArray[np.float32]:
    """Hyperintensities first, strokes over them; both take the place of what was there."""
    image = image + lesions.hyperintensity * (look.mean[Matter.WMH] - image)
    rim, cavity = look.mean[Matter.RIM], look.mean[Matter.CAVITY]
    stroke = rim + lesions.cavity * (cavity - rim)
    return np.asarray(image + lesions.stroke * (stroke - image), dtype=np.float32)


def _texture(rng: np.random.Generator, head: Head) -> NDArray[np.float32]:
    """A fine field in the brain and a coarser one outside, of standard deviation 1 each."""
    d, h, w = head.matter.shape
    outer = among(head.matter, OUTER)
    if not outer.any():
        return smooth_field(rng, (d, h, w), TEXTURE_MM / head.anatomy.spacing_mm)
    field = smooth_field(rng, (d, h, w), OUTER_TEXTURE_MM / head.anatomy.spacing_mm)
    fine = smooth_field(rng, head.anatomy.shape, TEXTURE_MM / head.anatomy.spacing_mm)
    np.copyto(field[head.box], fine, where=~outer[head.box])
    return field


def _random_look(rng: np.random.Generator) -> Look:
    mean = rng.uniform(*RANDOM_MEAN, len(Matter))
    mean[Matter.AIR] = mean[Matter.MIXED] = 0
    mean[Matter.VENTRICLE] = mean[Matter.CSF]
    white = mean[Matter.WHITE]
    for part in (Matter.WMH, Matter.RIM, Matter.CAVITY):
        if abs(mean[part] - white) < RANDOM_APART:
            mean[part] = white + RANDOM_APART if white < 0.8 else white - RANDOM_APART
    texture = rng.uniform(*RANDOM_STD, len(Matter))
    texture[Matter.AIR] = 0
    return Look(mean=mean.astype(np.float32), texture=texture.astype(np.float32))


def _inversion_recovery(of: Relaxation) -> float:
    recovered = 1 - 2 * np.exp(-TI_MS / of.t1_ms) + np.exp(-TR_MS / of.t1_ms)
    return float(of.density * recovered * np.exp(-TE_MS / of.t2_ms))
