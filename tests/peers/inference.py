"""Inference: the peer's nnUNetPredictor and strokenet on the same scan, the same weights, files to files.

The model is one of ours, exported; the peer loads that folder unchanged, and ours is what the import makes of it.
Random weights, shifted so that half of the voxels are lesion, are the harder case: their logits are noise about zero,
so that any difference in grid, weights or rounding shows in the labels. The peer is therefore run twice more: given our
preprocessed image in the place of its own, which must give our exact answer; and with float32 sums, which must give our
improved one. How far these two lie from the peer as it is bounds the rows that are not met.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import nibabel
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from planner.plan import NetworkPlan, Plan, PostprocessRule, Semantics, Triple
from strokenet.data.case import read_case
from strokenet.infer.config import InferConfig
from strokenet.infer.predict import Prediction, predict
from strokenet.model.checkpoint import load_model, save_weights
from strokenet.model.network import build_network
from strokenet.nnunet.export import export_nnunet
from strokenet.nnunet.importing import import_nnunet
from strokenet.preprocess.planning import PlanConfig, plan_workspace, preprocess_workspace
from strokenet.preprocess.preprocess import preprocess
from strokenet.train.run import TrainConfig
from strokenet.train.train import train
from strokenet.workspace import Workspace
from tests.peers import peer
from tests.peers.row import Row

TIES = 10  # voxels of a scan that may have another label: two logits that are even after rounding to float16
STEPS = 60  # of the brief training
IMAGE_CAUSE = "images that are 1e-7 apart move float16 sums by a step; given our image, the peer moves as far"
PATCHES: dict[str, tuple[tuple[float, float, float], Triple, Triple]] = {  # spacing, patch, kernel of level 0
    "isotropic": ((1.5, 1.5, 1.5), (64, 80, 64), (3, 3, 3)),
    "anisotropic": ((4.0, 1.2, 1.2), (16, 96, 96), (1, 3, 3)),
}


def rows(full: bool) -> Iterator[Row]:
    """A drawn head, so that the suite says something where the real scans are not at hand."""
    with tempfile.TemporaryDirectory(dir=peer.FOLDER) as folder:
        root = peer.write_description("Dataset921_Drawn", channels=("T1", "FLAIR"), labels=LABELS, cases=1)
        _draw_head(root)
        for kind, trained, mirrored in (
            ("isotropic", False, (False, True)),
            ("isotropic", True, (False,)),
            ("anisotropic", False, (False,)),
        ):
            yield from _model_rows(Path(folder), root, "drawn head", kind, trained=trained, mirrored=mirrored)
        shutil.rmtree(root)


def real_rows(full: bool) -> Iterator[Row]:
    """The real T1+FLAIR case of open_ms, brought to 1.5 mm or 4 x 1.2 x 1.2 mm; full: by its own default plan too."""
    data = peer.real_data()
    assert data is not None
    with tempfile.TemporaryDirectory(dir=peer.FOLDER) as folder:
        root = peer.write_description("Dataset922_Real", channels=("T1", "FLAIR"), labels=LABELS, cases=1)
        source = data / "open_ms" / "cross_sectional" / "patient07"
        for number, name in enumerate(("T1", "FLAIR")):
            shutil.copy(source / f"{name}.nii.gz", root / "imagesTr" / f"case_{number:04d}.nii.gz")
        _write_bright_label(root)
        for kind in PATCHES:
            for trained in (False, True):
                both = (False, True) if kind == "isotropic" or full else (False,)
                yield from _model_rows(Path(folder), root, "real T1+FLAIR", kind, trained=trained, mirrored=both)
        yield _exported_command_row(Path(folder), root)
        yield _turned_row(Path(folder), root)
        if full:
            yield from _model_rows(
                Path(folder), root, "real T1+FLAIR", "default", trained=False, mirrored=(False, True)
            )
        shutil.rmtree(root)


LABELS = {"background": 0, "lesion": 1}


@dataclass(frozen=True, kw_only=True, eq=False)
class Answer:
    """mask (D, H, W); probability (K, D, H, W)."""

    mask: NDArray[np.uint8]
    probability: NDArray[np.float32]


@dataclass(frozen=True)
class _Pair:
    """One model on both sides. folder: holds the peer's results folder, and the model that was imported from it."""

    folder: Path
    raw: Path

    @cached_property
    def images(self) -> tuple[Path, ...]:
        return tuple(sorted((self.raw / "imagesTr").glob("*.nii.gz")))

    @cached_property
    def image(self) -> torch.Tensor:
        """What our preprocessing makes of the scans, (C, D, H, W) float32."""
        plan = load_model(self.folder / "imported").plan
        case = read_case("case", dict(zip(plan.channels, self.images, strict=True)))
        return preprocess(case, plan).image

    def peers_answer(
        self, *, mirrored: bool, sums: torch.dtype = torch.float16, image: torch.Tensor | None = None
    ) -> Answer:
        """sums: float32 to see what the peer's float16 costs. image: instead of its own preprocessing's."""
        with mock.patch.object(torch, "half", sums):
            exported, target = self.folder / "exported", self.folder / "peer"
            return peers_answer(exported, ("0",), self.images, target, mirrored=mirrored, image=image)

    def our_answer(self, *, mirrored: bool, semantics: Semantics) -> Prediction:
        return our_answer(self.folder / "imported", self.images, mirrored=mirrored, semantics=semantics)


def peers_answer(
    source: Path,
    folds: Sequence[int | str],
    images: Sequence[Path],
    target: Path,
    *,
    mirrored: bool,
    image: torch.Tensor | None = None,
) -> Answer:
    """nnUNetPredictor on a results folder, from files to files, with probabilities.

    target: without its suffix. image: takes the place of what the peer's preprocessing has made, of the same shape.
    """
    with peer.quiet():
        predictor = _predictor(source, folds, mirrored=mirrored)
        if image is not None:
            predictor.predict_logits_from_preprocessed_data = _given(
                predictor.predict_logits_from_preprocessed_data, image
            )
        files = [[str(path) for path in images]]
        predictor.predict_from_files_sequential(files, [str(target)], save_probabilities=True)
    mask = nibabel.load(f"{target}.nii.gz").get_fdata().astype(np.uint8).T
    return Answer(mask=mask, probability=np.load(f"{target}.npz")["probabilities"])


def _given(predict_logits: Callable[[torch.Tensor], torch.Tensor], image: torch.Tensor) -> Callable[..., torch.Tensor]:
    def predict_ours(theirs: torch.Tensor) -> torch.Tensor:
        assert theirs.shape == image.shape
        return predict_logits(image)

    return predict_ours


def our_answer(model_folder: Path, images: Sequence[Path], *, mirrored: bool, semantics: Semantics) -> Prediction:
    """Our inference of an imported model, in float32."""
    model = load_model(model_folder)
    case = read_case("case", dict(zip(model.plan.channels, images, strict=True)))
    torch.set_num_threads(1)  # as the peer: more threads add up convolutions in another order
    config = InferConfig(tta="plan" if mirrored else "none", semantics=semantics, precision="fp32", probabilities=True)
    return predict(model, case, config)


def _predictor(source: Path, folds: Sequence[int | str], *, mirrored: bool) -> Any:
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(use_mirroring=mirrored, device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(source), tuple(folds))
    return predictor


def _model_rows(
    folder: Path, raw: Path, on: str, kind: str, *, trained: bool, mirrored: tuple[bool, ...]
) -> Iterator[Row]:
    pair = _pair(folder / f"{kind}-{trained}", raw, kind, trained=trained)
    for mirror in mirrored:
        theirs = pair.peers_answer(mirrored=mirror)
        where = f"{on}, {kind}, {'trained' if trained else 'random'} weights{', all mirrored' if mirror else ''}"
        yield from _compared(where, theirs, pair, mirror, trained=trained)


def _compared(where: str, theirs: Answer, pair: _Pair, mirror: bool, *, trained: bool) -> Iterator[Row]:
    exact = pair.our_answer(mirrored=mirror, semantics="exact")
    improved = pair.our_answer(mirrored=mirror, semantics="improved")
    if trained:
        yield from _rows_as_it_is(where, theirs, exact, improved)
        return
    given = pair.peers_answer(mirrored=mirror, image=pair.image)
    whole = pair.peers_answer(mirrored=mirror, sums=torch.float32)
    yield from _rows_as_it_is(where, theirs, exact, improved, given, whole)
    on = f"{where}, our preprocessed image given to both"
    for check, difference, tolerance, unit in (
        ("labels", int((exact.mask != given.mask).sum()), 0, "voxels"),
        ("probabilities", _largest(exact, given), 1e-6, ""),
    ):
        yield Row(check=f"inference exact, {check}", on=on, difference=difference, tolerance=tolerance, unit=unit)
    yield Row(
        check="inference improved, against the peer with float32 sums",
        on=where,
        difference=int((improved.mask != whole.mask).sum()),
        tolerance=TIES,
        unit="voxels",
        note=f"probabilities {_largest(improved, whole):.1e} apart",
    )


def _rows_as_it_is(
    where: str,
    theirs: Answer,
    exact: Prediction,
    improved: Prediction,
    given: Answer | None = None,
    whole: Answer | None = None,
) -> Iterator[Row]:
    """Ours beside the peer as it is. given, whole: the peer with our image, and with float32 sums, for random weights.

    Their distance from the peer is the bound: we may not be further from it than its own rounding moves it.
    """
    yield Row(
        check="inference exact, labels",
        on=where,
        difference=int((exact.mask != theirs.mask).sum()),
        tolerance=TIES,
        unit="voxels",
        note=f"the peer finds {int((theirs.mask > 0).sum())} lesion voxels",
        cause=IMAGE_CAUSE if given else "",
        bound=int((given.mask != theirs.mask).sum()) if given else 0,
    )
    yield Row(
        check="inference exact, probabilities",
        on=where,
        difference=_largest(exact, theirs),
        tolerance=1e-3,
        unit="",
        cause=IMAGE_CAUSE if given else "",
        bound=_largest(given, theirs) + 1e-6 if given else 0.0,
    )
    own = 1 - _dice(whole.mask, theirs.mask) if whole else 0.0
    yield Row(
        check="inference improved, 1 - Dice",
        on=where,
        difference=1 - _dice(improved.mask, theirs.mask),
        tolerance=1e-3,
        unit="",
        note=_where_apart(improved, theirs),
        cause=f"logits about zero: by float16 sums alone the peer is {own:.1e} from itself" if whole else "",
        bound=1.1 * own,
    )


def _largest(first: Answer | Prediction, second: Answer) -> float:
    """Largest difference of the probabilities."""
    return float(np.abs(first.probability - second.probability).max())


def _where_apart(ours: Prediction, theirs: Answer) -> str:
    """How many labels differ, and how even the two labels are there."""
    apart = ours.mask != theirs.mask
    if not apart.any():
        return "no label differs"
    even = float(np.abs(ours.probability[1][apart] - 0.5).max())
    return f"{int(apart.sum())} labels differ, where the lesion's probability is at most {even:.2g} from 0.5"


def _exported_command_row(folder: Path, raw: Path) -> Row:
    """The command that a user of nnU-Net types, on the exported folder, against the class that it wraps."""
    pair = _Pair(folder / "isotropic-True", raw)
    out = pair.folder / "by-command"
    words = ("-i", str(raw / "imagesTr"), "-o", str(out), "-m", str(pair.folder / "exported"), "-f", "0")
    command = Path(sys.executable).with_name("nnUNetv2_predict_from_modelfolder")
    subprocess.run(
        [str(command), *words, "-device", "cpu", "--disable_tta", "-npp", "1", "-nps", "1"],
        check=True,
        capture_output=True,
        timeout=600,
    )
    mask = nibabel.load(out / "case.nii.gz").get_fdata().astype(np.uint8).T
    ours = pair.our_answer(mirrored=False, semantics="exact").mask
    return Row(
        check="export",
        on="nnUNetv2_predict_from_modelfolder on our folder, against our exact inference",
        difference=int((mask != ours).sum()),
        tolerance=TIES,
        unit="voxels",
        note=f"{int(mask.sum())} lesion voxels",
    )


def _turned_row(folder: Path, raw: Path) -> Row:
    """A plan in RAS on a scan that is stored otherwise: the peer's reader must turn it as we do."""
    turned = folder / "LAS"
    shutil.copytree(raw, turned)
    for path in (turned / "imagesTr").glob("*.nii.gz"):
        image = nibabel.load(path)
        nibabel.save(image.as_reoriented(np.array([[1, -1], [2, 1], [0, 1]])), path)
    source = folder / "isotropic-True" / "imported"
    model = folder / "turned-model"
    shutil.copytree(source, model)
    Workspace(model).write_plan(replace(Workspace(source).read_plan(), orientation="RAS"))
    pair = _Pair(folder / "turned", turned)
    _export_and_import(pair.folder, model)
    theirs = pair.peers_answer(mirrored=False)
    ours = pair.our_answer(mirrored=False, semantics="exact")
    return Row(
        check="export, RAS plan",
        on="the same scan stored in other axes; NibabelIOWithReorient and our turn",
        difference=int((ours.mask != theirs.mask).sum()),
        tolerance=TIES,
        unit="voxels",
        note=f"{int((theirs.mask > 0).sum())} lesion voxels",
    )


def _pair(folder: Path, raw: Path, kind: str, *, trained: bool) -> _Pair:
    """A model of ours with seeded or briefly trained weights, exported and imported again."""
    workspace = plan_workspace(raw, folder / "work", PlanConfig(orientation="as-stored", jobs=1)).workspace
    plan = workspace.read_plan() if kind == "default" else _small(workspace.read_plan(), kind)
    plan = replace(plan, postprocess=PostprocessRule(), mirror_axes=(0, 1, 2))
    workspace.write_plan(plan)
    if trained:
        preprocess_workspace(workspace.root, jobs=1)
        torch.set_num_threads(peer.cores())
        train(workspace, TrainConfig(fold="all", epochs=1, iterations=STEPS, val_iterations=1, device="cpu"))
        (workspace.root / "fold_all").rename(workspace.root / "fold_0")
    else:
        save_weights(workspace.fold("0").last, _even_weights(plan, raw), note={"epoch": "0"})
    _export_and_import(folder, workspace.root)
    return _Pair(folder, raw)


def _even_weights(plan: Plan, raw: Path) -> dict[str, torch.Tensor]:
    """Seeded weights whose lesion head is shifted to answer lesion in half of the patch at the image's centre."""
    torch.manual_seed(0)
    network = build_network(plan).eval()
    files = sorted((raw / "imagesTr").glob("*.nii.gz"))
    image = preprocess(read_case("case", dict(zip(plan.channels, files, strict=True))), plan).image.numpy()
    starts = [max(0, (size - edge) // 2) for size, edge in zip(image.shape[1:], plan.patch, strict=True)]
    centre = image[:, *(slice(start, start + edge) for start, edge in zip(starts, plan.patch, strict=True))]
    padding = [(0, 0), *((0, edge - size) for size, edge in zip(centre.shape[1:], plan.patch, strict=True))]
    with torch.no_grad():
        logits = network(torch.from_numpy(np.pad(centre, padding))[None])[0]
        bias = network.decoder.seg_layers[-1].bias
        assert isinstance(bias, torch.Tensor)
        bias[1] -= (logits[1] - logits[0]).median()
    return network.state_dict()


def _export_and_import(folder: Path, model: Path) -> None:
    export_nnunet(model, folder / "exported")
    import_nnunet(folder / "exported", folder / "imported")


def _small(plan: Plan, kind: str) -> Plan:
    """The plan at a coarser spacing with a small network, so that the suite takes minutes."""
    spacing, patch, kernel = PATCHES[kind]
    strides: tuple[Triple, ...] = ((1, 1, 1), (2, 2, 2) if kernel == (3, 3, 3) else (1, 2, 2), (2, 2, 2), (2, 2, 2))
    kernels: tuple[Triple, ...] = (kernel, (3, 3, 3), (3, 3, 3), (3, 3, 3))
    network = NetworkPlan(
        kind="plain",
        features=(8, 16, 32, 64),
        strides=strides,
        kernels=kernels,
        encoder_blocks=(2, 2, 2, 2),
        decoder_convs=(2, 2, 2),
        decoder_kernels=kernels[:-1],
    )
    return replace(plan, spacing=spacing, patch=patch, batch_size=2, network=network)


def _write_bright_label(root: Path) -> None:
    """Bright tissue of the FLAIR: a label that a small network learns in a minute, as it does not learn the lesions."""
    image = nibabel.load(root / "imagesTr" / "case_0001.nii.gz")
    flair = image.get_fdata()
    smooth = gaussian_filter(flair, 2.0)
    label = (smooth > np.percentile(smooth[flair > 0], 85)).astype(np.uint8)
    peer.write_scan(root / "labelsTr" / "case.nii.gz", label, image.affine)


def _draw_head(root: Path) -> None:
    """An ellipsoid of noise with a dark ball, in a border of zeros, voxels of 1.4 x 1.1 x 2 mm."""
    shape = (70, 90, 48)
    rng = np.random.default_rng(5)
    grid = np.stack(np.meshgrid(*(np.linspace(-1.1, 1.1, n) for n in shape), indexing="ij"))
    brain, ball = (grid**2).sum(0) < 1, ((grid - 0.3) ** 2).sum(0) < 0.04
    affine = np.diag([1.4, 1.1, 2.0, 1.0])
    for number, contrast in enumerate((-40, 50)):
        voxels = np.where(brain, rng.normal(100, 12, shape) + contrast * ball, 0).astype(np.float32)
        peer.write_scan(root / "imagesTr" / f"case_{number:04d}.nii.gz", voxels, affine)
    peer.write_scan(root / "labelsTr" / "case.nii.gz", ball.astype(np.uint8), affine)


def _dice(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> float:
    together = int((first > 0).sum()) + int((second > 0).sum())
    return 2 * int(((first > 0) & (second > 0)).sum()) / together if together else 1.0
