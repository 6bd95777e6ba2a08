"""The checkpoint writer on a GPU: the snapshot is of its moment, though the next step is queued at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from strokenet.train.run import fold_cases, start_run
from strokenet.train.state import load_state
from strokenet.train.writer import CheckpointWriter
from tests.train.workspaces import make_workspace, short

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch sees")


def test_a_snapshot_is_of_its_moment_though_the_next_step_is_queued_at_once(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path)
    plan = workspace.read_plan()
    run = start_run(workspace, plan, short(device="cuda"), fold_cases(workspace, plan, "0"))
    busy = torch.randn(4096, 4096, device="cuda")
    with CheckpointWriter(run) as writer:
        for step in range(5):
            expected = {name: tensor.cpu() for name, tensor in run.network.state_dict().items()}
            for _ in range(20):
                busy = busy @ busy * 1e-2  # the GPU is behind the loop: the copy is queued, not done
            writer.save()
            with torch.no_grad():
                for parameter in run.network.parameters():
                    parameter.add_(1)
            writer.wait()
            state = load_state(run.folder)
            assert state is not None, step
            assert all(torch.equal(state.network[name], expected[name]) for name in expected), step
        assert all(copy.is_pinned() for copy in writer._copies.values())
