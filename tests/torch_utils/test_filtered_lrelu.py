"""filtered_lrelu beyond the golden cases: gradients, the mask, dtypes, layouts, edges, refusals."""

from __future__ import annotations

import naive_ops
import pytest
import torch
from tolerances import OPS_F64, assert_close

from torch_utils.ops import filtered_lrelu as module
from torch_utils.ops.filtered_lrelu import filtered_lrelu
from torch_utils.ops.upfirdn2d import setup_filter

pytestmark = pytest.mark.usefixtures("implementation")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
UP = setup_filter([1, 2, 4, 7, 4, 2, 1, 1])
DOWN = setup_filter([[1, 2], [3, 5]])


def masked(monkeypatch):
    """Use on the CPU the activation of other devices."""
    monkeypatch.setattr(
        module, "_activate", lambda x, slope, clamp: module._MaskedActivation.apply(x, slope, clamp)
    )


@pytest.mark.parametrize("use_mask", [False, True])
@pytest.mark.parametrize("clamp", [None, 0.4])
def test_filtered_lrelu_first_and_second_gradients(monkeypatch, use_mask, clamp):
    if use_mask:
        masked(monkeypatch)
    x = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    b = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def op(x, b):
        return filtered_lrelu(x, UP, DOWN, b, up=2, down=2, padding=[4, 3, 2, 5], slope=0.3, clamp=clamp)

    assert torch.autograd.gradcheck(op, (x, b))
    assert torch.autograd.gradgradcheck(op, (x, b))


@pytest.mark.parametrize("use_mask", [False, True])
@pytest.mark.parametrize("channels", [3, 16])
@pytest.mark.parametrize(("up", "down"), [(1, 1), (2, 1), (2, 2), (4, 2)])
def test_filtered_lrelu_equals_the_definition(monkeypatch, use_mask, channels, up, down):
    if use_mask:
        masked(monkeypatch)
    results = []
    x, b = torch.randn(2, channels, 5, 6).double(), torch.randn(channels).double()
    for op in (filtered_lrelu, naive_ops.filtered_lrelu):
        x, b = x.detach().clone().requires_grad_(), b.detach().clone().requires_grad_()
        y = op(x, UP, DOWN, b, up, down, [4, 3, 6, 5], 1.7, 0.1, 0.5)
        product = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum()
        results.append((y, *torch.autograd.grad(product, [x, b])))
    for ours, expected, name in zip(*results, ("y", "dx", "db")):
        assert_close(ours, expected, OPS_F64, name)
    assert results[0][0].abs().max() > 0.45, "the clamp is reached, or this tests too little"


def test_filtered_lrelu_mask_keeps_one_byte_a_pixel():
    u = torch.randn(1, 2, 8, 8, requires_grad=True)
    y = module._MaskedActivation.apply(u, 0.2, 0.5)
    assert [saved.dtype for saved in y.grad_fn.saved_tensors] == [torch.uint8]


def test_filtered_lrelu_keeps_inputs():
    for channels in (3, 16):
        x = torch.randn(1, channels, 4, 4)
        before = x.clone()
        filtered_lrelu(x, gain=1, slope=0.5, clamp=0.3)
        filtered_lrelu(x, UP, None, up=2, padding=4)
        assert torch.equal(x, before)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_filtered_lrelu_low_precision_error_at_most_twice_torch(dtype, device):
    up, down = UP.to(device), DOWN.to(device)
    x, b = torch.randn(2, 16, 12, 12, device=device).to(dtype), torch.randn(16, device=device).to(dtype)
    options = (2, 2, [4, 3, 4, 3], 2**0.5, 0.2, 1.5)
    exact = naive_ops.filtered_lrelu(x.double(), up.double(), down.double(), b.double(), *options)
    plain = naive_ops.filtered_lrelu(x, up, down, b, *options)
    y = filtered_lrelu(x, up, down, b, *options)
    assert y.dtype == dtype
    assert (y.double() - exact).abs().max() <= 2 * (plain.double() - exact).abs().max()


def test_filtered_lrelu_layouts_one_pixel_and_empty_batches():
    x = torch.randn(2, 16, 6, 10)
    options = dict(up=2, down=2, padding=4)
    expected = filtered_lrelu(x, UP, UP, **options)
    last = x.contiguous(memory_format=torch.channels_last)
    assert_close(filtered_lrelu(last, UP, UP, **options), expected, OPS_F64)
    strided = x[:, :, :, ::2]
    copied = filtered_lrelu(strided.clone(memory_format=torch.contiguous_format), UP, UP, **options)
    assert_close(filtered_lrelu(strided, UP, UP, **options), copied, OPS_F64)
    pixel = filtered_lrelu(x[:, :, :1, :1], UP, UP, padding=7)
    assert pixel.shape == (2, 16, 1, 1)
    empty = torch.zeros(0, 16, 6, 10, requires_grad=True)
    y = filtered_lrelu(empty, UP, UP, torch.zeros(16), clamp=1, **options)
    assert y.shape == (0, *expected.shape[1:])
    assert torch.autograd.grad(y.sum(), empty)[0].shape == empty.shape


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (dict(x=torch.zeros(4, 4)), ValueError, "x must be"),
        (dict(fu=torch.zeros(0)), ValueError, "filter"),
        (dict(fd=[1.0]), TypeError, "list"),
        (dict(b=torch.zeros(3)), ValueError, r"\[2\].*\[3\]"),
        (dict(b=0.0), ValueError, "float"),
        (dict(up=0), ValueError, "up"),
        (dict(up=[2, 2]), ValueError, "up"),
        (dict(down=2.0), TypeError, "down"),
        (dict(padding=[1, 2, 3]), ValueError, "padding"),
        (dict(gain=0), ValueError, "gain"),
        (dict(slope=-0.1), ValueError, "slope"),
        (dict(clamp=-1), ValueError, "clamp"),
        (dict(padding=[-4, 0, 0, 0]), ValueError, "width 4"),
        (dict(fu=torch.ones(3, 1), fd=torch.ones(3, 1)), ValueError, "height 4"),
        (dict(impl="cuda"), RuntimeError, "cuda"),
    ],
)
def test_filtered_lrelu_refusals_name_the_problem(arguments, error, words):
    with pytest.raises(error, match=words):
        filtered_lrelu(**{"x": torch.zeros(1, 2, 4, 4), **arguments})
