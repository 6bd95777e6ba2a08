"""Batches: the same whenever they are asked for, and what the worker processes do."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from strokenet.data.errors import InputError
from strokenet.train import feed as feeds
from strokenet.train import resident as residents
from strokenet.train.feed import Augmentation, Batch, Feed, WorkersLost
from strokenet.train.patches import Phase
from strokenet.train.run import fold_cases
from strokenet.workspace import Workspace
from tests.plans import tiny_plan
from tests.train.workspaces import make_workspace


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return make_workspace(tmp_path_factory.mktemp("feed"))


def make_feed(workspace: Workspace, augmentation: Augmentation, *, batch_size: int = 3, seed: int = 0) -> Feed:
    plan = workspace.read_plan()
    cases = fold_cases(workspace, plan, "0")
    return Feed(
        plan,
        train=cases.train,
        val=cases.val,
        batch_size=batch_size,
        seed=seed,
        augmentation=augmentation,
        device=torch.device("cpu"),
    )


def draw(
    workspace: Workspace, augmentation: Augmentation, steps: range, phase: Phase = "train", epoch: int = 0, **more: Any
) -> list[Batch]:
    with make_feed(workspace, augmentation, **more) as feed:
        return list(feed.batches(phase, epoch, steps))


def assert_same(one: list[Batch], other: list[Batch]) -> None:
    assert [batch.cases for batch in one] == [batch.cases for batch in other]
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.image, b.image)
        assert torch.equal(a.label, b.label)


@pytest.mark.parametrize("augmentation", ["device", "none"])
def test_batches_have_the_networks_shape_and_labels(workspace: Workspace, augmentation: Augmentation) -> None:
    for phase in ("train", "val"):
        for batch in draw(workspace, augmentation, range(6), phase):
            assert (batch.image.shape, batch.image.dtype) == ((3, 2, 16, 16, 16), torch.float32)
            assert (batch.label.shape, batch.label.dtype) == ((3, 16, 16, 16), torch.int64)
            assert set(batch.label.unique().tolist()) <= {0, 1}
            assert set(batch.cases) <= ({"a", "b"} if phase == "train" else {"c"})
            assert (batch.label[-1] == 1).any()  # the forced sample


@pytest.mark.parametrize("phase", ["train", "val"])
def test_later_steps_do_not_depend_on_earlier_ones(workspace: Workspace, phase: Phase) -> None:
    assert_same(draw(workspace, "device", range(3, 7), phase), draw(workspace, "device", range(7), phase)[3:])


@pytest.mark.parametrize("spare", [0, 1, 9])
def test_looking_further_ahead_changes_nothing(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, spare: int
) -> None:
    usual = draw(workspace, "device", range(5))
    monkeypatch.setattr(feeds, "SPARE", spare)
    assert_same(draw(workspace, "device", range(5)), usual)


def test_batches_differ_by_seed_epoch_step_and_phase(workspace: Workspace) -> None:
    first, second = draw(workspace, "none", range(2))
    others = [
        second,
        *draw(workspace, "none", range(1), epoch=1),
        *draw(workspace, "none", range(1), seed=1),
        *draw(workspace, "none", range(1), "val"),
    ]
    assert all(not torch.equal(first.image, other.image) for other in others)


def test_validation_is_never_augmented(workspace: Workspace) -> None:
    assert_same(draw(workspace, "device", range(2), "val"), draw(workspace, "none", range(2), "val"))


def test_batches_are_made_while_the_network_computes(workspace: Workspace) -> None:
    """The batch after next is begun, on another thread, before the first is given back."""
    made: list[tuple[int, str]] = []
    with make_feed(workspace, "device") as feed:
        prepare = feed._batch

        def noted(phase: Phase, epoch: int, step: int) -> Batch:
            made.append((step, threading.current_thread().name))
            return prepare(phase, epoch, step)

        feed._batch = noted  # type: ignore[method-assign]
        batches = feed.batches("train", 0, range(9))
        next(batches)
        feed._threads.submit(int).result()  # whatever was asked for is made by now
        batches.close()
    assert [step for step, _ in made] == [0, 1, 2]
    assert all(name.startswith("feed") for _, name in made)


def test_a_failure_while_cutting_reaches_the_loop(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(residents, "cut", broken)
    with pytest.raises(OSError, match="Input/output error"):
        draw(workspace, "device", range(2))


@pytest.fixture(scope="module")
def published(workspace: Workspace) -> Iterator[Feed]:
    """One team of workers for several tests: they take seconds to start."""
    with make_feed(workspace, "batchgenerators", batch_size=2) as feed:
        yield feed


def test_batchgenerators_gives_the_same_batches_for_a_seed(published: Feed) -> None:
    batches = list(published.batches("train", 0, range(4)))
    for batch in batches:
        assert (batch.image.shape, batch.image.dtype) == ((2, 2, 16, 16, 16), torch.float32)
        assert (batch.label.shape, batch.label.dtype) == ((2, 16, 16, 16), torch.int64)
        assert set(batch.label.unique().tolist()) <= {0, 1}
    assert_same(list(published.batches("train", 0, range(1, 4))), batches[1:])
    assert not torch.equal(batches[0].image, batches[1].image)


def test_a_signal_to_our_group_of_processes_does_not_reach_the_workers(published: Feed) -> None:
    """As torchrun sends one: the step at hand still needs them."""
    assert published._pool.submit(os.getpgrp).result() != os.getpgrp()


def test_an_error_in_a_worker_names_the_case(
    published: Feed, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(published, "_plan", tiny_plan(mirror_axes=()))
    monkeypatch.setattr(feeds, "augment_published", _fails)
    with pytest.raises(InputError, match=r"^[ab]: --augment batchgenerators failed \(ZeroDivisionError: ") as caught:
        next(published.batches("train", 0, range(1)))
    assert "\n" not in str(caught.value)
    assert "in _fails" in caplog.text  # the traceback of the worker


def test_a_killed_worker_is_one_line(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds, "worker_count", lambda *_: 1)
    monkeypatch.setattr(feeds, "augment_published", _is_killed)
    message = r"^[ab]: a worker of --augment batchgenerators was killed"
    with pytest.raises(WorkersLost, match=message) as caught:
        draw(workspace, "batchgenerators", range(1), batch_size=1)
    assert "\n" not in str(caught.value)


def _fails(*_: object, **__: object) -> None:
    raise ZeroDivisionError("in a worker")


def _is_killed(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
