"""Preprocessing: both sides prepare the same files by the same plan, from reading to the voxels drawn of each label."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from planner.plan import IntensityStats, Normalisation, Plan, PostprocessRule, Spacing, Triple
from strokenet.data.case import read_case
from strokenet.preprocess.preprocess import Prepared, preprocess
from strokenet.preprocess.resample import separate_axis
from tests.peers import peer
from tests.peers.fingerprint import LABELS, synthetic_head
from tests.peers.row import Row
from tests.peers.translate import peer_plans
from tests.plans import tiny_plan

# isort: split
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

STATS = IntensityStats(
    mean=80.0, std=20.0, min=0.0, max=200.0, median=80.0, percentile_00_5=30.0, percentile_99_5=140.0
)
LESION = {"background": 0, "lesion": 1}


@dataclass(frozen=True, kw_only=True)
class Scans:
    """The files of one case. channels: name -> path. label: None as at inference."""

    channels: dict[str, Path]
    label: Path | None
    labels: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a case is prepared. spacing: mm, after `transpose`. masked: z-score inside the head only, a channel each."""

    spacing: Spacing
    transpose: Triple = (0, 1, 2)
    normalisation: tuple[Normalisation, ...] = ("zscore", "zscore")
    masked: tuple[bool, ...] = (True, True)


def rows(full: bool) -> Iterator[Row]:
    """Synthetic heads: fine and coarse grids, every normalisation, every order of axes."""
    fine = _write_head("fine", (50, 58, 22), (1.0, 1.1, 2.2), seed=0)
    coarse = _write_head("coarse", (60, 64, 14), (0.8, 0.8, 5.0), seed=1)
    spacings: tuple[tuple[Triple, Spacing], ...] = (
        ((0, 1, 2), (1.3, 1.3, 1.3)),
        ((2, 0, 1), (0.8, 1.9, 1.2)),
        ((1, 2, 0), (3.9, 1.1, 1.0)),
    )
    ways = [
        Way(spacing=spacing, transpose=order, normalisation=schemes, masked=masked)
        for order, spacing in spacings
        for schemes, masked in _NORMALISATIONS
    ]
    yield from _compared("synthetic case, 1.0 x 1.1 x 2.2 mm", fine, ways)
    yield from _compared("synthetic case, 0.8 x 0.8 x 5.0 mm", coarse, ways)


_NORMALISATIONS: tuple[tuple[tuple[Normalisation, ...], tuple[bool, ...]], ...] = (
    (("zscore", "zscore"), (True, True)),
    (("zscore", "zscore"), (False, False)),
    (("ct", "rescale_to_0_1"), (False, False)),
    (("rgb_to_0_1", "none"), (False, False)),
)


def real_rows(full: bool) -> Iterator[Row]:
    """Real scans: T1 + FLAIR, DWI + ADC, and a thick-sliced case whose slices are resampled one by one."""
    ms, stroke, thick = _real_scans()
    kept, changed = Way(spacing=(1.0, 1.0, 1.0)), Way(spacing=(1.25, 0.93, 1.1), transpose=(1, 0, 2))
    yield from _compared("real T1 + FLAIR", ms, [kept, changed, Way(spacing=(4.0, 1.0, 1.0))])
    unmasked = Way(spacing=(1.5, 1.5, 1.5), masked=(False, False))
    yield from _compared("real DWI + ADC", stroke, [Way(spacing=(2.0, 2.0, 2.0)), unmasked])
    slices = [Way(spacing=(5.5, 0.7, 0.7)), Way(spacing=(3.0, 1.0, 1.0)), Way(spacing=(1.5, 1.5, 1.5))]
    yield from _compared("real T1 + T1c of 5.5 mm slices", thick, slices)


def _compared(on: str, scans: Scans, ways: list[Way]) -> Iterator[Row]:
    """Two rows: the images' largest difference, and how many labels, voxels of them and box edges are not equal."""
    image, values, places, separate = 0.0, 0, 0, 0
    for way in ways:
        plan = _plan(scans, way)
        theirs, ours = _peer_prepared(scans, plan), _our_prepared(scans, plan)
        unseen, our_unseen = (prepare(replace(scans, label=None), plan) for prepare in (_peer_prepared, _our_prepared))
        for a, b in ((theirs, ours), (unseen, our_unseen)):  # as in training, and as at inference
            image = max(image, _image_difference(a.image, b.image.numpy()))
        values += _label_differences(theirs, ours)
        places += sum(len(voxels) for voxels in ours.foreground.values())
        stored = ours.origin.turn.permute(ours.origin.geometry.spacing)
        separate += separate_axis(stored, plan.spacing) is not None
    yield Row(
        check="preprocessed image",
        on=f"{on}, {len(ways)} plans",
        difference=image,
        tolerance=1e-5,
        unit="of the range",
        note=f"with and without the label; {separate} of {len(ways)} slice by slice (separate z)",
    )
    yield Row(
        check="preprocessed label",
        on=f"{on}, {len(ways)} plans",
        difference=values,
        tolerance=0,
        unit="values",
        note=f"labels, crop, and {places} sampled voxels of the labels",
    )


@dataclass(frozen=True, kw_only=True)
class _PeerPrepared:
    """image (C, D, H, W); label (D, H, W); places: label -> voxels (n, 3); box: [start, stop] an axis."""

    image: NDArray[np.float32]
    label: NDArray[np.int16]
    places: dict[int, NDArray[np.int64]]
    box: list[list[int]]


def _plan(scans: Scans, way: Way) -> Plan:
    return tiny_plan(
        channels=tuple(scans.channels),
        labels=scans.labels,
        orientation="as-stored",
        transpose=way.transpose,
        spacing=way.spacing,
        normalisation=way.normalisation,
        use_mask_for_norm=way.masked,
        intensity=(STATS,) * len(scans.channels),
        postprocess=PostprocessRule(),
    )


def _our_prepared(scans: Scans, plan: Plan) -> Prepared:
    return preprocess(read_case("case", scans.channels, scans.label, scans.labels), plan)


def _peer_prepared(scans: Scans, plan: Plan) -> _PeerPrepared:
    plans = PlansManager(peer_plans(plan))
    description = {
        "channel_names": {str(place): name for place, name in enumerate(scans.channels)},
        "labels": scans.labels,
        "file_ending": ".nii.gz",
    }
    images = [str(path) for path in scans.channels.values()]
    label_file = None if scans.label is None else str(scans.label)
    with peer.quiet():
        image, label, properties = DefaultPreprocessor(verbose=False).run_case(
            images, label_file, plans, plans.get_configuration("3d_fullres"), description
        )
    places = {
        value: np.asarray(voxels, np.int64).reshape(-1, 4)[:, 1:]  # the peer's have a channel axis
        for value, voxels in properties.get("class_locations", {}).items()
    }
    return _PeerPrepared(image=image, label=label[0], places=places, box=properties["bbox_used_for_cropping"])


def _image_difference(theirs: NDArray[np.float32], ours: NDArray[np.float32]) -> float:
    """Largest difference, as a share of the range of its channel. (C, D, H, W) each."""
    if theirs.shape != ours.shape:
        return float("inf")
    return max(float(np.abs(a - b).max()) / float(np.ptp(a)) for a, b in zip(theirs, ours, strict=True))


def _label_differences(theirs: _PeerPrepared, ours: Prepared) -> int:
    box = [list(ends) for ends in zip(ours.origin.box.start, ours.origin.box.stop, strict=True)]
    if theirs.places.keys() != ours.foreground.keys():
        return len(theirs.label.ravel())
    places = sum(peer.differing(voxels, ours.foreground[value]) for value, voxels in theirs.places.items())
    return peer.differing(theirs.label, ours.label) + peer.differing(theirs.box, box) + places


def _write_head(name: str, shape: tuple[int, ...], spacing: Spacing, *, seed: int) -> Scans:
    """A synthetic case in a folder of its own; spacing in mm (i, j, k)."""
    *images, label = synthetic_head(np.random.default_rng(seed), shape, lesion=True)
    folder = peer.FOLDER / "heads" / name
    affine = np.diag([*spacing, 1.0])
    channels = {"T1": folder / "case_0000.nii.gz", "FLAIR": folder / "case_0001.nii.gz"}
    for path, image in zip(channels.values(), images, strict=True):
        peer.write_scan(path, image, affine)
    peer.write_scan(folder / "label.nii.gz", label, affine)
    return Scans(channels=channels, label=folder / "label.nii.gz", labels=LABELS)


def _real_scans() -> tuple[Scans, Scans, Scans]:
    """T1 + FLAIR of a brain, DWI + ADC of a stroke, and a head of thick slices with its brain as the label."""
    data = peer.real_data()
    assert data is not None
    ms = data / "open_ms" / "cross_sectional" / "patient07"
    stroke = data / "isles22" / "sub-strokecase0001" / "sub-strokecase0001_ses-0001_"
    thick = data / "native_grids_tcga"
    first = Scans(
        channels={"T1": ms / "T1.nii.gz", "FLAIR": ms / "FLAIR.nii.gz"}, label=ms / "lesion.nii.gz", labels=LESION
    )
    dwi = {"DWI": Path(f"{stroke}dwi.nii.gz"), "ADC": Path(f"{stroke}adc.nii.gz")}
    t1 = {"T1": thick / "t1.nii.gz", "T1c": thick / "t1c.nii.gz"}
    return (
        first,
        replace(first, channels=dwi, label=Path(f"{stroke}msk.nii.gz")),
        replace(first, channels=t1, label=thick / "bet_tcia_example_t1c_mask.nii.gz"),
    )
