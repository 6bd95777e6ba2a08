"""What a checkpoint of the paper's network costs: what training waits for, and what the thread does meanwhile.

    python -m tests.train.checkpoint_cost [--device cpu] [--repeats 5] [--epochs 1000] [--out DIR]

No step is computed: the weights are random and the momentum is there. The loop of small operations shows what the
thread takes from a training that needs Python for every launch: it is timed alone and beside a write. Two numbers are
the fastest and the median. Drawing the curve (timed apart) is limited to a share of the time, writer.CURVE_SHARE.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from strokenet.model.device import choose_device
from strokenet.model.network import build_network
from strokenet.train.record import COLUMNS, draw, state_of
from strokenet.train.run import Run, TrainConfig
from strokenet.train.writer import CheckpointWriter
from strokenet.workspace import FoldFolder
from tests.plans import paper_plan


def paper_run(root: Path, device: torch.device, epochs: int) -> Run:
    """The paper's network on T1 and FLAIR with momentum, so many epochs behind it."""
    plan = paper_plan("T1", "FLAIR")
    network = build_network(plan).to(device)
    optimizer = torch.optim.SGD(network.parameters(), 1e-4, 0.99, nesterov=True)
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    row = dict.fromkeys(COLUMNS, 0.5)
    return Run(
        plan=plan,
        config=TrainConfig(),
        folder=FoldFolder(root),
        device=device,
        dtype=torch.float32,
        network=network,
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(device.type, enabled=False),
        settings={"init": "random", "heads": "new", "modality_dropout": "0.0"},
        history=[
            row | {"epoch": float(epoch), "ema_dice": epoch / epochs} for epoch in range(epochs)
        ],  # best: the last
    )


def small_operations(device: torch.device, count: int) -> float:
    """Seconds that so many small operations take, each started from Python."""
    x = torch.zeros(256, device=device)
    began = time.perf_counter()
    for _ in range(count):
        x.add_(1)
    return time.perf_counter() - began


def lost_beside(run: Run, writer: CheckpointWriter, hand_over: Callable[[], None]) -> float:
    """Seconds that small operations of this thread lose to a checkpoint that is written meanwhile."""
    alone = small_operations(run.device, 5000) / 5000
    hand_over()
    count, began = 0, time.perf_counter()
    while writer._writing is not None and not writer._writing.done():
        small_operations(run.device, 20)
        count += 20
    lost = time.perf_counter() - began - count * alone
    writer.wait()
    return lost


def measure(run: Run, repeats: int, *, derived: bool) -> str:
    """Of `repeats` checkpoints after a first one, which allocates: fastest and median, and the work of the cores."""
    handed, written, work = [], [], []
    with CheckpointWriter(run) as writer:
        hand_over = writer.checkpoint if derived else writer.save
        for _ in range(repeats + 1):
            began, mine, all_cores = time.perf_counter(), time.thread_time(), time.process_time()
            hand_over()
            handed.append(time.perf_counter() - began)
            work.append((time.thread_time() - mine, all_cores))
            writer.wait()
            written.append(time.perf_counter() - began)
            work[-1] = (work[-1][0], time.process_time() - all_cores)
        lost = [lost_beside(run, writer, hand_over) for _ in range(repeats)]
    what = "state, best and last weights, log" if derived else "state alone"
    mine, all_cores = (statistics.median(column) for column in zip(*work[1:], strict=True))
    return (
        f"{what}: training waits {_spread(handed[1:])} ms (work {1000 * mine:.0f}; the first time "
        f"{1000 * handed[0]:.0f}), written after {_spread(written[1:])} ms (work {1000 * all_cores:.0f}), in which "
        f"small operations of the loop lose {_spread(lost)} ms\n"
    )


def _spread(seconds: list[float]) -> str:
    return f"{1000 * min(seconds):.0f} to {1000 * statistics.median(seconds):.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=1000, help="behind the run: the length of its log")
    parser.add_argument("--out", type=Path, help="on the disk to measure [default: a temporary folder]")
    options = parser.parse_args()
    device = choose_device(options.device)
    with tempfile.TemporaryDirectory(dir=options.out) as root:
        run = paper_run(Path(root), device, options.epochs)
        parameters = sum(parameter.numel() for parameter in run.network.parameters())
        for derived in (False, True):
            sys.stdout.write(measure(run, options.repeats, derived=derived))
        size = run.folder.state.stat().st_size
        began = time.thread_time()
        draw(run.folder, state_of(run))
        curve = time.thread_time() - began
    sys.stdout.write(
        f"{parameters / 1e6:.1f} M parameters, state of {size / 1e6:.0f} MB, on {device}; "
        f"the curve of {options.epochs} epochs: {1000 * curve:.0f} ms of work\n"
    )


if __name__ == "__main__":
    main()
