"""The group of ranks on a GPU: nccl, DistributedDataParallel and the summed Dice, by a group of one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from strokenet.infer.shard import Shard
from strokenet.train import distributed
from strokenet.train.distributed import joined
from strokenet.train.train import train
from tests.plans import tiny_plan
from tests.train.test_distributed import free_ports
from tests.train.workspaces import make_workspace, short, weights

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch sees")
DEVICE = "cuda"
ONE = Shard(index=0, count=1, of="torchrun")


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where ranks would meet."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", free_ports(1)[0])


@pytest.mark.usefixtures("place")
def test_a_group_of_one_trains_as_a_process_alone(tmp_path: Path) -> None:
    plan = tiny_plan(batch_dice=True)
    alone, grouped = make_workspace(tmp_path / "alone", plan), make_workspace(tmp_path / "grouped", plan)
    config = short(device=DEVICE, precision="fp32", deterministic=True)
    train(alone, config)
    train(grouped, config, launched=ONE)
    ours, theirs = weights(grouped.fold("0").last), weights(alone.fold("0").last)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-5, msg=name)


@pytest.mark.usefixtures("place")
def test_a_sum_over_the_group_carries_its_gradient_and_tensors_stay_on_their_device() -> None:
    with joined(ONE, DEVICE) as ranks:
        assert not ranks.alone
        x = torch.ones(3, device=DEVICE, requires_grad=True)
        (2 * ranks.part(1).total(x)).sum().backward()
        assert x.grad is not None
        assert x.grad.tolist() == [2.0] * 3
        assert ranks.mean(x.detach()).device.type == DEVICE
        assert ranks.total(torch.ones(2)).device.type == "cpu"
        assert distributed._gpu_name(torch.device(DEVICE, 0)) != ""
    assert not torch.distributed.is_initialized()
