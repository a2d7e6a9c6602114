"""Launch plans of unit_distance."""

from __future__ import annotations

from ..params import UnitDistance
from ..plan import LaunchPlan, is_wide
from ..sums import Images


def plan(p: UnitDistance, capability: tuple[int, int]) -> LaunchPlan:
    """Return specialization and launch for a struct with its pointers filled in."""
    memory = Images(False, 1, p.positions, p.channels)
    vector = memory.vector(p.dtype, [p.x, p.y, p.out if p.s else None])
    defines = (
        ("SG_DTYPE", p.dtype),
        *memory.defines(vector),
        ("SG_WEIGHTS", int(bool(p.w))),
        ("SG_GRAD", int(bool(p.s))),
        *((("SG_INDEX_64", 1),) if is_wide(p.positions * p.channels) else ()),
    )
    grid, block = memory.grid(p.dtype, vector), memory.block(vector)
    return LaunchPlan(
        "unit_distance", "unit_distance/unit_distance.cu", "sg_unit_distance_cuda", defines, grid, block
    )
