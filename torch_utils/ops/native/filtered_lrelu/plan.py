"""Launch plans of filtered_lrelu: the tile of outputs per block.

The macros and the layout of shared memory are explained in filtered_lrelu.cu.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from ..params import ACTIVATE, GATE, RECORD, FilteredLrelu
from ..plan import ITEM_BYTES, MAX_GRID, LaunchPlan, ceil_div, extent, is_wide, shared_limit, up_to
from . import tensor_cores

WARP = 32
WARPS = (2, 4, 7)  # of a block, a few numbers, or every size of a layer would be compiled for itself
MAX_WARPS = 32  # for filters that need them
MAX_ROWS = 64  # of outputs of a tile
ROWS_2D = 4  # of outputs that a thread filters at once
BUSY = 18  # warps of a multiprocessor, so that some compute while the others wait for memory or a barrier
REGISTERS = 65536  # of a multiprocessor
PUBLISHED_TAPS = 36  # along y, of both filters
SETUP = 100  # instructions of a thread for a tile of any size
BARRIER = 0.05  # time for each warp of a block, which waits for the others
RESERVED = 1024  # bytes of shared memory that each block takes for the system
WRITTEN_OUT = 4096  # multiplications that compile within a second or two; beyond that they are looped over


def plan(p: FilteredLrelu, capability: tuple[int, int]) -> LaunchPlan:
    """Return specialization and launch for a struct with its pointers filled in; sets its `tile_h`.

    Raises ValueError for filters of which not even a small tile fits into shared memory.
    """
    if tensor_cores.takes(p, capability):
        return tensor_cores.plan(p, capability)
    axes = Axes.of(p)
    width, p.tile_h, shared = best_tile(p, axes, shared_limit(capability))
    shape_x, shape_y = (p.n, p.c, p.in_h, p.in_w), (p.n, p.c, p.out_h, p.out_w)
    wide = is_wide(max(extent(shape_x, p.x_stride), extent(shape_y, p.y_stride)))
    load, shift = _load(p, width)
    defines = (
        *(("SG_DTYPE", p.dtype), ("SG_UP", p.up), ("SG_DOWN", p.down), ("SG_PERIOD", axes.period)),
        *(("SG_TAPS_UX", axes.ux), ("SG_TAPS_UY", axes.uy), ("SG_TAPS_DX", axes.dx), ("SG_TAPS_DY", axes.dy)),
        *(("SG_SEPARABLE_U", int(axes.separable_u)), ("SG_SEPARABLE_D", int(axes.separable_d))),
        *(("SG_PHASE_X", p.pad_x0 % p.up), ("SG_PHASE_Y", p.pad_y0 % p.up)),
        *(("SG_MODE", p.mode), ("SG_CLAMPS", int(p.mode <= RECORD and p.clamp >= 0)), ("SG_TILE_W", width)),
        *(("SG_LOAD", load), ("SG_SHIFT", shift), ("SG_STORE", _store(p, axes))),
        ("SG_UNROLL", int(_written_out(p, axes) <= WRITTEN_OUT)),
        ("SG_BLOCKS", axes.resident_blocks(width)),
        *((("SG_INDEX_64", 1),) if wide else ()),
    )
    blocks = p.n * p.c * ceil_div(p.out_w, width) * ceil_div(p.out_h, p.tile_h)
    grid = (max(min(blocks, MAX_GRID), 1), 1, 1)
    source, entry = "filtered_lrelu/filtered_lrelu.cu", "sg_filtered_lrelu_cuda"
    return LaunchPlan("filtered_lrelu", source, entry, defines, grid, (axes.threads(width), 1, 1), shared)


class Axes(NamedTuple):
    """The filters, and the arithmetic of filtered_lrelu.cu; names as there."""

    up: int
    down: int
    ux: int
    uy: int
    dx: int
    dy: int
    separable_u: bool
    separable_d: bool
    phase_x: int
    phase_y: int
    quad: int
    acc_bytes: int

    @classmethod
    def of(cls, p: FilteredLrelu) -> Axes:
        acc = 8 if p.dtype == 1 else 4
        taps = (p.fu_w, p.fu_h or p.fu_w, p.fd_w, p.fd_h or p.fd_w)
        phases = (p.pad_x0 % p.up, p.pad_y0 % p.up)
        return cls(p.up, p.down, *taps, p.fu_h == 0, p.fd_h == 0, *phases, 16 // acc, acc)

    @property
    def period(self) -> int:
        return math.lcm(self.up, self.down)

    @property
    def unit(self) -> int:
        """Outputs after which the same taps come again."""
        return self.up // math.gcd(self.up, self.down)

    @property
    def early(self) -> int:
        return (self.period + self.uy - 2 - self.phase_y) // self.up + 1 - self.period // self.up

    @property
    def columns_2d(self) -> int:
        return 2 * self.quad // self.down if 2 * self.quad % self.down == 0 else 1

    @property
    def columns(self) -> int:
        return self.quad // self.down if self.quad % self.down == 0 else 1

    def threads(self, width: int) -> int:
        return up_to(WARP, (width - 1) * self.down + self.dx)

    def blocks(self, rows: int) -> int:
        return ceil_div((rows - 1) * self.down + self.dy, self.period)

    def inputs(self, rows: int) -> int:
        return self.early + self.blocks(rows) * self.period // self.up

    def pitches(self, width: int, load: int, shift: int) -> tuple[int, int]:
        """Return (IN_P, WIDE_P)."""
        run = self.up * self.quad
        wide = up_to(run, self.threads(width))
        first = (run - 1 - self.phase_x + self.up - 1) // self.up
        reads = up_to(self.quad, shift + first + ceil_div(self.ux, self.up))
        return up_to(max(self.quad, load), (wide // run - 1) * self.quad + reads), wide

    def resident_blocks(self, width: int) -> int:
        """Return how many blocks must fit into the registers of a multiprocessor.

        The compiler saves registers for it, which it can for published filters without spilling them.
        """
        registers = (96 if self.separable_d else 128) if self.separable_u else 168  # of a thread
        if self.uy + self.dy > PUBLISHED_TAPS or self.acc_bytes > 4:
            registers = 255
        return max(REGISTERS // (registers * self.threads(width)), 1)

    def shared_bytes(self, p: FilteredLrelu, width: int, height: int) -> int:
        """Return the shared memory of a block in bytes."""
        threads, blocks, inputs = self.threads(width), self.blocks(height), self.inputs(height)
        in_p, wide_p = self.pitches(width, *_load(p, width))
        padded_ux = ceil_div(self.ux, self.up) * self.up
        taps_u = self.ux + self.uy if self.separable_u else self.uy * padded_ux
        taps_d = self.dx if self.separable_d else self.dy * up_to(self.quad, self.dx)
        filtered = height * threads
        if not self.separable_d:
            filtered = blocks * self.period * (threads + (32 if threads % 64 == 0 else 0))
        staged = inputs * in_p
        accs = up_to(self.quad, taps_u) + up_to(self.quad, taps_d)
        accs += max(staged, filtered) + inputs * wide_p if self.separable_u else staged + filtered
        words = 0 if p.mode == ACTIVATE else threads // WARP + (p.mode == GATE)
        return accs * self.acc_bytes + blocks * self.period * words * 8


# ---- Tiles


def best_tile(p: FilteredLrelu, axes: Axes, limit: int) -> tuple[int, int, int]:
    """Return (width, height, bytes of shared memory) of the tile with the least work."""
    best = None
    for width in _widths(p, axes):
        for height in _heights(p, axes):
            shared = axes.shared_bytes(p, width, height)
            if shared > limit:
                continue
            warps = axes.threads(width) // WARP
            resident = min((limit + RESERVED) // (shared + RESERVED), axes.resident_blocks(width)) * warps
            # Fitted to times on an H200; benchmarks/bench_tiles.py measures them.
            time = work(p, axes, width, height) * (1 + BARRIER * warps) / math.sqrt(min(1.0, resident / BUSY))
            if best is None or time < best[0]:
                best = (time, width, height, shared)
    if best is None:
        raise ValueError(
            f"filtered_lrelu: filters of {axes[2:6]} taps with up {p.up}, down {p.down} do not fit into the "
            f"{limit} bytes of shared memory of this GPU; use impl='ref'"
        )
    return best[1:]


def _widths(p: FilteredLrelu, axes: Axes) -> list[int]:
    """Return the widest tile for each number of warps; each word of a mask has one writer."""
    step = math.lcm(8, axes.unit, WARP // math.gcd(WARP, p.down) if p.mode == RECORD else 1)
    found = [((warps * WARP - axes.dx) // p.down + 1) // step * step for warps in WARPS]
    widths = [width for width in found if width > 0]
    return widths or ([step] if axes.threads(step) <= MAX_WARPS * WARP else [])


def _heights(p: FilteredLrelu, axes: Axes) -> Iterator[int]:
    """Return tile heights that divide the image evenly."""
    unit = math.lcm(axes.unit, 1 if axes.separable_d else ROWS_2D)
    tried = set()
    for shares in range(1, p.out_h + 1):
        height = up_to(unit, ceil_div(p.out_h, shares))
        if height not in tried and (height <= MAX_ROWS or height == unit):
            tried.add(height)
            yield height


def work(p: FilteredLrelu, axes: Axes, width: int, height: int) -> float:
    """Estimate the instructions of the threads for one image plane, as counted in sm_90 code."""
    steps_x, steps_y = ceil_div(axes.ux, p.up), ceil_div(axes.uy, p.up)
    activation = (4, 9, 6)[p.mode] + 2 / p.up  # of an element of the grid; and of a block of rows
    total = 0.0
    for tiles_y, rows in _shares(p.out_h, height):
        inputs, grid = axes.inputs(rows), axes.blocks(rows) * axes.period
        for tiles_x, columns in _shares(p.out_w, width):
            threads, all_threads = axes.threads(columns), axes.threads(width)
            one = SETUP * all_threads
            one += inputs * all_threads * (8 / p.up + (steps_x + 3 if axes.separable_u else 0))
            one += grid * threads * (steps_y * (1 if axes.separable_u else steps_x) + activation)
            if axes.separable_d:
                one += grid * threads * (axes.dy + 4) / p.down + rows * columns * (axes.dx + 7)
            else:
                items = ceil_div(rows, ROWS_2D) * ceil_div(columns, axes.columns_2d)
                rounds = ceil_div(items, all_threads) * all_threads * ROWS_2D * axes.columns_2d
                one += rounds * axes.dx * axes.dy * 1.1
            total += tiles_y * tiles_x * one
    return total


def _shares(size: int, tile: int) -> list[tuple[int, int]]:
    """Return (how many, of what size)."""
    return [share for share in ((size // tile, tile), (1, size % tile)) if all(share)]


# ---- Memory


def _load(p: FilteredLrelu, width: int) -> tuple[int, int]:
    """Return (elements read at once, place of a tile's first input in them): at most 16 bytes."""
    item = ITEM_BYTES[p.dtype]
    load = 16 // item
    steps = [p.in_w, width * p.down // p.up, *p.x_stride[:3]]
    while load > 1 and (any(step % load for step in steps) or (p.x or 0) % (load * item)):
        load //= 2
    return load, (p.pad_x0 % p.up - p.pad_x0) // p.up % load


def _store(p: FilteredLrelu, axes: Axes) -> int:
    """Return elements written at once: all of a thread's in a row, else 1."""
    store, item = axes.columns if axes.separable_d else axes.columns_2d, ITEM_BYTES[p.dtype]
    while store * item > 16:
        store //= 2
    if axes.separable_d and store < axes.columns:
        return 1
    return (
        1
        if any(step % store for step in (p.out_w, *p.y_stride[:3])) or (p.y or 0) % (store * item)
        else store
    )


def _written_out(p: FilteredLrelu, axes: Axes) -> int:
    """Return the multiplications of a thread that are unrolled."""
    steps_x = ceil_div(axes.ux, p.up)
    inputs = axes.early + axes.period // p.up
    found = inputs * axes.uy * (1 if axes.separable_u else steps_x)
    found += axes.up * axes.quad * steps_x if axes.separable_u else 0
    if axes.separable_d:
        return found + axes.period * ceil_div(axes.dy, p.down) + axes.columns * axes.dx
    return found + ROWS_2D * axes.columns_2d * axes.dx * axes.dy
