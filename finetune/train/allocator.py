"""Keep freed memory inside the process while training on a CPU, where asking for it again costs much."""

from __future__ import annotations

import ctypes
import os

# Numbers of mallopt's options, fixed by <malloc.h>.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
LARGEST_BLOCK = 1 << 30  # bytes; larger blocks still go back to the system when they are freed
NEVER_TRIM = 2**31 - 1


def keep_freed_memory() -> bool:
    """Tell glibc to reuse the memory of freed tensors instead of returning it; say whether it was told so.

    By default every large tensor is a mapping of its own, whose pages the kernel has to clear on first touch:
    a third of the time of a small network on a CPU. Best effort: False, and nothing changed, on other systems
    and where the environment already tunes the allocator (`MALLOC_…`, `GLIBC_TUNABLES`).
    """
    tuned = any(name.startswith("MALLOC_") for name in os.environ)
    if tuned or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    try:
        if not (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc"):
            return False
        mallopt = ctypes.CDLL(None).mallopt
        done = [mallopt(M_MMAP_THRESHOLD, LARGEST_BLOCK), mallopt(M_TRIM_THRESHOLD, NEVER_TRIM)]
    except (AttributeError, OSError, TypeError, ValueError):  # no confstr, no such name, no such function
        return False
    return all(done)
