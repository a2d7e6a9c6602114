"""Find working compilers by compiling three lines of code."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from . import NativeUnavailable

CXX_NAMES = ("c++", "g++", "clang++")
STANDARD = "-std=c++17"
TRIAL_CXX = """#include <cmath>
namespace trial::cpp17 {}
extern "C" double sg_trial(double a) { return std::sqrt(a); }
"""
TRIAL_CUDA = 'extern "C" __global__ void sg_trial(float* x) {\n    x[threadIdx.x] += 1.0f;\n}\n'
TIME_OUT = 120  # seconds for a trial; a compiler that hangs is one that does not work

NO_CXX = "Install one (Debian, Ubuntu: apt install g++; conda: conda install cxx-compiler) or set CXX."
NO_NVCC = "Nothing is lost: NVRTC, which torch for CUDA brings along, builds the same kernels."


class Compiler(NamedTuple):
    """A compiler that works on this machine."""

    path: str
    version: str


@functools.cache
def cxx() -> Compiler:
    """Return the first C++ compiler that works: $CXX, else c++, g++, clang++ of the PATH.

    Raises NativeUnavailable with the error of each.
    """
    chosen = os.environ.get("CXX", "").strip()
    names = (chosen,) if chosen else CXX_NAMES
    library = "trial.dll" if sys.platform == "win32" else "trial.so"
    options = [STANDARD, "-shared", "-fPIC", "-o", library]
    return _first(names, "C++ compiler", "trial.cpp", TRIAL_CXX, options, library, NO_CXX)


@functools.cache
def nvcc() -> Compiler:
    """Return the first nvcc that works: $CUDACXX, that of $CUDA_HOME, of the PATH, of /usr/local/cuda.

    Raises NativeUnavailable with the error of each.
    """
    names = [os.environ.get("CUDACXX", "").strip()]
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable, "").strip():
            names.append(str(Path(home) / "bin" / "nvcc"))
    names += ["nvcc", "/usr/local/cuda/bin/nvcc"]
    options = ["-cubin", "-o", "trial.cubin"]
    return _first(tuple(filter(None, names)), "nvcc", "trial.cu", TRIAL_CUDA, options, "trial.cubin", NO_NVCC)


def _first(
    names: tuple[str, ...], kind: str, source: str, text: str, options: list[str], made: str, remedy: str
) -> Compiler:
    failures = []
    for name in names:
        path = shutil.which(name)
        if path is None:
            failures.append(f"{name}: not found")
            continue
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / source).write_text(text)
            error = run([path, source, *options], folder)
            if error is None and (Path(folder) / made).is_file() and (Path(folder) / made).stat().st_size:
                return Compiler(path, _version(path, folder))
        failures.append(f"{path} cannot compile three lines: {error or 'no message and no output file'}")
    raise NativeUnavailable(f"no {kind} that works ({'; '.join(failures)})", remedy)


def run(command: list[str], folder: str | Path, time_out: float = TIME_OUT) -> str | None:
    """Run a compiler; return None, or the most informative line of the error."""
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=time_out,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return None if done.returncode == 0 else first_error(done.stdout + "\n" + done.stderr, done.returncode)


def first_error(output: str, code: int) -> str:
    """Return the first line that mentions an error, else the last, else the exit code."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "error:" in line] or [
        line for line in lines if "error" in line.lower()
    ]
    return (errors or lines[-1:] or [f"exit code {code}"])[0][:400]


def _version(path: str, folder: str) -> str:
    try:
        done = subprocess.run(
            [path, "--version"],
            cwd=folder,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIME_OUT,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown version"
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    # nvcc names itself in its first line and its version in the fourth.
    return next((line for line in lines if "release" in line), lines[0] if lines else "unknown version")
