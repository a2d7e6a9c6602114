"""Build CUDA binaries, one per specialization, with NVRTC or nvcc from the same sources and macros."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import shlex
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch_utils.ops.native.plan import LaunchPlan

from . import NativeUnavailable, cache, compilers
from .cpu_build import SOURCES, _escaped, find_ninja

NAME = "kernel.cubin"
OPTIONS = (compilers.STANDARD,)
TIME_OUT = 900.0  # seconds

log = logging.getLogger("torch_utils.ops")


def find(plan: LaunchPlan, capability: tuple[int, int], sources: Path = SOURCES) -> bytes | None:
    """Return the binary from the cache, by whichever compiler."""
    for maker in ("nvrtc", "nvcc"):
        if path := cache.find(key(plan, capability, maker, sources), NAME):
            return path.read_bytes()
    return None


def key(plan: LaunchPlan, capability: tuple[int, int], maker: str, sources: Path = SOURCES) -> str:
    """Return the key of a specialization: everything the compiler reads."""
    sources_hash = _own_texts() if sources == SOURCES else _texts(sources)
    return cache.key_of([maker, *OPTIONS, *_macros(plan), _arch(capability), plan.source, sources_hash])


def nvrtc(
    plan: LaunchPlan, capability: tuple[int, int], sources: Path = SOURCES, *, replace: bool = False
) -> bytes:
    """Compile one specialization with NVRTC, which needs no toolkit and no compiler on the machine.

    `replace` replaces what the cache has for it. Raises NativeUnavailable: cuda-core or NVRTC is missing, or
    the error of the compiler.
    """
    program, program_options = _cuda_core()
    options = program_options(
        name=plan.source,
        arch=_arch(_nearest(capability)),
        std="c++17",
        define_macro=[(name, str(value)) for name, value in plan.defines],
        include_path=[str(sources), str((sources / plan.source).parent)],
    )
    text = (sources / plan.source).read_text(encoding="utf-8")
    try:
        code = program(text, "c++", options).compile("cubin").code
    except Exception as error:
        cause = compilers.first_error(str(error), 1)
        raise NativeUnavailable(
            f"NVRTC cannot compile {plan.source} for {_arch(capability)}: {cause}", "Please report this."
        ) from None
    with contextlib.suppress(OSError):  # no space: it is compiled again at the next start
        cache.publish(key(plan, capability, "nvrtc", sources), NAME, bytes(code), replace=replace)
    return bytes(code)


def _nearest(capability: tuple[int, int]) -> tuple[int, int]:
    """Return the compute capability to compile for.

    For a GPU newer than NVRTC, it is the highest one of the same major version below it: such binaries run.
    """
    try:
        from cuda.bindings import nvrtc as bindings

        supported = [divmod(number, 10) for number in bindings.nvrtcGetSupportedArchs()[1]]
    except Exception:  # NVRTC reports what it does not support
        supported = []
    older = [each for each in supported if each[0] == capability[0] and each <= capability]
    return max(older, default=capability)


def nvcc(plans: Sequence[LaunchPlan], capability: tuple[int, int], sources: Path = SOURCES) -> list[bytes]:
    """Compile many specializations at once with nvcc, driven by ninja; what it has made before is taken.

    Raises NativeUnavailable likewise.
    """
    compiler = compilers.nvcc()
    plans = [plan.specialization() for plan in plans]
    keys = {plan: key(plan, capability, "nvcc", sources) for plan in plans}
    found = {plan: cache.find(keys[plan], NAME) for plan in keys}
    if None in found.values():
        with cache.build_lock("nvcc"):  # whose holder may have made some of them
            missing = [plan for plan in keys if cache.find(keys[plan], NAME) is None]
            for plan, binary in zip(missing, _make_with_nvcc(missing, capability, compiler, sources)):
                cache.publish(keys[plan], NAME, binary)
        found = {plan: cache.find(keys[plan], NAME) for plan in keys}
    return [path.read_bytes() for plan in plans if (path := found[plan])]


def _make_with_nvcc(
    plans: list[LaunchPlan], capability: tuple[int, int], compiler: compilers.Compiler, sources: Path
) -> list[bytes]:
    with tempfile.TemporaryDirectory(prefix="stylegan-finetune-build-") as folder:
        error = _run_nvcc(Path(folder), plans, capability, compiler, sources) if plans else None
        if error is not None:
            cause = f"{compiler.path} ({compiler.version}) cannot compile the CUDA ops: {error}"
            raise NativeUnavailable(cause, compilers.NO_NVCC)
        return [(Path(folder) / f"{number}.cubin").read_bytes() for number in range(len(plans))]


def nvrtc_many(
    plans: Sequence[LaunchPlan], capability: tuple[int, int], sources: Path = SOURCES
) -> list[bytes]:
    """Compile many specializations side by side, those that are in the cache excepted.

    NVRTC releases the GIL while it compiles. Raises NativeUnavailable.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda p: find(p, capability, sources) or nvrtc(p, capability, sources), plans))


def _run_nvcc(
    folder: Path,
    plans: list[LaunchPlan],
    capability: tuple[int, int],
    compiler: compilers.Compiler,
    sources: Path,
) -> str | None:
    common = [*OPTIONS, "-cubin", f"-arch={_arch(capability)}", "-I", str(sources)]
    commands = [
        [compiler.path, *common, *_macros(plan), str(sources / plan.source), "-o", f"{number}.cubin"]
        for number, plan in enumerate(plans)
    ]
    ninja = find_ninja()
    if ninja is None:
        errors = (compilers.run(command, folder, TIME_OUT) for command in commands)
        return next((error for error in errors if error is not None), None)
    lines = ["rule nvcc", "  command = $line"]
    for number, command in enumerate(commands):
        lines += [
            f"build {number}.cubin: nvcc {_escaped(command[-3])}",
            f"  line = {shlex.join(command).replace('$', '$$')}",
        ]
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    return compilers.run([ninja], folder, TIME_OUT)


def _macros(plan: LaunchPlan) -> list[str]:
    return [f"-D{name}={value}" for name, value in plan.defines]


def _arch(capability: tuple[int, int]) -> str:
    return f"sm_{capability[0]}{capability[1]}"


def _texts(sources: Path) -> str:
    """Return a hash of all that a kernel may include."""
    files = sorted(path for path in sources.rglob("*") if path.suffix in (".cu", ".cuh", ".h"))
    parts = ([path.relative_to(sources).as_posix(), path.read_bytes()] for path in files)
    return cache.key_of(part for pair in parts for part in pair)


@functools.cache
def _own_texts() -> str:
    """Return the hash of our own sources, read once: a network needs dozens of kernels."""
    return _texts(SOURCES)


@functools.cache
def _cuda_core() -> tuple[Any, Any]:
    """Return the two classes of cuda-core that compile. Raises NativeUnavailable without them or NVRTC."""
    import torch

    extra = f"[cu{torch.version.cuda.partition('.')[0]}]" if torch.version.cuda else ""
    remedy = f"Install it: pip install 'cuda-core{extra}'"
    try:
        try:
            from cuda.core import Program, ProgramOptions
        except ImportError:
            from cuda.core.experimental import Program, ProgramOptions  # type: ignore[no-redef]
    except ImportError as error:
        raise NativeUnavailable(f"cuda-core cannot be imported ({error})", remedy) from None
    return Program, ProgramOptions


@functools.cache
def nvrtc_version() -> str:
    """Compile three lines with NVRTC and return its version. Raises NativeUnavailable if that fails."""
    program, options = _cuda_core()
    try:
        program(compilers.TRIAL_CUDA, "c++", options(arch="sm_80")).compile("cubin")
    except Exception as error:
        raise NativeUnavailable(
            f"NVRTC does not work: {compilers.first_error(str(error), 1)}",
            "torch for CUDA brings it along; torch for CPUs does not.",
        ) from None
    try:
        from cuda.bindings import nvrtc as bindings

        _, major, minor = bindings.nvrtcVersion()
        return f"{major}.{minor}"
    except Exception:
        return "of unknown version"
