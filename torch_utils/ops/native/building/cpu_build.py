"""Build the CPU library from all C++ files of the ops, with ninja and the first working compiler."""

from __future__ import annotations

import functools
import logging
import os
import platform
import shlex
import shutil
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from . import NativeUnavailable, cache, compilers

SOURCES = Path(__file__).resolve().parents[1]
NAME = "libsg_ops.dll" if sys.platform == "win32" else "libsg_ops.so"
FLAGS = (
    *(compilers.STANDARD, "-O3", "-fPIC", "-fvisibility=hidden"),
    # Sums may become fused products and sums; nothing else that changes results is allowed.
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
)
TIME_OUT = 600.0  # seconds

log = logging.getLogger("torch_utils.ops")


def build(sources: Path = SOURCES) -> Path:
    """Return the library, cached or built now. Raises NativeUnavailable with the compiler's output."""
    if found := find(sources):
        return found
    compiler = compilers.cxx()
    key = _key(_texts(sources), compiler)
    if found := cache.find(key, NAME):
        return found
    with cache.build_lock(key):
        if found := cache.find(key, NAME):  # by the process that held the lock
            return found
        log.info("Building the CPU ops with %s, once …", compiler.version)
        started = time.perf_counter()
        path = cache.publish(key, NAME, _compile(sources, compiler))
        log.info("Built the CPU ops with %s in %.1f s.", compiler.version, time.perf_counter() - started)
        return path


def find(sources: Path = SOURCES) -> Path | None:
    """Return the library, if the compiler of this machine built it before."""
    compiler = compiler_of_last_time()
    return None if compiler is None else cache.find(_key(_texts(sources), compiler), NAME)


def _texts(sources: Path) -> dict[str, bytes]:
    return {path.relative_to(sources).as_posix(): path.read_bytes() for path in _files(sources)}


def _files(sources: Path) -> list[Path]:
    return sorted(path for path in sources.rglob("*") if path.suffix in (".cpp", ".h"))


def _key(texts: dict[str, bytes], compiler: compilers.Compiler) -> str:
    parts: list[str | bytes] = ["cpu", *FLAGS, compiler.path, compiler.version, machine()]
    for name, text in texts.items():
        parts += [name, text]
    return cache.key_of(parts)


def compiler_of_last_time() -> compilers.Compiler | None:
    """Return the compiler of $CXX or the PATH as of its last success, which is faster than to try it.

    A compiler is identified by its path, its size and the time it was changed.
    """
    names = (os.environ.get("CXX", "").strip(),) if os.environ.get("CXX", "").strip() else compilers.CXX_NAMES
    path = next((found for name in names if (found := shutil.which(name))), None)
    if path is None:
        return None
    note = cache.find(_note_key(path), "compiler.txt")
    if note is None:
        try:
            compiler = compilers.cxx()
        except NativeUnavailable:
            return None
        cache.publish(_note_key(path), "compiler.txt", f"{compiler.path}\n{compiler.version}".encode())
        return compiler
    found, _, version = note.read_text().partition("\n")
    return compilers.Compiler(found, version)


def _note_key(path: str) -> str:
    real = os.stat(path)
    trial = compilers.TRIAL_CXX  # which the compiler has passed
    parts = ["compiler", trial, path, os.path.realpath(path), str(real.st_size), str(real.st_mtime_ns)]
    return cache.key_of(parts)


@functools.cache
def machine() -> str:
    """Return what -march=native depends on: the processor's name and instruction sets."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text(errors="replace").splitlines()
        wanted = ("model name", "flags", "Features", "CPU part")
        return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
    return " ".join((platform.machine(), platform.processor(), platform.platform()))


def _compile(sources: Path, compiler: compilers.Compiler) -> bytes:
    """Build in a folder of its own; a compiler that does not support -march=native is called without it."""
    failures = []
    for architecture in (["-march=native"], ["-mcpu=native"], []):
        with tempfile.TemporaryDirectory(prefix="stylegan-finetune-build-") as folder:
            made = Path(folder) / NAME
            error = _run(Path(folder), sources, compiler, [*FLAGS, *architecture])
            if error is None and made.is_file():
                return made.read_bytes()
            failures.append(error or "no message and no output file")
            # Not just native: the paths of the sources contain it.
            if not any(word in failures[-1] for word in ("-march", "-mcpu", "'native'")):
                break
    raise NativeUnavailable(
        f"{compiler.path} ({compiler.version}) cannot compile the CPU ops: {failures[0]}",
        "Another compiler is chosen with CXX=…; please report this.",
    )


def _run(folder: Path, sources: Path, compiler: compilers.Compiler, flags: list[str]) -> str | None:
    files = [path for path in _files(sources) if path.suffix == ".cpp"]
    ninja = find_ninja()
    if ninja is None:
        return compilers.run(
            [compiler.path, *flags, "-shared", *map(str, files), "-o", NAME, "-pthread"], folder, TIME_OUT
        )
    (folder / "build.ninja").write_text(ninja_file(compiler.path, flags, files))
    return compilers.run([ninja], folder, TIME_OUT)


def ninja_file(compiler: str, flags: list[str], files: list[Path]) -> str:
    """Return the build file for ninja: one object per file, one library."""
    objects = [f"{number}_{path.stem}.o" for number, path in enumerate(files)]
    if os.name == "posix":  # where ninja calls a shell
        compiler = shlex.quote(compiler)
    lines = [
        f"cxx = {_escaped(compiler)}",
        f"flags = {' '.join(flags)}",
        "rule compile",
        "  command = $cxx $flags -c $in -o $out",
        "rule link",
        "  command = $cxx $flags -shared $in -o $out -pthread",
        *(f"build {made}: compile {_escaped(str(path))}" for made, path in zip(objects, files)),
        f"build {NAME}: link {' '.join(objects)}",
        f"default {NAME}",
    ]
    return "\n".join(lines) + "\n"


def _escaped(path: str) -> str:
    return path.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def find_ninja() -> str | None:
    """Return the ninja of the package of that name, or of the PATH."""
    beside = Path(sysconfig.get_path("scripts")) / ("ninja.exe" if sys.platform == "win32" else "ninja")
    return str(beside) if beside.is_file() else shutil.which("ninja")
