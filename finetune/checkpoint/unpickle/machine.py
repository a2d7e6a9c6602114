"""A machine that reads the pickle language and can do nothing else: it imports nothing and calls nothing.

Python's own unpickler calls what a file names. This one computes plain values only (None, bool, int, float,
str, list, tuple, dict, set, `Blob`) and hands every global, call and state of the file to a `World`, which
answers with inert stand-ins or refuses. All errors are `PickleRefused` with the position of the opcode in the
file.

Time and memory are bounded by the size of the file: a `Budget` counts opcodes and copied bytes, big bytes
stay views of the file, keys of dicts and sets can be compared in constant time, and nothing here recurses.
"""

from __future__ import annotations

import struct
import sys
from typing import Any, Protocol

from finetune.checkpoint.unpickle.opcodes import HANDLERS, STOP, UNSUPPORTED
from finetune.checkpoint.unpickle.values import (
    DAMAGED,
    MAX_MARKS,
    MAX_TEXT,
    NOT_LATIN1,
    Budget,
    Global,
    is_key,
    kind,
)
from finetune.errors import PickleRefused


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
