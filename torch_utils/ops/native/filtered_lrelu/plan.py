"""How filtered_lrelu runs on a GPU."""

from __future__ import annotations

from ..params import RECORD, FilteredLrelu
from ..plan import MAX_GRID, Plan, ceil_div, extent, is_wide, shared_limit

THREADS = 256
WARP = 32
WIDTHS, HEIGHTS = (64, 32, 16, 8), (64, 32, 16, 8, 4)  # outputs of a tile


def plan(p: FilteredLrelu, capability: tuple[int, int]) -> Plan:
    """The specialisation and the launch for a struct with its pointers filled in.

    Raises ValueError for filters of which not even a small tile fits into shared memory.
    """
    width, height, shared = best_tile(p, shared_limit(capability))
    shape_x, shape_y = (p.n, p.c, p.in_h, p.in_w), (p.n, p.c, p.out_h, p.out_w)
    wide = is_wide(max(extent(shape_x, p.x_stride), extent(shape_y, p.y_stride)))
    (ux, uy), (dx, dy) = _taps(p)
    separable_u, separable_d = p.fu_h == 0, p.fd_h == 0
    defines = (
        *(("SG_DTYPE", p.dtype), ("SG_UP", p.up), ("SG_DOWN", p.down)),
        *(("SG_TAPS_UX", ux), ("SG_TAPS_UY", uy), ("SG_TAPS_DX", dx), ("SG_TAPS_DY", dy)),
        *(("SG_SEPARABLE_U", int(separable_u)), ("SG_SEPARABLE_D", int(separable_d))),
        *(("SG_MODE", p.mode), ("SG_CLAMPS", int(p.mode <= RECORD and p.clamp >= 0))),
        *(("SG_HAS_BIAS", int(bool(p.b))), ("SG_TILE_W", width), ("SG_TILE_H", height)),
        *((("SG_INDEX_64", 1),) if wide else ()),
    )
    blocks = p.n * p.c * ceil_div(p.out_w, width) * ceil_div(p.out_h, height)
    grid = (max(min(blocks, MAX_GRID), 1), 1, 1)
    source, entry = "filtered_lrelu/filtered_lrelu.cu", "sg_filtered_lrelu_cuda"
    return Plan("filtered_lrelu", source, entry, defines, grid, (THREADS, 1, 1), shared)


def best_tile(p: FilteredLrelu, limit: int) -> tuple[int, int, int]:
    """(width, height, bytes of shared memory) of the tile with the least work; two fit side by side."""
    best = None
    for room in (limit // 2, limit):
        for width in WIDTHS:
            if p.mode == RECORD and width * p.down % WARP:
                continue  # each word of the mask has one writer
            for height in HEIGHTS:
                shared, work = cost(p, width, height)
                if shared > room:
                    continue
                tiles = ceil_div(p.out_w, width) * ceil_div(p.out_h, height)
                if best is None or tiles * work < best[0]:
                    best = (tiles * work, width, height, shared)
        if best is not None:
            return best[1:]
    raise ValueError(
        f"filtered_lrelu: filters of {_taps(p)} taps with up {p.up}, down {p.down} do not fit into the "
        f"{limit} bytes of shared memory of this GPU; use impl='ref'"
    )


def cost(p: FilteredLrelu, width: int, height: int) -> tuple[int, int]:
    """Bytes of shared memory and multiplications of one tile; the arithmetic of filtered_lrelu.cu."""
    (ux, uy), (dx, dy) = _taps(p)
    steps_x, steps_y = ceil_div(ux, p.up), ceil_div(uy, p.up)
    padded_x, padded_y = steps_x * p.up, steps_y * p.up
    separable_u, separable_d = p.fu_h == 0, p.fd_h == 0
    grid_h = (height - 1) * p.down + dy
    grid_w = ceil_div((width - 1) * p.down + dx, WARP) * WARP
    in_w, in_h = (grid_w + ux - 2) // p.up + 2, (grid_h + uy - 2) // p.up + 2
    taps = (padded_x + padded_y if separable_u else padded_x * padded_y) + (dx if separable_d else dx * dy)
    inputs = in_h * in_w + (in_h * grid_w if separable_u else 0)
    cells = taps + grid_h * grid_w + max(inputs, height * grid_w if separable_d else 0)
    work = in_h * in_w
    if separable_u:
        work += in_h * grid_w * steps_x + grid_h * grid_w * steps_y
    else:
        work += grid_h * grid_w * steps_x * steps_y
    work += height * grid_w * dy + height * width * dx if separable_d else height * width * dx * dy
    return cells * (8 if p.dtype == 1 else 4), work


def _taps(p: FilteredLrelu) -> tuple[tuple[int, int], tuple[int, int]]:
    """(x, y) of either filter."""
    return (p.fu_w, p.fu_h or p.fu_w), (p.fd_w, p.fd_h or p.fd_w)
