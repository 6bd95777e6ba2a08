"""A run that is killed (SIGKILL) at every write in turn and resumed, and one that is not: python -m tests.train.killed.

Runs in a fresh interpreter and forks it, because starting torch takes longer than the runs. Prints one line a kill.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from strokenet.train.train import train
from strokenet.workspace import Workspace
from tests.train.workspaces import assert_same_run, short

CONFIG = short(epochs=2, iterations=2, val_iterations=1, validate_every=2, resume=True, checkpoint_minutes=0)


def forked(function: Callable[[], object]) -> int:
    """Wait status of a child that runs the function."""
    child = os.fork()
    if child == 0:
        try:
            function()
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def killed_at(root: Path, number: int) -> None:
    """Trains; the process is gone just before the rename of that number, that is just after the one before it."""
    renames = 0
    replace = os.replace

    def counting(source: Path, target: Path) -> None:
        nonlocal renames
        renames += 1
        if renames == number:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = counting  # type: ignore[assignment]
    train(Workspace(root), CONFIG)


def main(root: Path) -> None:
    """root: holds `whole`, a workspace that was not trained yet."""
    whole, fresh, killed = root / "whole", root / "fresh", root / "killed"
    shutil.copytree(whole, fresh)
    train(Workspace(whole), CONFIG)  # here: the children then find torch and matplotlib warm
    for number in itertools.count(1):
        shutil.rmtree(killed, ignore_errors=True)
        shutil.copytree(fresh, killed)
        status = forked(lambda: killed_at(killed, number))  # noqa: B023
        if status == 0:  # it wrote less often than that
            break
        assert os.WIFSIGNALED(status), status
        assert forked(lambda: train(Workspace(killed), CONFIG)) == 0
        assert_same_run(Workspace(killed), Workspace(whole))
        left = [path.name for path in (killed / "fold_0").iterdir() if path.name.startswith(".")]
        assert not left, left
        sys.stdout.write(f"killed before rename {number}: same\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
