"""Scanner: a perfect volume as one of several scanners stores it.

Comes in: a volume of signal.py on a fine grid. Goes out: the same on the scan's grid, with the scanner's own
resolution, bias field, motion, Rician noise and gain, in whole numbers. The bias field is kept, because `prepare` is
measured by it. acquisition.py does the like for the small drawn cohort of the demo, whose bits must not change.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage

from strokenet.data.geometry import Geometry, Spacing
from strokenet.synth.field import smooth_field, stretched
from strokenet.synth.head import Triple, extent

FIELD_MM = 6.0  # a bias field is drawn and saved on a grid this coarse; between its points it is linear
GHOST_CYCLES = (2.0, 7.0)  # of a breath-like motion during the scan
CENTRE_LINES = 0.04  # of k-space, where the head is taken to be still: their motion would only shift the picture
FWHM = 2.355


@dataclass(frozen=True, kw_only=True)
class Site:
    """A scanner and its protocol.

    resolution_mm: (D, H, W) of the sequence, before its grid. noise: standard deviation, white matter 1. bias: standard
    deviation of the field's logarithm; bias_mm: its smoothness. gamma: power of the contrast, 1 the plain one. gain:
    stored number of white matter. motion: share of the scans in which the patient moves, by up to motion_mm.
    """

    name: str
    resolution_mm: Spacing = (1.0, 1.0, 1.0)
    noise: float = 0.03
    bias: float = 0.06
    bias_mm: float = 45.0
    gamma: float = 1.0
    gain: float = 500.0
    motion: float = 0.1
    motion_mm: float = 1.5


@dataclass(frozen=True, kw_only=True, eq=False)
class Scan:
    """image: (D, H, W) float32, whole numbers. geometry: its grid. bias: the factor that was applied, on bias_geometry,
    which is coarser and goes a little beyond. moved: whether the patient did."""

    image: NDArray[np.float32]
    geometry: Geometry
    bias: NDArray[np.float32]
    bias_geometry: Geometry
    moved: bool


ATLAS_SITES = (  # Meddahi 2024, V counts 9 sites in ATLAS v2.0; how these differ is our own choice
    Site(name="site01", noise=0.022, bias=0.03, gamma=1.00, gain=320),
    Site(name="site02", noise=0.035, bias=0.08, gamma=0.85, gain=620, resolution_mm=(1.0, 0.94, 0.94)),
    Site(name="site03", noise=0.055, bias=0.05, gamma=1.15, gain=140, resolution_mm=(1.0, 1.0, 1.5)),
    Site(name="site04", noise=0.028, bias=0.12, gamma=0.95, gain=880, resolution_mm=(1.2, 1.2, 1.2)),
    Site(name="site05", noise=0.040, bias=0.04, gamma=0.75, gain=240, resolution_mm=(1.5, 1.0, 1.0), motion=0.3),
    Site(name="site06", noise=0.020, bias=0.10, gamma=1.25, gain=450, resolution_mm=(0.9, 0.9, 0.9)),
    Site(name="site07", noise=0.065, bias=0.06, gamma=0.90, gain=95, resolution_mm=(1.0, 1.6, 1.0)),
    Site(name="site08", noise=0.032, bias=0.15, gamma=1.05, gain=1200, bias_mm=35.0),
    Site(name="site09", noise=0.045, bias=0.07, gamma=1.10, gain=710, resolution_mm=(2.0, 1.0, 1.0), motion=0.2),
    Site(name="site10", noise=0.025, bias=0.05, gamma=0.80, gain=530, resolution_mm=(1.0, 1.1, 1.1)),
    Site(name="site11", noise=0.050, bias=0.09, gamma=1.00, gain=180, resolution_mm=(1.3, 1.0, 1.3), bias_mm=60.0),
)


def scan(rng: np.random.Generator, signal: NDArray[np.float32], geometry: Geometry, site: Site) -> Scan:
    """Gamma, bias, resolution, motion, noise and gain, in this order.

    Args:
        signal: (D, H, W) float32 on the scan's grid, white matter near 1.
    """
    bias, bias_geometry = draw_bias(rng, geometry, site)
    image = np.power(signal, np.float32(site.gamma)) if site.gamma != 1 else signal.copy()
    image *= on_grid(bias, geometry)
    image = blurred(image, site.resolution_mm, geometry.spacing)
    moved = bool(rng.random() < site.motion)
    if moved:
        image = ghosted(rng, image, site.motion_mm / geometry.spacing[1])
    image = noisy(rng, image, site.noise)
    image *= np.float32(site.gain)
    np.rint(image, out=image)
    return Scan(image=image, geometry=geometry, bias=bias, bias_geometry=bias_geometry, moved=moved)


def draw_bias(rng: np.random.Generator, geometry: Geometry, site: Site) -> tuple[NDArray[np.float32], Geometry]:
    """A coil's uneven sensitivity: a smooth factor of mean 1 on a coarse grid that covers the scan's."""
    d, h, w = (int(np.ceil(n * s / FIELD_MM)) + 1 for n, s in zip(geometry.shape, geometry.spacing, strict=True))
    field = smooth_field(rng, (d, h, w), site.bias_mm / FIELD_MM)
    factor = np.exp(np.float32(site.bias) * field)
    affine = geometry.affine.copy()
    affine[:3, :3] *= FIELD_MM / np.array(geometry.spacing)
    coarse = Geometry(shape=(d, h, w), spacing=(FIELD_MM, FIELD_MM, FIELD_MM), affine=affine)
    return np.asarray(factor / factor.mean(), dtype=np.float32), coarse


def on_grid(field: NDArray[np.float32], geometry: Geometry) -> NDArray[np.float32]:
    """A field of draw_bias at every voxel of the scan."""
    for axis in range(3):
        field = stretched(field, axis, geometry.shape[axis], FIELD_MM / geometry.spacing[axis])
    return field


def blurred(image: NDArray[np.float32], resolution_mm: Spacing, spacing: Spacing) -> NDArray[np.float32]:
    """The image as a sequence of this resolution shows it on this finer grid."""
    for axis, (resolution, step) in enumerate(zip(resolution_mm, spacing, strict=True)):
        if resolution > 1.01 * step:
            sigma = np.sqrt(resolution**2 - step**2) / FWHM / step
            image = ndimage.gaussian_filter1d(image, sigma, axis, truncate=3)
    return image


def ghosted(rng: np.random.Generator, image: NDArray[np.float32], amplitude: float) -> NDArray[np.float32]:
    """The head shifts along H, the phase direction, from line to line of k-space: ghosts and smear.

    amplitude: largest shift, in voxels. (D, H, W) float32 -> the same.
    """
    lines = image.shape[1]
    frequency = fft.fftfreq(lines)
    cycles, start = rng.uniform(*GHOST_CYCLES), rng.uniform(0, 2 * np.pi)
    shift = amplitude * rng.uniform(0.4, 1) * np.sin(2 * np.pi * cycles * frequency + start)
    shift[np.abs(frequency) < CENTRE_LINES] = 0
    phase = np.exp(-2j * np.pi * frequency * shift).astype(np.complex64)[None, :, None]
    spectrum = fft.fft(image, axis=1)  # complex64
    spectrum *= phase
    return np.asarray(np.abs(fft.ifft(spectrum, axis=1, overwrite_x=True)), dtype=np.float32)


def noisy(rng: np.random.Generator, image: NDArray[np.float32], sigma: float) -> NDArray[np.float32]:
    """The magnitude with Gaussian noise in both parts of the signal (Gudbjartsson 1995), with little memory."""
    real = rng.standard_normal(image.shape, dtype=np.float32)
    real *= np.float32(sigma)
    real += image
    real *= real
    imaginary = rng.standard_normal(image.shape, dtype=np.float32)
    imaginary *= np.float32(sigma)
    imaginary *= imaginary
    real += imaginary
    return np.asarray(np.sqrt(real, out=real))


def at_points(
    volume: NDArray[np.float32], affine: NDArray[np.float64], geometry: Geometry, to_head: NDArray[np.float64]
) -> NDArray[np.float32]:
    """A volume of the head at the voxels of a scan, linearly; 0 outside.

    Args:
        volume: (D, H, W) float32. affine: (4, 4), its (d, h, w, 1) -> head mm. to_head: (4, 4), scan world mm -> head.

    Returns:
        float32, of geometry.shape.
    """
    to_voxel = np.linalg.inv(affine) @ to_head @ geometry.affine
    shift = np.rint(to_voxel[:3, 3]).astype(np.intp)
    whole = to_voxel.copy()
    whole[:3, 3] = shift
    if np.allclose(whole[:3, :3], np.eye(3), atol=1e-6) and np.allclose(whole, to_voxel, atol=1e-4):
        return _pasted(volume, geometry.shape, shift)
    out = np.zeros(geometry.shape, np.float32)
    part = _reached(volume, to_voxel, geometry.shape)
    start = to_voxel[:3, :3] @ [s.start for s in part] + to_voxel[:3, 3]
    out[part] = ndimage.affine_transform(
        volume, to_voxel[:3, :3], start, output_shape=out[part].shape, order=1, prefilter=False
    )
    return np.maximum(out, 0, out=out)  # rounding


def _reached(volume: NDArray[np.float32], to_voxel: NDArray[np.float64], shape: Triple) -> tuple[slice, slice, slice]:
    """The box of the scan that the volume's part that is not 0 can reach."""
    low, high = extent(volume != 0)
    corners = np.array(list(itertools.product(*zip(low - 1, high + 1, strict=True))))
    inverse = np.linalg.inv(to_voxel)
    at = corners @ inverse[:3, :3].T + inverse[:3, 3]
    first = np.clip(np.floor(at.min(0)), 0, shape).astype(int)
    last = np.clip(np.ceil(at.max(0)) + 1, 0, shape).astype(int)
    d, h, w = (slice(int(a), int(b)) for a, b in zip(first, last, strict=True))
    return d, h, w


def _pasted(volume: NDArray[np.float32], shape: Triple, shift: NDArray[np.intp]) -> NDArray[np.float32]:
    """The voxels of a grid that is the volume's own, moved by whole voxels: no interpolation."""
    out = np.zeros(shape, np.float32)
    target, source = [], []
    for n, m, s in zip(shape, volume.shape, shift.tolist(), strict=True):
        target.append(slice(max(0, -s), max(0, min(n, m - s))))
        source.append(slice(max(0, s), max(0, min(m, n + s))))
    out[tuple(target)] = volume[tuple(source)]
    return out
