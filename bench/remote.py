"""Contenders in processes of their own: each builds its thing once, then takes a turn for every line that it is sent.

The peers live in another interpreter, and a process has threads, an allocator and a peak of memory of its own; so ours
has one, too. While one computes, the others wait for their line and take no time.

    parent   Remote(...)     ask_answer()          ask_turn(3)
    child    builds      ->  an answer to compare  3 units of its work, timed by itself       (serve)

A line is JSON on the child's own copy of stdout; what its packages print goes to stderr with its last words. A child
that dies or says nothing for long ends the comparison with these words, and with it all that it has started.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from bench.measure import Measurement, model_of

PATIENCE_SECONDS = 540.0  # for one line: torch.compile of a network takes a minute or two
LAST_WORDS = 3000  # characters


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a child is to do. task: which of its program's. folder: what the parent has written for it.

    device: "cpu" or "cuda". threads: torch's. settings: of the task, as JSON has them.
    """

    task: str
    folder: str
    device: str
    threads: int
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Turn:
    """Milliseconds of one unit of work (a step, a sample, an epoch), and of its parts, by name."""

    ms: float
    parts_ms: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Contender:
    """What a child has built. answer: numbers to compare. turn: does so many units, and says what one has taken."""

    answer: Callable[[], Mapping[str, float]]
    turn: Callable[[int], Turn]


@dataclass(frozen=True, kw_only=True)
class Program:
    """A contender as the parent starts it. units: of one turn."""

    python: str
    module: str
    job: Job
    units: int = 1
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def words(self) -> tuple[str, ...]:
        """The command."""
        return (self.python, "-m", self.module, json.dumps(asdict(self.job)))


class Remote:
    """A running child; use it in a with block."""

    def __init__(self, name: str, program: Program):
        self._name, self._units = name, program.units
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed by __exit__
        self._process = subprocess.Popen(
            program.words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env=os.environ | _environment(program),
            text=True,
            start_new_session=True,  # a group of its own, so that its own workers can be ended with it
        )

    def __enter__(self) -> Remote:
        try:
            self._read()  # it is built
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *reason: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()  # it ends by itself at the end of its lines
        if reason and reason[0] is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process.stdout.close()
        self._said.close()

    def ask_answer(self) -> dict[str, float]:
        """The numbers to compare."""
        return self._ask({})

    def ask_turn(self) -> tuple[Turn, float]:
        """One turn of the program's units, and the peak of memory so far or, on a GPU, of this turn, GB."""
        reply = self._ask({"turn": self._units})
        return Turn(ms=reply["ms"], parts_ms=reply["parts_ms"]), reply["peak_gb"]

    def _ask(self, what: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            print(json.dumps(what), file=self._process.stdin, flush=True)
        except OSError:
            raise self._lost("is gone") from None
        return self._read()

    def _read(self) -> dict[str, Any]:
        """Its next line. One that has died may leave workers that hold the pipe open: so the process is looked at."""
        assert self._process.stdout is not None
        until = time.monotonic() + PATIENCE_SECONDS
        while not select.select([self._process.stdout], [], [], 0.5)[0]:
            if self._process.poll() is not None:
                raise self._lost(f"ended with {self._process.returncode}")
            if time.monotonic() > until:
                raise self._lost(f"said nothing for {PATIENCE_SECONDS:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise self._lost(f"ended with {self._process.wait()}")
        return dict(json.loads(line))

    def _lost(self, how: str) -> RuntimeError:
        self._said.seek(0)
        words = self._said.read().decode(errors="replace")
        return RuntimeError(f"{self._name} {how}:\n{words[-LAST_WORDS:]}")


@contextmanager
def running(programs: Mapping[str, Program]) -> Iterator[dict[str, Remote]]:
    """Children, built one after the other."""
    with ExitStack() as stack:
        yield {name: stack.enter_context(Remote(name, program)) for name, program in programs.items()}


def in_turn_apart(
    suite: str,
    what: str,
    remotes: Mapping[str, Remote],
    *,
    device: torch.device,
    repeats: int,
    seconds: float,
    warm_up: int = 1,
) -> Measurement:
    """A B C, A B C ...: as measure.in_turn, each contender in its process and by its own clock.

    seconds: a round that would end later than so long after the first one's beginning is not begun, but two are made.
    """
    times: dict[str, list[float]] = {name: [] for name in remotes}
    parts: dict[str, list[Mapping[str, float]]] = {name: [] for name in remotes}
    peaks: dict[str, float] = {}
    began = time.monotonic()
    for turn in range(warm_up + repeats):
        started = time.monotonic()
        for name, remote in remotes.items():
            took, peak = remote.ask_turn()
            if turn < warm_up:
                continue
            times[name].append(took.ms)
            parts[name].append(took.parts_ms)
            peaks[name] = max(peaks.get(name, peak), peak)
        if turn > warm_up and 2 * time.monotonic() - started - began > seconds:
            break
    return Measurement(
        suite=suite,
        what=what,
        on=model_of(device),
        times_ms={name: tuple(values) for name, values in times.items()},
        peaks_gb={name: peak for name, peak in peaks.items() if not math.isnan(peak)},
        parts_ms={name: _medians(of) for name, of in parts.items() if of and of[0]},
    )


def serve(tasks: Mapping[str, Callable[[Job], Contender]]) -> None:
    """The child's side: builds the job of its command line, says so, and answers line by line until there is none."""
    answers = _own_stdout()
    job = Job(**json.loads(sys.argv[1]))
    torch.set_num_threads(job.threads)
    contender = tasks[job.task](job)
    _say(answers, {"built": job.task})
    for line in sys.stdin:
        units = json.loads(line).get("turn")
        if units is None:
            _say(answers, dict(contender.answer()))
            continue
        if job.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        _say(answers, asdict(contender.turn(units)) | {"peak_gb": _peak_gb(job.device)})


def describe(image: Tensor, label: Tensor) -> dict[str, float]:
    """What must be alike however a batch was augmented: its voxels a sample, and what is in them."""
    return {
        "image_voxels": image[0].numel(),
        "label_voxels": label[0].numel(),
        "not_finite": float((~image.isfinite()).sum()),
        "lowest_label": float(label.min()),
        "deviation": float(image.float().std()),
    }


def epoch_turn(seconds: Sequence[float], waited_seconds: float, wall_seconds: float) -> Turn:
    """An epoch by its side's own log. Its parts: the wait for batches in it, and what comes after it, such as writing.

    seconds: of each epoch. waited_seconds, wall_seconds: of all of them together.
    """
    mean = sum(seconds) / len(seconds)
    after = max(0.0, wall_seconds / len(seconds) - mean)
    return Turn(ms=1000 * mean, parts_ms={"data wait": 1000 * waited_seconds / len(seconds), "after it": 1000 * after})


def _environment(program: Program) -> dict[str, str]:
    """Beside the parent's own. Unbuffered, so that the last words are there."""
    return {"OMP_NUM_THREADS": str(program.job.threads), "PYTHONUNBUFFERED": "1", **program.environment}


def _own_stdout() -> TextIO:
    """Stdout for the answers alone; what is printed from here on goes to stderr."""
    own = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return own


def _say(answers: TextIO, what: Mapping[str, Any]) -> None:
    print(json.dumps(what), file=answers, flush=True)


def _peak_gb(device: str) -> float:
    """The process's peak: of torch's allocator since it was reset on a GPU, else of all its memory since it began.

    Not getrusage's, which begins with what the parent held when it started the child. NaN where Linux does not say it.
    """
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    lines = Path("/proc/self/status").read_text().splitlines() if sys.platform == "linux" else ()
    return next((int(line.split()[1]) / 2**20 for line in lines if line.startswith("VmHWM:")), math.nan)


def _medians(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}
