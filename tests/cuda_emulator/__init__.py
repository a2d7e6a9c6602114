"""CUDA kernels on a CPU: the same source and macros, compiled by g++, run block by block."""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

from torch_utils.ops.native import cuda, library, params
from torch_utils.ops.native.building.cpu_build import SOURCES
from torch_utils.ops.native.plan import LaunchPlan

HERE = Path(__file__).parent
PARAMS = {
    "bias_act": ("sg_bias_act_params", params.BiasAct),
    "fma": ("sg_fma_params", params.Fma),
    "unit_distance": ("sg_unit_distance_params", params.UnitDistance),
    "upfirdn2d": ("sg_upfirdn2d_params", params.Upfirdn2d),
    "filtered_lrelu": ("sg_filtered_lrelu_params", params.FilteredLrelu),
}


FLAGS = ["-std=c++17", "-O1", "-w", "-fPIC", "-DSG_EMULATED"]
FLAGS += os.environ.get("SG_EMULATOR_FLAGS", "").split()  # tests/stress/test_sanitizers.py


@functools.cache
def _flags() -> list[str]:
    """Return the options of g++; from version 12 on, variables begin as NaN."""
    version = subprocess.run(["g++", "-dumpversion"], capture_output=True, text=True, check=True).stdout
    return [*FLAGS, "-ftrivial-auto-var-init=pattern"] if int(version.split(".")[0]) >= 12 else FLAGS


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    """Return a folder for the programs, with the emulator as a precompiled header."""
    folder = tempfile.TemporaryDirectory()
    header = shutil.copy(HERE / "emulator.h", folder.name)
    subprocess.run(["g++", *_flags(), "-x", "c++-header", header, "-o", f"{header}.gch"], check=True)
    return folder


@functools.cache
def _compiled(plan: LaunchPlan) -> Any:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("the emulator of CUDA is compiled with g++")
    name = f"{plan.op}_{abs(hash(plan))}"
    folder = Path(_folder().name)
    struct = PARAMS[plan.op][0]
    source = folder / f"{name}.cpp"
    source.write_text(f'#include "{SOURCES / plan.source}"\nSG_EMULATE({plan.entry}, {struct})\n')
    macros = [f"-D{key}={value}" for key, value in plan.defines]
    command = [compiler, *_flags(), "-shared", *macros, "-include", str(folder / "emulator.h")]
    command += ["-I", str(SOURCES), "-I", str(folder), str(source), "-o", str(folder / f"{name}.so")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:3000]
    library = ctypes.CDLL(str(folder / f"{name}.so"))
    library.sg_emulate.restype = ctypes.c_char_p
    return library


def run(op: str, x, pointers: dict[str, int], numbers: tuple, with_sums: bool = False):
    """What `cuda._run` does, without a GPU."""
    p = cuda._MAKE[op](*numbers)
    for name, pointer in pointers.items():
        setattr(p, name, pointer)
    plan = importlib.import_module(f"torch_utils.ops.native.{op}.plan").plan(p, CAPABILITY)
    plans.append(plan)
    sums = None
    if with_sums:
        sums = cuda.empty_sums(plan.grid[:1], x)
        p.sums = sums.data_ptr()
    library = _compiled(plan.specialization())
    grid, block = (ctypes.c_uint * 3)(*plan.grid), (ctypes.c_uint * 3)(*plan.block)
    error = library.sg_emulate(ctypes.byref(p), grid, block, plan.shared_bytes)
    assert error is None, error.decode()
    return sums


CAPABILITY = (9, 0)
plans: list[LaunchPlan] = []  # of all calls so far


@pytest.fixture
def emulated(monkeypatch):
    """`torch_utils.ops.native.cuda` works on CPU tensors; gives the plans of its calls."""
    monkeypatch.setattr(cuda, "_run", run)
    plans.clear()
    return plans


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """Where the CUDA kernels run; "cpu" is the emulator."""
    if request.param == "cpu":
        request.getfixturevalue("emulated")
        monkeypatch.setattr(library, "kernels", lambda x: cuda)
    return request.param
