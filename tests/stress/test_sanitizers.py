"""The CPU kernels, and the CUDA kernels in the emulator, under the sanitizers of the C++ compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.stress
ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "torch_utils" / "ops" / "native"
DRIVER = Path(__file__).with_name("sanitize_driver.cpp")
CXX = os.environ.get("CXX", "c++")
ROUNDS = os.environ.get("STRESS_ROUNDS", "100")
# Optimized, or the vectors would not be those of the library; a finding must end the run to be seen.
FLAGS = (
    "-std=c++17 -O1 -g -march=native -ffp-contract=fast -fno-math-errno -fno-trapping-math -Wall -Wextra "
    "-Wno-psabi -fno-omit-frame-pointer -fno-sanitize-recover=all -pthread"
).split()


def require(sanitizer: str, folder: Path) -> None:
    """Skip where the compiler or the library of a sanitizer is missing."""
    if shutil.which(CXX) is None:
        pytest.skip(f"needs a C++ compiler ({CXX} is not found)")
    (folder / "empty.cpp").write_text("int main() { return 0; }")
    words = [CXX, f"-fsanitize={sanitizer}", folder / "empty.cpp", "-o", folder / "empty"]
    if subprocess.run(words, capture_output=True).returncode:
        pytest.skip(f"{CXX} has no {sanitizer} sanitizer")


@pytest.mark.parametrize("sanitizer", ["address", "undefined", "thread"])
def test_sanitizers_cpu_kernels(sanitizer, tmp_path):
    require(sanitizer, tmp_path)
    sources = [DRIVER, *sorted(SOURCES.glob("*.cpp")), *sorted(SOURCES.glob("*/*.cpp"))]
    program = tmp_path / "driver"
    words = [CXX, *FLAGS, f"-fsanitize={sanitizer}", f"-I{SOURCES}", *sources, "-o", program]
    subprocess.run(words, check=True)
    settings = {"ASAN_OPTIONS": "detect_stack_use_after_return=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
    done = subprocess.run([program, ROUNDS], env=settings | os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]


def test_sanitizers_emulated_cuda_kernels(tmp_path):
    """Reads and writes beyond a tensor or beyond shared memory end the run."""
    require("address,undefined", tmp_path)
    library = subprocess.check_output(["g++", "-print-file-name=libasan.so"], text=True).strip()
    settings = {
        "LD_PRELOAD": library,
        # Python and torch keep memory until the end. The coroutines of the emulator have stacks of their own.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "SG_EMULATOR_FLAGS": "-g -fsanitize=address,undefined -fno-sanitize-recover=undefined",
    }
    words = [sys.executable, "-m", "pytest", "-n0", "-s", "-p", "no:faulthandler", "-m", "slow or not slow"]
    # The last of them raises in a backward pass; this sanitizer aborts where torch throws.
    words += ["-k", "not nvcc and not nvrtc and not trial and not ahead and not refuses"]
    files = ("test_cuda_emulated.py", "test_fma.py", "test_unit_distance.py")
    words += [f"tests/torch_utils/{file}" for file in files]
    done = subprocess.run(words, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
