"""How upfirdn2d runs on a GPU."""

from __future__ import annotations

from ..params import Upfirdn2d
from ..plan import ITEM_BYTES, MAX_GRID, Plan, ceil_div, extent, is_wide, shared_limit

THREADS = 256
TILES = ((32, 32), (32, 16), (32, 8), (16, 16), (8, 8))  # outputs, x and y


def plan(p: Upfirdn2d, capability: tuple[int, int]) -> Plan:
    """The specialisation and the launch for a struct with its pointers filled in."""
    separable = p.f_h == 0
    taps_x, taps_y = p.f_w, p.f_w if separable else p.f_h
    item, acc = ITEM_BYTES[p.dtype], 8 if p.dtype == 1 else 4
    padded_x, padded_y = ceil_div(taps_x, p.up_x) * p.up_x, ceil_div(taps_y, p.up_y) * p.up_y
    taps = padded_x + padded_y if separable else padded_x * padded_y
    shape_x, shape_y = (p.n, p.c, p.in_h, p.in_w), (p.n, p.c, p.out_h, p.out_w)
    wide = is_wide(max(extent(shape_x, p.x_stride), extent(shape_y, p.y_stride)))
    channels_last = p.c > 1 and p.x_stride[1] == 1 and p.y_stride[1] == 1
    tile, vector, shared = TILES[-1], 1, taps * acc
    if channels_last:
        vector = _vector(p, item)
        blocks = ceil_div(p.n * p.out_h * p.out_w * (p.c // vector), THREADS)
    else:
        tile, shared = _tile(p, taps, acc, taps_x, taps_y, separable, shared_limit(capability))
        blocks = p.n * p.c * ceil_div(p.out_w, tile[0]) * ceil_div(p.out_h, tile[1])
    rows = THREADS // tile[0]
    fixed = THREADS % tile[0] == 0 and rows * p.down_y % p.up_y == 0
    defines = (
        *(("SG_DTYPE", p.dtype), ("SG_SEPARABLE", int(separable)), ("SG_CHANNELS_LAST", int(channels_last))),
        *(("SG_UP_X", p.up_x), ("SG_UP_Y", p.up_y), ("SG_DOWN_X", p.down_x), ("SG_DOWN_Y", p.down_y)),
        *(("SG_TAPS_X", taps_x), ("SG_TAPS_Y", taps_y), ("SG_VECTOR", vector)),
        *(("SG_TILE_W", tile[0]), ("SG_TILE_H", tile[1]), ("SG_FIXED_PHASE", int(fixed and taps <= 64))),
        *((("SG_INDEX_64", 1),) if wide else ()),
    )
    grid = (max(min(blocks, MAX_GRID), 1), 1, 1)
    return Plan(
        "upfirdn2d", "upfirdn2d/upfirdn2d.cu", "sg_upfirdn2d_cuda", defines, grid, (THREADS, 1, 1), shared
    )


def _vector(p: Upfirdn2d, item: int) -> int:
    """Channels of one thread: 16 bytes where everything is a multiple of that, else fewer."""
    vector = 16 // item
    steps = [p.c, *(p.x_stride[i] for i in (0, 2, 3)), *(p.y_stride[i] for i in (0, 2, 3))]
    while vector > 1 and (
        any(step % vector for step in steps)
        or any((address or 0) % (vector * item) for address in (p.x, p.y))
    ):
        vector //= 2
    return vector


def _tile(
    p: Upfirdn2d, taps: int, acc: int, taps_x: int, taps_y: int, separable: bool, limit: int
) -> tuple[tuple[int, int], int]:
    """The largest tile that is not mostly empty and fits, and its bytes of shared memory."""
    for width, height in TILES:
        in_w = ((width - 1) * p.down_x + taps_x - 1) // p.up_x + 2
        in_h = ((height - 1) * p.down_y + taps_y - 1) // p.up_y + 2
        shared = (taps + in_h * in_w + (in_h * width if separable else 0)) * acc
        smallest = (width, height) == TILES[-1]
        if shared <= limit // 2 and (smallest or (p.out_w > width // 2 and p.out_h > height // 2)):
            return (width, height), shared
    return TILES[-1], shared
