"""Modality dropout: what is drawn, that nothing else moves, and what a run and its weights remember of it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from strokenet.data.errors import InputError
from strokenet.model.checkpoint import load_model, save_weights, trained_dropout
from strokenet.model.network import build_network
from strokenet.train import feed as feeds
from strokenet.train.dropout import check_dropout, draw_dropped, drop_channels
from strokenet.train.feed import Augmentation, Batch, Feed
from strokenet.train.patches import Phase, Stream, sample_rng
from strokenet.train.run import TrainConfig, fold_cases
from strokenet.train.state import load_state, save_state
from strokenet.train.train import train
from strokenet.workspace import Workspace
from tests.plans import STATS, tiny_plan
from tests.train.workspaces import assert_same_run, make_workspace, short


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return make_workspace(tmp_path_factory.mktemp("dropout"))


def make_feed(workspace: Workspace, p: float | None, how: Augmentation = "device") -> Feed:
    """Batches of three samples; p None: a feed that was never told of dropout."""
    plan = workspace.read_plan()
    cases = fold_cases(workspace, plan, "0")
    more: dict[str, Any] = {} if p is None else {"modality_dropout": p}
    return Feed(
        plan,
        train=cases.train,
        val=cases.val,
        batch_size=3,
        seed=5,
        augmentation=how,
        device=torch.device("cpu"),
        **more,
    )


def batches(
    workspace: Workspace, p: float | None, how: Augmentation = "device", phase: Phase = "train", first: int = 0
) -> list[Batch]:
    """Steps `first` to 4."""
    with make_feed(workspace, p, how) as feed:
        return list(feed.batches(phase, 2, range(first, 4)))


def same(one: list[Batch], other: list[Batch]) -> bool:
    return all(
        torch.equal(a.image, b.image) and torch.equal(a.label, b.label) and a.cases == b.cases
        for a, b in zip(one, other, strict=True)
    )


def test_every_non_empty_proper_subset_is_equally_likely() -> None:
    rng = np.random.default_rng(0)
    drawn = Counter(draw_dropped(rng, 3, 1.0) for _ in range(6000))
    assert set(drawn) == {(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)}
    assert all(abs(count - 1000) < 4 * np.sqrt(6000 * 1 / 6 * 5 / 6) for count in drawn.values())


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_a_sample_loses_channels_with_probability_p(p: float) -> None:
    rng = np.random.default_rng(1)
    share = np.mean([draw_dropped(rng, 2, p) != () for _ in range(4000)])
    assert abs(share - p) <= 4 * np.sqrt(p * (1 - p) / 4000)


def test_whole_channels_become_zero_and_the_others_stay() -> None:
    image = torch.full((8, 2, 3, 4, 5), 7.0)
    drop_channels(image, [np.random.default_rng(seed) for seed in range(8)], 1.0)
    values = image.flatten(2)
    assert ((values == 0).all(2) ^ (values == 7).all(2)).all()  # (N, C): each the one or the other
    assert (values.sum((1, 2)) == 7 * 60).all()  # one of two is left in every sample
    assert len({tuple(row) for row in (values[:, :, 0] == 0).tolist()}) == 2


@pytest.mark.parametrize("how", ["device", "none", "batchgenerators"])
def test_dropout_takes_channels_of_the_same_batches_after_augmentation(
    workspace: Workspace, how: Augmentation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a feed that knows no dropout only whole channels differ, and they are 0: no noise refills them."""
    monkeypatch.setattr(feeds, "worker_count", lambda *_: 1)
    with make_feed(workspace, None, how) as feed:  # one team of workers for both: they take seconds to start
        usual = list(feed.batches("train", 2, range(2)))
        feed._modality_dropout = 1.0
        dropped = list(feed.batches("train", 2, range(2)))
    for a, b in zip(usual, dropped, strict=True):
        assert a.cases == b.cases
        assert torch.equal(a.label, b.label)
        kept = b.image.flatten(2).any(2)  # (N, C)
        assert kept.sum(1).tolist() == [1, 1, 1]
        assert torch.equal(b.image[kept], a.image[kept])


def test_the_same_channels_are_lost_whatever_the_augmentation(workspace: Workspace) -> None:
    """They have a stream of their own: what augmentation drew before does not move them."""
    lost = [
        torch.cat([~batch.image.flatten(2).any(2) for batch in batches(workspace, 0.5, how)])
        for how in get_args(Augmentation)
        if how != "batchgenerators"  # the workers start slowly, and the drops happen in the same line
    ]
    assert lost[0].any()
    assert torch.equal(*lost)


def test_without_dropout_the_batches_are_what_they_were(workspace: Workspace) -> None:
    assert same(batches(workspace, 0.0), batches(workspace, None))
    assert not same(batches(workspace, 0.5), batches(workspace, None))


def test_the_streams_of_before_keep_their_numbers() -> None:
    """A run of an earlier version resumes on the same patches: (phase, epoch, step, index) is the key, as it was."""
    keys = [np.random.SeedSequence(entropy=9, spawn_key=(number, 1, 2, 3)) for number in (0, 1)]
    cut, checked, dropped = (sample_rng(9, stream, 1, 2, 3).random() for stream in get_args(Stream))
    assert [cut, checked] == [np.random.default_rng(key).random() for key in keys]
    assert dropped not in (cut, checked)


def test_dropped_batches_depend_on_neither_threads_nor_earlier_steps(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = batches(workspace, 0.5)
    assert same(batches(workspace, 0.5, first=2), usual[2:])
    monkeypatch.setattr(feeds, "SPARE", 9)
    assert same(batches(workspace, 0.5), usual)


def test_validation_loses_nothing(workspace: Workspace) -> None:
    assert same(batches(workspace, 1.0, phase="val"), batches(workspace, None, phase="val"))


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_a_probability_outside_0_to_1_is_refused(p: float) -> None:
    with pytest.raises(InputError, match=r"modality_dropout is .*; allowed: 0 to 1"):
        TrainConfig(modality_dropout=p)


def test_plans_whose_channels_cannot_be_dropped_are_refused_in_one_line(tmp_path: Path) -> None:
    single = {"normalisation": ("zscore",), "use_mask_for_norm": (False,), "intensity": (STATS,)}
    alone = tiny_plan(channels=("T1",), **single)
    check_dropout(alone, 0.0)
    with pytest.raises(InputError, match="the plan has T1 alone; two channels are needed"):
        check_dropout(alone, 0.5)
    stats = STATS.__class__(mean=40, std=9, min=0, max=99, median=40, percentile_00_5=5, percentile_99_5=90)
    mixed = tiny_plan(channels=("T1", "CT"), normalisation=("zscore", "ct"), intensity=(STATS, stats))
    with pytest.raises(InputError, match="an absent CT would not be 0 after its normalisation, ct") as caught:
        check_dropout(mixed, 0.5)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="an absent CT"):
        train(make_workspace(tmp_path / "work", mixed), short(modality_dropout=0.5))
    assert not (tmp_path / "work" / "fold_0").exists()


def test_a_resumed_run_equals_the_unbroken_one_and_keeps_its_dropout(tmp_path: Path) -> None:
    whole, broken = make_workspace(tmp_path / "whole"), make_workspace(tmp_path / "broken")
    train(whole, short(modality_dropout=0.5))
    train(broken, short(modality_dropout=0.5, stop_epoch=1))
    with pytest.raises(InputError, match=r"--modality-dropout was 0.5, is 0.0"):
        train(broken, short(resume=True))
    train(broken, short(modality_dropout=0.5, resume=True))
    assert_same_run(whole, broken)
    assert load_model(whole.root).modality_dropout == 0.5


def test_a_run_begun_before_there_was_dropout_resumes_without_it(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path / "work")
    train(workspace, short(stop_epoch=1))
    state = load_state(workspace.fold("0"))
    assert state is not None
    del state.settings["modality_dropout"]
    save_state(workspace.fold("0"), state)
    with pytest.raises(InputError, match=r"--modality-dropout was 0.0, is 0.5"):
        train(workspace, short(resume=True, modality_dropout=0.5))
    assert train(workspace, short(resume=True)).finished
    assert load_model(workspace.root).modality_dropout == 0.0


def _write_folds(root: Path, *notes: dict[str, Any]) -> None:
    plan = tiny_plan()
    Workspace(root).write_plan(plan)
    for fold, note in enumerate(notes):
        save_weights(Workspace(root).fold(str(fold)).last, build_network(plan).state_dict(), note=note)


def test_folds_that_disagree_on_dropout_are_one_line(tmp_path: Path) -> None:
    _write_folds(tmp_path, {"modality_dropout": "0.5"}, {"epoch": "3"})
    message = r"folds were trained with modality dropout 0.5 \(fold 0\), 0 \(fold 1\); choose folds of one kind"
    for read in (load_model, trained_dropout):
        with pytest.raises(InputError, match=message):
            read(tmp_path)
    assert load_model(tmp_path, folds=["0"]).modality_dropout == 0.5
    assert trained_dropout(tmp_path, ["1"]) == 0.0


@pytest.mark.parametrize("value", ["much", "nan", "2", "-1", None, [1], 10**400], ids=lambda value: str(value)[:5])
def test_a_damaged_note_is_one_line(tmp_path: Path, value: Any) -> None:
    _write_folds(tmp_path, {"modality_dropout": value})
    assert json.dumps(value)  # the file is whole, only its note is not
    with pytest.raises(InputError, match="the note in its header is damaged"):
        trained_dropout(tmp_path)
