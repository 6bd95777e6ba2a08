"""Several ranks are one process with the same batch; they stop, fail and resume together."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from strokenet.data.errors import InputError
from strokenet.infer.shard import Shard
from strokenet.train import distributed
from strokenet.train.distributed import ALONE, Ranks, joined, restarted
from strokenet.train.feed import Batch, Feed
from strokenet.train.loss import deep_supervision_loss
from strokenet.train.patches import sample_rng
from strokenet.train.run import fold_cases
from strokenet.train.state import load_state
from strokenet.train.train import train
from strokenet.workspace import Workspace
from tests.conftest import ROOT
from tests.train.ranks import EQUAL, LONG, SCENARIOS
from tests.train.test_train import spoil
from tests.train.workspaces import assert_same_run, make_workspace, rows, short, weights

LOCAL = {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
WRITTEN = {"state.pt", "state.prev.pt", "last.safetensors", "best.safetensors", "log.csv", "progress.png"}


def free_ports(count: int) -> list[str]:
    """Ports of this machine that nobody listens at."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [str(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


def started(words: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", *words],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | LOCAL | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(processes: list[subprocess.Popen[str]], seconds: float) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each; what is not done by then is killed."""
    limit = time.monotonic() + seconds
    found = []
    for process in processes:
        try:
            said = process.communicate(timeout=max(0.1, limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            said = process.communicate()
        found.append((process.returncode, *said))
    return found


Outcomes = dict[str, tuple[dict[str, Any], dict[str, Any]]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def outcomes(root: Path) -> Outcomes:
    """Every training of tests.train.ranks by two ranks, of which each names what it ended with."""
    for name in SCENARIOS:
        plan = EQUAL[name][0] if name in EQUAL else None
        workspace = make_workspace(root / name, plan)
        if name in ("bad", "all-bad"):
            spoil(workspace, "b", 1)
        if name == "all-bad":
            spoil(workspace, "a", 0)
        if name == "not-shared":
            shutil.copytree(workspace.root, root / "copy")
            train(workspace, short(stop_epoch=1))
            shutil.move(root / "copy", workspace.root / "copy")
    train(Workspace(root / "trained"), short(epochs=1))
    words = ["-m", "tests.train.ranks", str(root), *free_ports(len(SCENARIOS))]
    pair = [started(words, {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}) for rank in (0, 1)]
    for code, _, error in ended(pair, 400):
        assert code == 0, error
    first, second = (json.loads((root / f"rank_{rank}.json").read_text()) for rank in (0, 1))
    return {name: (first[name], second[name]) for name in SCENARIOS}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Workspace]:
    """The trainings of EQUAL by one process."""
    folder = tmp_path_factory.mktemp("alone")
    workspaces = {name: make_workspace(folder / name, plan) for name, (plan, _) in EQUAL.items()}
    for name, workspace in workspaces.items():
        train(workspace, EQUAL[name][1])
    return workspaces


def assert_close(one: Workspace, other: Workspace, fold: str = "0") -> None:
    """Weights within 1e-5, and the log but for the times."""
    a, b = weights(one.fold(fold).last), weights(other.fold(fold).last)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-5, msg=name)
    ours, theirs = ([{k: float(v or "nan") for k, v in row.items()} for row in rows(w, fold)] for w in (one, other))
    assert len(ours) == len(theirs)
    for row, same in zip(ours, theirs, strict=True):
        assert row == pytest.approx(same, abs=1e-5, nan_ok=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", EQUAL)
def test_two_ranks_are_one_process_with_the_same_batch(
    outcomes: Outcomes, alone: dict[str, Workspace], root: Path, name: str
) -> None:
    """Nine steps, both kinds of Dice, a batch that splits evenly and one that does not; all numbers of validation."""
    assert [one["error"] for one in outcomes[name]] == [None, None]
    assert_close(Workspace(root / name), alone[name], "all")
    assert 0 < float(rows(alone[name], "all")[-1]["volume_dice"]) <= 1


@pytest.mark.slow
def test_all_ranks_know_the_same_numbers_and_one_writes(outcomes: Outcomes) -> None:
    for name in EQUAL:
        first, second = outcomes[name]
        assert [one["finished"] for one in (first, second)] == [True, True]
        clock = ("seconds", "data_wait_share")
        told = [[{k: v for k, v in row.items() if k not in clock} for row in one["history"]] for one in (first, second)]
        assert json.dumps(told[0]) == json.dumps(told[1])  # NaN is itself there
        assert set(first["written"]) == WRITTEN
        assert second["written"] == []
    assert not any(one["left"] for pair in outcomes.values() for one in pair)  # no group of processes


@pytest.mark.slow
def test_a_bad_step_is_skipped_by_all_ranks_and_each_names_its_cases(outcomes: Outcomes, root: Path) -> None:
    """Each rank holds one sample of the batch; the case whose voxels are NaN may be on either."""
    first, second = outcomes["bad"]
    bad = [step for step in range(8) if "b" in drawn(step)]
    assert 0 < len(bad) < 8
    assert [one["history"][0]["skipped_steps"] for one in (first, second)] == [len(bad)] * 2
    for one in (first, second):
        assert len(one["warned"]) == len(bad)
        assert all(f"step {step + 1}, cases" in line for step, line in zip(bad, one["warned"], strict=True))
    assert all(tensor.isfinite().all() for tensor in weights(Workspace(root / "bad").fold("0").last).values())


def drawn(step: int) -> set[str]:
    """Cases of a step's batch of two in the first epoch, drawn as patches.py says."""
    return {("a", "b")[int(sample_rng(short().seed, "train", 0, step, index).integers(2))] for index in range(2)}


@pytest.mark.slow
def test_too_many_bad_steps_end_all_ranks_and_one_says_so(outcomes: Outcomes) -> None:
    first, second = outcomes["all-bad"]
    assert (first["kind"], second["kind"]) == ("InputError", "ToldElsewhere")
    assert "5 steps in a row without a finite loss" in first["error"]


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_after_the_same_step(outcomes: Outcomes, root: Path, tmp_path: Path) -> None:
    assert [(one["signal"], one["finished"]) for one in outcomes["signalled"]] == [(signal.SIGTERM, False)] * 2
    stopped, whole = Workspace(root / "signalled"), make_workspace(tmp_path)
    state = load_state(stopped.fold("0"))
    assert state is not None
    assert (state.progress.epoch, state.progress.step) == (1, 1)
    train(stopped, short(epochs=2, resume=True))  # as one process: a checkpoint knows no ranks
    train(whole, short(epochs=2))
    assert_close(stopped, whole)


@pytest.mark.slow
def test_the_time_that_is_up_on_one_rank_stops_all(outcomes: Outcomes) -> None:
    assert [(one["signal"], one["finished"], one["history"]) for one in outcomes["out-of-time"]] == [
        (None, False, [])
    ] * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("trained", "trained/fold_0: a run is there; --resume continues it, or remove the folder first"),
        ("crowded", "2 processes for a batch of 1; allowed: one a patch; start 1 at most (--nproc-per-node), or take"),
        ("other-fold", "differs: fold 1 there, 0 on rank 0, cases 2 to train"),
        ("not-shared", "differs: epoch 0 there, 1 on rank 0; start all ranks with the same options, and with a work"),
        ("no-plan", "rank 1: "),
    ],
)
def test_what_cannot_be_trained_together_is_refused_in_one_line(outcomes: Outcomes, name: str, line: str) -> None:
    first, second = outcomes[name]
    assert (first["kind"], second["kind"]) == ("InputError", "ToldElsewhere")
    assert line in first["error"]
    assert "\n" not in first["error"]


@pytest.mark.slow
def test_who_loses_a_rank_says_so_and_the_last_checkpoint_is_whole(outcomes: Outcomes, root: Path) -> None:
    first, second = outcomes["dies"]
    assert (first["kind"], second["kind"]) == ("RankLost", "ZeroDivisionError")
    assert first["error"].startswith("rank 0: another of the 2 processes is gone")
    state = load_state(Workspace(root / "dies").fold("0"))
    assert state is not None
    assert (state.progress.epoch, state.progress.step) == (1, 0)


OPTIONS = [
    f"--epochs={LONG.epochs}",
    f"--iters-per-epoch={LONG.iterations}",
    f"--val-iters={LONG.val_iterations}",
    f"--seed={LONG.seed}",
    "--device=cpu",
]


def rank_of(launcher: subprocess.Popen[str], rank: int) -> int | None:
    """Process id of a rank that torchrun started."""
    try:
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        found = [
            int(c) for c in children if f"RANK={rank}".encode() in Path(f"/proc/{c}/environ").read_bytes().split(b"\0")
        ]
    except OSError:
        return None
    return found[0] if found else None


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the ranks by Linux's /proc")
def test_torchrun_starts_a_killed_rank_again_and_the_run_ends_as_if_nothing_had_happened(
    outcomes: Outcomes, root: Path, tmp_path: Path
) -> None:
    """Bit for bit as two ranks that nobody disturbed, though --resume was never given."""
    workspace = make_workspace(tmp_path)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    launcher = started([*torchrun, "-m", "strokenet", "train", str(workspace.root), *OPTIONS], {})
    log, killed = workspace.fold("0").log, False
    while launcher.poll() is None and not killed:
        time.sleep(0.005)
        if log.exists() and len(log.read_text().splitlines()) > 1 and (victim := rank_of(launcher, 1)):
            os.kill(victim, signal.SIGKILL)
            killed = True
    ((code, _, error),) = ended([launcher], 300)
    assert killed, error
    assert code == 0, error
    assert error.count("resuming at epoch") == 1
    assert_same_run(workspace, Workspace(root / "long"))


@pytest.mark.slow
def test_processes_of_srun_train_together_and_one_speaks(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path)
    (port,) = free_ports(1)
    words = ["-m", "strokenet", "train", str(workspace.root), "--epochs=1", "--iters-per-epoch=2", "--val-iters=1"]
    slurm = {"SLURM_STEP_NUM_TASKS": "2", "MASTER_PORT": port}
    pair = [
        started([*words, "--device=cpu"], slurm | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)})
        for rank in (0, 1)
    ]
    (code, out, error), second = ended(pair, 200)
    assert code == 0, error
    assert "epoch 1/1" in error
    assert out
    assert second == (0, "", "")
    assert len(rows(workspace)) == 1


@pytest.mark.parametrize("batch_size", range(1, 10))
def test_shares_are_the_whole_batch_and_earlier_ranks_have_one_more(batch_size: int) -> None:
    for world in range(1, batch_size + 1):
        shares = [Ranks(rank=rank, world=world).share(batch_size) for rank in range(world)]
        assert [index for share in shares for index in share] == list(range(batch_size))
        sizes = [len(share) for share in shares]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[0] - sizes[-1] <= 1


def test_rounds_hold_every_item_once_and_are_as_many_on_every_rank() -> None:
    for world in range(1, 5):
        for count in range(8):
            rounds = [Ranks(rank=rank, world=world).rounds(range(count)) for rank in range(world)]
            assert len(set(map(len, rounds))) == 1
            assert sorted(x for one in rounds for x in one if x is not None) == list(range(count))


@pytest.mark.parametrize("batch_size", [2, 3])
def test_the_mean_of_the_parts_losses_is_the_batchs(batch_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    levels = [torch.randn(batch_size, 3, n, n, n, generator=generator) for n in (8, 4, 2)]
    label = torch.randint(0, 3, (batch_size, 8, 8, 8), generator=generator)
    whole = deep_supervision_loss(levels, label, batch_dice=False)
    losses = []
    for rank in range(2):
        ranks = Ranks(rank=rank, world=2)
        own = slice(ranks.share(batch_size).start, ranks.share(batch_size).stop)
        part = ranks.part(batch_size)
        losses.append(deep_supervision_loss([x[own] for x in levels], label[own], batch_dice=False, part=part))
    torch.testing.assert_close(torch.stack(losses).mean(), whole, rtol=0, atol=1e-6)


def feed_of(workspace: Workspace, share: range | None) -> Feed:
    """Batches of three of fold 0, or a share of them."""
    plan, cases = workspace.read_plan(), fold_cases(workspace, workspace.read_plan(), "0")
    return Feed(
        plan,
        train=cases.train,
        val=cases.val,
        batch_size=3,
        seed=short().seed,
        augmentation="device",
        device=torch.device("cpu"),
        modality_dropout=0.5,
        share=share,
    )


def test_shares_of_a_batch_are_its_samples(tmp_path: Path) -> None:
    """Cases, cuts, augmentation and dropout."""
    workspace = make_workspace(tmp_path)

    def batches(share: range | None) -> list[Batch]:
        with feed_of(workspace, share) as feed:
            return [*feed.batches("train", 1, range(4)), *feed.batches("val", 1, range(2))]

    parts = zip(batches(range(2)), batches(range(2, 3)), strict=True)
    for whole, (first, second) in zip(batches(None), parts, strict=True):
        assert (*first.cases, *second.cases) == whole.cases
        assert torch.equal(torch.cat([first.image, second.image]), whole.image)
        assert torch.equal(torch.cat([first.label, second.label]), whole.label)


def test_one_process_alone_touches_no_group() -> None:
    with joined(None, "cpu") as ranks:
        assert ranks is ALONE
        assert not torch.distributed.is_initialized()
        network, loss = torch.nn.Linear(1, 1), torch.ones(())
        assert ranks.wrap(network) is network
        assert ranks.mean(loss) is loss
        assert ranks.most(3, 0.5) == (3, 0.5)
        assert (ranks.part(3).weight, ranks.part(3).total(loss)) == (1.0, loss)


def test_processes_that_do_not_know_where_to_meet_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    shard = Shard(index=0, count=2, of="srun")
    with (
        pytest.raises(InputError, match=r"^srun: 2 processes, but MASTER_PORT does not say where they meet; set "),
        joined(shard, "cpu"),
    ):
        pytest.fail("they met")


def test_a_process_that_nobody_joins_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "MEET_SECONDS", 1)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", free_ports(1)[0])
    with (
        pytest.raises(
            InputError, match=r"^torchrun: rank 0 could not meet all 2 processes at 127.0.0.1:\d+ \("
        ) as caught,
        joined(Shard(index=0, count=2, of="torchrun"), "cpu"),
    ):
        pytest.fail("it met somebody")
    assert "\n" not in str(caught.value)
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("places", "line"),
    [
        ([("m1", "cuda", "a"), ("m1", "cuda", "b"), ("m2", "cuda", "c")], None),
        ([("m1", "cpu", ""), ("m1", "cpu", "")], None),
        (
            [("m1", "cuda", "a"), ("m1", "cuda", "b"), ("m1", "cuda", "a")],
            "m1: several ranks share a GPU; start 2 there",
        ),
        ([("m1", "cuda", "a"), ("m2", "cpu", "")], "would compute on cpu and cuda (m1 has cuda, m2 has cpu)"),
    ],
)
def test_ranks_have_a_gpu_each_or_none(places: list[tuple[str, str, str]], line: str | None) -> None:
    found = distributed._cannot_compute_together(places)
    assert found is None if line is None else line in str(found)


def test_only_a_restart_of_torchrun_counts_as_one() -> None:
    assert restarted({"TORCHELASTIC_RESTART_COUNT": "1"})
    assert not restarted({"TORCHELASTIC_RESTART_COUNT": "0"})
    assert not restarted({})
