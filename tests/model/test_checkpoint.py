"""Weights on disk: a round trip without loss, and files that are refused before they are believed."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, save, save_file

from planner.plan import Plan
from strokenet.data.errors import InputError
from strokenet.model.checkpoint import MAX_HEADER_BYTES, expected_shapes, load_model, load_weights, save_weights
from strokenet.model.network import build_network
from strokenet.workspace import Workspace
from tests.infer.models import write_model
from tests.plans import tiny_network, tiny_plan


@pytest.fixture
def plan() -> Plan:
    return tiny_plan()


@pytest.fixture
def file(tmp_path: Path, plan: Plan) -> Path:
    save_weights(tmp_path / "last.safetensors", build_network(plan).state_dict(), note={"epoch": "7"})
    return tmp_path / "last.safetensors"


def split(path: Path) -> tuple[dict[str, object], bytes]:
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def join(path: Path, header: object, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_weights_come_back_bit_for_bit(file: Path, plan: Plan) -> None:
    network = build_network(plan)
    save_weights(file, network.state_dict(), note={"epoch": "8"})
    loaded = load_weights(file, plan)
    assert sorted(loaded) == sorted(network.state_dict())
    for name, tensor in network.state_dict().items():
        assert torch.equal(loaded[name], tensor)
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"strokenet": '{"epoch": "8"}'}
    assert [path.name for path in file.parent.iterdir()] == ["last.safetensors"]


def test_the_file_is_the_one_that_safetensors_writes(tmp_path: Path) -> None:
    """Of any layout and length, with names that are no ASCII."""
    weights = {
        "wide": torch.randn(2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d),
        "übrig": torch.randn(3),
        "turned": torch.randn(4, 3).T,
        "half": torch.randn(3).half(),
        "brain": torch.randn(5).bfloat16(),
        "alone": torch.tensor(1.5, requires_grad=True),
        "none": torch.zeros(0, 3),
    }
    save_weights(tmp_path / "a.safetensors", weights, note={"epoch": "1"})
    plain = {name: tensor.detach().contiguous() for name, tensor in weights.items()}
    ours = load(tmp_path.joinpath("a.safetensors").read_bytes())
    assert all(torch.equal(ours[name], plain[name]) for name in plain)
    floats = {name: tensor for name, tensor in plain.items() if tensor.dtype == torch.float32}
    save_weights(tmp_path / "b.safetensors", floats, note={"epoch": "1"})
    assert tmp_path.joinpath("b.safetensors").read_bytes() == save(floats, metadata={"strokenet": '{"epoch": "1"}'})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights_are_read_as_float32(file: Path, plan: Plan, dtype: torch.dtype) -> None:
    halved = {name: tensor.to(dtype) for name, tensor in build_network(plan).state_dict().items()}
    save_weights(file, halved, note={})
    for name, tensor in load_weights(file, plan).items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, halved[name].float())


def test_the_expected_shapes_are_the_networks(plan: Plan) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in build_network(plan).state_dict().items()}
    assert expected_shapes(plan) == shapes


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def _cut_in_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:300])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"weights": [1.0]}))


def _bloat(path: Path) -> None:
    header, data = split(path)
    join(path, json.dumps(header).encode() + b" " * MAX_HEADER_BYTES, data)


def _giant_length(path: Path) -> None:
    path.write_bytes((2**63).to_bytes(8, "little") + path.read_bytes()[8:])


def _list(path: Path) -> None:
    join(path, [1, 2], b"")


def _deep(path: Path) -> None:
    join(path, b"[" * 100_000, b"")


def _long_number(path: Path) -> None:
    join(path, b'{"a": ' + b"9" * 10_000 + b"}", b"")


def _shape(path: Path) -> None:
    header, data = split(path)
    name = "encoder.stages.0.0.convs.0.conv.weight"
    header[name]["shape"] = [2**40, 2, 3, 3, 3]  # type: ignore[index]
    join(path, header, data)


def _shape_is_a_number(path: Path) -> None:
    header, data = split(path)
    header["encoder.stages.0.0.convs.0.conv.bias"]["shape"] = 4  # type: ignore[index]
    join(path, header, data)


def _entry_is_text(path: Path) -> None:
    header, data = split(path)
    header["encoder.stages.0.0.convs.0.conv.bias"] = "F32"
    join(path, header, data)


def _other_type(path: Path) -> None:
    tensors = {name: tensor.double() for name, tensor in build_network(tiny_plan()).state_dict().items()}
    save_file(tensors, path)


def _overlap(path: Path) -> None:
    header, data = split(path)
    header["encoder.stages.0.0.convs.0.conv.bias"]["data_offsets"] = [0, 16]  # type: ignore[index]
    join(path, header, data)


def _outside(path: Path) -> None:
    header, data = split(path)
    header["encoder.stages.0.0.convs.0.conv.bias"]["data_offsets"] = [2**40, 2**40 + 16]  # type: ignore[index]
    join(path, header, data)


def _missing(path: Path) -> None:
    tensors = dict(build_network(tiny_plan()).state_dict())
    del tensors["decoder.seg_layers.0.weight"]
    save_file(tensors, path)


def _unknown(path: Path) -> None:
    save_file({**build_network(tiny_plan()).state_dict(), "x" * 5000: torch.zeros(1)}, path)


def _other_network(path: Path) -> None:
    save_file(build_network(tiny_plan(network=tiny_network(features=(8, 8, 8)))).state_dict(), path)


def _nan(path: Path) -> None:
    tensors = {name: tensor.clone() for name, tensor in build_network(tiny_plan()).state_dict().items()}
    tensors["decoder.seg_layers.1.bias"][0] = torch.nan
    save_file(tensors, path)


BROKEN = {
    _truncate: "cannot be read|cut short",
    _cut_in_header: "cut short",
    _empty: "cut short",
    _pickle: "header of|cut short",
    _bloat: f"at most {MAX_HEADER_BYTES} are read",
    _giant_length: f"header of {2**63} bytes",
    _list: "no safetensors file",
    _deep: "no safetensors file",
    _long_number: "no safetensors file",
    _shape: "plan.json asks for",
    _shape_is_a_number: "plan.json asks for",
    _entry_is_text: "plan.json asks for",
    _other_type: "in F32, F16, BF16",
    _overlap: "cannot be read",
    _outside: "cannot be read",
    _missing: "1 missing .decoder.seg_layers.0.weight.",
    _unknown: "1 unknown",
    _other_network: "use the plan that the weights were trained with",
    _nan: "decoder.seg_layers.1.bias holds NaN",
}


@pytest.mark.parametrize("harm", BROKEN, ids=lambda harm: harm.__name__[1:])
def test_a_broken_file_is_refused_in_one_short_line(harm: Callable[[Path], None], file: Path, plan: Plan) -> None:
    harm(file)
    with pytest.raises(InputError, match=BROKEN[harm]) as caught:
        load_weights(file, plan)
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600 + len(str(file))


def test_a_model_holds_every_numbered_fold_or_all(tmp_path: Path) -> None:
    write_model(tmp_path, folds=("10", "2", "all"))
    model = load_model(tmp_path)
    assert model.folds == ("2", "10")
    assert load_model(tmp_path, folds=("all",)).folds == ("all",)
    assert load_model(tmp_path, folds=("10", "2", "10")).folds == ("10", "2")
    assert not any(network.training for network in model.networks)
    first, second = (network.state_dict() for network in model.networks)
    assert not torch.equal(first["decoder.seg_layers.0.weight"], second["decoder.seg_layers.0.weight"])


def test_only_fold_all_is_a_model_too(tmp_path: Path) -> None:
    write_model(tmp_path, folds=("all",))
    assert load_model(tmp_path).folds == ("all",)


def test_best_serves_where_last_is_gone(tmp_path: Path) -> None:
    write_model(tmp_path)
    fold = Workspace(tmp_path).fold("0")
    fold.last.rename(fold.best)
    assert load_model(tmp_path).folds == ("0",)


@pytest.mark.parametrize(
    ("folds", "message"), [(("1",), "no weights for fold 1; trained: 0"), ((), "fold .none named.; trained: 0")]
)
def test_a_fold_that_is_not_there_is_named(tmp_path: Path, folds: tuple[str, ...], message: str) -> None:
    write_model(tmp_path)
    with pytest.raises(InputError, match=message):
        load_model(tmp_path, folds=folds)


def test_a_folder_that_is_no_model_is_told_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such model folder"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no plan.json"):
        load_model(tmp_path)
    Workspace(tmp_path).write_plan(tiny_plan())
    with pytest.raises(InputError, match="no trained fold; run `strokenet train"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("patch", [16, 16, 15], "patch"),
        ("patch", [4096, 16, 16], "patch"),
        ("spacing", [0, 1, 1], "spacing"),
        ("channels", [], "channels"),
        ("labels", {"background": 0, "lesion": 7}, "consecutive"),
        ("mirror_axes", [3], "mirror_axes"),
        ("exec", "import os", "unknown fields"),
        ("network", {"kind": "plain"}, "network"),
        ("network", None, "network"),
        ("orientation", "LPS", "orientation"),
    ],
)
def test_a_plan_that_was_tampered_with_is_refused(tmp_path: Path, field: str, value: object, message: str) -> None:
    write_model(tmp_path)
    path = Workspace(tmp_path).plan_file
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(InputError, match=message) as caught:
        load_model(tmp_path)
    assert str(path) in str(caught.value)


def test_a_plan_that_is_no_json_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path)
    Workspace(tmp_path).plan_file.write_text("{")
    with pytest.raises(InputError, match="no valid JSON"):
        load_model(tmp_path)
