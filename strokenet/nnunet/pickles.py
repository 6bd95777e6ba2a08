"""Pickles: values that a stranger stored, read by a machine that knows numbers, texts, containers and arrays alone.

Comes in: a stream. Goes out: plain values, numpy's numbers and arrays, and what the caller's own names make. A pickle
is a program for a stack machine; Python's runs whatever it names, and torch's restricted one still lets a small file
take all memory or end the process. This one steps through the opcodes that nnU-Net's files hold (protocols 2 to 4) and
refuses every other. Whatever it makes is no larger than the file: nothing is copied, called or hashed but plain keys.
Files of v1 were written by numpy 1, whose module was numpy.core; numpy 2 calls it numpy._core.
"""

from __future__ import annotations

import pickletools
import re
import stat
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from strokenet.data.errors import InputError

MAX_PICKLE_BYTES = 16 * 2**20  # plans.pkl of 655 cases has 100 kB
_KIND = re.compile(r"[biuf][1248]")
_PLAIN_KEYS = (str, int, float, bool, type(None))

Make = Callable[..., Any]


class ForeignError(ValueError):
    """A file that is refused; the message follows its name."""


@dataclass(frozen=True, eq=False)
class Name:
    """What a file names. make: what a call of it makes, None where it is only ever mentioned."""

    name: str
    make: Make | None


class Kind:
    """Stands for numpy.dtype, whose own __setstate__ would let a file say that its bytes are pointers."""

    def __init__(self, code: Any = "", *_: Any) -> None:
        if not isinstance(code, str) or _KIND.fullmatch(code) is None:
            shown = repr(code) if isinstance(code, str) else type(code).__name__
            raise ForeignError(f"holds an array of {shown:.40}, which is not allowed")
        self.dtype = np.dtype(code)

    def build(self, state: Any) -> None:
        """Takes the byte order; fields and anything else of a state are refused."""
        if type(state) is not tuple or len(state) < 5 or state[1] not in ("<", ">", "|", "="):
            raise ForeignError("holds an array of an unknown kind, which is not allowed")
        if any(part is not None for part in state[2:5]):
            raise ForeignError("holds an array of fields, which is not allowed")
        self.dtype = self.dtype.newbyteorder(state[1])


class Array(np.ndarray[Any, Any]):
    """An array that takes its content from bytes of a plain number type alone."""

    def build(self, state: Any) -> None:
        """Takes shape, type and bytes, as numpy's arrays store them."""
        _, shape, kind, fortran, content = state
        if type(kind) is not Kind or type(content) is not bytes:
            raise ForeignError("holds an array of objects, which is not allowed")
        checked: Any = (1, shape, kind.dtype, fortran is True, content)
        self.__setstate__(checked)


def _empty_array(*_: Any) -> Array:
    return np.ndarray.__new__(Array, (0,))


def _number(kind: Any, content: Any) -> Any:
    if type(kind) is not Kind or type(content) is not bytes or len(content) != kind.dtype.itemsize:
        raise ForeignError("holds a number of another size than its bytes; download or copy it again")
    return np.frombuffer(content, kind.dtype)[0]


_MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")
NUMBERS: Mapping[str, Make | None] = {  # names of numpy's numbers, and of ordered dictionaries
    **{f"{module}.scalar": _number for module in _MULTIARRAY},
    "numpy.dtype": Kind,
    "collections.OrderedDict": dict,
}
ARRAYS: Mapping[str, Make | None] = {
    **NUMBERS,
    **{f"{module}._reconstruct": _empty_array for module in _MULTIARRAY},
    "numpy.ndarray": None,  # only ever named as what _reconstruct makes
}
_ENCODE = "_codecs.encode"  # how pickles of protocol 2 spell bytes


def load_pickle(path: Path) -> Any:
    """The value of a pickle made of plain values, dictionaries and numpy arrays: v1's plans.pkl and *.model.pkl.

    Raises:
        InputError: missing, larger than 16 MiB, cut short, or it names anything else.
    """
    with one_line(path):
        check_regular(path, MAX_PICKLE_BYTES)
        return read_pickle(BytesIO(path.read_bytes()), ARRAYS, MAX_PICKLE_BYTES)


def read_pickle(stream: BinaryIO, names: Mapping[str, Make | None], most: int, persistent: Make | None = None) -> Any:
    """The value of the pickle that begins here; the stream then stands behind it.

    names: the names that it may hold -> what a call of them makes. most: bytes. persistent: what an identifier of
    something outside the pickle makes.

    Raises:
        ForeignError: another name or opcode, or a call that is none of nnU-Net's. Other errors: it is damaged.
    """
    machine = _Machine(names, persistent)
    begin = stream.tell()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of strange text in a damaged file
        for code, argument, position in pickletools.genops(stream):
            machine.place = (position or 0) - begin
            if machine.place > most:
                raise ForeignError(f"holds a pickle of more than {most} bytes; it is none of nnU-Net's")
            step = _STEPS.get(code.name)
            if step is None:
                raise ForeignError(f"holds {code.name}, which is not allowed (only plain values are read)")
            step(machine, argument)
    (value,) = machine.stack
    return value


class _Machine:
    """The stack of a pickle while it is read; `place` is the byte it is at."""

    def __init__(self, names: Mapping[str, Make | None], persistent: Make | None):
        self.names, self.persistent = names, persistent
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # stacks under each mark
        self.memo: dict[int, Any] = {}
        self.place = self.encoded = 0

    def mark(self, _: Any) -> None:
        self.below.append(self.stack)
        self.stack = []

    def above_mark(self) -> list[Any]:
        above, self.stack = self.stack, self.below.pop()
        return above

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def tuple_of(self, count: int) -> None:
        parts = [self.stack.pop() for _ in range(count)]
        self.push(tuple(reversed(parts)))

    def put(self, number: int | None) -> None:
        self.memo[len(self.memo) if number is None else number] = self.stack[-1]

    def extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise ForeignError("appends to what is no list, which is not allowed")
        target.extend(values)

    def update(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(values) % 2:
            raise ForeignError("sets an entry of what is no dictionary, which is not allowed")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if not _is_plain_key(key):
                raise ForeignError("holds a dictionary with a key that is no plain value, which is not allowed")
            target[key] = value

    def name(self, full: str) -> None:
        if full != _ENCODE and full not in self.names:
            raise ForeignError(f"names {full:.120}, which is not allowed (only tensors, arrays and numbers are read)")
        self.push(Name(full, self.encode if full == _ENCODE else self.names[full]))

    def name_on_stack(self) -> None:
        attribute, module = self.stack.pop(), self.stack.pop()
        if type(attribute) is not str or type(module) is not str:
            raise ForeignError("names something by what is no text, which is not allowed")
        self.name(f"{module}.{attribute}")

    def encode(self, text: Any, encoding: Any) -> bytes:
        """Of all the codecs the one that pickles use. Each text is encoded once, so all are shorter than the file."""
        if type(text) is not str or type(encoding) is not str or encoding != "latin1":
            raise ForeignError("encodes as something else than 'latin1', which is not allowed")
        self.encoded += len(text)
        if self.encoded > self.place:
            raise ForeignError("encodes one text many times, which is not allowed")
        return text.encode("latin-1")

    def call(self) -> None:
        arguments, callee = self.stack.pop(), self.stack.pop()
        if type(callee) is not Name or callee.make is None or type(arguments) is not tuple:
            raise ForeignError("calls something that is not allowed")
        if callee.make is dict and arguments:
            raise ForeignError("copies a dictionary, which is not allowed")
        self.push(callee.make(*arguments))

    def build(self) -> None:
        """Gives an object its state; a dictionary has none, but torch stores versions with its own."""
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, (Kind, Array)):
            target.build(state)
        elif type(target) is not dict:
            raise ForeignError("gives a state to what has none, which is not allowed")

    def refer(self) -> None:
        if self.persistent is None:
            raise ForeignError("refers to something outside the file, which is not allowed")
        self.push(self.persistent(self.stack.pop()))


def _is_plain_key(key: Any) -> bool:
    """A text or number, or a tuple of some (v1 has tuples of labels). To hash anything else could take for ever."""
    return all(type(part) in _PLAIN_KEYS for part in key) if type(key) is tuple else type(key) in _PLAIN_KEYS


_ARGUMENTS = """
    BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT
    BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8
"""
_STEPS: Mapping[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda m, _: None),
    **dict.fromkeys(_ARGUMENTS.split(), _Machine.push),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine.put),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda m, number: m.push(m.memo[number])),
    "NONE": lambda m, _: m.push(None),
    "NEWTRUE": lambda m, _: m.push(True),
    "NEWFALSE": lambda m, _: m.push(False),
    "EMPTY_DICT": lambda m, _: m.push({}),
    "EMPTY_LIST": lambda m, _: m.push([]),
    "EMPTY_TUPLE": lambda m, _: m.push(()),
    "TUPLE1": lambda m, _: m.tuple_of(1),
    "TUPLE2": lambda m, _: m.tuple_of(2),
    "TUPLE3": lambda m, _: m.tuple_of(3),
    "MARK": _Machine.mark,
    "TUPLE": lambda m, _: m.push(tuple(m.above_mark())),
    "APPEND": lambda m, _: m.extend([m.stack.pop()]),
    "APPENDS": lambda m, _: m.extend(m.above_mark()),
    "SETITEM": lambda m, _: m.update([m.stack.pop(-2), m.stack.pop()]),
    "SETITEMS": lambda m, _: m.update(m.above_mark()),
    "GLOBAL": lambda m, full: m.name(full.replace(" ", ".", 1)),
    "STACK_GLOBAL": lambda m, _: m.name_on_stack(),
    "REDUCE": lambda m, _: m.call(),
    "BUILD": lambda m, _: m.build(),
    "BINPERSID": lambda m, _: m.refer(),
}


def check_regular(path: Path, limit: int) -> None:
    """InputError for what is no file, or one larger than `limit` bytes."""
    try:
        status = path.stat()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path}: is no regular file")
    if status.st_size > limit:
        raise InputError(f"{path}: {status.st_size} bytes; at most {limit} are read")


@contextmanager
def one_line(path: Path) -> Iterator[None]:
    """Whatever a damaged file makes its reader raise becomes one line; a file can make it raise nearly anything."""
    try:
        yield
    except InputError:
        raise
    except ForeignError as error:
        raise InputError(f"{path}: {error}") from None
    except Exception as error:
        text = " ".join(str(error).split())
        what = f"{type(error).__name__}{f': {text:.150}' if text.isprintable() and text else ''}"
        raise InputError(
            f"{path}: damaged or cut short, it cannot be read ({what}); download or copy it again"
        ) from None
