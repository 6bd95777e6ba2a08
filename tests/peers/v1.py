"""Models of nnU-Net v1: nnunet 1.7.1 makes and runs them, strokenet imports them and gives the same answer.

The peer's side is its own trainer's: nnUNetTrainerV2 builds the network and writes the checkpoint, and it is run from
files to files through its preprocessor, sliding window and export. Random weights whose logits lie about zero are the
hardest case: any difference in grid, weights or normalisation shows in the labels.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray

from planner.plan import Spacing, Triple
from strokenet.data.case import read_case
from strokenet.infer.config import InferConfig
from strokenet.infer.predict import Prediction, predict
from strokenet.model.checkpoint import Model, load_model
from strokenet.nnunet.importing import import_nnunet
from strokenet.preprocess.preprocess import preprocess
from tests.nnunet.v1_folders import ANISOTROPIC, ISOTROPIC, SHAPES, Shape, parameters, plans, record, weights
from tests.peers import peer
from tests.peers.fingerprint import synthetic_head
from tests.peers.row import Row
from tests.peers.v1_peer import (
    CHECKPOINT,
    Answer,
    answer,
    command_mask,
    generic_unet,
    peer_pickle,
    save_model,
)
from tests.peers.v1_trainers import trainer_row

# isort: split
with peer.quiet():
    from nnunet.inference import segmentation_export

TIES = 10  # voxels of a scan that may have another label: two probabilities that are even to float32's last digits
PAPER = Shape(pools=((2, 2, 2),) * 5, kernels=((3, 3, 3),) * 6, base=32)


@dataclass(frozen=True, kw_only=True)
class Way:
    """A model and how it is run. spacing, patch: after `transpose`. mirrored: along all axes. folds: averaged."""

    name: str
    spacing: Spacing
    patch: Triple
    shape: Shape = ISOTROPIC
    transpose: Triple = (0, 1, 2)
    schemes: tuple[str, str] = ("nonCT", "nonCT")
    masked: bool = False
    mirrored: bool = False
    folds: int = 1

    @property
    def backward(self) -> list[int]:
        """Where the scan's axes lie in the plan."""
        return [self.transpose.index(axis) for axis in range(3)]


SEVERAL_TILES = Way(name="isotropic, several tiles", spacing=(1.3, 1.3, 1.3), patch=(16, 24, 24))
MIRRORED = Way(
    name="isotropic, all mirrored, two folds", spacing=(1.6, 1.6, 1.6), patch=(24, 24, 24), mirrored=True, folds=2
)
THICK = Way(name="anisotropic, mask", spacing=(5.0, 1.3, 1.2), patch=(8, 24, 24), shape=ANISOTROPIC, masked=True)
TURNED = Way(
    name="5 mm along the scan's x",
    spacing=(5.0, 1.2, 1.3),
    patch=(8, 24, 24),
    shape=ANISOTROPIC,
    transpose=(2, 0, 1),
)
WRONG_AXIS = (
    "where the plan alone is coarse along an axis, v1's export counts that axis in the plan's order on an array that "
    "it has turned back to the scan's, and takes nearest slices of the wrong one; ours takes the right one"
)
WAYS = (
    SEVERAL_TILES,
    MIRRORED,
    THICK,
    Way(name="isotropic, mask", spacing=(1.6, 1.4, 1.5), patch=(16, 16, 24), masked=True),
    Way(name="one tile, mask", spacing=(2.0, 2.0, 2.0), patch=(32, 40, 40), masked=True),
    Way(
        name="anisotropic, turned, CT and noNorm, mask",
        spacing=(2.5, 1.0, 1.4),
        patch=(16, 24, 16),
        shape=ANISOTROPIC,
        transpose=(2, 0, 1),
        schemes=("CT", "noNorm"),
        masked=True,
    ),
)
REAL_WAYS = (
    Way(name="isotropic, mask", spacing=(2.0, 2.0, 2.0), patch=(48, 48, 48), masked=True),
    Way(name="isotropic, all mirrored", spacing=(2.5, 2.5, 2.5), patch=(40, 48, 48), mirrored=True),
    Way(name="anisotropic", spacing=(4.0, 1.5, 1.5), patch=(16, 64, 64), shape=ANISOTROPIC),
)


def rows(full: bool) -> Iterator[Row]:
    """Networks, trainers, and synthetic heads of fine and of thick slices; full: the paper's network too."""
    yield _parameter_row()
    yield _logits_row("4 shapes of Generic_UNet, all heads", SHAPES)
    if full:
        yield _logits_row("the paper's shape, all heads", {"paper": PAPER})
    yield trainer_row()
    yield _recorded_row()
    with tempfile.TemporaryDirectory(dir=peer.FOLDER) as made:
        folder = Path(made)
        fine = _write_head(folder / "fine", (40, 44, 30), (1.0, 1.1, 1.4), seed=0)
        axial = _write_head(folder / "axial", (44, 40, 12), (0.9, 1.0, 5.0), seed=1)
        sagittal = _write_head(folder / "sagittal", (12, 44, 40), (5.0, 0.9, 1.0), seed=2)
        for way in WAYS:
            yield from _way_rows(folder, "synthetic head", fine, way)
        for way in (SEVERAL_TILES, THICK):
            yield from _way_rows(folder, "5 mm axial slices", axial, way)
        for way in (THICK, TURNED):
            yield from _way_rows(folder, "5 mm sagittal slices", sagittal, way)
        yield from _turned_rows(folder, "synthetic head", fine)
        yield _command_row(folder, fine)


def real_rows(full: bool) -> Iterator[Row]:
    """The real T1+FLAIR case of open_ms, channel 0 = FLAIR as in the paper's model."""
    data = peer.real_data()
    assert data is not None
    source = data / "open_ms" / "cross_sectional" / "patient07"
    images = (source / "FLAIR.nii.gz", source / "T1.nii.gz")
    with tempfile.TemporaryDirectory(dir=peer.FOLDER) as folder:
        for way in REAL_WAYS:
            yield from _way_rows(Path(folder), "real FLAIR+T1", images, way)


def _parameter_row() -> Row:
    """The folders that the unit tests make, against the class."""
    wrong = 0
    for shape in (*SHAPES.values(), PAPER):
        theirs = [(name, tuple(tensor.shape)) for name, tensor in generic_unet(shape).state_dict().items()]
        ours = list(parameters(shape).items())
        wrong += sum(a != b for a, b in zip(theirs, ours, strict=False)) + abs(len(theirs) - len(ours))
    on = f"names, order and shapes of {len(SHAPES) + 1} networks, as the unit tests make them"
    return Row(check="v1 parameters", on=on, difference=wrong, tolerance=0, unit="values")


def _logits_row(on: str, shapes: Mapping[str, Shape]) -> Row:
    """Every level's logits of the class, and of what the import makes of its parameters."""
    largest, size = 0.0, 0.0
    for shape in shapes.values():
        theirs = generic_unet(shape).eval()
        theirs.load_state_dict(weights(shape))
        edge = 2 ** (len(shape.pools) + 1)
        x = torch.randn(2, shape.channels, edge, 3 * edge, 2 * edge, generator=torch.Generator().manual_seed(1))
        with tempfile.TemporaryDirectory(dir=peer.FOLDER) as folder, torch.inference_mode():
            stored = plans(shape, patch_size=np.array([edge] * 3))
            _write_by_hand(Path(folder) / "source", stored, theirs.state_dict())
            (network,) = _imported(Path(folder)).networks
            for peers, ours in zip(theirs(x), network.forward_levels(x), strict=True):
                largest = max(largest, float((peers - ours).abs().max()))
                size = max(size, float(peers.abs().max()))
    return Row(check="v1 logits", on=on, difference=largest, tolerance=1e-5, unit="", note=f"logits up to {size:.1f}")


def _recorded_row() -> Row:
    """A fork of v1 trained the paper's models with one mirrored axis under the stock trainer's name."""
    wrong = 0
    for axes in ((1,), (0, 2), ()):
        with tempfile.TemporaryDirectory(dir=peer.FOLDER) as folder:
            save_model(Path(folder) / "source", _stored(SEVERAL_TILES), folds=1, mirror_axes=axes)
            wrong += _imported(Path(folder)).plan.mirror_axes != axes
    on = "3 settings that nnUNetTrainerV2 wrote into debug.json"
    return Row(check="v1 mirror axes", on=on, difference=wrong, tolerance=0, unit="values")


@dataclass(frozen=True, kw_only=True, eq=False)
class _Answers:
    """One scan on both sides. image: what our network saw, (C, D, H, W). exact: with every tile computed, as theirs."""

    theirs: Answer
    image: NDArray[np.float32]
    improved: Prediction
    exact: Prediction


def _way_rows(folder: Path, on: str, images: tuple[Path, ...], way: Way) -> Iterator[Row]:
    """Three rows: what the network sees, probabilities, labels."""
    found = _answers(folder, images, way)
    where = f"{on}; {way.name}"
    yield _image_row(where, found)
    yield from _answer_rows(where, found)


def _turned_rows(folder: Path, on: str, images: tuple[Path, ...]) -> Iterator[Row]:
    """The plan alone is coarse, along an axis that it turns: v1 with the axis counted right, and as it is.

    As it is, ours may be no further from v1 than v1 with the right axis is, and the tolerance.
    """
    where = f"{on}; {TURNED.name}"
    as_it_is = _answers(folder, images, TURNED)
    with _axis_counted_right(TURNED):
        mended = _answers(folder, images, TURNED)
    yield _image_row(where, as_it_is)
    yield from _answer_rows(f"{where}, v1's export counting the right axis", mended)
    moved = _differences(as_it_is.theirs, mended.theirs)
    for row, itself in zip(_answer_rows(where, as_it_is), moved, strict=True):
        note = f"{row.note}; v1 and itself with the right axis: {itself:.4g}"
        yield replace(row, note=note, cause=f"{WRONG_AXIS}, as the rows above show", bound=itself + row.tolerance)


def _answers(folder: Path, images: tuple[Path, ...], way: Way) -> _Answers:
    with tempfile.TemporaryDirectory(dir=folder) as made:
        root = Path(made)
        save_model(root / "source", _stored(way), folds=way.folds)
        theirs = answer(root / "source", images, root / "mask.nii.gz", folds=way.folds, mirrored=way.mirrored)
        model = _imported(root)
        case = read_case("case", dict(zip(model.plan.channels, images, strict=True)))
        return _Answers(
            theirs=theirs,
            image=preprocess(case, model.plan).image.numpy(),
            improved=predict(model, case, _config(way, "improved")),
            exact=predict(model, case, _config(way, "exact")),
        )


@contextmanager
def _axis_counted_right(way: Way) -> Iterator[None]:
    """v1's export with the coarse axis of the plan's spacing counted in the scan's order, as the array's axes are.

    For scans that are not coarse themselves: their spacing is in that order already.
    """
    count = segmentation_export.get_lowres_axis

    def in_the_scans_order(spacing: Any) -> Any:
        assert np.allclose(spacing, way.spacing)
        return count(np.array(spacing)[way.backward])

    with mock.patch.object(segmentation_export, "get_lowres_axis", in_the_scans_order):
        yield


def _image_row(where: str, found: _Answers) -> Row:
    assert found.theirs.image.shape == found.image.shape
    pairs = zip(found.theirs.image, found.image, strict=True)
    largest = max(float(np.abs(a - b).max()) / float(np.ptp(a)) for a, b in pairs)
    return Row(check="v1 image", on=where, difference=largest, tolerance=1e-5, unit="of the range")


def _answer_rows(where: str, found: _Answers) -> Iterator[Row]:
    """Probabilities and labels of the default form of inference; the exact one is noted beside it."""
    probability, labels = _differences(found.theirs, found.improved)
    exact = _differences(found.theirs, found.exact)
    lesion = f"the peer finds {int((found.theirs.mask > 0).sum())} of {found.theirs.mask.size} to be lesion"
    note = f"exact: {exact[0]:.1e}"
    yield Row(check="v1 probabilities", on=where, difference=probability, tolerance=1e-4, unit="", note=note)
    note = f"exact: {exact[1]}; {lesion}"
    yield Row(check="v1 labels", on=where, difference=labels, tolerance=TIES, unit="voxels", note=note)


def _differences(theirs: Answer, other: Answer | Prediction) -> tuple[float, int]:
    """The largest of any probability, and how many labels."""
    largest = float(np.abs(other.probability - theirs.probability).max())
    return largest, int((other.mask != theirs.mask).sum())


def _command_row(folder: Path, images: tuple[Path, ...]) -> Row:
    """What nnUNet_predict calls, with its processes and queues, against our default inference."""
    with tempfile.TemporaryDirectory(dir=folder) as made:
        root = Path(made)
        save_model(root / "source", _stored(MIRRORED), folds=MIRRORED.folds)
        mask = command_mask(root / "source", images, root / "mask.nii.gz")
        model = _imported(root)
        case = read_case("case", dict(zip(model.plan.channels, images, strict=True)))
        ours = predict(model, case, _config(MIRRORED, "improved"))
    return Row(
        check="v1 labels",
        on=f"synthetic head; {MIRRORED.name}; predict_cases",
        difference=int((mask != ours.mask).sum()),
        tolerance=TIES,
        unit="voxels",
        note=f"{int((mask > 0).sum())} lesion voxels",
    )


def _config(way: Way, semantics: Any) -> InferConfig:
    return InferConfig(
        tta="plan" if way.mirrored else "none", semantics=semantics, precision="fp32", probabilities=True
    )


def _stored(way: Way) -> dict[str, Any]:
    """plans.pkl of a way."""
    stored = plans(way.shape, current_spacing=np.array(way.spacing), patch_size=np.array(way.patch))
    stored |= {"transpose_forward": list(way.transpose), "transpose_backward": way.backward}
    stored["normalization_schemes"] = dict(enumerate(way.schemes))
    stored["use_mask_for_norm"] = dict.fromkeys(range(way.shape.channels), way.masked)
    for statistics in stored["dataset_properties"]["intensityproperties"].values():
        statistics |= {"mean": np.float64(101.5), "sd": np.float64(18.0)}
        statistics |= {"percentile_00_5": np.float64(60.0), "percentile_99_5": np.float64(150.0)}
    return stored


def _imported(root: Path) -> Model:
    import_nnunet(root / "source", root / "model")
    return load_model(root / "model")


def _write_by_hand(source: Path, stored: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> None:
    (source / "fold_0").mkdir(parents=True)
    peer_pickle(source / "plans.pkl", stored)
    peer_pickle(source / "fold_0" / f"{CHECKPOINT}.model.pkl", record(stored))
    torch.save({"state_dict": state}, source / "fold_0" / f"{CHECKPOINT}.model")


def _write_head(folder: Path, shape: Triple, spacing: Spacing, *, seed: int) -> tuple[Path, ...]:
    """Two channels of a synthetic head; shape and spacing (i, j, k)."""
    *channels, _ = synthetic_head(np.random.default_rng(seed), shape, lesion=True)
    paths = tuple(folder / f"case_{number:04d}.nii.gz" for number in range(len(channels)))
    for path, voxels in zip(paths, channels, strict=True):
        peer.write_scan(path, voxels, np.diag([*spacing, 1.0]))
    return paths
