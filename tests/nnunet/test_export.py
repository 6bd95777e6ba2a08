"""Export: what nnU-Net v2 reads, and the way back without a bit changed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from planner.fingerprint import Fingerprint
from planner.plan import NetworkPlan, Plan
from strokenet.data import files
from strokenet.data.errors import InputError
from strokenet.model.checkpoint import load_model
from strokenet.model.network import UNet
from strokenet.nnunet.export import all_names, export_nnunet, plans_json
from strokenet.nnunet.importing import import_nnunet
from strokenet.workspace import Workspace
from tests.infer.models import write_model
from tests.nnunet.v2_folders import foreign_plan, residual_network, write_folder
from tests.plans import STATS, tiny_network, tiny_plan
from tests.train.workspaces import make_workspace

PLANS = [
    pytest.param(tiny_plan(), id="own"),
    pytest.param(foreign_plan(), id="foreign"),
    pytest.param(tiny_plan(planner="resenc-m", network=residual_network()), id="residual"),
    pytest.param(tiny_plan(semantics="exact", mirror_axes=(2, 0)), id="exact"),
    pytest.param(tiny_plan(mirror_axes=(), spacing=(3.1, 0.1, 1 / 3), transpose=(2, 0, 1)), id="turned"),
    pytest.param(
        foreign_plan(
            normalise="after-resampling",
            average="probabilities",
            tile_weights="peak-1-float32",
            intensity=(None, None),
            planner="nnU-Net v1",
        ),
        id="v1",
    ),
    pytest.param(tiny_plan(network=tiny_network(decoder_convs=(3, 1))), id="uneven-decoder"),
    pytest.param(
        tiny_plan(
            network=tiny_network(kernels=((1, 3, 3), (3, 3, 3), (3, 3, 3)), decoder_kernels=((1, 3, 3), (3, 3, 3)))
        ),
        id="anisotropic",
    ),
]


@pytest.mark.parametrize("plan", PLANS)
def test_a_model_that_comes_back_is_the_one_that_left(tmp_path: Path, plan: Plan) -> None:
    write_model(tmp_path / "model", plan, folds=("0", "2", "all"))
    export_nnunet(tmp_path / "model", tmp_path / "there")
    import_nnunet(tmp_path / "there", tmp_path / "back")
    first, second = (Workspace(tmp_path / name) for name in ("model", "back"))
    assert second.read_plan() == first.read_plan() == plan
    assert second.trained_folds() == first.trained_folds()
    for fold in first.trained_folds():
        before, after = (load_model(w.root, folds=[fold]).networks[0].state_dict() for w in (first, second))
        assert list(before) == list(after)
        assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("kind", "blocks", "decoder", "count", "digest"),
    [
        ("plain", (2, 2, 2), (2, 2), 136, "ce75fcc14661429812e25c431ef321ae9330d7ace4f6e114099b16ffd1014ced"),
        ("residual", (1, 3, 2), (1, 1), 244, "d08a72dc198947c688001d627e52d204cc99e0c2d50c968a3c3bed9a3162f225"),
    ],
)
def test_the_names_are_those_of_the_peers_networks(
    kind: Any, blocks: tuple[int, ...], decoder: tuple[int, ...], count: int, digest: str
) -> None:
    """Digest of the sorted names and shapes of dynamic_network_architectures 0.4.4."""
    kernels = ((1, 3, 3), (3, 3, 3), (3, 3, 3))
    plan = NetworkPlan(
        kind=kind,
        features=(4, 8, 8),
        strides=((1, 1, 1), (1, 2, 2), (2, 2, 2)),
        kernels=kernels,
        encoder_blocks=blocks,
        decoder_convs=decoder,
        decoder_kernels=kernels[:-1],
    )
    named = all_names(UNet(plan, channels=2, heads=2).state_dict())
    text = "\n".join(f"{name} {tuple(tensor.shape)}" for name, tensor in sorted(named.items()))
    assert (len(named), hashlib.sha256(text.encode()).hexdigest()) == (count, digest)


def checkpoint(folder: Path, fold: str) -> dict[str, Any]:
    """Read without running anything in it."""
    content: dict[str, Any] = torch.load(folder / f"fold_{fold}" / "checkpoint_final.pth", weights_only=True)
    return content


def test_the_checkpoint_holds_what_the_predictor_reads(tmp_path: Path) -> None:
    write_model(tmp_path / "model", tiny_plan(mirror_axes=()))
    export_nnunet(tmp_path / "model", tmp_path / "there")
    content = checkpoint(tmp_path / "there", "0")
    assert content["trainer_name"] == "nnUNetTrainer"
    assert content["init_args"]["configuration"] == "3d_fullres"
    assert content["inference_allowed_mirroring_axes"] is None  # an empty tuple makes the peer fail


def test_each_checkpoint_names_its_fold_and_holds_the_files_beside_it(tmp_path: Path) -> None:
    """The peer's trainer takes whole numbers, and the text "all"."""
    write_model(tmp_path / "model", folds=("0", "12", "all"))
    export_nnunet(tmp_path / "model", tmp_path / "there")
    arguments = {fold: checkpoint(tmp_path / "there", fold)["init_args"] for fold in ("0", "12", "all")}
    assert {fold: value["fold"] for fold, value in arguments.items()} == {"0": 0, "12": 12, "all": "all"}
    for value in arguments.values():
        for name, file in (("plans", "plans.json"), ("dataset_json", "dataset.json")):
            assert value[name] == json.loads((tmp_path / "there" / file).read_text())


@pytest.fixture
def turned(tmp_path: Path) -> Workspace:
    """Four cases, so that medians lie between two of them; the network's axes are W, D, H."""
    workspace = Workspace(tmp_path / "work")
    workspace.write_plan(tiny_plan(transpose=(2, 0, 1)))
    workspace.write_fingerprint(
        Fingerprint(
            case_ids=("a", "b", "c", "d"),
            shapes_after_crop=((20, 31, 40), (24, 36, 45), (21, 30, 44), (22, 33, 41)),
            spacings=((3.0, 1.0, 0.5), (2.0, 1.0, 0.75), (4.0, 1.25, 0.5), (3.0, 1.5, 1.0)),
            median_relative_size=0.75,
            intensity=(replace(STATS, mean=1.5), STATS),
        )
    )
    return workspace


def test_the_medians_of_the_dataset_are_in_network_axes(turned: Workspace, tmp_path: Path) -> None:
    """D, H, W: 3, 1.125, 0.625 mm and 21.5, 32, 42.5 voxels. The peer rounds these half to even."""
    export_nnunet(turned.root, tmp_path / "there")
    plans = json.loads((tmp_path / "there" / "plans.json").read_text())
    assert plans["original_median_spacing_after_transp"] == [0.625, 3.0, 1.125]
    assert plans["original_median_shape_after_transp"] == [42, 22, 32]
    assert (plans["transpose_forward"], plans["transpose_backward"]) == ([2, 0, 1], [1, 2, 0])


def test_without_a_fingerprint_the_medians_are_the_plans() -> None:
    plans = plans_json(tiny_plan(transpose=(2, 0, 1), spacing=(0.5, 2.0, 1.0), median_shape=(42.5, 21.75, 32.0)))
    assert plans["original_median_spacing_after_transp"] == [0.5, 2.0, 1.0]
    assert plans["original_median_shape_after_transp"] == [42, 22, 32]


def test_the_fingerprint_is_written_as_nnunet_writes_it(turned: Workspace, tmp_path: Path) -> None:
    """The keys of nnunetv2 2.8.1, without the cases' names that our own file has beside them."""
    export_nnunet(turned.root, tmp_path / "there")
    found = json.loads((tmp_path / "there" / "dataset_fingerprint.json").read_text())
    intensity = found.pop("foreground_intensity_properties_per_channel")
    assert found == {
        "spacings": [[3.0, 1.0, 0.5], [2.0, 1.0, 0.75], [4.0, 1.25, 0.5], [3.0, 1.5, 1.0]],
        "shapes_after_crop": [[20, 31, 40], [24, 36, 45], [21, 30, 44], [22, 33, 41]],
        "median_relative_size_after_cropping": 0.75,
    }
    assert {channel: stats["mean"] for channel, stats in intensity.items()} == {"0": 1.5, "1": 0.0}
    for stats in intensity.values():
        assert set(stats) == {"mean", "median", "std", "min", "max", "percentile_99_5", "percentile_00_5"}


def test_the_description_is_nnunets(turned: Workspace, tmp_path: Path) -> None:
    export_nnunet(turned.root, tmp_path / "there")
    assert json.loads((tmp_path / "there" / "dataset.json").read_text()) == {
        "channel_names": {"0": "T1", "1": "FLAIR"},
        "labels": {"background": 0, "lesion": 1},
        "numTraining": 4,
        "file_ending": ".nii.gz",
    }


def test_the_decoder_is_listed_from_the_bottleneck_up() -> None:
    """Our level 0 is the full resolution; the peer's first decoder stage is the deepest."""
    stored = plans_json(tiny_plan(network=tiny_network(decoder_convs=(3, 1))))
    kwargs = stored["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    assert kwargs["n_conv_per_stage_decoder"] == [1, 3]


def test_orientation_chooses_the_peers_reader() -> None:
    readers = {o: plans_json(tiny_plan(orientation=o))["image_reader_writer"] for o in ("RAS", "as-stored")}
    assert readers == {"RAS": "NibabelIOWithReorient", "as-stored": "SimpleITKIO"}


RULE, OF_V1 = "the threshold 0.2 and the minimum of 4 mm3 are strokenet's", "the model is of nnU-Net v1"


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        pytest.param(foreign_plan(), [], id="nothing"),
        pytest.param(tiny_plan(), [RULE], id="threshold"),
        pytest.param(foreign_plan(normalise="after-resampling"), [OF_V1], id="v1 normalising"),
        pytest.param(foreign_plan(average="probabilities"), [OF_V1], id="v1 averaging"),
        pytest.param(tiny_plan(average="probabilities"), [RULE, OF_V1], id="both"),
    ],
)
def test_what_nnunet_will_do_otherwise_is_said(tmp_path: Path, plan: Plan, said: list[str]) -> None:
    write_model(tmp_path / "model", plan)
    notes = export_nnunet(tmp_path / "model", tmp_path / "there").notes
    assert len(notes) == len(said)
    assert all(text in note for text, note in zip(said, notes, strict=True))


def test_a_workspace_without_weights_gives_its_plans_alone(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path / "work")
    exported = export_nnunet(workspace.root, tmp_path / "there")
    assert exported.folds == ()
    names = {path.name for path in (tmp_path / "there").iterdir()}
    assert names - {"dataset_fingerprint.json"} == {"plans.json", "dataset.json"}
    assert ("dataset_fingerprint.json" in names) == workspace.fingerprint_file.is_file()


def test_a_decoder_that_v2_cannot_build_is_refused(tmp_path: Path) -> None:
    network = tiny_network(kernels=((1, 3, 3), (3, 3, 3), (3, 3, 3)), decoder_kernels=((3, 3, 3), (3, 3, 3)))
    write_model(tmp_path / "model", tiny_plan(network=network))
    with pytest.raises(InputError, match="nnU-Net v2 has no such network"):
        export_nnunet(tmp_path / "model", tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_a_label_called_ignore_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "model", foreign_plan(labels={"background": 0, "lesion": 1, "ignore": 2}))
    with pytest.raises(InputError, match='nnU-Net leaves the label "ignore" out'):
        export_nnunet(tmp_path / "model", tmp_path / "there")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_model(tmp_path / "model")
    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(InputError, match="there: cannot be written \\(No space left on device\\); choose another -o"):
        export_nnunet(tmp_path / "model", tmp_path / "new" / "there")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """No file can be written beyond `size` bytes: what a full disk does, at a place of our choice."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("share", [0.001, 0.3, 0.6, 0.999])
def test_a_disk_that_fills_in_the_middle_of_the_weights_is_told_in_one_line(tmp_path: Path, share: float) -> None:
    write_model(tmp_path / "model", tiny_plan(network=tiny_network(features=(32, 64, 64))))  # 2 MB
    export_nnunet(tmp_path / "model", tmp_path / "there")
    whole = (tmp_path / "there" / "fold_0" / "checkpoint_final.pth").stat().st_size
    with files_of_at_most(int(share * whole)), pytest.raises(InputError, match="new/there: cannot be written"):
        export_nnunet(tmp_path / "model", tmp_path / "new" / "there")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("way", [export_nnunet, import_nnunet], ids=["export", "import"])
def test_all_is_flushed_before_the_folder_takes_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: Any
) -> None:
    """So that after a power cut the folder is whole or not there."""
    write_model(tmp_path / "model", folds=("0", "all"))
    write_folder(tmp_path / "foreign", folds=("0", "all"))
    flushed: set[int] = set()
    before: list[set[int]] = []  # what was flushed by the time of each rename
    rename = os.replace

    def remember(old: Path, new: Path) -> None:
        before.append(set(flushed))
        rename(old, new)

    monkeypatch.setattr(files.os, "fsync", lambda handle: flushed.add(os.fstat(handle).st_ino))
    monkeypatch.setattr(files.os, "replace", remember)
    out = tmp_path / "out"
    way(tmp_path / ("model" if way is export_nnunet else "foreign"), out)
    written = [out, *out.rglob("*")]
    assert len(written) >= 6
    assert [str(path) for path in written if path.stat().st_ino not in before[-1]] == []
    assert tmp_path.stat().st_ino in flushed


def test_a_damaged_fold_leaves_nothing_behind(tmp_path: Path) -> None:
    write_model(tmp_path / "model", folds=("0", "1"))
    Workspace(tmp_path / "model").fold("1").last.write_bytes(b"nothing")
    with pytest.raises(InputError, match="no safetensors file"):
        export_nnunet(tmp_path / "model", tmp_path / "there")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_that_is_there_is_kept(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "plans.json").write_text("{}")
    with pytest.raises(InputError, match="is there already"):
        export_nnunet(tmp_path / "model", tmp_path / "there")
    assert json.loads((tmp_path / "there" / "plans.json").read_text()) == {}


def test_our_fields_cannot_overrule_the_network(tmp_path: Path) -> None:
    """A stranger's key of ours is read like any plan: known fields alone, every range checked."""
    write_model(tmp_path / "model")
    export_nnunet(tmp_path / "model", tmp_path / "there")
    path = tmp_path / "there" / "plans.json"
    stored = json.loads(path.read_text())
    stored["strokenet"] |= {"patch": [64, 64, 64], "semantics": "other"}
    path.write_text(json.dumps(stored))
    with pytest.raises(InputError, match="plan semantics is 'other'"):
        import_nnunet(tmp_path / "there", tmp_path / "back")
    stored["strokenet"]["semantics"] = "exact"
    path.write_text(json.dumps(stored))
    assert import_nnunet(tmp_path / "there", tmp_path / "back").plan == replace(tiny_plan(), semantics="exact")
