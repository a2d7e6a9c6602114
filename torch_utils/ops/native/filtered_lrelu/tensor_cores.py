"""Launch plans of filtered_lrelu on tensor cores.

The macros and the layout of shared memory are explained in tensor_cores.cu.
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
LARGEST_HALF = 65504.0
REGISTERS = 65536  # of a multiprocessor
RESERVED = 1024  # bytes of shared memory that each block takes for the system
BUSY = 12  # warps of a multiprocessor, so that some compute while the others wait
# Estimated cycles of a warp, not yet fitted to times, which benchmarks/bench_tiles.py measures.
BLOCK_CYCLES = 1500
PIECE_CYCLES, PIECE_CYCLES_2D = 160, 230  # for a piece of the upsampled image, by the up filter
OUTPUT_CYCLES, OUTPUT_CYCLES_2D = 60, 800  # for 16 x 16 outputs, by the down filter


def takes(p: FilteredLrelu, capability: tuple[int, int]) -> bool:
    """Return whether the kernel computes this call.

    Between the filters, values are float16, so an activation needs a clamp, and taps times the gain in range.
    Matrices have room for 8 taps for each input or output, and for 18 columns of a 2-D down filter; a row of
    a 2-D filter takes four registers. With fewer than 8 columns, or rows of an up filter, most of a matrix
    would be zeros.
    """
    if p.dtype != DTYPES[torch.float16] or capability < (8, 0) or p.up not in (2, 4) or p.down not in (2, 4):
        return False
    gates = p.mode == GATE
    if not gates and not (0 <= p.clamp <= LARGEST_HALF and 2**-6 <= p.up_gain <= 2**10):
        return False
    up = 2 <= p.fu_w <= 8 * p.up
    if p.fu_h:
        up = gates and p.up == 2 and 8 <= p.fu_w <= 16 and 8 <= p.fu_h <= 14
    down = 2 <= p.fd_w <= 8 * p.down
    if p.fd_h:
        down = not gates and p.down == 2 and 8 <= p.fd_w <= 18 and 2 <= p.fd_h <= 14
    return up and down


def plan(p: FilteredLrelu, capability: tuple[int, int]) -> LaunchPlan:
    """Return specialization and launch for a struct with its pointers filled in; sets its `tile_h`."""
    tile = best_tile(p, shared_limit(capability))
    p.tile_h = tile.height
    shape_x, shape_y = (p.n, p.c, p.in_h, p.in_w), (p.n, p.c, p.out_h, p.out_w)
    wide = is_wide(max(extent(shape_x, p.x_stride), extent(shape_y, p.y_stride)))
    load, shift = _load(p)
    defines = (
        *(("SG_DTYPE", p.dtype), ("SG_UP", p.up), ("SG_DOWN", p.down)),
        *(("SG_TAPS_UX", p.fu_w), ("SG_TAPS_UY", p.fu_h or p.fu_w)),
        *(("SG_TAPS_DX", p.fd_w), ("SG_TAPS_DY", p.fd_h or p.fd_w)),
        *(("SG_SEPARABLE_U", int(p.fu_h == 0)), ("SG_SEPARABLE_D", int(p.fd_h == 0))),
        *(("SG_PHASE_X", p.pad_x0 % p.up), ("SG_PHASE_Y", p.pad_y0 % p.up)),
        *(("SG_MODE", p.mode), ("SG_TILE_W", tile.width), ("SG_WARPS", tile.warps)),
        *(("SG_LOAD", load), ("SG_SHIFT", shift), ("SG_STORE", _store(p)), ("SG_BLOCKS", _resident(p, tile))),
        *((("SG_INDEX_64", 1),) if wide else ()),
    )
    blocks = p.n * p.c * ceil_div(p.out_w, tile.width) * ceil_div(p.out_h, tile.height)
    source, entry = "filtered_lrelu/tensor_cores.cu", "sg_filtered_lrelu_tensor_cuda"
    grid, block = (max(min(blocks, MAX_GRID), 1), 1, 1), (WARP * tile.warps, 1, 1)
    return LaunchPlan("filtered_lrelu", source, entry, defines, grid, block, tile.shared_bytes(p))


class Tile(NamedTuple):
    """Outputs of a block, and its warps, each of which computes a strip of the upsampled image."""

    width: int
    height: int
    warps: int

    def pieces(self, p: FilteredLrelu, columns: int) -> int:
        """Return the pieces of a strip for so many columns of outputs."""
        unit = GROUP_W * max(p.up, p.down)
        return ceil_div((up_to(GROUP_W, columns) + GROUP_W) * p.down, unit) * unit // PIECE_W

    def shared_bytes(self, p: FilteredLrelu) -> int:
        """Return the shared memory of a block in bytes, for all modes; names as in tensor_cores.cu."""
        grid_w, grid_h = PIECE_W * self.pieces(p, self.width), STRIP_H * self.warps
        if p.fu_h:
            in_h = grid_h // 2 + (p.fu_h - p.pad_y0 % 2) // 2
            pairs = p.fu_h * (PIECE_W - 1 + 29 + p.pad_x0 % 2)
        else:
            in_h, pairs = (grid_h - 16) // p.up + 16, 0
        in_p = up_to(16, grid_w // p.up + GROUP_W) + 8
        if p.fd_h:
            stored = grid_h // 4 * (4 * (up_to(64, grid_w - 16) + 16) + 8)
            pairs += GROUP_W - 1 + 16 * p.fd_h
        else:
            stored = grid_h * (up_to(16, self.width) + 8)
            pairs += (15 * p.down + 16 * ceil_div(15 * p.down + p.fd_w, 16)) // 2
        return 2 * (in_h * in_p + stored) + 8 * grid_h * (ceil_div(grid_w, 32) | 1) + 4 * pairs

    def time(self, p: FilteredLrelu, limit: int) -> float:
        """Estimate the time for an image plane."""
        tiles_y = ceil_div(p.out_h, self.height)
        full, rest = divmod(p.out_w, self.width)
        columns = [self.width] * full + [rest] * (rest > 0)
        piece = PIECE_CYCLES_2D if p.fu_h else PIECE_CYCLES
        output = OUTPUT_CYCLES_2D if p.fd_h else OUTPUT_CYCLES
        total = 0.0
        for each in columns:
            squares = ceil_div(ceil_div(min(self.height, p.out_h), 16) * ceil_div(each, 16), self.warps)
            cycles = BLOCK_CYCLES + piece * self.pieces(p, each) + output * squares
            total += tiles_y * self.warps * cycles
        blocks = min((limit + RESERVED) // (self.shared_bytes(p) + RESERVED), _resident(p, self))
        return total * max(1.0, BUSY / (blocks * self.warps)) ** 0.5


def best_tile(p: FilteredLrelu, limit: int) -> Tile:
    """Return the tile with the least work, the same whether bits are recorded or not."""
    return min(tiles(p, limit), key=lambda tile: tile.time(p, limit))


def tiles(p: FilteredLrelu, limit: int) -> Iterator[Tile]:
    """Return the tiles to choose from; their rows divide the image about evenly."""
    # Words of a mask have one writer, and all tiles begin at the same place of a load.
    step = GROUP_W if p.mode == GATE and p.down >= p.up else 2 * GROUP_W
    for warps in WARPS:
        # Even: the 2-D down filter takes pairs of rows, and all tiles begin with the same phase.
        most = ((STRIP_H * warps - (p.fd_h or p.fd_w)) // p.down + 1) // 2 * 2
        if most < 2:
            continue
        height = up_to(2, ceil_div(p.out_h, ceil_div(p.out_h, most)))
        for width in range(step, min(MAX_WIDTH, up_to(step, p.out_w)) + 1, step):
            tile = Tile(width, height, warps)
            if tile.shared_bytes(p) <= limit:
                yield tile


def _resident(p: FilteredLrelu, tile: Tile) -> int:
    """Return how many blocks must fit into the registers of a multiprocessor."""
    registers = 168 if p.fu_h or p.fd_h else 128  # of a thread: a 2-D filter keeps all its taps
    return max(REGISTERS // (registers * WARP * tile.warps), 1)


def _load(p: FilteredLrelu) -> tuple[int, int]:
    """Return (elements read at once, place of a tile's first input in them): at most 16 bytes."""
    load, item = 8, ITEM_BYTES[p.dtype]
    phase = p.pad_x0 % p.up
    first = (phase - p.pad_x0) // p.up  # input of the first tile
    columns = (GROUP_W * p.up - 1 + p.fu_w - 1 - phase) // p.up + 1  # of the 16 of a matrix
    steps = [p.in_w, *p.x_stride[:3], (p.x or 0) // item]
    while load > 1 and (any(step % load for step in steps) or columns + first % load > 16):
        load //= 2
    return load, first % load


def _store(p: FilteredLrelu) -> int:
    """Return elements written at once."""
    is_even = not any(step % 2 for step in (p.out_w, *p.y_stride[:3])) and (p.y or 0) % 4 == 0
    return 2 if is_even else 1
