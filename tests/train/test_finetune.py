"""Fine-tuning: a run of its own from another model's weights (Meddahi 2024, VI.B), and on corrected masks (VII.C)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from planner.plan import PostprocessRule
from strokenet.infer.sliding_window import predict_logits
from strokenet.model.checkpoint import load_model, load_weights, network_with
from strokenet.preprocess.preprocess import Prepared
from strokenet.preprocess.store import Store, plan_key
from strokenet.train.feed import Batch, Feed
from strokenet.train.loss import deep_supervision_loss
from strokenet.train.run import TrainConfig, fold_cases
from strokenet.train.state import load_state
from strokenet.train.train import train
from strokenet.workspace import Workspace
from tests.plans import tiny_plan
from tests.train.workspaces import drawn_case, make_workspace, rows, short, weights

CORE, RIM = 3.0, 1.4  # brightness over noise of deviation 0.3


def drawn_batches(workspace: Workspace, config: TrainConfig, epochs: int) -> list[Batch]:
    """The training batches of the first epochs, as the loop sees them."""
    plan, cases = workspace.read_plan(), fold_cases(workspace, workspace.read_plan(), config.fold)
    feed = Feed(
        plan,
        train=cases.train,
        val=cases.val,
        batch_size=plan.batch_size,
        seed=config.seed,
        augmentation=config.augment,
        device=torch.device("cpu"),
    )
    with feed:
        return [b for epoch in range(epochs) for b in feed.batches("train", epoch, range(config.iterations))]


def test_fine_tuning_begins_its_own_schedule_without_momentum(tmp_path: Path) -> None:
    """SGD written out from the source's weights: v = 0 before the first step, lr 1e-5 (1 - epoch / 500)^0.9."""
    source, workspace = make_workspace(tmp_path / "source"), make_workspace(tmp_path / "work")
    train(source, short(seed=3))
    state = load_state(source.fold("0"))
    assert state is not None
    momenta = [entry["momentum_buffer"].abs().max() for entry in state.optimizer["state"].values()]
    assert max(momenta) > 0.1  # there is a momentum that could have been taken over
    config = short(init=source.root, lr=1e-5, epochs=500, stop_epoch=2)
    plan, given = workspace.read_plan(), load_weights(source.fold("0").last, workspace.read_plan())
    network = network_with(plan, {name: tensor.clone() for name, tensor in given.items()})
    velocity: dict[str, torch.Tensor] = {}
    for step, batch in enumerate(drawn_batches(workspace, config, 2)):
        lr = 1e-5 * (1 - (step // config.iterations) / 500) ** 0.9
        network.zero_grad()
        deep_supervision_loss(network.forward_levels(batch.image), batch.label, batch_dice=plan.batch_dice).backward()
        gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
        norm = sum(float((g.double() ** 2).sum()) for g in gradients.values()) ** 0.5
        with torch.no_grad():
            for name, p in network.named_parameters():
                if name in gradients:
                    d = gradients[name] * min(1.0, 12 / norm) + 3e-5 * p
                    velocity[name] = d if name not in velocity else 0.99 * velocity[name] + d
                    p -= lr * (d + 0.99 * velocity[name])
    train(workspace, config)
    ours = weights(workspace.fold("0").last)
    moved = torch.cat([(p - given[name]).ravel() for name, p in network.state_dict().items()])
    apart = torch.cat([(p - ours[name]).ravel() for name, p in network.state_dict().items()])
    assert moved.norm() > 1e-5
    assert apart.norm() < 0.01 * moved.norm()
    assert [float(row["lr"]) for row in rows(workspace)] == [1e-5, pytest.approx(1e-5 * (499 / 500) ** 0.9)]


def styled_case(case_id: str, seed: int, *, corrected: bool) -> Prepared:
    """A bright core in a fainter rim. The first masks outline the core alone, the experts' corrected ones both."""
    case = drawn_case(case_id, seed)
    rng = np.random.default_rng(1000 + seed)
    shape = case.image.shape[1:]
    centre = [int(rng.integers(8, edge - 8)) for edge in shape]
    distance = sum((axis - c) ** 2 for axis, c in zip(np.indices(shape), centre, strict=True))
    core, both = distance < 12, distance < 32
    image = rng.normal(0, 0.3, (2, *shape)) + CORE * core + RIM * (both & ~core)
    label = (both if corrected else core).astype(np.int16)
    return replace(
        case, image=torch.from_numpy(image.astype(np.float32)), label=label, foreground={1: np.argwhere(label == 1)}
    )


def styled_workspace(root: Path, *, corrected: bool) -> Workspace:
    workspace = make_workspace(root, tiny_plan(postprocess=PostprocessRule()))
    key = f"{plan_key(workspace.read_plan())}-drawn"
    for seed, case_id in enumerate("abc"):
        Store(workspace.preprocessed).write(styled_case(case_id, seed, corrected=corrected), key)
    return workspace


def dice_on(root: Path, cases: Sequence[Prepared]) -> float:
    """Mean Dice of whole volumes, 2 |P and R| / (|P| + |R|) by hand."""
    model, scores = load_model(root), []
    for case in cases:
        logits = predict_logits(model.networks, case.image, patch=model.plan.patch)
        found, true = (logits.argmax(0) == 1).numpy(), case.label == 1
        scores.append(2 * (found & true).sum() / (found.sum() + true.sum()))
    return float(np.mean(scores))


def test_fine_tuning_on_corrected_masks_learns_the_correction(tmp_path: Path) -> None:
    """Held-out cases, scored in the experts' style: far above the model as it was, and above as many steps anew."""
    first = styled_workspace(tmp_path / "first", corrected=False)
    corrected, anew = (styled_workspace(tmp_path / name, corrected=True) for name in ("corrected", "anew"))
    outlined, wanted = ([styled_case(f"t{n}", 50 + n, corrected=style) for n in range(4)] for style in (False, True))
    train(first, short(epochs=8, iterations=20))
    few = short(epochs=3, iterations=10, lr=3e-3)
    train(corrected, replace(few, init=first.root))
    train(anew, few)
    before, after, fresh = (dice_on(work.root, wanted) for work in (first, corrected, anew))
    assert dice_on(first.root, outlined) > 0.8  # the first style was learnt
    assert before < 0.5
    assert after > 0.75
    assert after > fresh
