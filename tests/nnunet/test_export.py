"""Export: what nnU-Net v2 reads, and the way back without a bit changed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from planner.plan import NetworkPlan, Plan
from strokenet.data.errors import InputError
from strokenet.model.checkpoint import load_model
from strokenet.model.network import UNet
from strokenet.nnunet.export import all_names, export_nnunet, plans_json
from strokenet.nnunet.importing import import_nnunet
from strokenet.workspace import Workspace
from tests.infer.models import write_model
from tests.nnunet.v2_folders import foreign_plan, residual_network
from tests.plans import tiny_network, tiny_plan
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


def test_the_checkpoint_holds_what_the_predictor_reads(tmp_path: Path) -> None:
    write_model(tmp_path / "model", tiny_plan(mirror_axes=()))
    export_nnunet(tmp_path / "model", tmp_path / "there")
    content = torch.load(tmp_path / "there" / "fold_0" / "checkpoint_final.pth", weights_only=True)
    assert content["trainer_name"] == "nnUNetTrainer"
    assert content["init_args"]["configuration"] == "3d_fullres"
    assert content["inference_allowed_mirroring_axes"] is None  # an empty tuple makes the peer fail


def test_the_decoder_is_listed_from_the_bottleneck_up() -> None:
    """Our level 0 is the full resolution; the peer's first decoder stage is the deepest."""
    stored = plans_json(tiny_plan(network=tiny_network(decoder_convs=(3, 1))))
    kwargs = stored["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    assert kwargs["n_conv_per_stage_decoder"] == [1, 3]


def test_orientation_chooses_the_peers_reader() -> None:
    readers = {o: plans_json(tiny_plan(orientation=o))["image_reader_writer"] for o in ("RAS", "as-stored")}
    assert readers == {"RAS": "NibabelIOWithReorient", "as-stored": "SimpleITKIO"}


def test_what_nnunet_will_do_otherwise_is_said(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    (note,) = export_nnunet(tmp_path / "model", tmp_path / "there").notes
    assert "threshold 0.2 and the minimum of 4 mm3" in note
    write_model(tmp_path / "plain", foreign_plan())
    assert export_nnunet(tmp_path / "plain", tmp_path / "plain-there").notes == ()


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
