"""Our contenders: no batch is made and no epoch is begun outside of a turn, and the waits are added up."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench import our_train
from bench.our_train import EPOCHS, _Pausing, _samples, _seconds

CPU = torch.device("cpu")


def test_a_turn_makes_the_batches_that_it_is_asked_for_and_no_other() -> None:
    asked: list[int] = []

    def batches(count: int) -> Iterator[tuple[Tensor, Tensor]]:
        asked.append(count)
        for _ in range(count):
            time.sleep(0.02)
            yield torch.ones(2, 1, 3, 3, 3), torch.zeros(2, 3, 3, 3)

    contender = _samples(batches, CPU, 2)
    turn = contender.turn(5)
    assert asked == [3]
    assert 10 <= turn.ms < 100  # 3 batches of 20 ms, 6 samples
    assert contender.answer()["image_voxels"] == 27


def test_an_epoch_begins_when_it_may_and_the_wait_for_batches_is_added_up() -> None:
    pausing, seen = _Pausing(), list[object]()

    def slow() -> Iterator[str]:
        for batch in ("first", "second"):
            time.sleep(0.05)
            yield batch

    def run() -> None:
        for epoch in pausing(range(EPOCHS), total=EPOCHS, what="train fold 0"):
            seen.append(epoch)
            seen.extend(pausing(slow(), total=2, what="epoch 1"))

    threading.Thread(target=run, daemon=True).start()
    time.sleep(0.05)
    assert seen == []
    for number in range(2):
        pausing.may_begin.release()
        assert pausing.has_ended.acquire(timeout=30)
        assert seen == [0, "first", "second", 1, "first", "second"][: 3 * number + 3]
    assert 0.2 <= pausing.waited_seconds < 2


def test_a_log_without_the_epochs_row_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(our_train.time, "sleep", lambda seconds: None)
    log = tmp_path / "log.csv"
    for content in (None, "epoch,seconds\n0,1.5\n"):
        if content is not None:
            log.write_text(content)
        with pytest.raises(RuntimeError, match="no row of epoch 2"):
            _seconds(log, 2)
    assert _seconds(log, 1) == [1.5]
