"""The kernels of unit_distance beside plain torch: on a GPU, and by the emulator without one."""

from __future__ import annotations

import pytest
import torch
from cuda_emulator import device as device
from cuda_emulator import emulated as emulated
from op_cases import loss, weights
from tolerances import SAME_F32, assert_close

from torch_utils.ops import impl
from torch_utils.ops.native import cpu, cuda, library
from torch_utils.ops.unit_distance import _has_kernels, unit_distance

# id -> shape
SHAPES = {
    "one_vector": (2, 4, 3, 5),
    "vgg": (1, 64, 17, 16),
    "vgg_deep": (2, 512, 2, 3),
    "several_parts": (2, 8, 40, 40),
    "lanes_without_channels": (1, 40, 3, 3),
    "last_vectors_of_some_lanes": (1, 320, 3, 3),
    "effnet": (2, 112, 5, 1),
    "odd": (2, 5, 3, 3),
    "colors": (1, 3, 4, 4),
    "odd_in_half": (3, 20, 1, 7),
    "wide_and_odd": (1, 67, 3, 2),
    "one_pixel": (2, 16, 1, 1),
    "two_channels": (2, 2, 3, 2),
    "batch_of_none": (0, 8, 4, 4),
}
FAST = ("vgg_deep", "odd", "batch_of_none")
EACH = pytest.mark.parametrize(
    "case", [pytest.param(id, marks=() if id in FAST else pytest.mark.slow) for id in SHAPES]
)


def tensors(case, dtype, device, with_w=True):
    """Two maps, with a position where one of them is 0, and weights."""
    generator = torch.Generator().manual_seed(list(SHAPES).index(case))
    shape = SHAPES[case]
    maps = []
    for _ in range(2):
        x = torch.randn(shape, generator=generator).to(device, dtype)
        maps.append(x.contiguous(memory_format=torch.channels_last))
    if dtype.itemsize >= 4 and shape[2] > 1:  # the gradient there is beyond the range of float16
        maps[1][:, :, -1, -1] = 0
    w = torch.rand(shape[1], generator=generator).to(device) if with_w else None
    return *maps, w


def formula(x, y, w):
    """The definition in plain torch, differentiated by torch."""
    u, v = (t / (t.square().sum(1, keepdim=True) + 1e-10).sqrt() for t in (x, y))
    return ((u - v).square() * (1 if w is None else w.to(x.dtype)[:, None, None])).sum(1)


def derivatives(run, made):
    """The distances and their gradients to x and y."""
    leaves = [t.detach().requires_grad_(True) for t in made[:2]]
    d = run(*leaves, made[2])
    return [d.detach(), *torch.autograd.grad(d, leaves, weights(d))]


def elsewhere(found):
    """Without the position where y is 0, whose gradient is a thousand times that of the others."""
    d, dx, dy = found
    dy = dy.clone()
    dy[:, :, -1, -1] = 0
    return d, dx, dy


@pytest.mark.parametrize("with_w", [True, False], ids=["weighted", "plain"])
@EACH
def test_unit_distance_float64_is_exact(case, with_w, device):
    x, y, w = tensors(case, torch.float64, device, with_w)
    exact = derivatives(formula, (x, y, w))
    for run in (library.unit_distance, cpu.unit_distance):
        actual = derivatives(run, (x, y, w))
        assert [value.shape for value in actual] == [value.shape for value in exact]
        assert max(loss(actual, exact)) < 1e-12, loss(actual, exact)
        assert max(loss(elsewhere(actual), elsewhere(exact))) < 1e-12


@pytest.mark.parametrize(
    "dtype",
    [torch.float32]
    + [pytest.param(each, marks=pytest.mark.slow) for each in (torch.float16, torch.bfloat16)],
)
@EACH
def test_unit_distance_other_dtypes_error_at_most_twice_torch(case, dtype, device):
    x, y, w = tensors(case, dtype, device)
    exact = derivatives(formula, (x.double(), y.double(), w))
    actual = derivatives(library.unit_distance, (x, y, w))
    assert all(value.dtype == dtype and torch.isfinite(value).all() for value in actual)
    plain = derivatives(cpu.unit_distance, (x.float(), y.float(), w))
    plain = loss(elsewhere([value.to(dtype) for value in plain]), elsewhere(exact))
    actual = loss(elsewhere(actual), elsewhere(exact))
    rounding = (8 if dtype == torch.float32 else 2) * torch.finfo(dtype).eps
    assert all(a <= max(2 * p, rounding) for a, p in zip(actual, plain)), (actual, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@EACH
def test_unit_distance_equal_maps_give_exactly_zero(case, dtype, device):
    x, _, w = tensors(case, dtype, device)
    assert not any(value.any() for value in derivatives(library.unit_distance, (x * 3.7, x * 3.7, w)))


@pytest.mark.parametrize("kernels", [cpu, cuda], ids=["composite", "kernels"])
def test_unit_distance_gradients(kernels, emulated, monkeypatch):
    monkeypatch.setattr(library, "kernels", lambda x: kernels)
    x, y, w = tensors("one_vector", torch.float64, "cpu")
    leaves = x.requires_grad_(True), (y + 0.5).requires_grad_(True)
    assert torch.autograd.gradcheck(library.unit_distance, (*leaves, w))


def test_unit_distance_second_and_third_gradients(emulated, monkeypatch):
    monkeypatch.setattr(library, "kernels", lambda x: cuda)
    x, y, w = tensors("odd", torch.float64, "cpu")
    results = []
    for run in (library.unit_distance, formula):
        leaves = x.detach().requires_grad_(True), (y + 0.5).requires_grad_(True)
        gradients = torch.autograd.grad(run(*leaves, w).square().sum(), leaves, create_graph=True)
        total = sum(each.square().sum() for each in gradients)
        seconds = torch.autograd.grad(total, leaves, create_graph=True)
        thirds = torch.autograd.grad(sum(each.square().sum() for each in seconds), leaves)
        results.append([each.detach() for each in (*seconds, *thirds)])
    assert max(loss(*results)) < 1e-12


def test_unit_distance_computes_only_what_gradients_need(emulated, monkeypatch):
    monkeypatch.setattr(library, "kernels", lambda x: cuda)
    x, y, w = tensors("vgg", torch.float32, "cpu")
    for needed, passes in (("", [0]), ("x", [0, 1]), ("y", [0, 1]), ("xy", [0, 1, 1])):
        emulated.clear()
        leaves = [t.detach().requires_grad_(name in needed) for name, t in zip("xy", (x, y))]
        d = library.unit_distance(*leaves, w)
        assert d.requires_grad == bool(needed) and d.is_contiguous()
        if needed:
            d.mean().backward()
        assert [dict(plan.defines)["SG_GRAD"] for plan in emulated] == passes
        assert [t.grad is not None for t in leaves] == [name in needed for name in "xy"]
        for t in leaves:
            assert t.grad is None or t.grad.is_contiguous(memory_format=torch.channels_last)


def test_unit_distance_loads_16_bytes_where_channels_allow(emulated, monkeypatch):
    monkeypatch.setattr(library, "kernels", lambda x: cuda)
    for case, dtype, expected in (
        ("vgg", torch.float32, 4),
        ("vgg_deep", torch.float16, 8),
        ("odd", torch.float32, 1),
        ("odd_in_half", torch.float16, 4),
    ):
        library.unit_distance(*tensors(case, dtype, "cpu"))
        assert dict(emulated[-1].defines)["SG_VECTOR"] == expected
    x, y, w = tensors("vgg", torch.float32, "cpu")
    memory = torch.zeros(x.numel() + 1)  # 4 bytes further than the allocator gives
    shifted = memory[1:].as_strided(x.shape, x.stride(), 1).copy_(x)
    assert_close(library.unit_distance(shifted, y, w), library.unit_distance(x, y, w), SAME_F32)
    assert [dict(plan.defines)["SG_VECTOR"] for plan in emulated[-2:]] == [1, 4]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda x, y, w: (x, y, w), True),
        (lambda x, y, w: (x, y, None), True),
        (lambda x, y, w: (x, y[:1], w), False),
        (lambda x, y, w: (x.contiguous(), y, w), False),
        (lambda x, y, w: (x, y.double(), w), False),
        (lambda x, y, w: (x[..., 1:], y[..., 1:], w), False),
        (lambda x, y, w: (x, y, w.requires_grad_(True)), False),
        (lambda x, y, w: (x, y, w[:1]), False),
        (lambda x, y, w: (x, y, torch.ones(8)), False),
    ],
)
def test_unit_distance_kernels_are_for_two_channels_last_maps(change, expected):
    x, y = (torch.empty(2, 4, 5, 8, device="meta").permute(0, 3, 1, 2) for _ in range(2))
    assert _has_kernels(*change(x, y, torch.empty(8, device="meta"))) is expected


def test_unit_distance_kernels_are_not_for_many_channels_or_cpus():
    x = torch.empty(1, 4096, 2, 2, device="meta").contiguous(memory_format=torch.channels_last)
    assert not _has_kernels(x, x, None)
    x = torch.rand(1, 8, 2, 2).contiguous(memory_format=torch.channels_last).requires_grad_(True)
    assert not _has_kernels(x, x, None)
    (dx,) = torch.autograd.grad(unit_distance(x, x.detach().cos()).sum(), x, create_graph=True)
    dx.sum().backward()  # plain torch has second gradients


@pytest.mark.gpu
def test_unit_distance_auto_takes_the_kernels_on_a_gpu():
    assert impl.choose("unit_distance", "auto", "cuda") == "cuda"
    x, y, w = tensors("several_parts", torch.float32, "cuda")
    x.requires_grad_(True)
    d = unit_distance(x, y, w)
    assert d.grad_fn.name().startswith("unit_distance")
    first = torch.autograd.grad(d, x, d.detach(), retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(d, x, d.detach())[0], first)
    assert torch.equal(unit_distance(y, x, w), d)
    with torch.no_grad():
        assert torch.equal(unit_distance(x, y, w), d)
    assert unit_distance(x.contiguous(), y, w).grad_fn.name().startswith("Sum")


@pytest.mark.gpu
def test_unit_distance_graph_captures_it_with_its_gradient():
    x, y, w = tensors("several_parts", torch.float32, "cuda")
    x.requires_grad_(True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.autograd.grad(unit_distance(x, y, w).mean(), x)  # kernels are built before the capture
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (captured,) = torch.autograd.grad(unit_distance(x, y, w).mean(), x)
    with torch.no_grad():
        x.copy_(x.flip(0))
    graph.replay()
    (expected,) = torch.autograd.grad(unit_distance(x, y, w).mean(), x)
    assert torch.equal(captured, expected)
    (exact,) = torch.autograd.grad(formula(x.double(), y.double(), w).mean(), x)
    assert_close(captured, exact, SAME_F32)
