"""The engine: one answer on every rung of the ladder, down which it goes when memory runs out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from kernels import instance_norm_act
from strokenet.data.case import Case, case_from_images
from strokenet.infer.config import InferConfig
from strokenet.infer.engine import CPU, Engine, Rung, ladder
from strokenet.infer.predict import predict_case
from strokenet.model.checkpoint import Model, load_model
from strokenet.model.device import is_out_of_memory
from strokenet.model.inference import InferenceNetwork, TrainedForm
from strokenet.model.network import ConvBlock, build_network
from tests.infer.models import head, oblique, write_model
from tests.plans import tiny_plan

META = torch.device("meta")  # a device that is not the CPU, to be told apart
RUNGS = tuple(Rung(device=CPU, batch=batch, sums_on=CPU) for batch in (8, 4, 2, 1))


@pytest.fixture
def model(tmp_path: Any) -> Model:
    write_model(tmp_path / "model", folds=("0", "1"))
    return load_model(tmp_path / "model")


@pytest.fixture
def case() -> Case:
    return case_from_images(
        "x", {name: (head((40, 36, 24), seed), oblique()) for seed, name in enumerate(("T1", "FLAIR"))}
    )


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """Lets a network run out of memory above so many tiles a call; returns the sizes of the calls."""
    real = InferenceNetwork.forward
    sizes: list[int] = []

    def limited(limit: int) -> list[int]:
        def forward(self: InferenceNetwork, x: torch.Tensor) -> torch.Tensor:
            sizes.append(len(x))
            if len(x) > limit:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
            return real(self, x)

        monkeypatch.setattr(InferenceNetwork, "forward", forward)
        return sizes

    return limited


def test_the_ladder_ends_on_the_cpu() -> None:
    gpu = torch.device("cuda", 1)
    rungs = ladder(gpu)
    assert [(rung.device, rung.batch, rung.sums_on) for rung in rungs] == [
        *((gpu, batch, gpu) for batch in (8, 4, 2, 1)),
        (gpu, 1, CPU),
        (CPU, 1, CPU),
    ]
    assert ladder(CPU) == (rungs[-1],)
    assert [str(rung) for rung in (rungs[0], *rungs[-3:])] == [
        "8 tiles at a time",
        "one tile at a time",
        "one tile at a time, sums in the machine's memory",
        "on the CPU",
    ]


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_every_rung_gives_one_answer_and_is_remembered(
    model: Model, case: Case, memory: Callable[[int], list[int]], caplog: pytest.LogCaptureFixture, limit: int
) -> None:
    config = InferConfig(threshold=0.5)
    expected = predict_case(Engine(model, config), case)
    sizes = memory(limit)
    engine = Engine(model, config, RUNGS)
    with caplog.at_level(logging.WARNING, "strokenet"):
        found = predict_case(engine, case)
    np.testing.assert_allclose(found.probability, expected.probability, atol=1e-5)
    assert (found.mask != expected.mask).sum() == 0
    fits = max(rung.batch for rung in RUNGS if rung.batch <= limit)
    assert engine.rung.batch == fits
    assert caplog.messages[-1] == f"memory ran out (CUDA out of memory); goes on {engine.rung}"
    sizes.clear()
    predict_case(engine, case)
    assert max(sizes) <= fits  # the next case does not try again


def test_the_last_rung_says_so(model: Model, case: Case, memory: Callable[[int], list[int]]) -> None:
    memory(0)
    with pytest.raises(torch.OutOfMemoryError):
        predict_case(Engine(model, InferConfig(), RUNGS), case)


def test_on_another_device_the_networks_are_made_anew(
    model: Model, case: Case, memory: Callable[[int], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = predict_case(Engine(model, InferConfig()), case)
    monkeypatch.setattr(Engine, "_on_rung", _full_but_on_the_cpu)
    engine = Engine(model, InferConfig(), (Rung(device=META, batch=8, sums_on=META), RUNGS[-1]))
    before = engine._networks
    found = predict_case(engine, case)
    assert engine.rung.device == CPU
    assert not set(before) & set(engine._networks)
    assert len(engine._networks) == len(before)
    np.testing.assert_allclose(found.probability, expected.probability, atol=1e-6)


@pytest.mark.parametrize("asked", [{"semantics": "exact"}, {"precision": "fp16"}, {"precision": "fp32"}])
def test_on_the_cpu_a_gpus_float16_becomes_float32(
    model: Model, case: Case, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any]
) -> None:
    """Not bfloat16, though this CPU be one that has it."""
    monkeypatch.setattr("strokenet.model.device.cpu_has_bf16", lambda: True)
    monkeypatch.setattr(Engine, "_on_rung", _full_but_on_the_cpu)
    engine = Engine(model, InferConfig(**asked), (Rung(device=META, batch=8, sums_on=META), RUNGS[-1]))
    predict_case(engine, case)
    assert {network.dtype for network in engine._networks} == {torch.float32}


def test_a_step_down_that_fails_leaves_the_engine_where_it_was(
    model: Model, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next case tries again, with networks that are where its rung is."""
    monkeypatch.setattr(Engine, "_on_rung", _full_but_on_the_cpu)
    engine = Engine(model, InferConfig(), (Rung(device=META, batch=8, sums_on=META), RUNGS[-1]))
    real, left = Engine._forms, [1, 1]  # of the networks, and of the case as a whole

    def full_once(self: Engine, *given: Any) -> Any:
        if left:
            left.pop()
            raise torch.OutOfMemoryError
        return real(self, *given)

    monkeypatch.setattr(Engine, "_forms", full_once)
    with pytest.raises(torch.OutOfMemoryError):
        predict_case(engine, case)
    found = predict_case(engine, case)
    assert engine.rung.device == CPU
    assert np.isfinite(found.probability).all()


def test_a_device_that_says_so_in_words_is_out_of_memory() -> None:
    for words in ("MPS backend out of memory (1 GB)", "CUDA error: out of memory", "CUDNN_STATUS_ALLOC_FAILED"):
        assert is_out_of_memory(RuntimeError(words))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_cudnns_other_flags_stay_the_callers(model: Model, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = InferenceNetwork.forward
    cudnn = torch.backends.cudnn

    def watching(self: InferenceNetwork, x: torch.Tensor) -> torch.Tensor:
        seen.append((cudnn.benchmark, cudnn.allow_tf32, cudnn.deterministic))
        return real(self, x)

    monkeypatch.setattr(InferenceNetwork, "forward", watching)
    monkeypatch.setattr(cudnn, "allow_tf32", False)
    monkeypatch.setattr(cudnn, "deterministic", True)
    predict_case(Engine(model, InferConfig()), case)
    assert set(seen) == {(True, False, True)}
    assert not cudnn.benchmark


_on_rung = Engine._on_rung


def _full_but_on_the_cpu(self: Engine, *rest: Any) -> torch.Tensor:
    if self.rung.device != CPU:
        raise torch.OutOfMemoryError
    return _on_rung(self, *rest)


@pytest.mark.parametrize("kind", ["plain", "residual"])
def test_the_inference_form_answers_as_the_network_does(kind: Any) -> None:
    torch.manual_seed(1)
    plan = tiny_plan(network=replace(tiny_plan().network, kind=kind))
    network = build_network(plan).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn_like(parameter)  # biases and norms that are not the fresh 0 and 1
    image = 3 + torch.randn(2, 2, *plan.patch)
    form = InferenceNetwork(network, torch.float32, CPU)
    with torch.inference_mode():
        found = form(image)
        expected = network.double()(image.double())
    assert (found - expected).abs().max() < 5e-5 * expected.abs().max()
    blocks = [name for name, module in network.named_modules() if isinstance(module, ConvBlock)]
    idle = {f"{name}.conv.bias" for name in blocks}
    assert idle <= dict(network.named_parameters()).keys()  # the network itself is as it was
    assert not idle & dict(form.network.named_parameters()).keys()


def test_exact_runs_the_networks_as_they_were_trained(model: Model, case: Case) -> None:
    engine = Engine(model, InferConfig(semantics="exact"))
    assert {type(network) for network in engine._networks} == {TrainedForm}
    patch = torch.randn(1, 2, *model.plan.patch)
    with torch.inference_mode():
        for form, network in zip(engine._networks, model.networks, strict=True):
            assert torch.equal(form(patch), network(patch))  # to the last bit
    assert {type(network) for network in Engine(model, InferConfig())._networks} == {InferenceNetwork}


def test_the_inference_form_takes_the_fast_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    real = instance_norm_act.instance_norm_act_operator
    monkeypatch.setattr(
        instance_norm_act,
        "instance_norm_act_operator",
        lambda *given, **named: taken.append(given[0].shape[1]) or real(*given, **named),
    )
    network = build_network(tiny_plan()).eval()
    form = InferenceNetwork(network, torch.float32, CPU)
    with torch.inference_mode():
        form(torch.zeros(1, 2, 16, 16, 16) + torch.randn(1))
    assert len(taken) == sum(isinstance(module, ConvBlock) for module in network.modules())


def test_every_convolution_of_the_inference_form_is_onednns(monkeypatch: pytest.MonkeyPatch) -> None:
    """But the transposed ones; the head too, of which torch has a plain loop."""
    taken = []
    real = torch.mkldnn_convolution
    monkeypatch.setattr(torch, "mkldnn_convolution", lambda *given: taken.append(given[1].shape[0]) or real(*given))
    network = build_network(tiny_plan()).eval()
    form = InferenceNetwork(network, torch.float32, CPU)
    with torch.inference_mode():
        form(torch.zeros(1, 2, 16, 16, 16) + torch.randn(1))
    assert len(taken) == 1 + sum(isinstance(module, ConvBlock) for module in network.modules())
    assert taken[-1] == network.heads


def test_bfloat16_answers_as_float32_but_for_its_rounding(model: Model, case: Case) -> None:
    """On any CPU: where it has no such arithmetic oneDNN emulates it, slowly and equally."""
    exact, rounded = (predict_case(Engine(model, InferConfig(precision=p)), case) for p in ("fp32", "bf16"))
    apart = np.abs(exact.probability - rounded.probability)
    assert 1e-6 < apart.max() < 0.05
    assert np.median(apart) < 0.005
