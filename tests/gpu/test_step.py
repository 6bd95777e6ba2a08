"""Steps on a GPU: recorded and computed ones learn the same, nothing waits for the host, and a bad step is skipped."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from strokenet.train.feed import Batch
from strokenet.train.launch import AHEAD, EAGER_STEPS, QueuedSteps, Recorded, make_steps
from strokenet.train.run import FoldCases, Run, start_run
from strokenet.train.step import REFERENCE, Speedups, make_step, set_rate
from strokenet.workspace import Workspace
from tests.plans import tiny_plan
from tests.train.test_step import batch as drawn
from tests.train.test_step import distance
from tests.train.workspaces import short

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch sees")
STEPS = EAGER_STEPS + 5


def started(folder: Path, precision: str = "fp32") -> Run:
    config = short(device="cuda", precision=precision)
    run = start_run(Workspace(folder), tiny_plan(), config, FoldCases(train=(), val=()))
    run.network.train()
    return run


def on_gpu(seed: int) -> Batch:
    image, label = (tensor.cuda() for tensor in drawn(seed))
    return Batch(image=image, label=label, cases=("a", "b"))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_queued_and_recorded_steps_learn_what_computed_ones_do(tmp_path: Path, precision: str) -> None:
    recorded, eager = started(tmp_path / "recorded", precision), started(tmp_path / "eager", precision)
    steps = make_steps(recorded, Speedups())
    compute = make_step(eager, Speedups())
    outcomes, losses = [], []
    for number in range(STEPS):
        if number == STEPS - 2:
            steps.begin(1e-3)
            set_rate(eager.optimizer, 1e-3)
        outcomes += steps(on_gpu(number), number)
        losses.append(float(compute(on_gpu(number).image, on_gpu(number).label)[0]))
    assert len(outcomes) == STEPS - AHEAD
    outcomes += steps.rest()
    assert [outcome.number for outcome in outcomes] == list(range(STEPS))
    assert all(outcome.good for outcome in outcomes)
    assert [outcome.loss for outcome in outcomes] == pytest.approx(losses, abs=1e-3 if precision == "fp32" else 2e-2)
    assert distance(recorded, eager) < (1e-4 if precision == "fp32" else 1e-2)


def test_the_steps_are_really_recorded(tmp_path: Path) -> None:
    run = started(tmp_path)
    compute = make_step(run, Speedups())
    calls = []

    def counted(image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return compute(image, label)

    steps = QueuedSteps(run, Recorded(counted, run.optimizer))
    steps.begin(0.01)
    for number in range(STEPS):
        steps(on_gpu(number), number)
    steps.rest()
    assert len(calls) == EAGER_STEPS + 1  # the last one is the recording
    steps.begin(0.005)  # no norm keeps another map: the recording holds
    steps(on_gpu(0), 0)
    assert len(calls) == EAGER_STEPS + 1


def test_a_step_is_recorded_while_other_threads_take_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As the feed's do. CUDA's default would forbid it, and they or the recording would fail."""
    run, ended = started(tmp_path), threading.Event()
    steps = make_steps(run, Speedups())

    def busy() -> int:
        taken = []  # and kept, so that CUDA is asked for more
        with torch.cuda.stream(torch.cuda.Stream()):
            while not ended.is_set():
                host = torch.empty(2**14, pin_memory=True)
                taken.append((host, host.cuda(non_blocking=True)))
                torch.cuda.current_stream().synchronize()
        return len(taken)

    with ThreadPoolExecutor(1) as threads:
        other = threads.submit(busy)
        try:
            outcomes = [outcome for number in range(STEPS) for outcome in steps(on_gpu(number), number)]
        finally:
            ended.set()
        assert other.result() > 0
    assert all(outcome.good for outcome in [*outcomes, *steps.rest()])
    assert "cannot be recorded" not in caplog.text


def test_the_fast_step_on_the_gpu_is_the_reference_but_for_rounding(tmp_path: Path) -> None:
    one, other = started(tmp_path / "one"), started(tmp_path / "other")
    plain, fast = make_step(one, REFERENCE), make_step(other, Speedups())
    for number in range(5):
        batch = on_gpu(number)
        plain(batch.image, batch.label)
        fast(batch.image, batch.label)
    assert distance(one, other) < 1e-3  # TF32 convolutions


def test_a_step_does_not_wait_for_the_gpu(tmp_path: Path) -> None:
    run = started(tmp_path, "bf16")
    compute = make_step(run, Speedups())
    batches = [on_gpu(number) for number in range(4)]
    for batch in batches[:3]:  # cuDNN chooses, Triton compiles
        compute(batch.image, batch.label)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        compute(batches[3].image, batches[3].label)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_bad_step_in_a_recording_changes_nothing(tmp_path: Path) -> None:
    run = started(tmp_path)
    steps = make_steps(run, Speedups())
    for number in range(STEPS):
        steps(on_gpu(number), number)
    steps.rest()
    before = [parameter.detach().clone() for parameter in run.network.parameters()]
    bad = on_gpu(STEPS)
    bad.image[0, 0, 3, 3, 3] = math.nan
    outcomes = [*steps(bad, STEPS), *steps.rest()]
    assert [outcome.good for outcome in outcomes] == [False]
    assert all(torch.equal(a, b) for a, b in zip(before, run.network.parameters(), strict=True))
