"""Cases on a GPU: the memory that was promised, and the same samples resident, streamed and by the CPU's memory map."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from strokenet.preprocess.store import Store, plan_key
from strokenet.train.feed import Augmentation, Batch, Feed
from strokenet.train.resident import Source, choose, fold_source, hold
from strokenet.train.run import FoldCases, fold_cases
from strokenet.workspace import Workspace
from tests.train.workspaces import CASES, drawn_case, make_workspace

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch sees")
GPU = torch.device("cuda", 0)
SHAPE = (120, 144, 128)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Cases large enough that torch's rounding of an allocation is small, of values that bfloat16 holds."""
    workspace = make_workspace(Path(tmp_path_factory.mktemp("resident")))
    for seed, case_id in enumerate(CASES):
        case = drawn_case(case_id, seed, shape=SHAPE)
        exact = replace(case, image=case.image.to(torch.bfloat16).float())
        Store(workspace.preprocessed).write(exact, f"{plan_key(workspace.read_plan())}-drawn")
    return workspace


def cases_of(workspace: Workspace) -> FoldCases:
    return fold_cases(workspace, workspace.read_plan(), "0")


def batches(workspace: Workspace, source: Source, augmentation: Augmentation) -> list[Batch]:
    cases = cases_of(workspace)
    feed = Feed(
        workspace.read_plan(),
        train=cases.train,
        val=cases.val,
        batch_size=4,
        seed=3,
        augmentation=augmentation,
        device=source.device,
        source=source,
    )
    with feed:
        return [
            Batch(image=batch.image.cpu(), label=batch.label.cpu(), cases=batch.cases)
            for batch in feed.batches("train", 0, range(12))
        ]


def resident(workspace: Workspace, number: int) -> Source:
    cases = cases_of(workspace)
    every = choose((*cases.train, *cases.val), heads=2, budget_bytes=10**12)
    some = choose(every.cases, heads=2, budget_bytes=number * every.predicted_bytes // 3)
    assert len(some.cases) == number
    return Source(device=GPU, resident=hold(some, GPU))


def test_cuda_holds_what_was_predicted_within_a_tenth(workspace: Workspace) -> None:
    cases = cases_of(workspace)
    holding = choose((*cases.train, *cases.val), heads=2, budget_bytes=10**12)
    before = torch.cuda.memory_allocated(GPU)
    held = hold(holding, GPU)
    assert len(held) == 3
    assert torch.cuda.memory_allocated(GPU) - before == pytest.approx(holding.predicted_bytes, rel=0.1)


@pytest.mark.parametrize("augmentation", ["device", "none"])
def test_resident_samples_equal_streamed_ones(workspace: Workspace, augmentation: Augmentation) -> None:
    streamed = batches(workspace, resident(workspace, 0), augmentation)
    for number in (1, 3):
        found = batches(workspace, resident(workspace, number), augmentation)
        for a, b in zip(found, streamed, strict=True):
            assert a.cases == b.cases
            assert torch.equal(a.image, b.image)
            assert torch.equal(a.label, b.label)


def test_samples_equal_those_of_the_cpu(workspace: Workspace) -> None:
    on_cpu = batches(workspace, Source(device=torch.device("cpu")), "none")
    on_gpu = batches(workspace, resident(workspace, 3), "none")
    for a, b in zip(on_gpu, on_cpu, strict=True):
        assert a.cases == b.cases
        assert torch.equal(a.image, b.image)
        assert torch.equal(a.label, b.label)


def test_left_to_itself_a_large_gpu_holds_every_case(workspace: Workspace) -> None:
    if torch.cuda.mem_get_info(GPU)[0] < 16e9:
        pytest.skip("less than 16 GB are free")
    cases = cases_of(workspace)
    source = fold_source(
        (*cases.train, *cases.val),
        workspace.read_plan(),
        asked_gb=None,
        batch_size=4,
        dtype=torch.bfloat16,
        device=GPU,
    )
    assert set(source.resident) == set(CASES)
    assert not source.streams(cases.train)
