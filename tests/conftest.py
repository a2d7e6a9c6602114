"""Shared fixtures: golden data, fixed seeds, one thread a process, and the `gpu` marker."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
# torch reads it at the first matrix product on a GPU, which comes before the tests of `--deterministic`.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))  # so that tests can say `from tolerances import …`

GOLDEN = Path(__file__).parent / "golden"
STARTED = time.monotonic()
SLOW_MINUTES = float(os.environ.get("SLOW_MINUTES", "inf"))  # .ci/run sets it
RECTANGLE = "stylegan2-ada-32x16"  # its golden file has shapes alone, and numbers of float16 layers
GOLDEN_NETWORKS = sorted(path.stem for path in GOLDEN.glob("stylegan*.pkl") if path.stem != RECTANGLE)


def pytest_collection_modifyitems(config, items):
    """Skip tests marked `gpu` where torch sees no CUDA device; put the longest slow file last."""
    if SLOW_MINUTES < float("inf"):  # each of its 200 cases is a program to compile
        items.sort(key=lambda item: item.path.name == "test_cuda_emulated.py")
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_runtest_setup(item):
    """Skip slow tests that would start too late for the time limit of CI."""
    if item.get_closest_marker("slow") and time.monotonic() - STARTED > 60 * SLOW_MINUTES:
        pytest.skip(f"not started within {SLOW_MINUTES:g} minutes (SLOW_MINUTES)")


@pytest.fixture(autouse=True)
def fixed_seeds():
    """Every test starts from the same random state."""
    np.random.seed(0)
    if "torch" in sys.modules:
        import torch

        torch.manual_seed(0)
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def float32_on_cuda(request):
    """Tests on a GPU compute float32 in float32, as training and generating do; torch's default is TF32."""
    if not request.node.get_closest_marker("gpu"):
        yield
        return
    from finetune.device import float32_math

    with float32_math():
        yield


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    return GOLDEN


@pytest.fixture(scope="session")
def golden_ops():
    """The op cases and their arrays: (list of cases, name -> array)."""
    cases = json.loads((GOLDEN / "ops.json").read_text())
    with np.load(GOLDEN / "ops.npz") as archive:
        return cases, {key: archive[key] for key in archive.files}


@pytest.fixture(scope="session")
def golden_network():
    """Call with a name of GOLDEN_NETWORKS: (constructor arguments and hashes, name -> array), read once."""
    cache: dict[str, tuple[dict, dict]] = {}

    def read(name: str):
        if name not in cache:
            with np.load(GOLDEN / f"{name}.npz") as archive:
                arrays = {key: archive[key] for key in archive.files}
            cache[name] = (json.loads((GOLDEN / f"{name}.json").read_text()), arrays)
        return cache[name]

    return read


@pytest.fixture(scope="session")
def browser():
    """benchmarks/browser.py; skips where Chromium is missing."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    module = importlib.import_module("browser")
    sys.path.remove(str(Path(__file__).parents[1] / "benchmarks"))
    if reason := module.missing():
        pytest.skip(reason)
    return module


@pytest.fixture
def reference_ops():
    """Plain torch computes the ops of this test."""
    from torch_utils.ops import impl

    impl.set_default_impl("ref")
    yield
    impl.set_default_impl(None)
