"""step, data and epoch with tiny sizes, beside the peers where they are installed; and what they refuse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import pytest
import torch

from bench import data, epoch, our_step, step
from bench.drawn import default_plan
from bench.epoch import Size
from bench.measure import Comparison, Measurement
from bench.our_step import Switches
from bench.peers import has_peer
from bench.remote import Remote

TINY = (16, 16, 16)
OURS = "strokenet"


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def with_peers() -> None:
    if not has_peer("nnunetv2"):
        pytest.skip("no nnU-Net: run tools/peers.sh or set STROKENET_PEERS")


class Said:
    """A contender that answers what it is told."""

    def __init__(self, **answer: float):
        self._answer = answer

    def ask_answer(self) -> dict[str, float]:
        return self._answer


def remotes(**of: Said) -> Mapping[str, Remote]:
    return cast("Mapping[str, Remote]", of)


def measured(comparison: Comparison) -> Measurement:
    done = comparison.run()
    assert done.what == comparison.what
    assert next(iter(done.times_ms)) == OURS
    assert len({len(times) for times in done.times_ms.values()}) == 1
    assert all(ms > 0 for times in done.times_ms.values() for ms in times)
    assert all(peak > 0.05 for peak in done.peaks_gb.values())
    return done


@pytest.mark.usefixtures("with_peers")
def test_a_step_of_the_same_loss_is_timed_in_its_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "QUICK", TINY)
    row, one_by_one = step.comparisons(quick=True)
    without = measured(one_by_one)
    assert list(without.times_ms)[1:] == [
        "without kept memory",
        "without channels last",
        "without bias left out",
        "without fused update",
    ]
    done = measured(row)
    assert set(done.times_ms) == {OURS, "nnU-Net"} | ({"MONAI DynUNet"} if has_peer("monai") else set())
    for name, parts in done.parts_ms.items():
        assert list(parts) == ["forward", "backward", "optimiser"], name
        assert 0.5 < sum(parts.values()) / done.median_ms(name) < 1.5  # medians of two rounds
    assert set(done.parts_ms) == set(done.times_ms)
    assert done.floor_ms is not None
    assert 0 < done.floor_ms < done.median_ms(OURS)
    assert "with the first weights; apart: nnU-Net " in done.answers


@pytest.mark.usefixtures("with_peers")
def test_samples_of_one_shape_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "QUICK", TINY)
    augmentation, whole = (measured(row) for row in data.comparisons(quick=True))
    assert list(augmentation.times_ms) == [OURS, "batchgeneratorsv2", "batchgenerators"]
    assert list(whole.times_ms) == [OURS, "batchgeneratorsv2"]
    assert "a sample of 16x16x16, 2 channels, one core" in whole.what


@pytest.mark.usefixtures("with_peers")
def test_epochs_of_both_sides_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    size = Size(patch=TINY, iterations=3, val_iterations=1, shape=(30, 36, 32), cases=2, rounds=2)
    monkeypatch.setattr(epoch, "QUICK", size)
    (row,) = epoch.comparisons(quick=True)
    done = measured(row)
    assert row.what == "3 + 1 iterations, batch 2, 16x16x16, 2 channels"
    for name, parts in done.parts_ms.items():
        assert list(parts) == ["data wait", "after it"]
        assert 0 < parts["data wait"] < done.median_ms(name)
    assert done.answers.startswith("fastest of 2: strokenet ")


def test_without_nnunet_nothing_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STROKENET_PEERS", str(tmp_path))
    for suite in (step, data, epoch):
        assert suite.comparisons(quick=False) == []
        assert "not measured, nnU-Net is not at" in capsys.readouterr().out


def test_the_issues_sizes_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    for suite in (step, data, epoch):
        monkeypatch.setattr(suite, "has_peer", lambda package: True)
    what = "batch 2, 64x64x64, 2 channels"
    assert [row.what for row in step.comparisons(quick=False)] == [what, f"{what}, optimisations off one by one"]
    assert len(data.comparisons(quick=False)) == 4
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(our_step, "our_dtype", lambda device: torch.bfloat16)
    beside, one_by_one = (row.what for row in step.comparisons(quick=False))
    assert beside == "batch 2, 128x128x128, 2 channels"
    assert one_by_one == f"{beside}, optimisations off one by one"
    off = dict(our_step.switched_off(torch.device("cuda")))
    assert list(off) == ["bfloat16", "channels last", "bias left out", "fused update", "graph"]
    assert off["graph"] == Switches(graph=False)
    assert len(data.comparisons(quick=False)) == 8
    assert epoch.comparisons(quick=False)[0].what.startswith("250 + 50 iterations, batch 2, 128x128x128")


def test_another_loss_is_refused() -> None:
    ours = Said(loss=1.0, loss_without_deep_supervision=2.0)
    near = step.compared(remotes(ours=ours, nnunet=Said(loss=1.000001), monai=Said(loss_without_deep_supervision=2.0)))
    assert near == "loss 1.00 with the first weights; apart: nnunet 1e-06, monai 0e+00"
    with pytest.raises(AssertionError, match=r"monai: its loss of the same weights and batch is 1\.0e\+00 from ours"):
        step.compared(remotes(ours=ours, nnunet=Said(loss=1.0), monai=Said(loss_without_deep_supervision=1.0)))


@pytest.mark.parametrize(
    ("name", "value"), [("image_voxels", 4), ("label_voxels", 3), ("not_finite", 1), ("lowest_label", -1)]
)
def test_samples_that_are_not_whole_are_refused(name: str, value: float) -> None:
    whole = {"image_voxels": 8, "label_voxels": 4, "not_finite": 0, "lowest_label": 0, "deviation": 1.0}
    assert data.compared(remotes(ours=Said(**whole), peer=Said(**whole | {"deviation": 2.9}))).startswith("random")
    for wrong in ({name: value}, {"deviation": 3.1}):
        with pytest.raises(AssertionError, match="peer: "):
            data.compared(remotes(ours=Said(**whole), peer=Said(**whole | wrong)))


def test_what_does_nothing_here_is_not_switched_off() -> None:
    off = [name for name, _ in our_step.switched_off(torch.device("cpu"))]
    assert off == ["kept memory", "channels last", "bias left out", "fused update"]
    assert Switches().bfloat16


@pytest.mark.parametrize(("edge", "features"), [(64, (32, 64, 128, 256, 320)), (128, (32, 64, 128, 256, 320, 320))])
def test_the_plan_of_a_patch_is_nnunets_default(edge: int, features: tuple[int, ...]) -> None:
    plan = default_plan((edge, edge, edge))
    assert plan.patch == (edge, edge, edge)
    assert plan.network.features == features
    assert plan.network.encoder_blocks == (2,) * len(features)
