"""The kernels of fma beside torch.addcmul: on a GPU, and by the emulator without one."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from cuda_emulator import device as device
from cuda_emulator import emulated as emulated
from op_cases import loss, weights

from torch_utils.ops import impl
from torch_utils.ops.fma import _has_kernels, fma
from torch_utils.ops.native import cpu, cuda, library


class Case(NamedTuple):
    """c: "number", "image" [H, W] or "batch" [N, 1, H, W]."""

    id: str
    shape: tuple[int, int, int, int]
    c: str
    layout: str = ""


def last(id, shape, c):
    return Case(id, shape, c, "channels_last")


CASES = [
    Case("modulation", (2, 16, 6, 10), "number"),
    Case("rows_not_whole_vectors", (2, 3, 5, 7), "batch"),
    Case("planes_in_several_parts", (1, 2, 96, 96), "image"),
    Case("planes_share_a_block", (3, 5, 4, 4), "batch"),
    Case("gaps_and_transposed", (2, 3, 5, 6), "batch", "gaps"),
    Case("batch_of_none", (0, 3, 4, 4), "batch"),
    last("demodulation_channels_last", (2, 72, 20, 20), "batch"),
    last("channels_last_number", (2, 8, 4, 6), "number"),
    last("odd_channels_last", (2, 3, 5, 7), "image"),
    last("several_vectors_of_channels", (1, 520, 3, 5), "batch"),
    last("one_pixel", (2, 8, 1, 1), "batch"),
]
FAST = ("modulation", "planes_in_several_parts", "demodulation_channels_last", "batch_of_none")
EACH = pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.id, marks=() if case.id in FAST else pytest.mark.slow) for case in CASES],
)


def tensors(case, dtype, device):
    generator = torch.Generator().manual_seed(CASES.index(case))
    n, c, h, w = case.shape

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    a = draw(*case.shape)
    if case.layout == "channels_last":
        a = a.contiguous(memory_format=torch.channels_last)
    if case.layout == "gaps":
        a = draw(n, h, c + 1, w + 3).transpose(1, 2)[:, :c, :, 2 : 2 + w]
    return a, draw(n, c, 1, 1), draw(*{"number": (), "image": (h, w), "batch": (n, 1, h, w)}[case.c])


def addcmul(a, b, c):
    return torch.addcmul(c, a, b)


def derivatives(run, made, order=2):
    """The result, its gradients, and the gradients of those."""
    leaves = [t.detach().requires_grad_(True) for t in made]
    y = run(*leaves)
    dy = weights(y).requires_grad_(True)
    first = torch.autograd.grad(y, leaves, dy, create_graph=order > 1)
    found = [y, *first]
    if order > 1:
        total = sum((g * weights(g)).sum() for g in first)
        second = torch.autograd.grad(total, [dy, *leaves[:2]])
        found += second
    return [value.detach() for value in found]


@EACH
def test_fma_float64_is_exact_to_the_second_derivative(case, device):
    made = tensors(case, torch.float64, device)
    exact = derivatives(addcmul, made)
    actual = derivatives(library.fma, made)
    assert [value.shape for value in actual] == [value.shape for value in exact]
    assert max(loss(actual, exact)) < 1e-12, loss(actual, exact)


@pytest.mark.parametrize(
    "dtype",
    [torch.float16]
    + [pytest.param(each, marks=pytest.mark.slow) for each in (torch.float32, torch.bfloat16)],
)
@EACH
def test_fma_other_dtypes_error_at_most_twice_torch(case, dtype, device):
    made = tensors(case, dtype, device)
    exact = derivatives(addcmul, [t.double() for t in made], order=1)
    plain = loss(derivatives(addcmul, made, order=1), exact)
    actual = loss(derivatives(library.fma, made, order=1), exact)
    rounding = (8 if dtype == torch.float32 else 2) * torch.finfo(dtype).eps
    assert all(a <= max(2 * p, rounding) for a, p in zip(actual, plain)), (actual, plain)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["planes", "pixels"])
@pytest.mark.parametrize("c_shape", [(), (2, 2), (2, 1, 2, 2)], ids=str)
@pytest.mark.parametrize("kernels", [cpu, cuda], ids=["composite", "kernels"])
def test_fma_gradients_of_both_orders(kernels, c_shape, layout, emulated, monkeypatch):
    monkeypatch.setattr(library, "kernels", lambda x: kernels)
    a = torch.randn(2, 2, 2, 2, dtype=torch.float64).to(memory_format=layout).requires_grad_(True)
    b = torch.randn(2, 2, 1, 1, dtype=torch.float64, requires_grad=True)
    c = torch.randn(c_shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(library.fma, (a, b, c))
    assert torch.autograd.gradgradcheck(library.fma, (a, b, c))


def test_fma_result_has_the_layout_of_its_features(device):
    for case in CASES:
        a, b, c = tensors(case, torch.float32, device)
        if case.id in FAST:
            y = library.fma(a, b, c)
            assert y.is_contiguous(memory_format=library.specs.image_layout(a))


def test_fma_pass_reads_and_writes_only_what_gradients_need(emulated, monkeypatch):
    monkeypatch.setattr(library, "kernels", lambda x: cuda)
    a, b, c = tensors(CASES[6], torch.float64, "cpu")
    for needed, expected in (("a", (0, 0)), ("ab", (1, 0)), ("abc", (1, 1)), ("ac", (0, 1))):
        made = [t.detach().requires_grad_(name in needed) for name, t in zip("abc", (a, b, c))]
        library.fma(*made).sum().backward()
        defines = dict(emulated[-1].defines)
        assert (defines["SG_DB"], defines["SG_DC"]) == expected
        assert [t.grad is not None for t in made] == [name in needed for name in "abc"]


@pytest.mark.parametrize(
    ("a", "b", "c", "expected"),
    [
        ((2, 3, 4, 5), (2, 3, 1, 1), (), True),
        ((2, 3, 4, 5), (2, 3, 1, 1), (4, 5), True),
        ((2, 3, 4, 5), (2, 3, 1, 1), (1, 1, 4, 5), True),
        ((2, 3, 4, 5), (2, 3, 1, 1), (2, 1, 4, 5), True),
        ((2, 3, 4, 5), (1, 3, 1, 1), (), False),
        ((2, 3, 4, 5), (2, 3, 4, 5), (), False),
        ((2, 3, 4, 5), (2, 3, 1, 1), (2, 3, 4, 5), False),
        ((2, 3, 4, 5), (2, 3, 1, 1), (1, 3, 1, 1), False),
        ((2, 4096, 4, 5), (2, 4096, 1, 1), (), False),
        ((3, 4), (3, 4), (3, 4), False),
    ],
)
def test_fma_kernels_are_for_images_times_a_number_for_each_channel(a, b, c, expected):
    made = [torch.empty(shape, device="meta") for shape in (a, b, c)]
    assert _has_kernels(*made) is expected
    assert not _has_kernels(made[0].half(), *made[1:])
    assert not _has_kernels(*(torch.empty(shape) for shape in (a, b, c)))


@pytest.mark.gpu
def test_fma_auto_takes_the_kernels_on_a_gpu():
    assert impl.choose("fma", "auto", "cuda") == "cuda"
    a, b, c = (t.requires_grad_(True) for t in tensors(CASES[6], torch.float16, "cuda"))
    y = fma(a, b, c)
    assert y.grad_fn.name().startswith("fma") and y.is_contiguous(memory_format=torch.channels_last)
    first = torch.autograd.grad(y, (a, b, c), y.detach(), retain_graph=True)
    again = torch.autograd.grad(y, (a, b, c), y.detach())
    assert all(torch.equal(x, y) for x, y in zip(first, again))  # no sum depends on the order of blocks
    assert fma(a, a, c).grad_fn.name().startswith("Addcmul")


@pytest.mark.gpu
def test_fma_graph_captures_fma_with_its_gradients():
    made = [t.requires_grad_(True) for t in tensors(CASES[6], torch.float32, "cuda")]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.autograd.grad(fma(*made).square().sum(), made)  # kernels are built before the capture
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.autograd.grad(fma(*made).square().sum(), made)
    with torch.no_grad():
        for t in made:
            t.mul_(0.5)
    graph.replay()
    expected = torch.autograd.grad(addcmul(*made).square().sum(), made)
    for actual, value in zip(captured, expected):
        torch.testing.assert_close(actual, value)
