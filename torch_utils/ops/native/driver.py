"""Load and launch kernels with the CUDA driver, through ctypes.

Modules live in the primary context of a device, the one that torch uses. It becomes the current
context of threads without one, as after torch's own calls; in a thread with the context of another device, it
is current during the call only.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Iterator
from typing import Any

import torch

from .building import NativeUnavailable

_NAME = "nvcuda.dll" if os.name == "nt" else "libcuda.so.1"
_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # of enum CUfunction_attribute
_FREE_SHARED_BYTES = 48 * 1024  # what every kernel may have without asking

_p, _i, _u = ctypes.c_void_p, ctypes.c_int, ctypes.c_uint
_SIGNATURES = {
    "cuDeviceGet": (ctypes.POINTER(_i), _i),
    "cuDevicePrimaryCtxRetain": (ctypes.POINTER(_p), _i),
    "cuCtxGetCurrent": (ctypes.POINTER(_p),),
    "cuCtxSetCurrent": (_p,),
    "cuCtxPushCurrent_v2": (_p,),
    "cuCtxPopCurrent_v2": (ctypes.POINTER(_p),),
    "cuModuleLoadData": (ctypes.POINTER(_p), ctypes.c_char_p),
    "cuModuleGetFunction": (ctypes.POINTER(_p), _p, ctypes.c_char_p),
    "cuFuncSetAttribute": (_p, _i, _i),
    "cuLaunchKernel": (_p, *(_u,) * 7, _p, _p, _p),
    "cuGetErrorName": (_i, ctypes.POINTER(ctypes.c_char_p)),
}


class DriverError(RuntimeError):
    """The CUDA driver refused a call."""


class BinaryRefused(NativeUnavailable):
    """The CUDA driver does not take a binary."""


@functools.cache
def _library() -> Any:
    try:
        library = ctypes.CDLL(_NAME)
    except OSError as error:
        raise NativeUnavailable(
            f"the CUDA driver does not load: {error}", "Install NVIDIA's driver."
        ) from None
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, _i
    return library


def _call(name: str, *arguments: Any) -> None:
    status = getattr(_library(), name)(*arguments)
    if status:
        raise _refused(name, status)


def _refused(name: str, status: int) -> DriverError:
    text = ctypes.c_char_p()
    _library().cuGetErrorName(status, ctypes.byref(text))
    return DriverError(f"{name}: {(text.value or b'error').decode()} ({status})")


# A number if torch exposes it (as Triton's launcher does), else through an object of torch.cuda.
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def _stream(device: int) -> int:
    return torch.cuda.current_stream(device).cuda_stream if _raw_stream is None else _raw_stream(device)


@functools.cache
def primary_context(device: int) -> int:
    """Return the context that torch uses on a device, kept until the process ends."""
    number, context = _i(), _p()
    _call("cuDeviceGet", ctypes.byref(number), device)
    _call("cuDevicePrimaryCtxRetain", ctypes.byref(context), number)
    assert context.value
    return context.value


@contextlib.contextmanager
def _current(context: int) -> Iterator[None]:
    _call("cuCtxPushCurrent_v2", context)
    try:
        yield
    finally:
        _call("cuCtxPopCurrent_v2", ctypes.byref(_p()))


def load_function(context: int, binary: bytes, entry: str) -> int:
    """Load a binary, which stays loaded, and return the handle of one of its kernels.

    Raises BinaryRefused if the driver does not take it.
    """
    module, function = _p(), _p()
    with _current(context):
        try:
            _call("cuModuleLoadData", ctypes.byref(module), binary)
            _call("cuModuleGetFunction", ctypes.byref(function), module, entry.encode())
        except DriverError as error:
            remedy = "A newer driver, or `finetune doctor --clean`, may help."
            cause = f"the driver does not take the binary of {entry}: {error}"
            raise BinaryRefused(cause, remedy) from error
    assert function.value
    return function.value


def allow_shared_bytes(context: int, function: int, shared_bytes: int) -> None:
    """Allow launches of a kernel to use that much shared memory; a smaller value later has no effect."""
    if shared_bytes <= max(_FREE_SHARED_BYTES, _allowed.get(function, 0)):
        return
    with _current(context):
        _call("cuFuncSetAttribute", function, _MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes)
    _allowed[function] = shared_bytes


_allowed: dict[int, int] = {}  # function -> bytes


def launch(
    context: int,
    function: int,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    shared_bytes: int,
    device: int,
    argument: ctypes.Structure,
) -> None:
    """Launch a kernel that takes one struct by value, on torch's current stream of the device."""
    library = _library()
    current = _p()
    library.cuCtxGetCurrent(ctypes.byref(current))
    arguments = _p(ctypes.addressof(argument))
    call = (function, *grid, *block, shared_bytes, _stream(device), ctypes.addressof(arguments), None)
    if not current.value:  # a thread that is new to CUDA; what runs here next expects a context, too
        _call("cuCtxSetCurrent", context)
    if current.value in (None, context):
        status = library.cuLaunchKernel(*call)
    else:
        with _current(context):
            status = library.cuLaunchKernel(*call)
    if status:
        raise _refused("cuLaunchKernel", status)
