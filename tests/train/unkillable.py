"""Kills the real `strokenet train` at random moments, again and again, and compares its end with an undisturbed run's.

    python -m tests.train.unkillable OUT [--kills 50] [--seed 0]

One run is left alone and its time is taken. Then a run on the same cases is killed (SIGKILL) at a moment drawn
uniformly over that time, which holds the start of Python, steps, validation and writes alike, and is started again by
the same command, until it is done; and so are further runs, until there were enough kills. Every run must end with the
undisturbed one's weights and log, bit for bit. One line a kill: what the fold folder held then. Time is the process's
own, of all its threads on the cores: a machine that is busy with something else moves no kill. Needs Linux, which tells
it in /proc.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from strokenet.model.checkpoint import load_model
from strokenet.train.state import load_state
from strokenet.workspace import Workspace
from tests.conftest import ROOT
from tests.train.workspaces import assert_same_run, make_workspace

TICKS = os.sysconf("SC_CLK_TCK")  # of the system's clock, a second
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
OPTIONS = (
    *("--epochs=24", "--iters-per-epoch=12", "--val-iters=2", "--seed=3", "--device=cpu", "--resume", "-q"),
    "--checkpoint-every=0.001",
)


@dataclass
class Counts:
    """kills: in all. early: before the fold folder was touched. cut: while a file was written."""

    kills: int = 0
    early: int = 0
    cut: int = 0


def train(workspace: Workspace, work: float | None = None) -> int:
    """The command line in a process of its own, killed after so many seconds on the cores. Returns 0, or -9: killed."""
    command = [sys.executable, "-m", "strokenet", "train", str(workspace.root), *OPTIONS]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, text=True, **pipes) as process:  # type: ignore[call-overload]
        while work is not None and process.poll() is None:
            if work_of(process.pid) >= work:
                time.sleep(random.uniform(0, 2 / TICKS))  # the clock ticks: also between, and where the process waits
                process.kill()
                break
            time.sleep(0.5 / TICKS)
        error = process.communicate()[1]  # it writes no more than fits into the pipe
    if process.returncode not in (0, -9) or error.strip():
        raise SystemExit(f"the command ended with {process.returncode}: {error}")
    return int(process.returncode)


def work_of(process: int) -> float:
    """Seconds on the cores so far, of all threads."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS  # utime and stime, proc(5)


def look(workspace: Workspace, counts: Counts, began: float) -> str:
    """What a kill left behind, in words. Raises where it is not whole."""
    folder = workspace.fold("0")
    state = load_state(folder)
    where = f"epoch {state.progress.epoch + 1}, step {state.progress.step}" if state else "no state"
    cut = sorted(path.name.split(".", 2)[2] for path in folder.root.glob(".*")) if folder.root.is_dir() else []
    if folder.weights is not None:
        load_model(workspace.root)
    early = not folder.log.is_file() or folder.log.stat().st_mtime < began
    counts.kills += 1
    counts.early += early
    counts.cut += bool(cut)
    doing = "starting" if early else f"writing {', '.join(cut)}" if cut else "training"
    return f"{doing}; on disk: {where}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began, rng, counts, runs = time.monotonic(), random.Random(options.seed), Counts(), 0
    whole = make_workspace(options.out / "whole")
    train(whole)  # reads Python's files from the disk for the first time
    shutil.rmtree(whole.fold("0").root)
    before = os.times()
    train(whole)
    after = os.times()
    work = after.children_user + after.children_system - before.children_user - before.children_system
    sys.stdout.write(f"undisturbed: {work:.1f} s of work in {after.elapsed - before.elapsed:.1f} s\n")
    while counts.kills < options.kills:
        runs += 1
        shutil.rmtree(options.out / "killed", ignore_errors=True)
        killed = make_workspace(options.out / "killed")
        while True:
            life = rng.uniform(0, work) if counts.kills < options.kills else None
            born = time.time()
            if train(killed, life) == 0:
                break
            text = look(killed, counts, born)
            sys.stdout.write(f"kill {counts.kills}, run {runs}, after {life:.2f} s of work: {text}\n")
            sys.stdout.flush()
        assert_same_run(killed, whole)
        left = [path.name for path in killed.fold("0").root.glob(".*")]
        assert not left, left
        sys.stdout.write(f"run {runs} is done: weights and log are the undisturbed one's, bit for bit\n")
    sys.stdout.write(
        f"{counts.kills} kills in {runs} runs ({counts.early} before the folder was touched, {counts.cut} while a file "
        f"was written): every run ended with the undisturbed one's weights and log, bit for bit; "
        f"{time.monotonic() - began:.0f} s in all\n"
    )


if __name__ == "__main__":
    main()
