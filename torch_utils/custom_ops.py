"""Access to the native kernels: load the CPU library or a CUDA binary, and report what is available."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch_utils.ops.native.building import NativeUnavailable as NativeUnavailable

if TYPE_CHECKING:
    from torch_utils.ops.native.plan import LaunchPlan

_lock = threading.RLock()
_library: ctypes.CDLL | NativeUnavailable | None = None


def cpu_library() -> ctypes.CDLL:
    """Return the CPU library, built or found in the cache and loaded, once per process.

    Raises NativeUnavailable with cause and remedy, the same one on every call.
    """
    global _library
    with _lock:
        if _library is None:
            try:
                with _os_errors_explained():
                    _library = _load_library()
            except NativeUnavailable as error:
                _library = error
        if isinstance(_library, NativeUnavailable):
            raise _library
        return _library


@contextlib.contextmanager
def _os_errors_explained() -> Iterator[None]:
    """Turn an OSError of a build, as without space for temporary files, into NativeUnavailable."""
    try:
        yield
    except OSError as error:
        raise NativeUnavailable(
            f"the kernels cannot be built: {error}", "Free some space, or set TMPDIR."
        ) from error


BUILD = "from torch_utils.ops.native.building import cpu_build; cpu_build.build()"


def build_for_next_start() -> bool:
    """Do without the CPU library in this process, and build it in a detached one; return whether that is so.

    Not if it is built or loaded already, and not if it could not be kept or there is no compiler: then
    `cpu_library` raises the reason.
    """
    from torch_utils.ops.native.building import cache, cpu_build

    global _library
    with _lock:
        try:
            if _library is not None or cpu_build.compiler_of_last_time() is None or cpu_build.find():
                return False
        except OSError:
            return False
        if not os.access(cache.ops_folder(), os.W_OK):  # which the look for a compiler has made
            return False
        _library = NativeUnavailable("the kernels are being built in the background, for the next start")
    _start_detached([sys.executable, "-P", "-c", BUILD])
    return True


NOT_BUILT = "not built yet"


@contextlib.contextmanager
def without_build() -> Iterator[None]:
    """Let `cpu_library` raise NativeUnavailable inside the block where it would build."""
    from torch_utils.ops.native.building import cache, compilers, cpu_build

    global _library
    with _lock:
        before = _library
        try:
            # An empty cache stays empty: to look for a build would store which compiler is used.
            if before is None and (not cache.size(cache.ops_folder())[0] or cpu_build.find() is None):
                compilers.cxx()
                _library = NativeUnavailable(NOT_BUILT, "To build now: finetune doctor --build")
        except (NativeUnavailable, OSError):
            pass  # `cpu_library` raises the reason
        try:
            yield
        finally:
            if before is None and isinstance(_library, NativeUnavailable):
                _library = None


def _start_detached(command: list[str]) -> None:
    # -P: without the current folder, which may have another torch_utils.
    paths = os.pathsep.join([str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")])
    subprocess.Popen(
        command,
        env=os.environ | {"PYTHONPATH": paths.rstrip(os.pathsep)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # it continues when this process or its terminal ends
    )


def _load_library() -> ctypes.CDLL:
    from torch_utils.ops.native import params
    from torch_utils.ops.native.building import cpu_build

    path = cpu_build.build()
    try:
        library = ctypes.CDLL(str(path))
        library.sg_build_info.restype = ctypes.c_char_p
        library.sg_struct_bytes.restype = ctypes.c_int
        theirs = [library.sg_struct_bytes(op) for op in range(3)]
    except (OSError, AttributeError) as error:
        raise NativeUnavailable(f"{path} cannot be loaded ({error})", CLEAN) from None
    ours = [ctypes.sizeof(struct) for struct in (params.BiasAct, params.Upfirdn2d, params.FilteredLrelu)]
    if theirs != ours:
        raise NativeUnavailable(f"{path} takes structs of {theirs} bytes, not {ours}", CLEAN)
    return library


CLEAN = "Empty the cache with: finetune doctor --clean"


def cpu_library_info() -> str:
    """Return compiler and instruction set of the CPU library. Raises NativeUnavailable."""
    return cpu_library().sg_build_info().decode()


@functools.cache
def _cubin(plan: LaunchPlan, capability: tuple[int, int]) -> bytes | NativeUnavailable:
    from torch_utils.ops.native.building import cuda_build

    if (found := cuda_build.find(plan, capability)) is not None:
        return found
    try:
        with _os_errors_explained():
            return cuda_build.nvrtc(plan, capability)
    except NativeUnavailable as first:
        try:
            with _os_errors_explained():
                return cuda_build.nvcc([plan], capability)[0]
        except NativeUnavailable as second:
            return NativeUnavailable(f"{first.cause}; {second.cause}", first.remedy)


def cubin(plan: LaunchPlan, capability: tuple[int, int]) -> bytes:
    """Return the CUDA binary of one specialization for devices of `capability`, from the cache or made now.

    NVRTC makes it, or nvcc if there is no NVRTC. Raises NativeUnavailable with the compilers' messages.
    """
    found = _cubin(plan.specialization(), capability)
    if isinstance(found, NativeUnavailable):
        raise found
    return found


def recompiled(plan: LaunchPlan, capability: tuple[int, int]) -> bytes:
    """Return a binary by NVRTC in place of one that the driver refuses. Raises NativeUnavailable."""
    from torch_utils.ops.native.building import cuda_build

    with _os_errors_explained():
        return cuda_build.nvrtc(plan.specialization(), capability, replace=True)


def build_cuda(plans: Sequence[LaunchPlan], capability: tuple[int, int]) -> str:
    """Build many specializations ahead of time, by nvcc if it works; return who made them, nvcc or nvrtc.

    Raises NativeUnavailable.
    """
    from torch_utils.ops.native.building import cuda_build

    try:
        cuda_build.nvcc(plans, capability)
        return "nvcc"
    except NativeUnavailable:
        cuda_build.nvrtc_many(plans, capability)
        return "nvrtc"


def have_cuda_kernels() -> None:
    """Raise NativeUnavailable if the ops have no CUDA kernels that could be built here."""
    from torch_utils.ops.native.building import compilers, cuda_build

    try:
        cuda_build.nvrtc_version()
    except NativeUnavailable as first:
        try:
            with _os_errors_explained():
                compilers.nvcc()
        except NativeUnavailable as second:
            raise NativeUnavailable(f"{first.cause}; {second.cause}", first.remedy) from None


def explain() -> dict[str, Any]:
    """Return, in plain values, what is needed to find out why the ops do not run as expected."""
    from torch_utils.ops.native.building import compilers, cpu_build, cuda_build

    def result_of(find: Any) -> dict[str, Any]:
        try:
            with _os_errors_explained():
                found = find()
            return {"works": True, **(found if isinstance(found, dict) else {"version": str(found)})}
        except NativeUnavailable as error:
            return {"works": False, "cause": error.cause, "remedy": error.remedy}

    return {
        "cxx": result_of(lambda: compilers.cxx()._asdict()),
        "nvcc": result_of(lambda: compilers.nvcc()._asdict()),
        "nvrtc": result_of(cuda_build.nvrtc_version),
        "ninja": cpu_build.find_ninja() or "",
        "cpu_library": result_of(cpu_library_info),
    }
