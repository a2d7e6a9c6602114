"""What only a GPU can show of the CUDA kernels: streams, graphs, threads, sizes past 2^31, memory kept."""

from __future__ import annotations

import threading

import pytest
import torch
from op_cases import CASES, derivatives, run, tensors

from torch_utils.ops.bias_act import bias_act
from torch_utils.ops.filtered_lrelu import filtered_lrelu
from torch_utils.ops.upfirdn2d import setup_filter, upfirdn2d

pytestmark = pytest.mark.gpu
BY_ID = {(case.op, case.id): case for case in CASES}
T = BY_ID["filtered_lrelu", "stylegan3_t"]
UP = BY_ID["upfirdn2d", "stylegan2_up"]
ACT = BY_ID["bias_act", "clamp_bites_lrelu"]
OPS = pytest.mark.parametrize("case", [T, UP, ACT], ids=lambda case: case.op)


@OPS
def test_native_kernel_runs_on_the_stream_at_hand(case):
    """What a busy stream computes is waited for by what comes after it there, and by nothing else."""
    made = tensors(case, torch.float32, "cuda")
    expected = run(case, made, impl="ref")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        slow = made["x"] * 2
        y = run(case, {**made, "x": slow / 2}, impl="cuda")
    torch.cuda.current_stream().wait_stream(stream)
    torch.testing.assert_close(y, expected)


@OPS
def test_native_graph_captures_an_op_with_its_gradients(case):
    made = tensors(case, torch.float32, "cuda")
    expected = derivatives(case, made, order=1, impl="cuda")  # kernels are built before the capture
    x = made["x"].clone().requires_grad_(True)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        derivatives(case, {**made, "x": x}, order=1, impl="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(case, {**made, "x": x}, impl="cuda")
        (gradient,) = torch.autograd.grad(captured.square().sum(), x)
    with torch.no_grad():
        x.copy_(made["x"] * 0.5)
    graph.replay()
    leaf = (made["x"] * 0.5).requires_grad_(True)
    y = run(case, {**made, "x": leaf}, impl="ref")
    torch.testing.assert_close(captured, y)
    torch.testing.assert_close(gradient, torch.autograd.grad(y.square().sum(), leaf)[0])
    assert len(expected) > 1


@OPS
def test_native_thread_that_never_used_cuda_launches_kernels(case):
    made, found = tensors(case, torch.float32, "cuda"), []
    thread = threading.Thread(target=lambda: found.append(run(case, made, impl="cuda")))
    thread.start()
    thread.join()
    torch.testing.assert_close(found[0], run(case, made, impl="ref"))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@OPS
def test_native_kernel_runs_where_its_tensors_are(case):
    made = tensors(case, torch.float32, "cuda:1")
    with torch.cuda.device(0):
        torch.testing.assert_close(run(case, made, impl="cuda"), run(case, made, impl="ref"))


def needs_memory(gib: float):
    """Skip where the GPU has not so much left."""
    if torch.cuda.mem_get_info()[0] < gib * 2**30:
        pytest.skip(f"needs {gib:g} GiB of free memory on the GPU")


def test_native_sizes_past_31_bits():
    """The last image of a batch past 2^31 elements is what it is alone."""
    needs_memory(26)
    x = torch.zeros(65, 64, 1024, 512, dtype=torch.float16, device="cuda")  # 2^31 elements and 2^25 more
    x[-1] = torch.randn(x.shape[1:], dtype=torch.float16, device="cuda")
    b = torch.randn(64, dtype=torch.float16, device="cuda")
    f = setup_filter([1, 3, 3, 1], device="cuda")
    g = setup_filter([1, 3, 3, 1], device="cuda", separable=True)
    for op in (
        lambda x: bias_act(x, b, act="lrelu", impl="cuda"),
        lambda x: upfirdn2d(x, f, padding=[2, 1, 2, 1], impl="cuda"),
        lambda x: filtered_lrelu(x, g, g, b, 2, 2, [3, 2, 3, 2], impl="cuda"),
    ):
        assert torch.equal(op(x)[-1:], op(x[-1:].clone()))


def test_native_training_keeps_two_bits_of_an_upsampled_element():
    x = torch.randn(4, 64, 148, 148, dtype=torch.float16, device="cuda", requires_grad=True)
    f = setup_filter([1.0] * 12, device="cuda")
    filtered_lrelu(x, f, f, None, 2, 2, 11, impl="cuda").sum().backward()  # kernels and taps are there
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = filtered_lrelu(x, f, f, None, 2, 2, 11, impl="cuda")
    kept = torch.cuda.memory_allocated() - before - y.numel() * y.element_size()
    upsampled = 4 * 64 * (2 * y.shape[2] + 10) ** 2
    assert kept < upsampled / 4 * 1.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if c.op == "filtered_lrelu"], ids=lambda case: case.id)
def test_native_recording_for_a_gradient_changes_no_bit(case, dtype):
    """A student, whose gradient is wanted, equals a teacher of the same weights."""
    made = tensors(case, dtype, "cuda")
    teacher = run(case, made, impl="cuda")
    student = run(case, {**made, "x": made["x"].clone().requires_grad_(True)}, impl="cuda")
    assert torch.equal(student, teacher)
