"""Threads of the CPU kernels: results do not depend on them, callers share them, forks do not lose them."""

from __future__ import annotations

import concurrent.futures
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from torch_utils import custom_ops
from torch_utils.ops.bias_act import bias_act
from torch_utils.ops.filtered_lrelu import filtered_lrelu
from torch_utils.ops.native import cpu
from torch_utils.ops.upfirdn2d import setup_filter, upfirdn2d

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(params=["OpenMP", "own"])
def threads(request):
    """The threads of torch's OpenMP, then those that the library starts itself."""
    cpu._functions()
    library, number = custom_ops.cpu_library(), torch.get_num_threads()
    runner = cpu._torch_parallel()
    if request.param == "OpenMP" and runner is None:
        pytest.skip("this torch brings no OpenMP of GNU's")
    library.sg_set_parallel_runner(cpu.ctypes.c_void_p(runner if request.param == "OpenMP" else None))
    yield
    library.sg_set_parallel_runner(cpu.ctypes.c_void_p(runner))
    torch.set_num_threads(number)


def everything(seed=0):
    """Outputs and gradients of every op, of sizes that are more than one task."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 5, 67, 61, generator=generator, requires_grad=True)
    b = torch.randn(5, generator=generator, requires_grad=True)
    f = setup_filter([1, 3, 3, 1])
    results = []
    for y in (
        upfirdn2d(x, f, up=2, padding=2, impl="cpu"),
        upfirdn2d(x, f, down=2, padding=1, impl="cpu"),
        bias_act(x, b, act="lrelu", clamp=1, impl="cpu"),
        bias_act(x.to(memory_format=torch.channels_last), b, act="tanh", impl="cpu"),
        filtered_lrelu(x, setup_filter([1.0] * 12), setup_filter([1.0] * 12), b, 2, 2, 10, impl="cpu"),
    ):
        gradients = torch.autograd.grad(y.square().sum(), [x, b], allow_unused=True)
        results += [y.detach(), *(g for g in gradients if g is not None)]
    return results


def test_native_results_do_not_depend_on_the_number_of_threads(threads):
    torch.set_num_threads(1)
    alone = everything()
    for number in (2, 3, 8):
        torch.set_num_threads(number)
        for one, many in zip(alone, everything(), strict=True):
            assert torch.equal(one, many)


def test_native_many_threads_of_python_may_call_at_once(threads):
    torch.set_num_threads(3)
    expected = [everything(seed) for seed in range(4)]
    with concurrent.futures.ThreadPoolExecutor(4) as callers:
        found = list(callers.map(everything, [0, 1, 2, 3] * 4))
    for seed, results in zip([0, 1, 2, 3] * 4, found, strict=True):
        assert all(map(torch.equal, results, expected[seed]))


FORKS = """
import os, signal, sys, torch
from torch_utils.ops.upfirdn2d import setup_filter, upfirdn2d

def run():
    return upfirdn2d(torch.linspace(-1, 1, 20480).reshape(1, 5, 64, 64), setup_filter([1, 2, 1]), impl="cpu")

torch.set_num_threads(3)
expected = run()
for _ in range(2):  # the child has lost torch's threads, its own child those that the library had started
    child = os.fork()
    if child:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    signal.alarm(30)  # one that hangs is not left behind
    if not torch.equal(run(), expected):
        os._exit(3)
print("both children agree", flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.slow
def test_native_children_of_a_process_with_threads_run_the_kernels():
    custom_ops.cpu_library()  # built here, not under the time limit
    done = subprocess.run(
        [sys.executable, "-c", FORKS],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "both children agree\n"
