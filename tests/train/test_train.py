"""The loop: one step against torch written out, the schedule, the averages, losses that are not finite, learning."""

from __future__ import annotations

import math
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from planner.plan import PostprocessRule
from strokenet.cli import main
from strokenet.data.errors import InputError
from strokenet.model.checkpoint import load_model, load_weights
from strokenet.model.network import build_network
from strokenet.preprocess.store import Store, plan_key
from strokenet.train import step as stepping
from strokenet.train import train as loop
from strokenet.train.feed import Batch, Feed
from strokenet.train.loss import deep_supervision_loss
from strokenet.train.patches import sample_rng
from strokenet.train.record import _is_best
from strokenet.train.run import fold_cases, start_run
from strokenet.train.state import load_state
from strokenet.train.step import REFERENCE, Speedups, make_step
from strokenet.train.train import moving_average, poly_lr, train
from strokenet.train.validate import confusion, dice_by_label
from strokenet.workspace import Workspace
from tests.plans import tiny_plan
from tests.train.workspaces import drawn_case, make_workspace, rows, short, weights


def batches(workspace: Workspace, count: int) -> list[Batch]:
    """The first training batches of `short()`, as the loop sees them."""
    plan = workspace.read_plan()
    cases = fold_cases(workspace, plan, "0")
    feed = Feed(
        plan,
        train=cases.train,
        val=cases.val,
        batch_size=plan.batch_size,
        seed=short().seed,
        augmentation="device",
        device=torch.device("cpu"),
    )
    with feed:
        return list(feed.batches("train", 0, range(count)))


@pytest.mark.parametrize("step", ["reference", "fast"])
def test_steps_equal_sgd_written_out(tmp_path: Path, step: str) -> None:
    """v <- 0.99 v + g + 3e-5 w;  w <- w - lr (g + 3e-5 w + 0.99 v), g scaled to a norm of 12 at most."""
    workspace = make_workspace(tmp_path)
    plan = workspace.read_plan()
    torch.manual_seed(short().seed)
    network = build_network(plan)
    velocity: dict[str, torch.Tensor] = {}
    losses = []
    scale = 300.0  # makes the clip bite
    for batch in batches(workspace, 3):
        network.zero_grad()
        loss = deep_supervision_loss(network.forward_levels(batch.image), batch.label, batch_dice=plan.batch_dice)
        (scale * loss).backward()
        losses.append(scale * float(loss.detach()))
        gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
        norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in gradients.values()))
        assert norm > 12
        with torch.no_grad():
            for name, p in network.named_parameters():
                if name in gradients:
                    d = gradients[name] * (12 / norm) + 3e-5 * p
                    velocity[name] = d if name not in velocity else 0.99 * velocity[name] + d
                    p -= 1e-2 * (d + 0.99 * velocity[name])

    def scaled(*values: Any, **named: Any) -> torch.Tensor:
        return scale * deep_supervision_loss(*values, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stepping, "deep_supervision_loss", scaled)
        result = train(workspace, short(stop_epoch=1, step=step))
    assert result.history[0]["train_loss"] == pytest.approx(np.mean(losses), rel=1e-6)
    ours = weights(workspace.fold("0").last)
    for name, p in network.state_dict().items():
        torch.testing.assert_close(ours[name], p, rtol=0, atol=1e-6, msg=name)


def test_the_head_without_weight_in_the_loss_stays_as_it_was(tmp_path: Path) -> None:
    """No gradient, so no weight decay either."""
    workspace = make_workspace(tmp_path)
    torch.manual_seed(short().seed)
    fresh = build_network(workspace.read_plan()).state_dict()
    train(workspace, short(stop_epoch=1))
    ours = weights(workspace.fold("0").last)
    same = [name for name in fresh if torch.equal(fresh[name], ours[name])]
    assert [name for name in same if name.startswith("decoder.seg_layers.0")] == [
        "decoder.seg_layers.0.weight",
        "decoder.seg_layers.0.bias",
    ]
    assert not torch.equal(fresh["decoder.seg_layers.1.weight"], ours["decoder.seg_layers.1.weight"])


def test_the_learning_rate_falls_by_the_published_polynomial() -> None:
    assert poly_lr(1e-2, 0, 1000) == 1e-2
    assert poly_lr(1e-2, 500, 1000) == pytest.approx(0.00535886731268146)
    assert poly_lr(1e-2, 999, 1000) == pytest.approx(1.9952623149688786e-05)
    assert poly_lr(1e-2, 2499, 3000) == pytest.approx(1e-2 * (501 / 3000) ** 0.9)


def test_the_log_has_the_schedule_of_all_epochs(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path)
    train(workspace, short(epochs=300, stop_epoch=2))
    assert [float(row["lr"]) for row in rows(workspace)] == [1e-2, pytest.approx(1e-2 * (299 / 300) ** 0.9)]


def test_the_log_says_how_an_epoch_went(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path)
    result = train(workspace, short(validate_every=2))
    for row in result.history:
        assert 0 < row["data_wait_share"] < 1
        assert row["seconds"] > 0
        assert row["skipped_steps"] == 0
    assert [row["volume_dice"] != "" for row in rows(workspace)] == [False, True, False]
    assert workspace.fold("0").curve.read_bytes().startswith(b"\x89PNG")


def test_the_time_spent_waiting_for_data_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = make_workspace(tmp_path)
    make = Feed._batch

    def slow(*values: Any) -> Batch:
        loop.time.sleep(0.2)
        return make(*values)

    monkeypatch.setattr(Feed, "_batch", slow)
    result = train(workspace, short(epochs=1, iterations=5, val_iterations=1))
    assert result.history[0]["data_wait_share"] > 0.5


def test_the_moving_average_is_the_peers() -> None:
    history: list[dict[str, float]] = []
    for dice, expected in ((0.5, 0.5), (1.0, 0.55), (math.nan, 0.55), (0.0, 0.495)):
        history.append({"ema_dice": moving_average(history, dice)})
        assert history[-1]["ema_dice"] == pytest.approx(expected)
    assert math.isnan(moving_average([], math.nan))
    assert moving_average([{"ema_dice": math.nan}], 0.5) == 0.5


def test_the_best_epoch_is_the_first_with_the_highest_average() -> None:
    means = [math.nan, 0.2, 0.3, 0.3, 0.25, 0.31]
    history = [{"ema_dice": mean} for mean in means]
    assert [_is_best(history[: n + 1]) for n in range(len(means))] == [False, True, True, False, False, True]


def test_best_keeps_the_weights_of_its_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = make_workspace(tmp_path)
    values = iter([0.5, 0.9, 0.1])
    monkeypatch.setattr(loop, "moving_average", lambda *_: next(values))
    train(workspace, short(stop_epoch=2))
    second = weights(workspace.fold("0").last)
    train(workspace, short(resume=True))
    best, last = weights(workspace.fold("0").best), weights(workspace.fold("0").last)
    assert all(torch.equal(best[name], second[name]) for name in best)
    assert any(not torch.equal(best[name], last[name]) for name in best)


def test_pseudo_dice_counts_all_patches_together() -> None:
    rng = np.random.default_rng(0)
    predicted, label = rng.integers(0, 4, (2, 3, 5, 6, 7))
    label[predicted == 3] = 0
    counts = confusion(torch.from_numpy(predicted), torch.from_numpy(label), (1, 2, 3))
    for k, dice in zip((1, 2, 3), dice_by_label(counts).tolist(), strict=True):
        p, g = set(np.flatnonzero(predicted == k)), set(np.flatnonzero(label == k))
        assert dice == pytest.approx(2 * len(p & g) / (len(p) + len(g)))
    empty = confusion(torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2), (1,))
    assert dice_by_label(empty).isnan().all()


def spoil(workspace: Workspace, case_id: str, seed: int) -> None:
    """The stored case again, with NaN everywhere."""
    plan = workspace.read_plan()
    case = drawn_case(case_id, seed)
    case.image[:] = math.nan
    Store(workspace.preprocessed).write(case, f"{plan_key(plan)}-drawn")


def test_a_loss_that_is_not_finite_names_the_cases_and_is_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    workspace = make_workspace(tmp_path)
    spoil(workspace, "b", 1)
    drawn = [batch_cases(workspace, step) for step in range(8)]
    bad = [step for step, cases in enumerate(drawn) if "b" in cases]
    assert 0 < len(bad) < 8
    result = train(workspace, short(iterations=8, batch_size=1, augment="none", stop_epoch=1))
    assert result.history[0]["skipped_steps"] == len(bad)
    for step in bad:
        assert f"not finite (epoch 1, step {step + 1}, cases b): step skipped" in caplog.text
    assert math.isfinite(result.history[0]["train_loss"])
    assert all(torch.isfinite(w).all() for w in load_weights(workspace.fold("0").last, workspace.read_plan()).values())


def batch_cases(workspace: Workspace, step: int) -> tuple[str, ...]:
    """Names that a batch of one holds at that step of the first epoch, drawn as patches.py says."""
    return (("a", "b")[int(sample_rng(short().seed, "train", 0, step, 0).integers(2))],)


@pytest.mark.parametrize("step", ["reference", "fast"])
def test_a_gradient_that_is_not_finite_is_skipped_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, step: str
) -> None:
    workspace = make_workspace(tmp_path)

    def steep(*values: Any, **named: Any) -> torch.Tensor:
        loss = deep_supervision_loss(*values, **named)
        return loss + (loss - loss.detach()).abs().sqrt()  # derivative of the root at 0: infinite

    monkeypatch.setattr(stepping, "deep_supervision_loss", steep)
    result = train(workspace, short(epochs=1, step=step))
    assert result.history[0]["skipped_steps"] == 3
    assert "train_loss" in result.history[0]
    assert rows(workspace)[0]["train_loss"] == ""
    torch.manual_seed(short().seed)
    fresh = build_network(workspace.read_plan()).state_dict()
    ours = weights(workspace.fold("0").last)
    assert all(torch.equal(ours[name], fresh[name]) for name in fresh)


def test_five_bad_steps_in_a_row_end_the_run_and_keep_the_last_checkpoint(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path)
    train(workspace, short(stop_epoch=1))
    folder = workspace.fold("0")
    good = load_weights(folder.last, tiny_plan())
    spoil(workspace, "a", 0)
    spoil(workspace, "b", 1)
    with pytest.raises(InputError, match=r"5 steps in a row .*\(epoch 3, step 2, cases [ab], [ab]\); the last good"):
        train(workspace, short(resume=True))  # steps 4, 5, 6 of the second epoch, 1 and 2 of the third
    state = load_state(folder)
    assert state is not None
    assert (state.progress.epoch, state.progress.bad_in_row) == (2, 3)
    kept = load_model(workspace.root).networks[0].state_dict()
    assert all(torch.equal(good[name], kept[name]) for name in good)


def test_the_command_line_ends_with_4_and_one_line_after_five_bad_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace = make_workspace(tmp_path)
    spoil(workspace, "a", 0)
    spoil(workspace, "b", 1)
    arguments = ["strokenet", "train", str(workspace.root), "--iters-per-epoch", "9", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", arguments)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as caught:
            main()
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert caught.value.code == 4
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "5 steps in a row without a finite loss" in errors[0]


@pytest.mark.parametrize("speedups", [REFERENCE, Speedups()])
def test_the_float16_scaler_may_skip_steps_but_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, speedups: Speedups
) -> None:
    workspace = make_workspace(tmp_path)
    plan = workspace.read_plan()
    run = start_run(workspace, plan, short(precision="fp16"), fold_cases(workspace, plan, "0"))
    compute = make_step(run, speedups)
    infinite = next(iter(run.network.parameters()))

    def loss(*_: Any, **__: Any) -> torch.Tensor:
        return torch.where(infinite > 100, infinite * math.inf, infinite).sum()  # finite, with a NaN gradient

    monkeypatch.setattr(stepping, "deep_supervision_loss", loss)
    before = infinite.detach().clone()
    batch = next(iter(batches(workspace, 1)))
    outcomes = [bool(compute(batch.image, batch.label)[1]) for _ in range(20)]
    assert outcomes[:16] == [True] * 16  # from a scale of 2^16 down
    assert outcomes[18:] == [False] * 2
    assert torch.equal(infinite, before)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_other_precisions_train(tmp_path: Path, precision: str) -> None:
    workspace = make_workspace(tmp_path)
    result = train(workspace, short(epochs=1, precision=precision))
    assert math.isfinite(result.history[0]["val_loss"])
    assert all(w.dtype == torch.float32 for w in weights(workspace.fold("0").last).values())


def test_a_bright_lesion_is_learnt_in_seconds(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path, tiny_plan(postprocess=PostprocessRule()))
    config = short(epochs=12, iterations=15, val_iterations=6, stop_epoch=8, validate_every=8)
    result = train(workspace, config)
    assert result.history[-1]["pseudo_dice"] > 0.8
    assert result.history[-1]["volume_dice"] > 0.8


def test_deterministic_gives_the_same_weights(tmp_path: Path) -> None:
    one, other = make_workspace(tmp_path / "one"), make_workspace(tmp_path / "other")
    train(one, short(epochs=1))
    train(other, short(epochs=1, deterministic=True))
    assert not torch.are_deterministic_algorithms_enabled()
    a, b = weights(one.fold("0").last), weights(other.fold("0").last)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_every_long_loop_shows_its_progress(tmp_path: Path) -> None:
    seen = []

    def track(items: Any, *, total: int, what: str) -> Any:
        count = 0
        for item in items:
            count += 1
            yield item
        seen.append((what, count, total))

    train(make_workspace(tmp_path), short(epochs=1, validate_every=1), track)
    assert seen[0] == ("epoch 1", 3, 3)
    assert seen[1] == ("validation patches", 2, 2)
    assert ("validation volumes", 1, 1) in seen
    assert seen[-1] == ("train fold 0", 1, 1)
