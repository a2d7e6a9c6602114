"""What every opcode does to a `machine.Machine`: handlers that call nothing but its methods.

Names and meanings of the opcodes: the documentation of the module pickletools.
"""

from __future__ import annotations

import re
import struct
from typing import TYPE_CHECKING, Any

from finetune.checkpoint.unpickle.values import MAX_LONG, MAX_PROTOCOL, MAX_TEXT, Blob, Global

if TYPE_CHECKING:
    from finetune.checkpoint.unpickle.machine import Machine

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
    """Register the handler of one opcode."""

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
opcode("(")(lambda m: m.mark())
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
