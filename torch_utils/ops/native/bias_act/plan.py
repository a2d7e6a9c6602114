"""Launch plans of bias_act."""

from __future__ import annotations

from ..params import BiasAct
from ..plan import ITEM_BYTES, LaunchPlan, ceil_div, is_wide
from ..sums import biased_images

THREADS = 256
BLOCKS = 1 << 16  # more elements than these take at once are taken in turns


def plan(p: BiasAct, capability: tuple[int, int]) -> LaunchPlan:
    """Return specialization and launch for a struct with its pointers filled in."""
    item = ITEM_BYTES[p.dtype]
    vector = 16 // item
    addresses = [value or 0 for value in (p.input, p.in2, p.ref, p.out)]
    if p.size % vector or any(address % 16 for address in addresses):
        vector = 1
    images = biased_images(p.size, p.bias_size, p.bias_step) if p.db else None
    if images:
        vector = images.vector(p.dtype, [*addresses, p.b])
    bias = 0
    if p.b and (p.order == 0 or p.act == 9):
        if p.bias_step % vector == 0:
            bias = 1
        elif p.bias_step == 1 and p.bias_size % vector == 0 and p.b % 16 == 0:
            bias = 2
        else:
            bias = 3
    defines = (
        ("SG_DTYPE", p.dtype),
        ("SG_ACT", p.act),
        ("SG_ORDER", p.order),
        ("SG_CLAMP", int(p.clamp >= 0)),
        ("SG_HAS_REF", int(bool(p.ref))),
        *(images.defines(vector) if images else (("SG_VECTOR", vector),)),
        ("SG_BIAS", bias),
        ("SG_DB", int(bool(images))),
        *((("SG_INDEX_64", 1),) if is_wide(p.size) else ()),
    )
    source, entry = "bias_act/bias_act.cu", "sg_bias_act_cuda"
    if images:
        grid, shared_bytes = images.grid(p.dtype, vector), images.shared_bytes(p.dtype, vector)
        return LaunchPlan("bias_act", source, entry, defines, grid, images.block(vector), shared_bytes)
    blocks = min(ceil_div(p.size, vector * THREADS), BLOCKS)
    return LaunchPlan("bias_act", source, entry, defines, (max(blocks, 1), 1, 1), (THREADS, 1, 1))
