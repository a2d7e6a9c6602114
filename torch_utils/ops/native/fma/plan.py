"""Launch plans of fma."""

from __future__ import annotations

from ..params import Fma
from ..plan import LaunchPlan, is_wide
from ..sums import Images


def plan(p: Fma, capability: tuple[int, int]) -> LaunchPlan:
    """Return specialization and launch for a struct with its pointers filled in."""
    memory = Images(bool(p.planar), p.n * p.channels if p.planar else p.n, p.size, p.channels)
    # Planes read a map c in vectors, pixels read b.
    small = p.b if not p.planar else p.c if p.addend == 2 else None
    vector = memory.vector(p.dtype, [p.input, p.other, p.out, small])
    defines = (
        ("SG_DTYPE", p.dtype),
        *memory.defines(vector),
        ("SG_ADDEND", p.addend),
        ("SG_DB", int(bool(p.db))),
        ("SG_DC", int(bool(p.dc))),
        *((("SG_INDEX_64", 1),) if is_wide(p.n * p.channels * p.size) else ()),
    )
    grid = memory.grid(p.dtype, vector)
    shared_bytes = memory.shared_bytes(p.dtype, vector) if p.db else 0
    return LaunchPlan("fma", "fma/fma.cu", "sg_fma_cuda", defines, grid, memory.block(vector), shared_bytes)
