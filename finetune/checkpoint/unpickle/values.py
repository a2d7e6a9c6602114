"""Values of the pickle interpreter, and limits on what a file may use."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from finetune.errors import PickleRefused

MAX_OPCODES = 500_000  # a 1024x1024 checkpoint has about 65,000, nested storages included
MAX_TEXT = 1 << 20  # bytes of one string that is not Latin-1
MAX_LONG = 64  # bytes of one integer
MAX_MARKS = 10_000  # open at once; a checkpoint has a few dozen
MAX_PROTOCOL = 5

DAMAGED = "If it should be one, compare its size and SHA-256 with the source's, or download it again."
NOT_LATIN1 = re.compile(rb"[\xc4-\xff]")  # first bytes of UTF-8 sequences above U+00FF

WIDE_ESCAPE = re.compile(rb"\\u(?!00)|\\U")  # the same in the text of protocol 0


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

    module: str
    attribute: str
    offset: int

    @property
    def name(self) -> str:
        return f"{self.module}.{self.attribute}"


@dataclass(slots=True, eq=False)
class Record:
    """An unknown name in the file, with arguments and state; nothing is executed.

    Without arguments it is the name itself. `offset` is the position of the name in the file.
    """

    name: str
    offset: int
    args: tuple[Any, ...] | None = None
    keywords: dict[Any, Any] | None = None
    state: Any = None


@dataclass(slots=True, eq=False)
class Budget:
    """What one file may still use: steps of the machine, and bytes copied from the file."""

    steps: int
    copied: int

    @classmethod
    def for_file(cls, size: int) -> Budget:
        return cls(steps=MAX_OPCODES, copied=size * 2 + (1 << 20))

    def step(self, count: int, offset: int) -> None:
        self.steps -= count
        if self.steps < 0:
            raise PickleRefused(
                f"the pickle takes more than {MAX_OPCODES:,} steps to read (at byte {offset}), "
                "more than any checkpoint",
                offset=offset,
            )

    def copy(self, num_bytes: int, offset: int) -> None:
        self.copied -= num_bytes
        if self.copied < 0:
            raise PickleRefused(
                f"the pickle grows to several times its size on disk (at byte {offset})", offset=offset
            )


def is_key(value: Any) -> bool:
    """Return whether `value` may be a key of a dict or set, as `as_key` returns it."""
    return value is None or type(value) in (str, bool, int, float)


def as_key(value: Any, budget: Budget, offset: int) -> Any:
    """Return a key, floats and large integers as text.

    A file can make numbers collide, which takes quadratic time; hashes of text are random.
    """
    if type(value) is not float and (type(value) is not int or -(2**31) <= value < 2**31):
        return value
    text = str(value)
    budget.copy(len(text), offset)
    return text


def kind(value: Any) -> str:
    """Describe the type of `value`, without the value itself."""
    return f"a {value.name}" if type(value) in (Global, Record) else f"a {type(value).__name__}"
