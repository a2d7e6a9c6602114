"""The face of the native kernels: get the CPU library, get a CUDA binary, ask what is there and why not."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from torch_utils.ops.native.building import NativeUnavailable as NativeUnavailable

if TYPE_CHECKING:
    from torch_utils.ops.native.plan import Plan


def cpu_library() -> ctypes.CDLL:
    """Return the CPU library, built or found in the cache and loaded, once per process.

    Raises NativeUnavailable with cause and remedy, the same one on every call.
    """
    raise NativeUnavailable("the CPU library is not built yet")


def cubin(plan: Plan, capability: tuple[int, int]) -> bytes:
    """Return the CUDA binary of one specialisation for devices of `capability`, from the cache or compiled now.

    Raises NativeUnavailable with the compiler's own words.
    """
    raise NativeUnavailable("CUDA binaries are not built yet")
