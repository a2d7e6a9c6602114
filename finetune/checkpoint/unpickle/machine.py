"""Interpreter of pickle opcodes that imports and calls nothing.

Python's own unpickler calls what a file names. This one computes plain values only (None, bool, int, float,
str, list, tuple, dict, set, `Blob`) and hands every global, call and state of the file to a `World`, which
returns inert stubs or refuses. All errors are `PickleRefused` with the position of the opcode in the
file.

Time and memory are bounded by the size of the file: a `Budget` counts opcodes and copied bytes, big bytes
stay views of the file, keys of dicts and sets can be compared in constant time, and nothing here recurses.
The documentation of the standard module pickletools defines the opcodes.
"""

from __future__ import annotations

import pickletools
import re
import struct
import sys
from collections.abc import Callable
from typing import Any

from finetune.checkpoint.unpickle.stubs import World
from finetune.checkpoint.unpickle.values import (
    DAMAGED,
    MAX_LONG,
    MAX_MARKS,
    MAX_PROTOCOL,
    MAX_TEXT,
    NOT_LATIN1,
    WIDE_ESCAPE,
    Blob,
    Budget,
    Global,
    Record,
    as_key,
    is_key,
    kind,
)
from finetune.errors import PickleRefused

OPCODES = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}
U8, U16, I32, U32, U64, F64 = (struct.Struct(code) for code in ("<B", "<H", "<i", "<I", "<Q", ">d"))


class Machine:
    """Reads successive pickles from `data`, the bytes of a file from position `base` on."""

    def __init__(self, data: memoryview, world: World, budget: Budget, *, base: int = 0) -> None:
        self.data = data
        self.world = world
        self.budget = budget
        self.base = base
        self.position = 0
        self.opcode_at = 0

    def run(self) -> Any:
        """Return the value of the pickle at `position`, and set `position` behind its STOP."""
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.protocol = 0
        data, budget, size = self.data, self.budget, len(self.data)
        while True:
            self.opcode_at = position = self.position
            budget.steps -= 1
            if budget.steps < 0 or position >= size:
                budget.step(0, self.at)
                self.take(1)  # which raises
            self.position = position + 1
            handler = BY_CODE[data[position]]
            if handler is None:
                return self._end(data[position])
            handler(self)

    @property
    def at(self) -> int:
        """Position in the file of the opcode being read."""
        return self.base + self.opcode_at

    def refuse(self, why: str) -> PickleRefused:
        what = f"the pickle is damaged or not a checkpoint: {why} (at byte {self.at})"
        return PickleRefused(what, offset=self.at, hint=DAMAGED)

    def _end(self, code: int) -> Any:
        """Return the value of the pickle if `code` is STOP; refuse any other opcode without a handler."""
        name = OPCODES.get(code)
        if name is None:
            raise self.refuse(f"it holds byte 0x{code:02x}, not an opcode")
        if name != "STOP":
            raise self.refuse(f"it holds opcode {name}, which no checkpoint needs")
        if self.marks or len(self.stack) != 1:
            raise self.refuse("it ends with unfinished values")
        return self.stack.pop()

    # Reading.

    def advance(self, count: int) -> int:
        """Move `position` over `count` bytes and return where it was."""
        start = self.position
        if start + count > len(self.data):
            left = len(self.data) - start
            raise self.refuse(
                f"{count:,} more bytes are announced and {left:,} are there; the file may be cut off"
            )
        self.position = start + count
        return start

    def take(self, count: int) -> memoryview:
        start = self.advance(count)
        return self.data[start : self.position]

    def unpack(self, layout: struct.Struct) -> Any:
        return layout.unpack_from(self.data, self.advance(layout.size))[0]

    def line(self, limit: int) -> bytes:
        """Return the text up to the next line feed, without it."""
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
        """Return `value` as a key; refuse values that can be slow to hash or to compare."""
        if is_key(value):
            return as_key(value, self.budget, self.at)
        raise self.refuse(f"a key of a dict or set is neither a text nor a number but {kind(value)}")

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
        return self.world.find(Global(module, name, self.at))


# One function for each opcode that does more than a line: they call nothing but methods of the machine.


def _decimal(m: Machine) -> None:
    text = m.line(3 * MAX_LONG)
    if text in (b"00", b"01"):
        return m.push(text == b"01")
    if not re.fullmatch(rb"[+-]?[0-9]+L?", text):
        raise m.refuse("a malformed number")
    m.push(int(text.rstrip(b"L")))


def _decimal_float(m: Machine) -> None:
    try:
        m.push(float(m.line(3 * MAX_LONG)))
    except ValueError:
        raise m.refuse("a malformed number") from None


def _long(m: Machine, layout: struct.Struct) -> None:
    size = m.unpack(layout)
    if not 0 <= size <= MAX_LONG:
        raise m.refuse(f"an integer of {size:,} bytes")
    m.push(int.from_bytes(m.take(size), "little", signed=True))


def _text(m: Machine, layout: struct.Struct) -> None:
    m.push(m.text(m.take(m.unpack(layout))))


def _text_line(m: Machine) -> None:
    raw = m.line(len(m.data))
    if len(raw) > MAX_TEXT and WIDE_ESCAPE.search(raw):  # would take four bytes a character
        raise m.refuse(f"a text of {len(raw):,} bytes, which is neither code nor packed bytes")
    m.budget.copy(len(raw), m.at)
    try:
        m.push(raw.decode("raw-unicode-escape"))
    except UnicodeDecodeError:
        raise m.refuse("a text is not Unicode") from None


def _bytes(m: Machine, layout: struct.Struct) -> None:
    view = m.take(m.unpack(layout))
    m.push(Blob(view, m.base + m.position - len(view)))


def _extend(m: Machine, items: list[Any]) -> None:
    if type(m.top()) is not Record:  # the items of an unknown class are dropped
        m.container(list).extend(items)


def _update(m: Machine, items: list[Any]) -> None:
    pairs = m.pairs(items)
    if type(m.top()) is not Record:
        m.container(dict).update(pairs)


def _add_items(m: Machine) -> None:
    items = m.pop_mark()
    if type(m.top()) is not Record:
        m.container(set).update(map(m.key, items))


def _pop(m: Machine) -> None:
    if m.stack:
        m.stack.pop()
    else:
        m.pop_mark()


def _put(m: Machine, index: int) -> None:
    if index < 0:
        raise m.refuse("a negative memo index")
    m.memo[index] = m.top()


def _get(m: Machine, index: int) -> None:
    if index not in m.memo:
        raise m.refuse("an undefined memo index")
    m.push(m.memo[index])


def _index(m: Machine) -> int:
    text = m.line(20)
    if not re.fullmatch(rb"[0-9]+", text):
        raise m.refuse("a malformed memo index")
    return int(text)


def _proto(m: Machine) -> None:
    m.protocol = m.unpack(U8)
    if m.protocol > MAX_PROTOCOL:
        raise m.refuse(f"pickle protocol {m.protocol} is unknown; the newest is {MAX_PROTOCOL}")


def _frame(m: Machine) -> None:
    size = m.unpack(U64)
    if size > len(m.data) - m.position:
        raise m.refuse(f"a frame of {size:,} bytes is announced; the file may be cut off")


def _global(m: Machine) -> None:
    names = [m.line(1000).decode("utf-8", "backslashreplace") for _ in range(2)]
    m.push(m.find(*names))


def _stack_global(m: Machine) -> None:
    name, module = m.pop(), m.pop()
    if type(name) is not str or type(module) is not str:
        raise m.refuse("the name of a global is not a text")
    m.push(m.find(module, name))


def _inst(m: Machine) -> None:
    _global(m)
    m.push(m.world.call(m.pop(), tuple(m.pop_mark()), m.at))


def _obj(m: Machine) -> None:
    items = m.pop_mark()
    if not items:
        raise m.refuse("a value is missing")
    m.push(m.world.call(items[0], tuple(items[1:]), m.at))


def _call(m: Machine) -> None:
    args, function = m.pop(), m.pop()
    if type(args) is not tuple:
        raise m.refuse("the arguments of a call are not a tuple")
    m.push(m.world.call(function, args, m.at))


def _call_with_keywords(m: Machine) -> None:
    keywords, args, function = m.pop(), m.pop(), m.pop()
    if type(args) is not tuple or type(keywords) is not dict:
        raise m.refuse("the arguments of a call are neither a tuple nor a dict")
    m.push(m.world.call(function, args, m.at, keywords))


def _build(m: Machine) -> None:
    state = m.pop()
    m.world.set_state(m.top(), state, m.at)


# Opcodes that are not here are refused.
HANDLERS: dict[str, Callable[[Machine], Any]] = {
    "NONE": lambda m: m.push(None),
    "NEWTRUE": lambda m: m.push(True),
    "NEWFALSE": lambda m: m.push(False),
    "EMPTY_TUPLE": lambda m: m.push(()),
    "EMPTY_LIST": lambda m: m.push([]),
    "EMPTY_DICT": lambda m: m.push({}),
    "EMPTY_SET": lambda m: m.push(set()),
    "BININT1": lambda m: m.push(m.unpack(U8)),
    "BININT2": lambda m: m.push(m.unpack(U16)),
    "BININT": lambda m: m.push(m.unpack(I32)),
    "BINFLOAT": lambda m: m.push(m.unpack(F64)),
    "INT": _decimal,
    "LONG": _decimal,
    "FLOAT": _decimal_float,
    "LONG1": lambda m: _long(m, U8),
    "LONG4": lambda m: _long(m, I32),
    "SHORT_BINUNICODE": lambda m: _text(m, U8),
    "BINUNICODE": lambda m: _text(m, U32),
    "BINUNICODE8": lambda m: _text(m, U64),
    "UNICODE": _text_line,
    "SHORT_BINBYTES": lambda m: _bytes(m, U8),
    "BINBYTES": lambda m: _bytes(m, U32),
    "BINBYTES8": lambda m: _bytes(m, U64),
    "BYTEARRAY8": lambda m: _bytes(m, U64),
    "MARK": lambda m: m.mark(),
    "TUPLE": lambda m: m.push(tuple(m.pop_mark())),
    "LIST": lambda m: m.push(m.pop_mark()),
    "DICT": lambda m: m.push(dict(m.pairs(m.pop_mark()))),
    "FROZENSET": lambda m: m.push(frozenset(map(m.key, m.pop_mark()))),
    "TUPLE1": lambda m: m.push((m.pop(),)),
    "TUPLE2": lambda m: m.push((m.pop(), m.pop())[::-1]),
    "TUPLE3": lambda m: m.push((m.pop(), m.pop(), m.pop())[::-1]),
    "APPEND": lambda m: _extend(m, [m.pop()]),
    "APPENDS": lambda m: _extend(m, m.pop_mark()),
    "SETITEM": lambda m: _update(m, [m.pop(), m.pop()][::-1]),
    "SETITEMS": lambda m: _update(m, m.pop_mark()),
    "ADDITEMS": _add_items,
    "POP": _pop,
    "POP_MARK": lambda m: m.pop_mark(),
    "DUP": lambda m: m.push(m.top()),
    "PUT": lambda m: _put(m, _index(m)),
    "BINPUT": lambda m: _put(m, m.unpack(U8)),
    "LONG_BINPUT": lambda m: _put(m, m.unpack(U32)),
    "MEMOIZE": lambda m: _put(m, len(m.memo)),
    "GET": lambda m: _get(m, _index(m)),
    "BINGET": lambda m: _get(m, m.unpack(U8)),
    "LONG_BINGET": lambda m: _get(m, m.unpack(U32)),
    "PROTO": _proto,
    "FRAME": _frame,
    # Names and calls are handled by the world.
    "GLOBAL": _global,
    "STACK_GLOBAL": _stack_global,
    "EXT1": lambda m: m.push(m.world.extension(m.unpack(U8), m.at)),
    "EXT2": lambda m: m.push(m.world.extension(m.unpack(U16), m.at)),
    "EXT4": lambda m: m.push(m.world.extension(m.unpack(I32), m.at)),
    "INST": _inst,
    "OBJ": _obj,
    "REDUCE": _call,
    "NEWOBJ": _call,
    "NEWOBJ_EX": _call_with_keywords,
    "BUILD": _build,
    "BINPERSID": lambda m: m.push(m.world.persistent(m.pop(), m.at)),
}
BY_CODE = [HANDLERS.get(OPCODES.get(code, "")) for code in range(256)]
