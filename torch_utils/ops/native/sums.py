"""How the kernels of sums.cuh divide an image among blocks and threads."""

from __future__ import annotations

from typing import NamedTuple

from .plan import ITEM_BYTES, ceil_div

THREADS = 256
BLOCKS = 2048  # enough to fill any GPU, few enough that adding up their sums costs nothing
TURNS = 4  # positions at least that a thread has
MAX_CHANNELS = 2048  # of a pixel, which a warp holds in registers


class Images(NamedTuple):
    """Dense memory: [groups, size] of one channel a group if planar, else [groups, size, channels]."""

    planar: bool
    groups: int
    size: int
    channels: int

    def vector(self, dtype: int, addresses: list[int | None]) -> int:
        """Return the elements a thread reads at once: up to 16 bytes, whole vectors a plane or a pixel."""
        item = ITEM_BYTES[dtype]
        vector = 16 // item
        length = self.size if self.planar else self.channels
        while length % vector or any((address or 0) % (vector * item) for address in addresses):
            vector //= 2
        return vector

    def is_fast(self, dtype: int) -> bool:
        """Return whether threads read vectors of at least 8 bytes, and hold the channels of a pixel."""
        wide = self.vector(dtype, []) * ITEM_BYTES[dtype] >= 8
        return wide and (self.planar or self.channels <= MAX_CHANNELS)

    def block(self, vector: int) -> tuple[int, int, int]:
        """Return threads along memory, and those that work on other planes or pixels."""
        if self.planar:
            most, steps = THREADS, max(ceil_div(self.size, vector * TURNS), 8)
        else:
            most, steps = 32, ceil_div(self.channels, vector)
        along = min(1 << (steps - 1).bit_length(), most)
        return along, THREADS // along, 1

    def blocks(self, vector: int) -> int:
        """Return the number of blocks for one part of every group."""
        return ceil_div(self.groups, self.block(vector)[1]) if self.planar else self.groups

    def parts(self, dtype: int) -> int:
        """Return the parts of a group, whatever the alignment: their sums are allocated before planning."""
        vector = 16 // ITEM_BYTES[dtype]
        along, others, _ = self.block(vector)
        turns = ceil_div(self.size, vector * along) if self.planar else ceil_div(self.size, others)
        return max(min(ceil_div(BLOCKS, self.blocks(vector)), turns // TURNS), 1)

    def grid(self, dtype: int, vector: int) -> tuple[int, int, int]:
        """Return the blocks of a launch."""
        return self.blocks(vector) * self.parts(dtype), 1, 1

    def sums_shape(self, dtype: int) -> tuple[int, ...]:
        """Return the shape of the sums that a kernel writes; those of the parts remain to be added."""
        shape = (self.groups, self.parts(dtype))
        return shape if self.planar else (*shape, self.channels)

    def defines(self, vector: int) -> tuple[tuple[str, int], ...]:
        """Return the macros of sums.cuh."""
        chunks = 1 if self.planar else ceil_div(self.channels, vector * self.block(vector)[0])
        return ("SG_VECTOR", vector), ("SG_PLANAR", int(self.planar)), ("SG_CHUNKS", chunks)

    def shared_bytes(self, dtype: int, vector: int) -> int:
        """Return the shared memory of a block in bytes."""
        warps = THREADS // 32
        numbers = warps if self.planar else warps * self.block(vector)[0] * vector
        return numbers * max(ITEM_BYTES[dtype], 4)


def biased_images(size: int, bias_size: int, bias_step: int) -> Images:
    """Return the memory of bias_act, in which element i has the bias (i / bias_step) % bias_size."""
    if bias_size == 1:
        return Images(True, 1, size, 1)
    if bias_step == 1:
        return Images(False, 1, size // bias_size, bias_size)
    return Images(True, size // bias_step, bias_step, bias_size)
