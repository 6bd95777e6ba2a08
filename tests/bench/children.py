"""Contenders of the tests: `python -m tests.bench.children JOB`."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch

from bench.remote import Contender, Job, Turn, serve


def counting(job: Job) -> Contender:
    """Writes down its name at every turn, prints much beside its answers, and says the time that it is told."""

    def turn(count: int) -> Turn:
        with Path(job.folder, "order").open("a") as order:
            order.write(job.settings["name"])
        sys.stdout.write("words of a package\n" * 1000)
        return Turn(ms=job.settings["ms"] * count, parts_ms={"half": job.settings["ms"] * count / 2})

    return Contender(answer=lambda: {"threads": torch.get_num_threads()}, turn=turn)


def failing(job: Job) -> Contender:
    """Fails in its first turn, by an exception or by a signal; a worker of it goes on and holds the pipe open."""
    if job.settings["when"] == "built":
        raise ValueError("last words, while it is built")

    def turn(count: int) -> Turn:
        worker = os.fork()
        if worker == 0:
            time.sleep(60)
            os._exit(0)
        Path(job.folder, "worker").write_text(str(worker))
        sys.stdout.write("last words, in a turn\n")
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    return Contender(answer=dict, turn=turn)


def silent(job: Job) -> Contender:
    """Never comes back from a turn."""

    def turn(count: int) -> Turn:
        sys.stdout.write("last words before the silence\n")
        time.sleep(60)
        raise AssertionError

    return Contender(answer=dict, turn=turn)


if __name__ == "__main__":
    serve({"counting": counting, "failing": failing, "silent": silent})
