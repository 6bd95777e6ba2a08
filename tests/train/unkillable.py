"""Kills the real `strokenet train` at random moments, again and again, and compares its end with an undisturbed run's.

    python -m tests.train.unkillable OUT [--kills 50] [--seed 0]

One run is left alone and timed. Then a run on the same cases is killed (SIGKILL) at a moment drawn uniformly over that
time, which holds the start of Python, steps, validation and writes alike, and is started again by the same command,
until it is done; and so are further runs, until there were enough kills. Every run must end with the undisturbed one's
weights and log, bit for bit. One line a kill: what the fold folder held then.
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

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
OPTIONS = (
    *("--epochs=16", "--iters-per-epoch=12", "--val-iters=2", "--seed=3", "--device=cpu", "--resume", "-q"),
    "--checkpoint-every=0.001",
)


@dataclass
class Counts:
    """kills: in all. early: before the fold folder was touched. cut: while a file was written."""

    kills: int = 0
    early: int = 0
    cut: int = 0


def train(workspace: Workspace, seconds: float | None = None) -> int:
    """The command line in a process of its own, killed after so many seconds. Returns 0, or -9 where it was killed."""
    command = [sys.executable, "-m", "strokenet", "train", str(workspace.root), *OPTIONS]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, text=True, **pipes) as process:  # type: ignore[call-overload]
        try:
            _, error = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            _, error = process.communicate()
    if process.returncode not in (0, -9) or error.strip():
        raise SystemExit(f"the command ended with {process.returncode}: {error}")
    return int(process.returncode)


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
    start = time.monotonic()
    train(whole)
    seconds = time.monotonic() - start
    sys.stdout.write(f"undisturbed: {seconds:.1f} s\n")
    while counts.kills < options.kills:
        runs += 1
        shutil.rmtree(options.out / "killed", ignore_errors=True)
        killed = make_workspace(options.out / "killed")
        while True:
            life = rng.uniform(0, seconds) if counts.kills < options.kills else None
            born = time.time()
            if train(killed, life) == 0:
                break
            text = look(killed, counts, born)
            sys.stdout.write(f"kill {counts.kills}, run {runs}, after {life:.2f} s: {text}\n")
            sys.stdout.flush()
        assert_same_run(killed, whole)
        left = [path.name for path in killed.fold("0").root.glob(".*")]
        assert not left, left
    sys.stdout.write(
        f"{counts.kills} kills in {runs} runs ({counts.early} before the folder was touched, {counts.cut} while a file "
        f"was written): every run ended with the undisturbed one's weights and log, bit for bit; "
        f"{time.monotonic() - began:.0f} s in all\n"
    )


if __name__ == "__main__":
    main()
