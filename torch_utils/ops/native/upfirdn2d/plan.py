"""Launch plans of upfirdn2d: outputs per thread, threads per block.

The macros are explained in upfirdn2d.cu, which checks the size of shared memory computed here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from ..params import Upfirdn2d
from ..plan import ITEM_BYTES, MAX_GRID, LaunchPlan, ceil_div, extent, is_wide, shared_limit

THREADS = 256
WARP = 32
ROWS = 8  # of a thread, if there are so many
COMFORTABLE = 48 * 1024  # bytes of shared memory, of which several blocks find room side by side
WRITTEN_OUT = 1024  # multiplications of a thread that compile within a second; beyond that they are loops

# Channels-last: fewer threads with more registers each, so that more loads are on their way, fewer repeated.
THREADS_LAST = 128
COLUMNS = 2  # of outputs of a thread, if there are so many
SUMS = 64  # bytes of accs of a row of a thread's outputs
WRITTEN_OUT_LAST = 2048


class Direction(NamedTuple):
    """One axis of a launch. phase: the tap that meets the first input of every block."""

    taps: int
    up: int
    down: int
    phase: int

    @classmethod
    def of(cls, taps: int, up: int, down: int, pad0: int) -> Direction:
        return cls(taps, up, down, pad0 % up)

    @property
    def unit(self) -> int:
        """The fewest outputs after which the same taps come again."""
        return self.up // math.gcd(self.up, self.down)

    @property
    def steps(self) -> int:
        """Taps that an output needs at most."""
        return ceil_div(self.taps, self.up)

    def needs(self, outputs: int) -> int:
        """Return the number of inputs from the first to the last of so many outputs."""
        return max(self.taps - 1 - self.phase + (outputs - 1) * self.down, 0) // self.up + 1

    def advance(self, outputs: int) -> int:
        """Return the number of inputs from the first of so many outputs to the first of the next."""
        return outputs * self.down // self.up


def plan(p: Upfirdn2d, capability: tuple[int, int]) -> LaunchPlan:
    """Return specialization and launch for a struct with its pointers filled in.

    Raises ValueError for filters of which not even a small tile fits into shared memory.
    """
    separable = p.f_h == 0
    x = Direction.of(p.f_w, p.up_x, p.down_x, p.pad_x0)
    y = Direction.of(p.f_w if separable else p.f_h, p.up_y, p.down_y, p.pad_y0)
    shape_x, shape_y = (p.n, p.c, p.in_h, p.in_w), (p.n, p.c, p.out_h, p.out_w)
    wide = is_wide(max(extent(shape_x, p.x_stride), extent(shape_y, p.y_stride)))
    is_last = p.c > 1 and p.x_stride[1] == 1 and p.y_stride[1] == 1
    chosen = (_channels_last(p, x, y) if is_last else None) or _planar(p, x, y, shared_limit(capability))
    own, blocks, threads, shared = chosen
    defines = (
        *(("SG_DTYPE", p.dtype), ("SG_SEPARABLE", int(separable))),
        *(("SG_UP_X", x.up), ("SG_DOWN_X", x.down), ("SG_TAPS_X", x.taps), ("SG_PHASE_X", x.phase)),
        *(("SG_UP_Y", y.up), ("SG_DOWN_Y", y.down), ("SG_TAPS_Y", y.taps), ("SG_PHASE_Y", y.phase)),
        *own,
        *(("SG_THREADS", threads), ("SG_SHARED_BYTES", shared)),
        *((("SG_INDEX_64", 1),) if wide else ()),
    )
    grid = (max(min(blocks, MAX_GRID), 1), 1, 1)
    return LaunchPlan(
        "upfirdn2d", "upfirdn2d/upfirdn2d.cu", "sg_upfirdn2d_cuda", defines, grid, (threads, 1, 1), shared
    )


_Chosen = tuple[tuple[tuple[str, int], ...], int, int, int]  # macros, blocks, threads, bytes of shared memory


# ---- Planar


def _planar(p: Upfirdn2d, x: Direction, y: Direction, limit: int) -> _Chosen:
    """Return the first tile that leaves room for others, or that fits at all."""
    for room in (COMFORTABLE, limit):
        for rows, columns, lanes, threads in _tiles(p, x, y):
            macros, shared = _layout(p, x, y, rows, columns, lanes, threads)
            if shared <= room:
                tiles = ceil_div(p.out_w, lanes * columns) * ceil_div(p.out_h, threads // lanes * rows)
                return macros, p.n * p.c * tiles, threads, shared
    raise ValueError(
        f"upfirdn2d: a filter of {y.taps} x {x.taps} taps does not fit into the {limit} bytes of shared "
        "memory of this GPU; use impl='ref'"
    )


def _tiles(p: Upfirdn2d, x: Direction, y: Direction) -> Iterator[tuple[int, int, int, int]]:
    """Return (rows, columns) of a thread, (lanes along x, threads) of a block: large ones first, none mostly
    empty."""
    quad = 16 // _acc_bytes(p)
    columns = x.unit
    while x.advance(2 * columns) <= quad and 2 * columns <= 16:
        columns *= 2  # until neighboring threads read neighboring 16 bytes
    rows = y.unit * max(1, ROWS // y.unit)
    while rows > y.unit and rows >= 2 * p.out_h:
        rows = y.unit * max(1, rows // y.unit // 2)
    while _written_out(p, x, y, rows, columns) > WRITTEN_OUT and (rows, columns) != (y.unit, x.unit):
        if rows > y.unit:
            rows = y.unit * max(1, rows // y.unit // 2)
        else:
            columns = max(x.unit, columns // 2)
    lanes = _power(min(ceil_div(p.out_w, columns), WARP))
    while True:
        threads = max(WARP, min(THREADS, lanes * _power(ceil_div(p.out_h, rows))))
        while True:
            yield rows, columns, lanes, threads
            if threads == WARP:
                break
            threads //= 2
        if lanes == 1:
            return
        lanes //= 2


def _layout(
    p: Upfirdn2d, x: Direction, y: Direction, rows: int, columns: int, lanes: int, threads: int
) -> tuple[tuple[tuple[str, int], ...], int]:
    """Return the macros of a tile and its bytes of shared memory: the arithmetic of planar.cuh."""
    item, acc = ITEM_BYTES[p.dtype], _acc_bytes(p)
    quad = 16 // acc
    load, shift = _load(p, x, lanes * x.advance(columns), quad)
    store = _store(p, columns, item)
    advance = x.advance(columns)
    aligned = quad if advance % quad == 0 else 2 if advance % 2 == 0 else 1
    needed = shift + x.needs(columns)
    before = (lanes - 1) * advance
    pitch = _up_to(quad, max(before + _up_to(aligned, needed), _up_to(load, before + needed)))
    height = (threads // lanes - 1) * y.advance(rows) + y.needs(rows)
    separable = p.f_h == 0
    cells = height * pitch + (x.taps + y.taps if separable else x.taps * y.taps)
    cells += height * _up_to(quad, lanes * columns) if separable else 0
    shared = cells * acc + (2 * threads * columns * item if store == 1 and columns > 1 else 0)
    macros = (
        *(("SG_CHANNELS_LAST", 0), ("SG_COLUMNS", columns), ("SG_ROWS", rows), ("SG_LANES", lanes)),
        *(("SG_LOAD", load), ("SG_SHIFT", shift), ("SG_STORE", store), ("SG_DENSE", int(_is_dense(p)))),
        ("SG_UNROLL", int(_written_out(p, x, y, rows, columns) <= WRITTEN_OUT)),
    )
    return macros, shared


def _load(p: Upfirdn2d, x: Direction, tile: int, quad: int) -> tuple[int, int]:
    """Return (elements read at once, place of a tile's first input in them) for tiles that far apart."""
    steps = [p.in_w, tile, *p.x_stride[:3]]
    if not _is_dense(p) or any(step % quad for step in steps) or (p.x or 0) % (quad * ITEM_BYTES[p.dtype]):
        return 1, 0
    return quad, (x.phase - p.pad_x0) // x.up % quad


def _store(p: Upfirdn2d, columns: int, item: int) -> int:
    """Return elements written at once: all of a thread's row or 16 bytes of it; else 1."""
    store = math.gcd(columns, 16 // item)
    steps = [p.out_w, *p.y_stride[:3]]
    if not _is_dense(p) or any(step % store for step in steps) or (p.y or 0) % (store * item):
        return 1
    return store


def _is_dense(p: Upfirdn2d) -> bool:
    return p.x_stride[3] == 1 and p.y_stride[3] == 1


def _written_out(p: Upfirdn2d, x: Direction, y: Direction, rows: int, columns: int) -> int:
    """Return the multiplications of a thread that are unrolled."""
    if p.f_h == 0:
        return columns * x.steps + rows * columns * y.steps
    return rows * columns * x.steps * y.steps


# ---- Channels-last


def _channels_last(p: Upfirdn2d, x: Direction, y: Direction) -> _Chosen | None:
    """Return None for filters so long that sharing between threads is worth more than joint reads."""
    item, acc, columns = ITEM_BYTES[p.dtype], _acc_bytes(p), x.unit * max(1, COLUMNS // x.unit)
    vector = 16 // item
    steps = [p.c, *(p.x_stride[i] for i in (0, 2, 3)), *(p.y_stride[i] for i in (0, 2, 3))]
    while vector > 1 and (
        any(step % vector for step in steps)
        or any((address or 0) % (vector * item) for address in (p.x, p.y))
        or vector * columns * acc > SUMS
    ):
        vector //= 2
    separable = p.f_h == 0
    # A filter that is kept as [y][x] taps and is a product of two costs half where each pixel meets all taps.
    factors = not separable and (x.up, x.down, y.up, y.down) == (1, 1, 1, 1) and x.taps * y.taps <= WARP
    rows = y.unit * max(1, ROWS // y.unit)
    while True:
        work = rows * x.steps * y.steps
        if separable or factors:
            work = y.needs(rows) * x.steps + rows * y.steps
        if work * columns * vector <= WRITTEN_OUT_LAST and (rows == y.unit or rows < 2 * p.out_h):
            break
        if rows == y.unit:
            return None
        rows = y.unit * max(1, rows // y.unit // 2)
    groups = p.c // vector
    # Side by side 128 bytes of a pixel, or a little more if that divides the channels evenly.
    lanes = next((lanes for lanes in range(8, 17) if groups % lanes == 0), min(groups, 8))
    taps = x.taps + y.taps if separable else x.taps * y.taps
    tiles = ceil_div(p.out_w, THREADS_LAST // lanes * columns) * ceil_div(p.out_h, rows)
    macros = (
        *(("SG_CHANNELS_LAST", 1), ("SG_COLUMNS", columns), ("SG_ROWS", rows), ("SG_LANES", lanes)),
        *(("SG_VECTOR", vector), ("SG_UNROLL", 1), ("SG_FACTORS", int(factors))),
    )
    return macros, p.n * ceil_div(groups, lanes) * tiles, THREADS_LAST, taps * acc


def _acc_bytes(p: Upfirdn2d) -> int:
    return 8 if p.dtype == 1 else 4


def _up_to(multiple: int, number: int) -> int:
    return ceil_div(number, multiple) * multiple


def _power(number: int) -> int:
    """Return the smallest power of two that is at least so large."""
    return 1 << max(number - 1, 0).bit_length()
