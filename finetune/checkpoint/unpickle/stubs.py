"""Inert objects (stubs) for the content of a checkpoint file, and errors for everything else."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np

from finetune.checkpoint.unpickle.values import DAMAGED, Global, kind
from finetune.errors import PickleRefused

MAX_DIMENSIONS = 8
MAX_EXTENT = 1 << 40  # elements along one axis, or stride: far above what fits a file, far below overflow


@dataclass(slots=True, eq=False)
class PersistentObject:
    """A module of the PyTorch generations: the name of its class and its `__dict__`, without its source."""

    class_name: str
    state: dict
    offset: int


@dataclass(slots=True, eq=False)
class TFNetwork:
    """A network of the TensorFlow generation; `state` is what it pickled."""

    offset: int
    state: dict = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Tensor:
    """A tensor or parameter: a read-only numpy view of the file, and the name of its torch dtype."""

    array: np.ndarray
    dtype: str
    offset: int
    is_parameter: bool = False


@dataclass(slots=True, eq=False)
class Array:
    """A numpy array; `value` is a read-only view of the file."""

    value: np.ndarray | None = None


@dataclass(slots=True, eq=False)
class Storage:
    """The memory of a tensor, one-dimensional."""

    array: np.ndarray
    dtype: str


@dataclass(slots=True, eq=False)
class Dtype:
    """A numpy dtype."""

    value: np.dtype


@dataclass(slots=True, eq=False)
class PlainObject:
    """An instance of `object`; whatever attributes it had are dropped."""


def printable(text: str) -> str:
    """Return `text` for a message: short, on one line, without control characters."""
    return "".join(c if c.isprintable() else "?" for c in text[:200])


NOT_OPENED = "Only networks of stylegan2, stylegan2-ada(-pytorch) and stylegan3 can be opened."
SAVE_AGAIN = (
    "To use it, save its generator again with Python's pickle, in the code that it comes from: "
    "pickle.dump({'G_ema': G_ema}, file)."
)


def block(name: str, offset: int, why: str = "is not allowed", hint: str | None = None) -> NoReturn:
    """Refuse a whole file for what it names."""
    name = printable(name)
    raise PickleRefused(
        f"the pickle refers to {name} (at byte {offset}), which {why}; nothing was executed",
        offset=offset,
        blocked=name,
        hint=hint or f"{NOT_OPENED} {SAVE_AGAIN}",
    )


WRITTEN_BY_DILL = f"The file was written by dill, with classes or functions of its own. {SAVE_AGAIN}"


def block_acting(name: str, offset: int, is_dill: bool = False) -> NoReturn:
    """Refuse a whole file for a global with which Python's pickle could run code or access files."""
    caution = (
        "Note that pickle.load and torch.load would execute it: do not open the file with them unless you "
        "trust its author."
    )
    block(
        name,
        offset,
        "can run code or access files",
        f"{WRITTEN_BY_DILL} {caution}" if is_dill else caution,
    )


def damaged(why: str, offset: int) -> NoReturn:
    """Refuse values that no checkpoint holds."""
    raise PickleRefused(
        f"the pickle is damaged or not a checkpoint: {why} (at byte {offset})", offset=offset, hint=DAMAGED
    )


class World:
    """Maps the names in a file to values. Every method refuses the file; subclasses allow what they need."""

    def find(self, name: Global) -> Any:
        """Return the stub for the global `name`."""
        block(name.name, name.offset)

    def extension(self, code: int, offset: int) -> Any:
        """Return the stub for a global that copyreg has numbered."""
        block_acting(f"copyreg extension {code}", offset)

    def call(self, function: Any, args: tuple, offset: int, keywords: dict | None = None) -> Any:
        """Return the value of `function(*args, **keywords)` (REDUCE, NEWOBJ, NEWOBJ_EX, OBJ and INST)."""
        block(function.name if type(function) is Global else kind(function), offset, "is called")

    def set_state(self, target: Any, state: Any, offset: int) -> None:
        """Change `target` as the opcode BUILD does."""
        damaged(f"it sets the state of {kind(target)}", offset)

    def persistent(self, key: Any, offset: int) -> Any:
        """Return the object with the persistent id `key`."""
        block("a persistent id", offset)


def expect(condition: bool, why: str, offset: int) -> None:
    if not condition:
        damaged(why, offset)


def check_extents(extents: Any, offset: int) -> None:
    is_short = type(extents) is tuple and len(extents) <= MAX_DIMENSIONS
    good = is_short and all(type(extent) is int and 0 <= extent <= MAX_EXTENT for extent in extents)
    expect(good, "an invalid shape", offset)
