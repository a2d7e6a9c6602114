"""Launch plans for the gradient of filtered_lrelu with a 2-D down filter, on tensor cores.

The macros and the layout of shared memory are explained in gradient_2d.cu.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..params import DTYPES, GATE, FilteredLrelu
from ..plan import ITEM_BYTES, MAX_GRID, LaunchPlan, ceil_div, extent, is_wide, shared_limit, up_to

WARP, GROUP_W, PIECE_W, STRIP_H = 32, 8, 16, 32
WARPS = (2, 3, 4, 5, 6)  # of a block; each number is compiled for itself
MAX_WIDTH = 128  # of outputs of a tile
REGISTERS = 65536  # of a multiprocessor
THREAD_REGISTERS = 168  # enough for 12 x 12 taps and down 2; with down 4, 8 bytes of a thread spill
RESERVED = 1024  # bytes of shared memory that each block takes for the system
BUSY = 12  # warps of a multiprocessor, so that some compute while the others wait
# Estimated cycles of a warp for a block, for a piece of the upsampled image, and for 16 x 16 outputs, not yet
# fitted to times, which benchmarks/bench_tiles.py measures.
BLOCK_CYCLES, PIECE_CYCLES, OUTPUT_CYCLES = 1500, 230, 60


def takes(p: FilteredLrelu, capability: tuple[int, int]) -> bool:
    """Return whether the kernel computes this call.

    Its matrices have 16 columns for the inputs of 16 elements, which 16 taps need at most. Each of 14 rows
    of taps takes four registers. A group of outputs ends within the pieces of the next one. With fewer than 8
    taps, the matrices would be mostly zeros.
    """
    if p.mode != GATE or p.dtype != DTYPES[torch.float16] or capability < (8, 0):
        return False
    filters = p.fu_h > 0 and p.fd_h == 0 and 8 <= p.fu_w <= 16 and 8 <= p.fu_h <= 14
    return filters and p.up == 2 and p.down in (2, 4) and 2 <= p.fd_w <= 8 * p.down


def plan(p: FilteredLrelu, capability: tuple[int, int]) -> LaunchPlan:
    """Return specialization and launch for a struct with its pointers filled in; sets its `tile_h`."""
    tile = best_tile(p, shared_limit(capability))
    p.tile_h = tile.height
    shape_x, shape_y = (p.n, p.c, p.in_h, p.in_w), (p.n, p.c, p.out_h, p.out_w)
    wide = is_wide(max(extent(shape_x, p.x_stride), extent(shape_y, p.y_stride)))
    load, shift = _load(p)
    resident = max(REGISTERS // (THREAD_REGISTERS * WARP * tile.warps), 1)
    defines = (
        *(("SG_DTYPE", p.dtype), ("SG_DOWN", p.down)),
        *(("SG_TAPS_UX", p.fu_w), ("SG_TAPS_UY", p.fu_h), ("SG_TAPS_D", p.fd_w)),
        *(("SG_PHASE_X", p.pad_x0 % 2), ("SG_PHASE_Y", p.pad_y0 % 2)),
        *(("SG_TILE_W", tile.width), ("SG_WARPS", tile.warps)),
        *(("SG_LOAD", load), ("SG_SHIFT", shift), ("SG_STORE", _store(p)), ("SG_BLOCKS", resident)),
        *((("SG_INDEX_64", 1),) if wide else ()),
    )
    blocks = p.n * p.c * ceil_div(p.out_w, tile.width) * ceil_div(p.out_h, tile.height)
    source, entry = "filtered_lrelu/gradient_2d.cu", "sg_filtered_lrelu_gradient_cuda"
    grid, block = (max(min(blocks, MAX_GRID), 1), 1, 1), (WARP * tile.warps, 1, 1)
    return LaunchPlan("filtered_lrelu", source, entry, defines, grid, block, tile.shared_bytes(p))


class Tile(NamedTuple):
    """Outputs of a block, and its warps, each of which computes a strip of the upsampled image."""

    width: int
    height: int
    warps: int

    def shared_bytes(self, p: FilteredLrelu) -> int:
        """Return the shared memory of a block in bytes; names as in gradient_2d.cu."""
        grid_w = (self.width // GROUP_W + 1) * p.down // 2 * PIECE_W
        grid_h = STRIP_H * self.warps
        in_h = 16 * self.warps + up_to(2, (p.fu_h - p.pad_y0 % 2) // 2 + 1) - 1
        in_p = up_to(16, grid_w // 2 + 8) + 8
        filtered_p = up_to(16, self.width) + 8
        pairs_up = PIECE_W - 1 + 29 + p.pad_x0 % 2
        pairs_down = (15 * p.down + 16 * ceil_div(15 * p.down + p.fd_w, 16)) // 2
        taps = 4 * (p.fu_h * pairs_up + pairs_down)
        return 2 * (in_h * in_p + grid_h * filtered_p) + 8 * grid_h * ceil_div(grid_w, 32) + taps

    def time(self, p: FilteredLrelu, limit: int) -> float:
        """Estimate the time for an image plane."""
        tiles_y = ceil_div(p.out_h, self.height)
        full, rest = divmod(p.out_w, self.width)
        columns = [self.width] * full + [rest] * (rest > 0)
        total = 0.0
        for each in columns:
            pieces = (ceil_div(each, GROUP_W) + 1) * p.down // 2
            squares = ceil_div(ceil_div(min(self.height, p.out_h), 16) * ceil_div(each, 16), self.warps)
            total += tiles_y * self.warps * (BLOCK_CYCLES + PIECE_CYCLES * pieces + OUTPUT_CYCLES * squares)
        shared = self.shared_bytes(p) + RESERVED
        blocks = min((limit + RESERVED) // shared, REGISTERS // (THREAD_REGISTERS * WARP * self.warps))
        return total * max(1.0, BUSY / (blocks * self.warps)) ** 0.5


def best_tile(p: FilteredLrelu, limit: int) -> Tile:
    """Return the tile with the least work."""
    return min(tiles(p, limit), key=lambda tile: tile.time(p, limit))


def tiles(p: FilteredLrelu, limit: int) -> Iterator[Tile]:
    """Return the tiles to choose from; their rows divide the image about evenly."""
    for warps in WARPS:
        most = (STRIP_H * warps - p.fd_w) // p.down + 1
        if most < 1:
            continue
        height = ceil_div(p.out_h, ceil_div(p.out_h, most))
        for width in range(GROUP_W, min(MAX_WIDTH, up_to(GROUP_W, p.out_w)) + 1, GROUP_W):
            tile = Tile(width, height, warps)
            if tile.shared_bytes(p) <= limit:
                yield tile


def _load(p: FilteredLrelu) -> tuple[int, int]:
    """Return (elements read at once, place of a tile's first input in them): at most 16 bytes."""
    load, item = 8, ITEM_BYTES[p.dtype]
    phase = p.pad_x0 % 2
    columns = (PIECE_W - 1 + p.fu_w - 1 - phase) // 2 + 1  # of the 16 of a matrix
    steps = [p.in_w, *p.x_stride[:3], (p.x or 0) // item]
    while load > 1 and (any(step % load for step in steps) or columns + _first(p) % load > 16):
        load //= 2
    return load, _first(p) % load


def _first(p: FilteredLrelu) -> int:
    """Return the first input of the first tile."""
    return (p.pad_x0 % 2 - p.pad_x0) // 2


def _store(p: FilteredLrelu) -> int:
    """Return elements written at once."""
    is_even = not any(step % 2 for step in (p.out_w, *p.y_stride[:3])) and (p.y or 0) % 4 == 0
    return 2 if is_even else 1
