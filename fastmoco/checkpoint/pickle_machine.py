"""Read a pickle as data, by a machine of bounded memory and time that imports and calls nothing.

Python's unpickler executes what a file says, and takes what a file asks for: a memo index of 2^28
costs gigabytes, a frame of 2^40 bytes ends in MemoryError, and a tuple as a key that contains
itself forty times over is hashed for years. Here a name is a `Name` and an object a `Record`, a key
is a text, a number or a `Record` (which has no content to hash), and every opcode takes at most
what the file has.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

Content: TypeAlias = bytes | bytearray | mmap.mmap

MOST_BYTES = 32 << 20
"""Longest pickle that is read, unless its reader says otherwise."""
MOST_OBJECTS = 4 << 20
"""Tuples, lists, dictionaries and records of a pickle of `MOST_BYTES`, which bounds its memory to
about 1 GB; a longer one may have as many more."""
LONGEST_NUMBER = 16
"""Bytes."""
DEEPEST = 100
"""Containers of several values inside each other."""


class PickleError(ValueError):
    """A pickle is damaged, or asks for more than data of its kind needs."""


class UnknownNameError(PickleError):
    """A pickle names something that its reader does not know.

    Attributes:
        name: with its module.
    """

    def __init__(self, name: str) -> None:
        super().__init__(f"it names {name[:200]}")
        self.name = name


@dataclass(frozen=True, slots=True, eq=False)
class Name:
    """A class or function that a pickle names; it was not imported."""

    full: str


@dataclass(slots=True, eq=False)
class Record:
    """An object that a pickle describes; it was not built.

    Attributes:
        name: of its class, or of the function that would make it.
        arguments: for that class or function.
        state: its fields, as a dictionary or tuple; None without any.
    """

    name: str
    arguments: tuple[Any, ...] = field(default=())
    state: Any = None


Calls: TypeAlias = Mapping[str, Callable[..., Any] | None]
"""Every name that a pickle may contain. With a function: called with the arguments of the pickle,
and must check them. With None: a `Record` or a `Name`."""


def read_pickle(
    content: Content,
    calls: Calls,
    *,
    at: int = 0,
    end: int | None = None,
    persistent: Callable[[Any], Any] | None = None,
    most: int | None = None,
) -> tuple[Any, int]:
    """Read the pickle at a byte of some content.

    Args:
        content: may be longer.
        calls: the names that it may contain.
        at: byte at which it begins.
        end: byte behind the last one that may belong to it; by default and at most `most` on.
        persistent: gives the object of a persistent id, and must check the id; None: there are none.
        most: bytes; default `MOST_BYTES`.

    Returns:
        What it contains, made of None, bool, int, float, str, bytes, tuple, list, dict, `Name`,
        `Record` and the results of `calls` and `persistent`; and the byte behind it. Lists and
        dictionaries may contain themselves: no reader may follow them to any depth.

    Raises:
        UnknownNameError: for a name that is not in `calls`.
        PickleError: naming the byte, if it is damaged, unknown or too large.
    """
    most = MOST_BYTES if most is None else most
    end = min(len(content), len(content) if end is None else end, at + most)
    machine = _Machine(content, at, end, calls, persistent, most)
    return machine.run(), machine.at


_KEYS = (str, bytes, Record)
"""Beside small numbers: equal hashes of large ones are easily made, of texts they are not."""


class _Machine:
    """The stack, the memo, and one method for each opcode."""

    def __init__(
        self,
        content: Content,
        at: int,
        end: int,
        calls: Calls,
        persistent: Callable[[Any], Any] | None,
        most: int,
    ) -> None:
        self.content = content
        self.at = at
        self.end = end
        self.calls = calls
        self.persistent = persistent
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: list[Any] = []
        self.objects = 0
        self.most = most
        self.most_objects = MOST_OBJECTS * most // MOST_BYTES

    def run(self) -> Any:
        content, end = self.content, self.end
        try:
            while self.at < end:
                code = content[self.at]
                self.at += 1
                if code == _STOP:
                    return self.stack.pop()
                step = _STEPS.get(code)
                if step is None:
                    raise PickleError(f"opcode {code:#04x} belongs to no data of this kind")
                step(self)
        except IndexError:
            raise PickleError(f"byte {self.at}: it uses a value that it does not contain") from None
        except UnicodeDecodeError:
            raise PickleError(f"byte {self.at}: a text is not UTF-8") from None
        except PickleError as error:
            if isinstance(error, UnknownNameError) or str(error).startswith("byte "):
                raise
            raise PickleError(f"byte {self.at}: {error}") from None
        raise PickleError(f"byte {self.at}: it ends too early, or has more than {self.most} bytes")

    # What opcodes have in common.

    def take(self, size: int) -> bytes:
        begin = self.at
        if size > self.end - begin:
            raise PickleError(f"asks for {size} bytes, and {self.end - begin} are left")
        self.at = begin + size
        return bytes(self.content[begin : self.at])

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def line(self) -> str:
        stop = self.content.find(b"\n", self.at, self.end)
        if stop < 0:
            raise PickleError("a line has no end")
        text = self.take(stop - self.at).decode()
        self.at += 1
        return text

    def made(self, value: Any) -> None:
        self.objects += 1
        if self.objects > self.most_objects:
            raise PickleError(f"it has more than {self.most_objects} objects")
        self.stack.append(value)

    def mark(self) -> None:
        if len(self.marks) == DEEPEST:
            raise PickleError(f"it is nested deeper than {DEEPEST}")
        self.marks.append(len(self.stack))

    def to_mark(self) -> list[Any]:
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    def named(self, module: Any, name: Any) -> Name:
        full = f"{module}.{name}" if isinstance(module, str) and isinstance(name, str) else "?"
        if full not in self.calls:
            raise UnknownNameError(full)
        return Name(full)

    def call(self, name: Any, arguments: Any) -> Any:
        if not isinstance(name, Name) or not isinstance(arguments, tuple):
            raise PickleError("it calls what is no name")
        function = self.calls[name.full]
        if function is None:
            return Record(name.full, arguments)
        try:
            return function(*arguments)
        except (TypeError, OverflowError, RuntimeError) as error:
            raise PickleError(f"{name.full} has other arguments ({_first_line(error)})") from None

    def remember(self, index: int) -> None:
        # Writers number what they remember from 0 on, Python 2 from 1 on.
        if index > len(self.memo) + 1:
            raise PickleError(f"a memo index of {index}, and {len(self.memo)} are in use")
        if index > self.most_objects:
            raise PickleError(f"it remembers more than {self.most_objects} objects")
        self.memo += [None] * (index + 1 - len(self.memo))
        self.memo[index] = self.stack[-1]

    # Opcodes.

    def skip(self, size: int) -> None:
        self.take(size)

    def skip_frame(self) -> None:
        size = self.number(8)
        if size > self.end - self.at:
            raise PickleError(f"a frame of {size} bytes, and {self.end - self.at} are left")

    def text(self, size: int, encoding: str = "utf-8") -> None:
        self.stack.append(self.take(size).decode(encoding, "surrogatepass"))

    def long_number(self) -> None:
        size = self.number(1)
        if size > LONGEST_NUMBER:
            raise PickleError(f"a whole number of {size} bytes")
        self.stack.append(int.from_bytes(self.take(size), "little", signed=True))

    def put_tuple(self, size: int) -> None:
        if size > len(self.stack):
            raise IndexError
        items = tuple(self.stack[-size:])
        del self.stack[-size:]
        self.made(items)

    def extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise PickleError("it appends to what is no list")
        self.stack[-1].extend(items)

    def set_items(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not dict or len(items) % 2:
            raise PickleError("it sets an item of what is no dictionary")
        for key in items[::2]:
            if not (isinstance(key, _KEYS) or (type(key) is int and abs(key) < 2**31)):
                raise PickleError(f"a {type(key).__name__} is no key")
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def stack_name(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.stack.append(self.named(module, name))

    def instance(self) -> None:
        name = self.named(self.line(), self.line())
        self.made(self.call(name, tuple(self.to_mark())))

    def new(self) -> None:
        arguments, name = self.stack.pop(), self.stack.pop()
        self.made(self.call(name, arguments))

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Record):
            if target.state is not None:
                raise PickleError(f"it builds one {target.name} twice")
            target.state = state
        elif type(target) is not dict:  # the attributes of an OrderedDict are left out
            raise PickleError("it builds what is no object")

    def persistent_id(self) -> None:
        if self.persistent is None:
            raise PickleError("it refers to something outside")
        self.stack.append(self.persistent(self.stack.pop()))


_STOP = ord(".")
_Step: TypeAlias = Callable[[_Machine], None]


def _push(value: Any) -> _Step:
    return lambda m: m.stack.append(value)


def _sized(size: int) -> _Step:
    """A text behind its length of `size` bytes."""
    return lambda m: m.text(m.number(size))


_STEPS: dict[int, _Step] = {
    ord(opcode): step
    for opcode, step in {
        "\x80": lambda m: m.skip(1),  # the protocol
        "\x95": _Machine.skip_frame,
        # Values.
        "N": _push(None),
        "\x88": _push(True),
        "\x89": _push(False),
        "K": lambda m: m.stack.append(m.number(1)),
        "M": lambda m: m.stack.append(m.number(2)),
        "J": lambda m: m.stack.append(int.from_bytes(m.take(4), "little", signed=True)),
        "\x8a": _Machine.long_number,
        "G": lambda m: m.stack.append(struct.unpack(">d", m.take(8))[0]),
        "V": lambda m: m.stack.append(m.line()),
        "\x8c": _sized(1),
        "X": _sized(4),
        "U": lambda m: m.text(m.number(1), "latin-1"),  # a text of Python 2
        "T": lambda m: m.text(m.number(4), "latin-1"),
        "C": lambda m: m.stack.append(m.take(m.number(1))),
        "B": lambda m: m.stack.append(m.take(m.number(4))),
        # Containers.
        "(": _Machine.mark,
        ")": _push(()),
        "]": lambda m: m.made([]),
        "}": lambda m: m.made({}),
        "\x8f": lambda m: m.made([]),  # a set, as a list
        "\x90": lambda m: m.extend(m.to_mark()),
        "t": lambda m: m.made(tuple(m.to_mark())),
        "\x85": lambda m: m.put_tuple(1),
        "\x86": lambda m: m.put_tuple(2),
        "\x87": lambda m: m.put_tuple(3),
        "a": lambda m: m.extend([m.stack.pop()]),
        "e": lambda m: m.extend(m.to_mark()),
        "s": _Machine.set_item,
        "u": lambda m: m.set_items(m.to_mark()),
        # The memo.
        "\x94": lambda m: m.remember(len(m.memo)),
        "q": lambda m: m.remember(m.number(1)),
        "r": lambda m: m.remember(m.number(4)),
        "h": lambda m: m.stack.append(m.memo[m.number(1)]),
        "j": lambda m: m.stack.append(m.memo[m.number(4)]),
        # Names and objects.
        "c": lambda m: m.stack.append(m.named(m.line(), m.line())),
        "\x93": _Machine.stack_name,
        "i": _Machine.instance,
        "R": _Machine.new,
        "\x81": _Machine.new,
        "b": _Machine.build,
        "Q": _Machine.persistent_id,
    }.items()
}


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
