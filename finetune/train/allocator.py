"""Keep freed memory inside the process while training on a CPU, because allocating it again is slow."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

# Numbers of mallopt's options, fixed by <malloc.h>.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
LARGEST_BLOCK = 1 << 30  # bytes; larger blocks still go back to the system when they are freed
USUAL_BLOCK = 128 << 10  # glibc's own
NEVER_TRIM = 2**31 - 1

_keeps = False  # whether this process does


def keep_freed_memory() -> bool:
    """Configure glibc to reuse the memory of freed tensors; return whether this succeeded.

    By default every large tensor is a mapping of its own, whose pages the kernel has to clear on first touch:
    a third of the time of a small network on a CPU. Best effort: False, and nothing changed, on other systems
    and if the environment already tunes the allocator (`MALLOC_…`, `GLIBC_TUNABLES`).
    """
    tuned = any(name.startswith("MALLOC_") for name in os.environ)
    if tuned or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    global _keeps
    try:
        if not (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc"):
            return False
        mallopt = ctypes.CDLL(None).mallopt
        done = [mallopt(M_MMAP_THRESHOLD, LARGEST_BLOCK), mallopt(M_TRIM_THRESHOLD, NEVER_TRIM)]
    except (AttributeError, OSError, TypeError, ValueError):  # no confstr, no such name, no such function
        return False
    _keeps = all(done)
    return _keeps


@contextlib.contextmanager
def freed_at_once() -> Iterator[None]:
    """Return freed memory to the system inside the block, for saves.

    Otherwise the temporary buffers of a save, whose sizes differ from those of a step, would be kept as well,
    and fragmentation would let memory grow a little with every save.
    """
    if not _keeps:
        yield
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(M_MMAP_THRESHOLD, USUAL_BLOCK)
    try:
        yield
    finally:
        mallopt(M_MMAP_THRESHOLD, LARGEST_BLOCK)
