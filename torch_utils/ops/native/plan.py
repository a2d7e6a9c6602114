"""Launch plans: the specialization of a CUDA kernel, and the shape of its launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class LaunchPlan(NamedTuple):
    """One specialization of a kernel: its sources and macros, and the number of threads.

    source: path below this folder. entry: name of the kernel. defines: macros that specialize it.
    shared_bytes: dynamic shared memory of a block.
    """

    op: str
    source: str
    entry: str
    defines: tuple[tuple[str, str | int], ...]
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int = 0

    def specialization(self) -> LaunchPlan:
        """Return the plan without the shape of a launch, on which a binary does not depend."""
        return self._replace(grid=(1, 1, 1), block=(1, 1, 1), shared_bytes=0)


MAX_GRID = 2**31 - 1
ITEM_BYTES = (4, 8, 2, 2)  # by the numbers of params.DTYPES


def ceil_div(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


def up_to(multiple: int, number: int) -> int:
    """Return `number`, rounded up to a multiple."""
    return ceil_div(number, multiple) * multiple


def is_wide(element_offsets: int) -> bool:
    """Return whether offsets up to so many elements need 64 bits, with a margin for products."""
    return element_offsets >= 2**30


def extent(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Return the number of elements from the first to the last of a strided tensor."""
    return 1 + sum((size - 1) * abs(step) for size, step in zip(shape, stride))


def shared_limit(capability: tuple[int, int]) -> int:
    """Return the shared memory a block may use, in bytes. Source: the capabilities in the CUDA guide."""
    known = {(7, 0): 96, (7, 5): 64, (8, 0): 163, (8, 6): 99, (8, 7): 163, (8, 9): 99}
    known |= {(9, 0): 227, (10, 0): 227, (10, 3): 227, (11, 0): 227, (12, 0): 99, (12, 1): 99}
    return 1024 * known.get(tuple(capability), 48)
