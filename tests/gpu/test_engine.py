"""The engine on a GPU: the CPU's answer in every arithmetic, by the fast norm, and down the ladder for real."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from kernels import instance_norm_act as norm
from strokenet.data.case import Case, case_from_images
from strokenet.infer.config import InferConfig
from strokenet.infer.engine import Engine, Rung
from strokenet.infer.predict import predict_case
from strokenet.model.checkpoint import load_model
from strokenet.model.graphed import Graphed
from strokenet.model.inference import InferenceNetwork
from strokenet.model.recording import Replay, record
from strokenet.preprocess.preprocess import preprocess
from tests.infer.models import head, oblique, write_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch sees")
GPU = torch.device("cuda", 0)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_model(tmp_path / "model", folds=("0", "1"))
    return tmp_path / "model"


@pytest.fixture
def case() -> Case:
    channels = {name: (head((40, 36, 24), seed), oblique()) for seed, name in enumerate(("T1", "FLAIR"))}
    return case_from_images("x", channels)


@pytest.mark.parametrize(("precision", "limit"), [("fp32", 2e-3), ("fp16", 2e-2), ("bf16", 5e-2)])
def test_the_gpu_answers_as_the_cpu_does(
    root: Path, case: Case, monkeypatch: pytest.MonkeyPatch, precision: str, limit: float
) -> None:
    on_cpu = predict_case(Engine(load_model(root), InferConfig(precision="fp32")), case)
    monkeypatch.setattr(norm, "instance_norm_act_reference", None)  # proves that it does not run
    config = InferConfig(precision=precision)  # type: ignore[arg-type]
    on_gpu = predict_case(Engine(load_model(root, device=GPU), config), case)
    assert np.abs(on_cpu.probability - on_gpu.probability).max() < limit


def test_every_rung_gives_one_answer(root: Path, case: Case) -> None:
    model, config = load_model(root, device=GPU), InferConfig(precision="fp32")
    engine = Engine(model, config)
    expected = predict_case(engine, case)
    for rung in engine.rungs[1:]:
        found = predict_case(Engine(model, config, (rung,)), case)
        np.testing.assert_allclose(found.probability, expected.probability, atol=2e-3, err_msg=str(rung))


def test_a_full_gpu_leaves_the_case_to_the_cpu(root: Path, case: Case, caplog: pytest.LogCaptureFixture) -> None:
    config = InferConfig(precision="fp32")
    expected = predict_case(Engine(load_model(root), config), case)
    cpu = torch.device("cpu")
    engine = Engine(
        load_model(root, device=GPU),
        config,
        (Rung(device=GPU, batch=8, sums_on=GPU), Rung(device=cpu, batch=1, sums_on=cpu)),
    )
    torch.cuda.set_per_process_memory_fraction(1e-5)  # less than a tile of the network
    try:
        with caplog.at_level(logging.WARNING, "strokenet"):
            found = predict_case(engine, case)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    np.testing.assert_allclose(found.probability, expected.probability, atol=1e-5)
    assert "memory ran out" in caplog.text


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_recorded_network_answers_as_the_network_does(root: Path, precision: str) -> None:
    model = load_model(root, device=GPU)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    network = InferenceNetwork(model.networks[0], dtype, GPU)
    made: list[int] = []

    def counted(network: InferenceNetwork, x: torch.Tensor) -> Replay:
        made.append(len(x))
        return record(network, x)

    graphed = Graphed(network, counted)
    with torch.inference_mode():
        batches = [torch.randn(n, 2, *model.plan.patch, device=GPU) for n in (4, 4, 4, 1, 1, 4)]
        answers = [graphed(x) for x in batches]  # all kept: a replay must not write over an earlier answer
        expected = [network(x) for x in batches]
    assert made == [4, 1]
    for found, wanted in zip(answers, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2 if dtype == torch.bfloat16 else 1e-4)


def test_the_engine_replays_and_forgets_when_it_steps_down(root: Path, case: Case) -> None:
    engine = Engine(load_model(root, device=GPU), InferConfig(precision="fp32"))
    first, second = predict_case(engine, case), predict_case(engine, case)
    np.testing.assert_allclose(first.probability, second.probability, atol=1e-4)
    assert all(isinstance(network, Graphed) and network._replays for network in engine._networks)
    engine._step_down(RuntimeError("out of memory"), engine.rungs[1:])
    assert not any(network._replays for network in engine._networks if isinstance(network, Graphed))


def test_nothing_but_the_scan_and_the_mask_crosses_to_the_gpu_and_back(root: Path, case: Case) -> None:
    engine = Engine(load_model(root, device=GPU), InferConfig(precision="fp32"))
    found = predict_case(engine, case)
    assert found.cropped.is_cuda
    prepared = preprocess(case, engine.model.plan, GPU)
    assert prepared.image.is_cuda
    assert prepared.inside.is_cuda
    on_cpu = preprocess(case, engine.model.plan)
    torch.testing.assert_close(prepared.image.cpu(), on_cpu.image, rtol=1e-5, atol=1e-5)
    assert torch.equal(prepared.inside.cpu(), on_cpu.inside)
