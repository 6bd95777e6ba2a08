"""What a file can make of a tensor or a dictionary: only plain numbers come through, by whatever name."""

from __future__ import annotations

import collections
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from strokenet.data.errors import InputError
from strokenet.nnunet.checkpoints import load_checkpoint
from strokenet.nnunet.importing import import_nnunet
from tests.nnunet import v1_folders, v2_folders
from tests.nnunet.hostile import START, legacy_parts, refused, spelled, storage, tensor, write_legacy

V1_FILE, V2_FILE = "fold_0/model_final_checkpoint.model", "fold_0/checkpoint_final.pth"


def quietly(make: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """Without torch's warnings that these kinds are young or old."""

    def made(plain: Tensor) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return make(plain)

    return made


def shadowed(plain: Tensor) -> Parameter:
    """With attributes in the place of methods."""
    found = Parameter(plain)
    for name in ("detach", "float", "clone", "numel", "untyped_storage"):
        setattr(found, name, "x")
    return found


class Subclass(Tensor):
    """A kind of tensor of the file's own."""


KINDS: dict[str, Callable[[Tensor], Any]] = {
    "meta": lambda plain: plain.to("meta"),
    "nested": quietly(lambda plain: torch.nested.nested_tensor([plain])),
    "float8": lambda plain: plain.to(torch.float8_e4m3fn),
    "float4": lambda plain: torch.zeros(plain.shape, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
    "complex": lambda plain: plain.to(torch.complex64),
    "sparse": lambda plain: plain.to_sparse(),
    "sparse-rows": quietly(lambda plain: plain.flatten(1).to_sparse_csr()),
    "quantised": quietly(lambda plain: torch.quantize_per_tensor(plain, 0.1, 0, torch.qint8)),
    "bool": lambda plain: plain > 0,
    "bytes": lambda plain: plain.to(torch.uint8),
    "expanded": lambda plain: torch.zeros((1,) * plain.ndim).expand(plain.shape),
    "overlapping": lambda plain: torch.zeros(plain.numel() - 1).as_strided(plain.shape, (0,) * plain.ndim),
    "subclass": lambda plain: plain.as_subclass(Subclass),
    "text": lambda plain: "numbers",
    "list": lambda plain: plain.tolist(),
    "nothing": lambda plain: None,
    "storage": lambda plain: plain.clone().untyped_storage(),
}
NO_NUMBERS = ("bool", "bytes", "text", "list", "nothing")  # torch writes the other kinds with names of their own
TOO_LARGE = ("expanded", "overlapping")


SECOND_NAME = f"decoder.{next(name for name in v2_folders.seeded_weights(v2_folders.foreign_plan(), 0))}"
PLACES: dict[str, tuple[str, str]] = {  # where the tensor stands -> its file and name
    "v1": (V1_FILE, "conv_blocks_context.0.blocks.0.conv.weight"),
    "v2": (V2_FILE, "decoder.seg_layers.1.weight"),
    "v2-second-name": (V2_FILE, SECOND_NAME),
}


def written_with(place: str, root: Path, change: Callable[[Tensor], Any]) -> Path:
    """A results folder in which one parameter is changed."""
    name = PLACES[place][1]

    def changed(content: dict[str, Any]) -> None:
        weights = content["state_dict" if place == "v1" else "network_weights"]
        assert name in weights
        weights[name] = change(weights[name].detach())

    write_folder = v1_folders.write_folder if place == "v1" else v2_folders.write_folder
    return write_folder(root, change_checkpoint=changed)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", [*KINDS, "shadowed"])
def test_a_model_of_other_tensors_is_refused(tmp_path: Path, place: str, kind: str) -> None:
    source = written_with(place, tmp_path / "source", {**KINDS, "shadowed": shadowed}[kind])
    message = "is no tensor of real numbers" if kind in NO_NUMBERS else "which is not allowed"
    refused(source, tmp_path, "a tensor larger than its numbers" if kind in TOO_LARGE else message, PLACES[place][0])


@pytest.mark.parametrize("place", PLACES)
def test_a_parameter_is_a_tensor(tmp_path: Path, place: str) -> None:
    """Some trainers keep torch's Parameter: the numbers are the same."""
    source = written_with(place, tmp_path / "source", Parameter)
    model = import_nnunet(source, tmp_path / "model")
    plain = import_nnunet(written_with(place, tmp_path / "plain", Tensor.clone), tmp_path / "same")
    assert all(type(value) is Tensor and value.equal(plain.weights["0"][n]) for n, value in model.weights["0"].items())


NAMES: dict[str, Any] = {
    "number": 1,
    "long-number": 10**600,
    "none": None,
    "bytes": b"a" * 10**5,
    "text": "x" * 10**6,
    "lines": "a\nb\x1b[2J\ud800",
    "pair": ("a", "b"),
    "tensor": torch.ones(10**5),
}


@pytest.mark.parametrize("name", NAMES)
def test_parameters_of_strange_names_are_refused(tmp_path: Path, name: str) -> None:
    def named(content: dict[str, Any]) -> None:
        content["network_weights"][NAMES[name]] = torch.ones(1)

    refused(v2_folders.write_folder(tmp_path / "source", change_checkpoint=named), tmp_path, "", V2_FILE)


class Lying:
    """Pickles as an OrderedDict with attributes in the place of its methods."""

    def __init__(self, content: Any):
        self.content = dict(content)

    def __reduce__(self) -> Any:
        names = ("get", "items", "values", "keys", "__getitem__", "__len__", "__contains__", "copy")
        return (collections.OrderedDict, (), dict.fromkeys(names, "x"), None, iter(self.content.items()))


def relying(content: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: Lying(value) if key in keys else value for key, value in content.items()}


@pytest.mark.parametrize("keys", [("network_weights",), ("init_args",), ("network_weights", "init_args")])
@pytest.mark.parametrize("whole", [False, True])
def test_attributes_of_a_v2_dictionary_change_nothing(tmp_path: Path, keys: tuple[str, ...], whole: bool) -> None:
    source = v2_folders.write_folder(tmp_path / "source")
    plain = import_nnunet(source, tmp_path / "plain")
    content = relying(torch.load(source / V2_FILE, weights_only=False), *keys)
    torch.save(Lying(content) if whole else content, source / V2_FILE)
    model = import_nnunet(source, tmp_path / "model")
    assert model.plan == plain.plan
    assert all(value.equal(plain.weights["0"][name]) for name, value in model.weights["0"].items())


@pytest.mark.parametrize("whole", [False, True])
def test_attributes_of_a_v1_dictionary_change_nothing(tmp_path: Path, whole: bool) -> None:
    source = v1_folders.write_folder(tmp_path / "source")
    plain = import_nnunet(source, tmp_path / "plain")
    content = relying(torch.load(source / V1_FILE, weights_only=False), "state_dict")
    torch.save(Lying(content) if whole else content, source / V1_FILE)
    model = import_nnunet(source, tmp_path / "model")
    assert all(value.equal(plain.weights["0"][name]) for name, value in model.weights["0"].items())


@pytest.mark.parametrize("key", ["", "plans"])
def test_attributes_of_a_v1_record_change_nothing(tmp_path: Path, key: str) -> None:
    source = v1_folders.write_folder(tmp_path / "source")
    plain = import_nnunet(source, tmp_path / "plain")
    record = v1_folders.record(v1_folders.plans())
    v1_folders.write_pickle(source / f"{V1_FILE}.pkl", relying(record, key) if key else Lying(record))
    assert import_nnunet(source, tmp_path / "model").plan == plain.plan


def v2_legacy(root: Path) -> tuple[Path, list[bytes], bytes]:
    """A v2 folder whose checkpoint has the form of before 1.6; its pickles and numbers."""
    source = v2_folders.write_folder(root)
    content = torch.load(source / V2_FILE, weights_only=False)
    torch.save(content, source / V2_FILE, _use_new_zipfile_serialization=False)
    return source, *legacy_parts((source / V2_FILE).read_bytes())


def test_an_old_checkpoint_is_read(tmp_path: Path) -> None:
    source, parts, numbers = v2_legacy(tmp_path / "source")
    assert (source / V2_FILE).read_bytes() == b"".join(parts) + numbers
    model = import_nnunet(source, tmp_path / "model")
    plain = import_nnunet(v2_folders.write_folder(tmp_path / "new"), tmp_path / "same")
    assert all(value.equal(plain.weights["0"][name]) for name, value in model.weights["0"].items())


@pytest.mark.parametrize("padded", [False, True], ids=["cut", "as-long-as-before"])
def test_numbers_that_a_file_does_not_hold_are_not_made_up(tmp_path: Path, padded: bool) -> None:
    """An old checkpoint lists its storages; those that it leaves out would be whatever was in memory."""
    source, parts, numbers = v2_legacy(tmp_path / "source")
    (source / V2_FILE).write_bytes(b"".join(parts[:4]) + START + b"]." + (numbers if padded else b""))
    refused(source, tmp_path, "download or copy it again", V2_FILE)


def test_storages_larger_than_the_file_are_refused(tmp_path: Path) -> None:
    content = START + b"}" + spelled("a") + tensor((1000,), (1,), storage(1000)) + b"s."
    write_legacy(tmp_path / "file", content)
    with pytest.raises(InputError, match="file: .*download or copy it again"):
        load_checkpoint(tmp_path / "file")
