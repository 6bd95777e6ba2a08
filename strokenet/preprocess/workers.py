"""The worker processes of jobs.py: fresh ones (spawn), each with a pipe of its own and one case at a time.

Own pipes instead of a pool, because a pool whose worker dies neither says which case it held nor goes on. The pipe
carries (case, item) to the worker; back come one _Ready, log records, and an outcome a case.
"""

from __future__ import annotations

import logging
import multiprocessing
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from logging.handlers import QueueHandler
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

from strokenet.data.errors import InputError
from strokenet.memory import available_bytes

Item = TypeVar("Item")
Result = TypeVar("Result")

_log = logging.getLogger("strokenet")


@dataclass(frozen=True, kw_only=True)
class CaseFailure:
    """Why a case failed, in one line; and the traceback, empty for wrong input and for killed workers."""

    message: str
    traceback: str = ""


@dataclass(frozen=True, eq=False)
class Done(Generic[Result]):
    """A result; told from a CaseFailure whatever it is."""

    value: Result


Outcomes = Generator[tuple[str, "Done[Result] | CaseFailure"], None, None]


def in_process(function: Callable[[Item], Result], items: Mapping[str, Item]) -> Outcomes[Result]:
    """(case id, outcome) of every case, one after the other, in this process."""
    for case_id, item in items.items():
        yield case_id, _attempt(function, case_id, item)


def in_processes(
    function: Callable[[Item], Result], items: Mapping[str, Item], workers: int, *, again: bool = True
) -> Outcomes[Result]:
    """(case id, outcome) of every case, as they come from the workers.

    Where workers cannot start (a script without `if __name__ == "__main__"`), the rest is done in this process.

    Args:
        again: a case whose worker was killed is tried once more at the end, alone in a fresh worker.
    """
    team = _Team(function, items, workers)
    try:
        while team.fill():
            yield from team.collect(again)
    finally:
        team.stop()
    yield from in_process(function, {case_id: items[case_id] for case_id in team.waiting})
    for case_id in team.killed:
        yield from in_processes(function, {case_id: items[case_id]}, 1, again=False)


def _attempt(function: Callable[[Item], Result], case_id: str, item: Item) -> Done[Result] | CaseFailure:
    """The result, or the failure with the traceback of what went wrong."""
    try:
        return Done(function(item))
    except InputError as error:
        return CaseFailure(message=str(error).removeprefix(f"{case_id}: "))
    except Exception as error:
        return _failure(error)


def _failure(error: Exception) -> CaseFailure:
    message = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    if isinstance(error, MemoryError):
        message = f"{message} ({_free_memory()}); use fewer --jobs or close other programs"
    return CaseFailure(message=message, traceback="".join(traceback.format_exception(error)))


@dataclass(frozen=True)
class _Ready:
    """First message of a worker: it could start."""


@dataclass(frozen=True)
class _Died:
    """Stands for the end of a worker's pipe."""

    reason: str


@dataclass(eq=False)
class _Worker:
    """A process, our end of its pipe, and the case it holds."""

    process: BaseProcess
    pipe: Connection
    case_id: str = ""
    ready: bool = False

    def give(self, case_id: str, item: object) -> None:
        self.case_id = case_id
        try:
            self.pipe.send((case_id, item))
        except BrokenPipeError:
            return  # it died: receive says so

    def receive(self) -> Any:
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            return _Died(_reason(self.process.exitcode))

    def stop(self) -> None:
        self.pipe.close()
        self.process.terminate()
        self.process.join()
        self.process.close()


class _Team(Generic[Item, Result]):
    """The workers at work: who holds which case, which wait, and whose worker was killed."""

    def __init__(self, function: Callable[[Item], Result], items: Mapping[str, Item], size: int) -> None:
        self.waiting = deque(items)
        self.killed: list[str] = []
        self._function = function
        self._items = items
        self._size = size
        self._members: list[_Worker] = []

    def fill(self) -> bool:
        """Starts workers for waiting cases; False when nobody holds a case any more."""
        while self.waiting and len(self._members) < self._size:
            self._members.append(_start(self._function))
            self._give_next(self._members[-1])
        return bool(self._members)

    def collect(self, again: bool) -> list[tuple[str, Done[Result] | CaseFailure]]:
        """Waits until a worker says something, and returns the outcomes that are ready."""
        ready = wait([worker.pipe for worker in self._members])
        outcomes: list[tuple[str, Done[Result] | CaseFailure]] = []
        for worker in [w for w in self._members if w.pipe in ready]:
            message = worker.receive()
            if isinstance(message, logging.LogRecord):
                _log.handle(message)
            elif isinstance(message, _Ready):
                worker.ready = True
            elif isinstance(message, _Died):
                outcomes += self._bury(worker, message.reason, again)
            else:
                outcomes.append((worker.case_id, message))
                self._give_next(worker)
        return outcomes

    def stop(self) -> None:
        """Ends all workers, whatever they do."""
        while self._members:
            self._members.pop().stop()

    def _give_next(self, worker: _Worker) -> None:
        if self.waiting:
            case_id = self.waiting.popleft()
            worker.give(case_id, self._items[case_id])
        else:
            self._members.remove(worker)
            worker.stop()

    def _bury(self, worker: _Worker, reason: str, again: bool) -> list[tuple[str, CaseFailure]]:
        """The outcome of the case whose worker is gone; none where it will be tried again."""
        self._members.remove(worker)
        worker.stop()
        if not worker.ready:
            _log.warning("a worker process could not start (it %s); going on with fewer", reason)
            self.waiting.appendleft(worker.case_id)
            self._size -= 1
            return []
        if again:
            _log.warning("%s: its worker %s; this case is tried again at the end, alone", worker.case_id, reason)
            self.killed.append(worker.case_id)
            return []
        return [(worker.case_id, CaseFailure(message=f"its worker {reason}; close other programs or free memory"))]


def _start(function: Callable[[Item], Result]) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    level = _log.getEffectiveLevel()
    process = context.Process(target=_serve, args=(theirs, function, level), daemon=True, name="strokenet case worker")
    process.start()
    theirs.close()  # so that the end of the process is the end of the pipe
    return _Worker(process=process, pipe=ours)


def _serve(pipe: Connection, function: Callable[[Any], Any], level: int) -> None:
    """Life of a worker: one thread, one case after the other, until the parent closes the pipe."""
    if "torch" in sys.modules:  # the function's own module has imported it by now, or does not need it
        sys.modules["torch"].set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent decides
    _log.setLevel(level)
    _log.addHandler(_PipeHandler(pipe))
    _log.propagate = False
    pipe.send(_Ready())
    while True:
        try:
            case_id, item = pipe.recv()
        except (EOFError, OSError):
            return
        outcome = _attempt(function, case_id, item)
        try:
            pipe.send(outcome)
        except BrokenPipeError:
            return
        except Exception as error:  # a result that cannot be pickled
            pipe.send(_failure(error))


class _PipeHandler(QueueHandler):
    """Sends log records to the parent instead of printing them between its progress bars."""

    def __init__(self, pipe: Connection) -> None:
        super().__init__(pipe)  # type: ignore[arg-type]
        self._pipe = pipe

    def enqueue(self, record: logging.LogRecord) -> None:
        self._pipe.send(record)


def _reason(exitcode: int | None) -> str:
    if exitcode == -signal.SIGKILL:
        return f"was killed (exit -9), most likely for lack of memory ({_free_memory()})"
    if exitcode is not None and exitcode < 0:
        return f"died of {signal.Signals(-exitcode).name} (exit {exitcode})"
    return f"ended with exit code {exitcode}"


def _free_memory() -> str:
    free = available_bytes()
    return "free memory unknown" if free is None else f"{free / 1e9:.1f} GB free now"
