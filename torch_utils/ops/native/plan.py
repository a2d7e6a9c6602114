"""What a plan is: the specialisation of a CUDA kernel, and the shape of its launch."""

from __future__ import annotations

from typing import NamedTuple


class Plan(NamedTuple):
    """One kernel for one form: what it is compiled from, and how many threads run it.

    source: path below this folder. entry: name of the kernel. defines: macros that specialise it.
    shared_bytes: dynamic shared memory of a block.
    """

    op: str
    source: str
    entry: str
    defines: tuple[tuple[str, str | int], ...]
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int = 0
