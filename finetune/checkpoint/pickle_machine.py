"""A machine that reads the pickle language and can do nothing else: it imports nothing and calls nothing.

Python's own unpickler calls what a file names. This one computes plain values only (None, bool, int, float,
str, list, tuple, dict, set, `Blob`) and hands every global, call and state of the file to a `World`, which
answers with inert stand-ins or refuses. All errors are `PickleRefused` with the position of the opcode in the
file.

Time and memory are bounded by the size of the file: a `Budget` counts opcodes and copied bytes, big bytes
stay views of the file, keys of dicts and sets can be compared in constant time, and nothing here recurses.
"""

from __future__ import annotations

import re
import struct
import sys
from dataclasses import dataclass
from typing import Any, Protocol

from finetune.errors import PickleRefused

MAX_OPCODES = 500_000  # a 1024x1024 checkpoint has about 65,000, nested storages included
MAX_TEXT = 1 << 20  # bytes of one string that is not Latin-1, and of one line of protocol 0
MAX_LONG = 64  # bytes of one integer
MAX_MARKS = 10_000  # open at once; a checkpoint has a few dozen
MAX_PROTOCOL = 5

DAMAGED = "If it should be one, compare its size and SHA-256 with the source's, or download it again."
NOT_LATIN1 = re.compile(rb"[\xc4-\xff]")  # first bytes of UTF-8 sequences above U+00FF


@dataclass(slots=True, frozen=True, eq=False)
class Blob:
    """Bytes of the file: a view, not a copy, and the position of its first byte in the file (None for a
    copy).
    """

    view: memoryview
    offset: int | None

    def __len__(self) -> int:
        return len(self.view)


@dataclass(slots=True, frozen=True, eq=False)
class Global:
    """A name that the file mentions, as text; nothing is looked up."""

    name: str
    offset: int


@dataclass(slots=True, eq=False)
class Budget:
    """What is left to spend on one file: steps of the machine, and bytes copied out of the file."""

    steps: int
    copied: int

    def step(self, count: int, offset: int) -> None:
        self.steps -= count
        if self.steps < 0:
            raise PickleRefused(
                f"the pickle takes more than {MAX_OPCODES:,} steps to read (at byte {offset}); "
                "no checkpoint needs as many",
                offset=offset,
            )

    def copy(self, num_bytes: int, offset: int) -> None:
        self.copied -= num_bytes
        if self.copied < 0:
            raise PickleRefused(
                f"the pickle grows to several times its size on disk (at byte {offset})", offset=offset
            )


class World(Protocol):
    """Decides what the names in a file stand for. Every method may raise PickleRefused."""

    def find(self, name: Global) -> Any:
        """A stand-in for the global `name`."""

    def call(self, function: Any, args: tuple, offset: int) -> Any:
        """The value of `function(*args)` (opcodes REDUCE, NEWOBJ and NEWOBJ_EX)."""

    def set_state(self, target: Any, state: Any, offset: int) -> Any:
        """`target` after the opcode BUILD; the result replaces nothing, it is `target` that must change."""

    def persistent(self, key: Any, offset: int) -> Any:
        """The object that the file keeps elsewhere under `key`."""


class Machine:
    """Reads one pickle after another from `data`, the bytes of a file from position `base` on."""

    def __init__(self, data: memoryview, world: World, budget: Budget, *, base: int = 0) -> None:
        self.data = data
        self.world = world
        self.budget = budget
        self.base = base
        self.position = 0
        self.opcode_at = 0

    def run(self) -> Any:
        """The value of the pickle at `position`, which moves behind its STOP."""
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.protocol = 0
        while True:
            self.opcode_at = self.position
            self.budget.step(1, self.at)
            opcode = self.take(1)[0]
            if opcode == STOP:
                return self._result()
            handler = HANDLERS.get(opcode)
            if handler is None:
                name = UNSUPPORTED.get(opcode)
                what = (
                    f"opcode {name}, which no checkpoint needs"
                    if name
                    else f"byte 0x{opcode:02x}, not an opcode"
                )
                raise self.refuse(f"it holds {what}")
            handler(self)

    @property
    def at(self) -> int:
        """Position in the file of the opcode being read."""
        return self.base + self.opcode_at

    def refuse(self, why: str) -> PickleRefused:
        what = f"the pickle is damaged or not a checkpoint: {why} (at byte {self.at})"
        return PickleRefused(what, offset=self.at, hint=DAMAGED)

    def _result(self) -> Any:
        if self.marks or len(self.stack) != 1:
            raise self.refuse("it ends with unfinished values")
        return self.stack.pop()

    # Reading.

    def take(self, count: int) -> memoryview:
        end = self.position + count
        if end > len(self.data):
            left = len(self.data) - self.position
            raise self.refuse(
                f"{count:,} more bytes are announced and {left:,} are there; the file may be cut off"
            )
        view = self.data[self.position : end]
        self.position = end
        return view

    def unpack(self, layout: struct.Struct) -> Any:
        return layout.unpack(self.take(layout.size))[0]

    def line(self, limit: int) -> bytes:
        """The text up to the next line feed, without it."""
        size = 256
        while True:
            size = min(size, limit + 1)
            head = bytes(self.data[self.position : self.position + size])
            end = head.find(b"\n")
            if end >= 0:
                self.position += end + 1
                return head[:end]
            if size > limit or len(head) < size:
                raise self.refuse(f"a line of text does not end within {limit:,} bytes")
            size *= 4

    def text(self, raw: memoryview) -> str:
        if len(raw) > MAX_TEXT and NOT_LATIN1.search(raw):  # would take four bytes a character
            raise self.refuse(f"a text of {len(raw):,} bytes, which is neither code nor packed bytes")
        try:
            text = str(raw, "utf-8", "surrogatepass")
        except UnicodeDecodeError:
            raise self.refuse("a text is not UTF-8") from None
        self.budget.copy(sys.getsizeof(text) - sys.getsizeof(""), self.at)
        return text

    # The stack.

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if not self.stack:
            raise self.refuse("a value is missing")
        return self.stack.pop()

    def top(self) -> Any:
        if not self.stack:
            raise self.refuse("a value is missing")
        return self.stack[-1]

    def mark(self) -> None:
        if len(self.marks) >= MAX_MARKS:
            raise self.refuse("its values are nested too deeply")
        self.marks.append(self.stack)
        self.stack = []

    def pop_mark(self) -> list[Any]:
        if not self.marks:
            raise self.refuse("a MARK is missing")
        items, self.stack = self.stack, self.marks.pop()
        return items

    def key(self, value: Any) -> Any:
        """`value`, if it can be a key: what a file may make slow to hash or to compare cannot."""
        if is_key(value):
            return value
        raise self.refuse(f"a key of a dict or set is neither a text nor a small number but {kind(value)}")

    def pairs(self, items: list[Any]) -> list[tuple[Any, Any]]:
        if len(items) % 2:
            raise self.refuse("a dict has a key without a value")
        return [(self.key(items[i]), items[i + 1]) for i in range(0, len(items), 2)]

    def container(self, expected: type) -> Any:
        target = self.top()
        if type(target) is not expected:
            raise self.refuse(f"{kind(target)} where a {expected.__name__} should be")
        return target

    def find(self, module: str, name: str) -> Any:
        if self.protocol < 3:  # as Python 2 called them
            module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
        return self.world.find(Global(f"{module}.{name}", self.at))


def is_key(value: Any) -> bool:
    """Whether `value` may be a key; large integers can be made to collide, so they may not."""
    is_small = type(value) is int and -(2**31) <= value < 2**31
    return is_small or value is None or type(value) in (str, bool)


def kind(value: Any) -> str:
    """What `value` is, in words that never contain the value itself."""
    return f"a {value.name}" if type(value) is Global else f"a {type(value).__name__}"


U8, U16, I32, U32, U64, F64 = (struct.Struct(code) for code in ("<B", "<H", "<i", "<I", "<Q", ">d"))
STOP = ord(".")
HANDLERS: dict[int, Any] = {}
UNSUPPORTED = {
    ord("P"): "PERSID",
    ord("S"): "STRING",
    ord("T"): "BINSTRING",
    ord("U"): "SHORT_BINSTRING",
    0x97: "NEXT_BUFFER",
    0x98: "READONLY_BUFFER",
}


_code: str | int


def opcode(code: str | int):
    """Register the handler of one opcode. Names and meanings: the documentation of the module pickletools."""

    def register(handler):
        HANDLERS[ord(code) if isinstance(code, str) else code] = handler
        return handler

    return register


def constants(table: dict[str | int, Any]) -> None:
    for code, value in table.items():
        opcode(code)(lambda m, value=value: m.push(value))


constants({"N": None, 0x88: True, 0x89: False, ")": ()})
opcode("]")(lambda m: m.push([]))
opcode("}")(lambda m: m.push({}))
opcode(0x8F)(lambda m: m.push(set()))

# Numbers.
for _code, _layout in (("K", U8), ("M", U16), ("J", I32), ("G", F64)):
    opcode(_code)(lambda m, layout=_layout: m.push(m.unpack(layout)))


@opcode("I")
@opcode("L")
def _decimal(m: Machine) -> None:
    text = m.line(3 * MAX_LONG)
    if text in (b"00", b"01"):
        return m.push(text == b"01")
    if not re.fullmatch(rb"[+-]?[0-9]+L?", text):
        raise m.refuse("a number is not a number")
    m.push(int(text.rstrip(b"L")))


@opcode("F")
def _decimal_float(m: Machine) -> None:
    try:
        m.push(float(m.line(3 * MAX_LONG)))
    except ValueError:
        raise m.refuse("a number is not a number") from None


def _long(m: Machine, layout: struct.Struct) -> None:
    size = m.unpack(layout)
    if not 0 <= size <= MAX_LONG:
        raise m.refuse(f"an integer of {size:,} bytes")
    m.push(int.from_bytes(m.take(size), "little", signed=True))


opcode(0x8A)(lambda m: _long(m, U8))
opcode(0x8B)(lambda m: _long(m, I32))

# Texts and bytes.
for _code, _layout in ((0x8C, U8), ("X", U32), (0x8D, U64)):
    opcode(_code)(lambda m, layout=_layout: m.push(m.text(m.take(m.unpack(layout)))))


@opcode("V")
def _unicode_line(m: Machine) -> None:
    raw = m.line(MAX_TEXT)
    m.budget.copy(len(raw), m.at)
    try:
        m.push(raw.decode("raw-unicode-escape"))
    except UnicodeDecodeError:
        raise m.refuse("a text is not Unicode") from None


def _blob(m: Machine, layout: struct.Struct) -> None:
    view = m.take(m.unpack(layout))
    m.push(Blob(view, m.base + m.position - len(view)))


for _code, _layout in (("C", U8), ("B", U32), (0x8E, U64), (0x96, U64)):
    opcode(_code)(lambda m, layout=_layout: _blob(m, layout))


# Containers.
opcode("(")(Machine.mark)
opcode("t")(lambda m: m.push(tuple(m.pop_mark())))
opcode("l")(lambda m: m.push(m.pop_mark()))
opcode("d")(lambda m: m.push(dict(m.pairs(m.pop_mark()))))
opcode(0x91)(lambda m: m.push(frozenset(map(m.key, m.pop_mark()))))


def _tuple(m: Machine, size: int) -> None:
    items = [m.pop() for _ in range(size)]
    m.push(tuple(reversed(items)))


for _code, _size in ((0x85, 1), (0x86, 2), (0x87, 3)):
    opcode(_code)(lambda m, size=_size: _tuple(m, size))


@opcode("a")
def _append(m: Machine) -> None:
    value = m.pop()
    m.container(list).append(value)


@opcode("e")
def _appends(m: Machine) -> None:
    items = m.pop_mark()
    m.container(list).extend(items)


@opcode("s")
def _setitem(m: Machine) -> None:
    value, key = m.pop(), m.key(m.pop())
    m.container(dict)[key] = value


@opcode("u")
def _setitems(m: Machine) -> None:
    pairs = m.pairs(m.pop_mark())
    m.container(dict).update(pairs)


@opcode(0x90)
def _additems(m: Machine) -> None:
    items = m.pop_mark()
    m.container(set).update(map(m.key, items))


# The stack and the memo.
@opcode("0")
def _pop(m: Machine) -> None:
    if m.stack:
        m.stack.pop()
    else:
        m.pop_mark()


opcode("1")(lambda m: m.pop_mark() and None)
opcode("2")(lambda m: m.push(m.top()))


def _put(m: Machine, index: int) -> None:
    if index < 0:
        raise m.refuse("a negative memo index")
    m.memo[index] = m.top()


def _get(m: Machine, index: int) -> None:
    if index not in m.memo:
        raise m.refuse("it refers to a value that it does not hold")
    m.push(m.memo[index])


def _index(m: Machine) -> int:
    text = m.line(20)
    if not re.fullmatch(rb"[0-9]+", text):
        raise m.refuse("a memo index is not a number")
    return int(text)


opcode("p")(lambda m: _put(m, _index(m)))
opcode("q")(lambda m: _put(m, m.unpack(U8)))
opcode("r")(lambda m: _put(m, m.unpack(U32)))
opcode(0x94)(lambda m: _put(m, len(m.memo)))
opcode("g")(lambda m: _get(m, _index(m)))
opcode("h")(lambda m: _get(m, m.unpack(U8)))
opcode("j")(lambda m: _get(m, m.unpack(U32)))


# The frame of the stream.
@opcode(0x80)
def _proto(m: Machine) -> None:
    m.protocol = m.unpack(U8)
    if m.protocol > MAX_PROTOCOL:
        raise m.refuse(f"it says pickle protocol {m.protocol}; {MAX_PROTOCOL} is the newest there is")


@opcode(0x95)
def _frame(m: Machine) -> None:
    size = m.unpack(U64)
    if size > len(m.data) - m.position:
        raise m.refuse(f"a frame of {size:,} bytes is announced; the file may be cut off")


# Everything that Python would execute goes to the world.
@opcode("c")
def _global(m: Machine) -> None:
    names = [m.line(1000).decode("utf-8", "backslashreplace") for _ in range(2)]
    m.push(m.find(*names))


@opcode(0x93)
def _stack_global(m: Machine) -> None:
    name, module = m.pop(), m.pop()
    if type(name) is not str or type(module) is not str:
        raise m.refuse("the name of a global is not a text")
    m.push(m.find(module, name))


def _extension(m: Machine, layout: struct.Struct) -> None:
    m.push(m.world.find(Global(f"copyreg extension {m.unpack(layout)}", m.at)))


for _code, _layout in ((0x82, U8), (0x83, U16), (0x84, I32)):
    opcode(_code)(lambda m, layout=_layout: _extension(m, layout))


@opcode("i")
def _inst(m: Machine) -> None:
    _global(m)
    function, args = m.pop(), m.pop_mark()
    m.push(m.world.call(function, tuple(args), m.at))


@opcode("o")
def _obj(m: Machine) -> None:
    items = m.pop_mark()
    if not items:
        raise m.refuse("a value is missing")
    m.push(m.world.call(items[0], tuple(items[1:]), m.at))


@opcode("R")
@opcode(0x81)
def _call(m: Machine) -> None:
    args, function = m.pop(), m.pop()
    if type(args) is not tuple:
        raise m.refuse("the arguments of a call are not a tuple")
    m.push(m.world.call(function, args, m.at))


@opcode(0x92)
def _call_with_keywords(m: Machine) -> None:
    keywords, args, function = m.pop(), m.pop(), m.pop()
    if type(args) is not tuple or type(keywords) is not dict or keywords:
        raise m.refuse("a call with keywords")
    m.push(m.world.call(function, args, m.at))


@opcode("b")
def _build(m: Machine) -> None:
    state = m.pop()
    m.world.set_state(m.top(), state, m.at)


@opcode("Q")
def _binpersid(m: Machine) -> None:
    m.push(m.world.persistent(m.pop(), m.at))
