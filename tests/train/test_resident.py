"""Where cases lie: the same samples from the device, from disk and streamed, and the memory that is promised."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from planner.plan import Plan, Triple
from strokenet.data.errors import InputError
from strokenet.preprocess.store import Store, StoredCase, plan_key
from strokenet.train import resident as residents
from strokenet.train.augment import augment, draw
from strokenet.train.feed import Augmentation, Batch, Feed
from strokenet.train.patches import OUTSIDE_LABEL, Phase, Spot, cut, is_forced, overlap, place, sample_rng
from strokenet.train.resident import Source, budget, choose, cut_tensor, fold_source, hold, needed, resident_bytes
from strokenet.train.run import FoldCases, TrainConfig, fold_cases
from strokenet.train.spatial import initial_patch, seen_box
from strokenet.workspace import Workspace
from tests.plans import paper_plan, tiny_plan
from tests.train.workspaces import CASES, drawn_case, make_workspace

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)  # named, never used


def rounded(workspace: Workspace) -> Workspace:
    """The drawn cases again, with images that bfloat16 holds."""
    plan = workspace.read_plan()
    for seed, case_id in enumerate(CASES):
        case = drawn_case(case_id, seed)
        exact = replace(case, image=case.image.to(torch.bfloat16).float())
        Store(workspace.preprocessed).write(exact, f"{plan_key(plan)}-drawn")
    return workspace


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return rounded(make_workspace(tmp_path_factory.mktemp("exact")))


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return make_workspace(tmp_path_factory.mktemp("usual"))


def cases_of(workspace: Workspace) -> FoldCases:
    return fold_cases(workspace, workspace.read_plan(), "0")


def holding_source(workspace: Workspace, budget_bytes: int = 2**40) -> Source:
    """Resident on the CPU, which no command does: the cut and the rounding are those of a GPU."""
    cases = cases_of(workspace)
    holding = choose((*cases.train, *cases.val), heads=2, budget_bytes=budget_bytes)
    return Source(device=CPU, resident=hold(holding, CPU))


def draw_batches(
    workspace: Workspace,
    source: Source | None,
    steps: range = range(6),
    phase: Phase = "train",
    augmentation: Augmentation = "device",
    batch_size: int = 4,
) -> list[Batch]:
    cases = cases_of(workspace)
    feed = Feed(
        workspace.read_plan(),
        train=cases.train,
        val=cases.val,
        batch_size=batch_size,
        seed=3,
        augmentation=augmentation,
        device=CPU,
        source=source,
    )
    with feed:
        return list(feed.batches(phase, 1, steps))


def assert_same(one: list[Batch], other: list[Batch]) -> None:
    assert [batch.cases for batch in one] == [batch.cases for batch in other]
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.image, b.image)
        assert torch.equal(a.label, b.label)


@pytest.mark.parametrize("augmentation", ["device", "none"])
@pytest.mark.parametrize("phase", ["train", "val"])
def test_resident_and_streamed_samples_equal_those_of_the_memory_map(
    exact: Workspace, monkeypatch: pytest.MonkeyPatch, augmentation: Augmentation, phase: Phase
) -> None:
    mapped = draw_batches(exact, None, phase=phase, augmentation=augmentation)
    with monkeypatch.context() as patched:
        patched.setattr(residents, "cut", None)  # proves that the memory map is not read
        assert_same(draw_batches(exact, holding_source(exact), phase=phase, augmentation=augmentation), mapped)
    monkeypatch.setattr(Source, "cut", Source._stream)
    assert_same(draw_batches(exact, None, phase=phase, augmentation=augmentation), mapped)


def test_samples_of_some_resident_cases_equal_those_of_all(exact: Workspace) -> None:
    one = resident_bytes(cases_of(exact).train[0], torch.int8)
    some = holding_source(exact, 2 * one)
    assert len(some.resident) == 2
    assert_same(draw_batches(exact, some), draw_batches(exact, holding_source(exact)))


def test_later_steps_of_resident_cases_do_not_depend_on_earlier_ones(exact: Workspace) -> None:
    source = holding_source(exact)
    assert_same(draw_batches(exact, source, range(3, 6)), draw_batches(exact, source)[3:])


def test_a_resident_image_is_off_by_one_part_in_256_at_most(usual: Workspace) -> None:
    mapped = draw_batches(usual, None, augmentation="none")
    held = draw_batches(usual, holding_source(usual), augmentation="none")
    for a, b in zip(held, mapped, strict=True):
        error = (a.image - b.image).abs()
        assert error.max() > 0
        assert (error <= b.image.abs() / 256).all()
        assert torch.equal(a.label, b.label)


def before(plan: Plan, cases: FoldCases, seed: int, epoch: int, step: int, batch_size: int) -> tuple[Tensor, Tensor]:
    """A training batch as it was made when every sample was cut with its margin, then drawn, then augmented."""
    rngs = [sample_rng(seed, "train", epoch, step, index) for index in range(batch_size)]
    raw = initial_patch(plan.patch)
    image = torch.zeros(batch_size, len(plan.channels), *raw)
    label = torch.zeros(batch_size, *raw, dtype=torch.int16)
    for index, rng in enumerate(rngs):
        case = cases.train[int(rng.integers(len(cases.train)))]
        foreground = tuple(case.foreground.values()) if is_forced(index, batch_size) else ()
        d, h, w = case.image.shape[1:]
        start = place(rng, (d, h, w), raw, plan.patch, foreground)
        cut(case.image, start, image[index].numpy(), 0.0)
        cut(case.label, start, label[index].numpy(), OUTSIDE_LABEL)
    draws = [draw(rng, channels=len(plan.channels), patch=plan.patch, mirror_axes=plan.mirror_axes) for rng in rngs]
    assert image.shape[2:] != plan.patch
    image, label = augment(
        image, label, draws, patch=plan.patch, heads=plan.heads, mask_channels=plan.use_mask_for_norm
    )
    return image, label.long().clamp_min(0)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"patch": (12, 16, 20)},
        {"patch": (4, 16, 16)},  # flat: turned in its plane alone
        {"mirror_axes": (0, 1, 2), "use_mask_for_norm": (True, False)},
    ],
)
def test_drawing_before_the_cut_changes_no_sample(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Bit for bit, moved samples and others."""
    plan = tiny_plan(**changes)
    workspace = make_workspace(tmp_path, plan)
    cases = cases_of(workspace)
    for step, batch in enumerate(draw_batches(workspace, None, range(8), batch_size=5)):
        image, label = before(plan, cases, 3, 1, step, 5)
        assert torch.equal(batch.image, image)
        assert torch.equal(batch.label, label)


def test_no_sample_is_cut_with_more_margin_than_it_needs(usual: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = usual.read_plan()
    sizes: list[tuple[int, ...]] = []

    def noted(array: Any, start: Triple, out: np.ndarray, fill: float) -> None:
        sizes.append(out.shape[-3:])
        cut(array, start, out, fill)

    monkeypatch.setattr(residents, "cut", noted)
    draw_batches(usual, None, range(25))
    expected: list[Triple] = []
    cases = cases_of(usual).train
    raw = initial_patch(plan.patch)
    for step in range(25):
        for index in range(4):
            rng = sample_rng(3, "train", 1, step, index)
            case = cases[int(rng.integers(len(cases)))]
            d, h, w = case.image.shape[1:]
            place(rng, (d, h, w), raw, plan.patch, [case.foreground[1]] if index == 3 else ())
            move = draw(rng, channels=2, patch=plan.patch, mirror_axes=plan.mirror_axes).spatial
            expected += 2 * [seen_box(move, plan.patch, raw)]  # image and label
    assert sorted(sizes) == sorted(expected)
    assert 40 < expected.count(plan.patch) / 2 < 100  # 64 of 100 are expected
    assert max(sizes) > plan.patch


@pytest.mark.parametrize("seed", range(5))
def test_a_tensor_is_cut_as_an_array_is(seed: int) -> None:
    rng = np.random.default_rng(seed)
    array = rng.integers(-99, 99, (2, 5, 6, 7)).astype(np.float32)
    size = tuple(int(n) for n in rng.integers(1, 9, 3))
    for _ in range(50):
        d, h, w = (int(n) for n in rng.integers(-11, 11, 3))
        expected, found = np.full((2, *size), np.nan, np.float32), torch.full((2, *size), torch.nan)
        cut(array, (d, h, w), expected, -1)
        cut_tensor(torch.from_numpy(array).to(torch.bfloat16), (d, h, w), found, -1)
        np.testing.assert_array_equal(found.numpy(), expected)


def test_what_lies_beside_an_array_overlaps_nowhere() -> None:
    for start in (-4, -9, 5, 8):
        source, target = overlap([start], [4], [5])
        assert np.arange(5)[source].size == np.arange(4)[target].size == 0


def test_the_middle_of_a_spot_is_what_a_plain_transform_keeps() -> None:
    spot = Spot(case=None, start=(-3, 5, 7))  # type: ignore[arg-type]
    assert spot.centred((8, 9, 9), (4, 4, 5)).start == (-3 + 2, 5 + 2, 7 + 2)


def shaped(case_id: str, shape: Triple, channels: int = 2) -> StoredCase:
    """A case of this shape that takes no memory."""
    return StoredCase(
        case_id=case_id,
        image=np.broadcast_to(np.float32(1), (channels, *shape)),
        label=np.broadcast_to(np.int16(1), shape),
        foreground={},
    )


def test_the_smallest_cases_are_held_until_the_budget_is_spent() -> None:
    cases = [shaped("large", (9, 9, 9)), shaped("small", (2, 3, 4)), shaped("middle", (4, 4, 4))]
    two = 5 * (2 * 3 * 4 + 4 * 4 * 4)  # 2 channels of 2 bytes, and the label's one
    for room, names in (
        (two - 1, ["small"]),
        (two, ["small", "middle"]),
        (two + 5 * 9**3, ["small", "middle", "large"]),
    ):
        holding = choose(cases, heads=2, budget_bytes=room)
        assert [case.case_id for case in holding.cases] == names
        assert holding.streamed == 3 - len(names)
        assert holding.predicted_bytes <= room


def test_a_case_on_both_sides_of_a_fold_is_held_once() -> None:
    case = shaped("a", (4, 4, 4))
    holding = choose([case, case], heads=2, budget_bytes=10**6)
    assert (len(holding.cases), holding.streamed, holding.predicted_bytes) == (1, 0, 5 * 64)


@pytest.mark.parametrize(("heads", "dtype"), [(128, torch.int8), (129, torch.int16)])
def test_labels_beyond_127_take_two_bytes(heads: int, dtype: torch.dtype) -> None:
    case = StoredCase(
        case_id="a",
        image=np.zeros((1, 2, 2, 2), np.float32),
        label=np.array([-1, 0, 1, 2, 3, 4, 5, heads - 1], np.int16).reshape(2, 2, 2),
        foreground={},
    )
    held = hold(choose([case], heads=heads, budget_bytes=10**6), CPU)["a"]
    assert held.label.dtype == dtype
    assert held.label.flatten().tolist() == case.label.flatten().tolist()


def test_what_is_predicted_is_what_torch_holds(usual: Workspace) -> None:
    """Within 10 %, in the storages that the views share."""
    cases = cases_of(usual)
    holding = choose((*cases.train, *cases.val), heads=2, budget_bytes=10**9)
    held = hold(holding, CPU)
    storages = {s.data_ptr(): s.nbytes() for case in held.values() for s in _storages(case.image, case.label)}
    assert len(held) == 3
    assert sum(storages.values()) == pytest.approx(holding.predicted_bytes, rel=0.1)


def _storages(*tensors: Tensor) -> list[torch.UntypedStorage]:
    return [tensor.untyped_storage() for tensor in tensors]


def test_655_atlas_cases_take_11_gb_a_channel() -> None:
    cases = [shaped(str(n), (197, 233, 189), channels=1) for n in range(655)]
    holding = choose(cases, heads=2, budget_bytes=10**12)
    image = 2 * 655 * 197 * 233 * 189
    assert holding.predicted_bytes == image * 3 // 2
    assert round(image / 1e9) == 11
    assert holding.line(GPU) == "cases on cuda:0: 655 of 655, 17.05 GB of 1000.00 GB; 0 streamed"


def test_what_is_held_is_said_before_it_is_copied(
    usual: Workspace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "strokenet")
    monkeypatch.setattr(residents, "_blocks", _no_memory)
    with pytest.raises(MemoryError):
        fold_source(cases_of(usual).train, tiny_plan(), asked_gb=1, batch_size=2, dtype=torch.float32, device=GPU)
    assert [record.getMessage() for record in caplog.records] == [
        "cases on cuda:0: 2 of 2, 0.00 GB of 1.00 GB; 0 streamed"
    ]


def _no_memory(*_: object) -> None:
    raise MemoryError


def test_on_a_cpu_nothing_is_copied(usual: Workspace) -> None:
    for asked in (None, 5.0):
        source = fold_source(
            cases_of(usual).train, tiny_plan(), asked_gb=asked, batch_size=2, dtype=torch.float32, device=CPU
        )
        assert source.resident == {}
        assert not source.streams(cases_of(usual).train)


def test_cases_that_are_not_held_are_streamed_to_a_gpu(usual: Workspace) -> None:
    cases = cases_of(usual).train
    held = holding_source(usual).resident
    assert Source(device=GPU).streams(cases)
    assert not Source(device=GPU, resident=held).streams(cases)


@pytest.mark.parametrize(("free_gb", "cases_get"), [(80.0, True), (3.0, False)])
def test_cases_get_four_fifths_of_what_the_network_leaves(
    monkeypatch: pytest.MonkeyPatch, free_gb: float, cases_get: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int(free_gb * 1e9), 10**11))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 5 * 10**8)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 10**8)  # 0.4 GB of torch's own are free too
    plan = paper_plan("T1", "FLAIR")
    given = budget(None, plan, batch_size=2, dtype=torch.bfloat16, device=GPU)
    need = needed(plan, batch_size=2, dtype=torch.bfloat16)
    assert given == pytest.approx(0.8 * (free_gb * 1e9 + 4e8 - need) if cases_get else 0)


def test_the_default_network_needs_what_nnunet_plans_for_it_and_the_feeds_batches() -> None:
    """8 GB are planned for 560 million feature-map voxels a sample; the paper's network writes 451 million."""
    plan = paper_plan("T1")
    gigabytes = needed(plan, batch_size=2, dtype=torch.bfloat16) / 1e9
    assert 8 * 451 / 560 < gigabytes < 8
    assert needed(plan, batch_size=4, dtype=torch.bfloat16) == pytest.approx(2e9 * gigabytes)
    assert needed(plan, batch_size=2, dtype=torch.float32) > 1.8e9 * gigabytes


def test_what_is_asked_for_is_given_and_only_cuda_tells_what_is_free() -> None:
    options: dict[str, Any] = {"batch_size": 2, "dtype": torch.float32}
    assert budget(1.5, tiny_plan(), device=GPU, **options) == 15 * 10**8
    assert budget(0, tiny_plan(), device=GPU, **options) == 0
    assert budget(None, tiny_plan(), device=torch.device("mps"), **options) == 0


def test_too_many_cases_for_the_device_are_one_line(usual: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    holding = choose(cases_of(usual).train, heads=2, budget_bytes=10**9)

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 70 GiB.\nmore")

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(
        InputError, match=r"^2 cases of 0.0 GB do not fit the memory of cuda:0; .*--resident-gb"
    ) as caught:
        hold(holding, GPU)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_a_budget_is_a_number_of_gigabytes(value: float) -> None:
    with pytest.raises(InputError, match="^resident_gb is "):
        TrainConfig(resident_gb=value)
