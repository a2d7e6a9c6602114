"""conv2d_resample, conv2d_gradfix and fma."""

from __future__ import annotations

import itertools

import naive_ops
import pytest
import torch
import torch.nn.functional as F
from tolerances import OPS_F64, SPLIT_F32, assert_close, sum_of_products

from torch_utils.ops import conv2d_gradfix
from torch_utils.ops.conv2d_resample import conv2d_resample
from torch_utils.ops.fma import fma
from torch_utils.ops.upfirdn2d import setup_filter

pytestmark = pytest.mark.usefixtures("implementation")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def definition(x, w, f, up, down, padding, groups, flip_weight, flip_filter):
    """Resample and convolve one after the other, padding as the contract counts it."""
    fh, fw = (1, 1) if f is None else (f.shape[0], f.shape[-1])
    px0, px1, py0, py1 = padding
    if up > 1:
        px0, px1 = px0 + (fw + up - 1) // 2, px1 + (fw - up) // 2
        py0, py1 = py0 + (fh + up - 1) // 2, py1 + (fh - up) // 2
    if down > 1:
        px0, px1 = px0 + (fw - down + 1) // 2, px1 + (fw - down) // 2
        py0, py1 = py0 + (fh - down + 1) // 2, py1 + (fh - down) // 2
    f_up, f_down = (f if up > 1 else None), (f if down > 1 else None)
    x = naive_ops.upfirdn2d(x, f_up, (up, up), (1, 1), (px0, px1, py0, py1), flip_filter, up**2)
    x = F.conv2d(x, w if flip_weight else w.flip([2, 3]), groups=groups)
    return naive_ops.upfirdn2d(x, f_down, down=(down, down), flip_filter=flip_filter)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("taps", [[1, 3, 3, 1], [1, 2, 3, 4, 5, 6, 7, 8], [[1, 2, 1], [2, 5, 1]], None])
@pytest.mark.parametrize(("up", "down"), [(1, 1), (2, 1), (1, 2), (3, 1), (2, 2)])
def test_conv2d_equals_the_definition(device, taps, up, down):
    f = None if taps is None else setup_filter(taps, device=device)
    for number, kernel in itertools.product(range(4), [(1, 1), (3, 3), (2, 3)]):
        flip_weight, flip_filter = bool(number & 1), bool(number & 2)
        groups = 2 if flip_filter else 1
        padding = ([1, 1, 1, 1], [2, 1, 1, 3], [0, 2, 1, 0], [4, 4, 3, 3])[number]
        x = torch.randn(2, 4, 7, 6, dtype=torch.float64, device=device, requires_grad=True)
        w = torch.randn(6, 4 // groups, *kernel, dtype=torch.float64, device=device, requires_grad=True)
        results = []
        for op in (conv2d_resample, definition):
            y = op(x, w, f, up, down, padding, groups, flip_weight, flip_filter)
            dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=device).view_as(y)
            results.append((y, *torch.autograd.grad(y, [x, w], dy)))
        for ours, expected, name in zip(*results, ("y", "dx", "dw")):
            assert_close(ours, expected, OPS_F64, f"{name} {padding} {flip_weight} {flip_filter}")


@pytest.mark.parametrize(("up", "down"), [(1, 1), (2, 1), (1, 2)])
def test_conv2d_first_and_second_gradients(up, down):
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    w = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    f = setup_filter([1, 3, 3, 1])

    def op(x, w):
        return conv2d_resample(x, w, f, up=up, down=down, padding=1)

    assert torch.autograd.gradcheck(op, (x, w))
    assert torch.autograd.gradgradcheck(op, (x, w))


GEOMETRIES = [
    dict(),
    dict(padding=1),
    dict(stride=2, padding=1),  # one row of an image of even height is not reached
    dict(stride=(2, 1), padding=(0, 2), groups=2),
    dict(padding=1, dilation=2, groups=2),
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("op", ["conv2d", "conv_transpose2d"])
def test_conv2d_bilinear_convolutions_differentiate_twice(monkeypatch, op, geometry):
    monkeypatch.setattr(conv2d_gradfix, "_is_bilinear", lambda input, weight: True)
    x = torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    w = torch.randn(2, 2 // geometry.get("groups", 1), 3, 3, dtype=torch.float64, requires_grad=True)

    def convolve(x, w):
        return getattr(conv2d_gradfix, op)(x, w, **geometry)

    assert_close(convolve(x, w), getattr(F, op)(x, w, **geometry), OPS_F64, op)
    assert torch.autograd.gradcheck(convolve, (x, w))
    assert torch.autograd.gradgradcheck(convolve, (x, w))


@pytest.mark.parametrize("device", DEVICES)
def test_conv2d_bilinear_convolutions_equal_torchs_gradients(monkeypatch, device):
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64, device=device, requires_grad=True)
    w = torch.randn(4, 4, 3, 3, dtype=torch.float64, device=device, requires_grad=True)
    results = []
    for bilinear in (True, False):
        monkeypatch.setattr(conv2d_gradfix, "_is_bilinear", lambda input, weight, which=bilinear: which)
        with conv2d_gradfix.no_weight_gradients():
            y = both_convolutions(x, w)
            (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        results.append((y, dx, *torch.autograd.grad(dx.square().sum(), [x, w])))
    for ours, torchs, name in zip(*results, ("y", "dx", "ddx", "ddw")):
        assert_close(ours, torchs, OPS_F64, name)


@pytest.mark.parametrize(("channels_in", "channels_out"), [(3, 6), (6, 3), (1, 1)])
def test_conv2d_thin_products_equal_torchs_convolutions(channels_in, channels_out):
    x = torch.randn(2, channels_in, 3, 4, dtype=torch.float64).to(memory_format=torch.channels_last)
    w = torch.randn(channels_out, channels_in, 1, 1, dtype=torch.float64)
    assert conv2d_gradfix._is_thin(x, w)
    y = conv2d_gradfix.conv2d(x, w)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close(y, F.conv2d(x, w), OPS_F64, "y")
    x, w = x.requires_grad_(), w.requires_grad_()
    assert torch.autograd.gradcheck(conv2d_gradfix.conv2d, (x, w))
    assert torch.autograd.gradgradcheck(conv2d_gradfix.conv2d, (x, w))
    with conv2d_gradfix.no_weight_gradients():
        conv2d_gradfix.conv2d(x, w).sum().backward()
    assert x.grad is not None and w.grad is None


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("up", "down"), [(1, 1), (2, 1), (1, 2)])
def test_conv2d_low_precision_layouts_and_empty_batches(device, dtype, up, down):
    f = setup_filter([1, 3, 3, 1], device=device)
    x, w = torch.randn(2, 8, 8, 8, device=device).to(dtype), torch.randn(8, 8, 3, 3, device=device).to(dtype)
    options = (up, down, [1, 1, 1, 1], 1, True, False)
    exact = definition(x.double(), w.double(), f.double(), *options)
    magnitudes = definition(x.double().abs(), w.double().abs(), f.double(), *options)
    resamples = up > 1 or down > 1
    terms, stored = (8 * 9 + 4 * 4, 3) if resamples else (8 * 9, 1)  # two passes of a filter
    bound = sum_of_products(dtype, terms, stored) * magnitudes
    plain = definition(x, w, f, *options)
    for layout in (torch.contiguous_format, torch.channels_last):
        y = conv2d_resample(x.contiguous(memory_format=layout), w, f, *options)
        error = (y.double() - exact).abs()
        assert y.dtype == dtype
        assert (error <= bound).all(), (error / bound).max()
        if device == "cpu":  # cuDNN has another algorithm for each layout: one says nothing about the other
            assert error.max() <= 2 * (plain.double() - exact).abs().max()
    assert conv2d_resample(x[:0], w, f, *options).shape == (0, *exact.shape[1:])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(up=0), "up"),
        (dict(down=-1), "down"),
        (dict(groups=3), "groups"),
        (dict(w=torch.zeros(2, 3, 1, 1)), "does not fit"),
        (dict(w=torch.zeros(2, 4)), "w must be"),
        (dict(w=torch.zeros(2, 4, 1, 1, dtype=torch.float64)), "float64"),
        (dict(padding=[1]), None),
        (dict(padding=[1, 2, 3]), "padding"),
    ],
)
def test_conv2d_refusals_name_the_problem(arguments, words):
    arguments = {"x": torch.zeros(1, 4, 4, 4), "w": torch.zeros(2, 4, 1, 1), **arguments}
    if words is None:
        assert conv2d_resample(**arguments).shape == (1, 2, 6, 6)
        return
    with pytest.raises(ValueError, match=words):
        conv2d_resample(**arguments)


def both_convolutions(x, w):
    """One convolution of each kind, not linear in their joint input."""
    y = conv2d_gradfix.conv2d(x, w, padding=1)
    return conv2d_gradfix.conv_transpose2d(y.sin(), w, stride=2, output_padding=1)


def test_conv2d_outside_the_block_the_convolutions_are_torchs():
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    w = torch.randn(4, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    b = torch.randn(4, dtype=torch.float64, requires_grad=True)
    options = dict(stride=2, padding=1, dilation=2, groups=2)
    for name in ("conv2d", "conv_transpose2d"):
        y = getattr(conv2d_gradfix, name)(x, w, b, **options)
        expected = getattr(F, name)(x, w, b, **options)
        assert torch.equal(y, expected)
        dy = torch.randn_like(y)
        ours, torchs = (torch.autograd.grad(result, [x, w, b], dy) for result in (y, expected))
        assert all(torch.equal(grad, same) for grad, same in zip(ours, torchs))


@pytest.mark.parametrize("device", DEVICES)
def test_conv2d_split_float32_is_nearly_float32(monkeypatch, device):
    """The product of the two rests, which is left out, is below 2^-21 of the whole; sums are truncated."""
    if device == "cpu":  # where the split is tried without tensor cores
        monkeypatch.setattr(conv2d_gradfix, "_is_bilinear", lambda input, weight: True)
        monkeypatch.setattr(conv2d_gradfix, "_has_tf32", lambda device: True)
    x = torch.randn(32, 64, 6, 6, device=device, requires_grad=True)
    w = (torch.randn(64, 64, 3, 3, device=device) / 24).requires_grad_()
    results = []
    for double in (False, True):
        a, b = (x.double(), w.double()) if double else (x, w)
        with conv2d_gradfix.split_float32(enable=not double):
            y = both_convolutions(a, b)
            (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
            results.append((y, dx, *torch.autograd.grad(dx.square().sum(), [x, w])))
    for ours, exact, name in zip(*results, ("y", "dx", "ddx", "ddw")):
        assert_close(ours.double(), exact.double(), SPLIT_F32, name)


@pytest.mark.parametrize("device", DEVICES)
def test_bmm_split_float32_is_nearly_float32(monkeypatch, device):
    if device == "cpu":
        monkeypatch.setattr(conv2d_gradfix, "_has_tf32", lambda device: True)
    a = torch.randn(3, 64, 96, device=device, requires_grad=True)
    b = (torch.randn(3, 96, 48, device=device) / 10).requires_grad_()
    results = []
    for double in (False, True):
        left, right = (a.double(), b.double()) if double else (a, b)
        with conv2d_gradfix.split_float32(enable=not double):
            y = conv2d_gradfix.bmm(left, right)
            assert type(y.grad_fn).__name__ == ("BmmBackward0" if double else "_MatrixProductBackward")
            da, db = torch.autograd.grad(y.square().sum(), [a, b], create_graph=True)
            results.append((y, da, db, *torch.autograd.grad(da.square().sum(), [a, b])))
    for ours, exact, name in zip(*results, ("y", "da", "db", "dda", "ddb")):
        assert_close(ours.double(), exact.double(), SPLIT_F32, name)


def test_bmm_outside_the_block_is_that_of_torch(monkeypatch):
    monkeypatch.setattr(conv2d_gradfix, "_has_tf32", lambda device: True)
    a, b = torch.randn(2, 40, 40), torch.randn(2, 40, 40)
    assert torch.equal(conv2d_gradfix.bmm(a, b), torch.bmm(a, b))
    with conv2d_gradfix.split_float32():
        assert torch.equal(conv2d_gradfix.bmm(a, b[:, :, :3]), torch.bmm(a, b[:, :, :3]))
        assert not torch.equal(conv2d_gradfix.bmm(a, b), torch.bmm(a, b))


@pytest.mark.parametrize(
    ("images", "channels", "pixels", "splits"),
    [(32, 64, 4, True), (8, 64, 8, True), (2, 32, 16, True), (8, 64, 4, False), (32, 31, 16, False)],
)
def test_conv2d_splits_where_it_pays(monkeypatch, images, channels, pixels, splits):
    monkeypatch.setattr(conv2d_gradfix, "_has_tf32", lambda device: True)
    x, w = torch.empty(images, channels, pixels, pixels), torch.empty(64, channels, 3, 3)
    assert not conv2d_gradfix._splits(x, w, 1)
    with conv2d_gradfix.split_float32():
        assert conv2d_gradfix._splits(x, w, 1) == splits
        assert not conv2d_gradfix._splits(x.half(), w.half(), 1)


def test_conv2d_outside_the_block_second_gradients_are_right():
    x = torch.randn(1, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    w = torch.randn(1, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(both_convolutions, (x, w))


def test_conv2d_inside_the_block_weights_get_no_gradient():
    x, w = torch.randn(1, 2, 4, 4, requires_grad=True), torch.randn(2, 2, 3, 3, requires_grad=True)
    b = torch.randn(2, requires_grad=True)
    y = conv2d_gradfix.conv2d(x, w, b)
    with conv2d_gradfix.no_weight_gradients():
        y.sum().backward()
    assert w.grad is None
    assert x.grad is not None and b.grad is not None

    with conv2d_gradfix.no_weight_gradients(disable=False):
        both_convolutions(x, w).sum().backward()
    assert w.grad is not None

    w.grad = None
    with conv2d_gradfix.no_weight_gradients():  # what counts is where the gradient is taken
        y = both_convolutions(x, w)
    y.sum().backward()
    assert w.grad is not None


def test_conv2d_block_nests_and_survives_errors():
    w = torch.ones(1, 1, 1, 1, requires_grad=True)
    x = torch.ones(1, 1, 1, 1)
    with pytest.raises(KeyError), conv2d_gradfix.no_weight_gradients():
        with conv2d_gradfix.no_weight_gradients():
            pass
        conv2d_gradfix.conv2d(x, w).sum().backward()
        assert w.grad is None
        raise KeyError
    conv2d_gradfix.conv2d(x, w).sum().backward()
    assert w.grad is not None


def test_conv2d_penalty_on_gradients_taken_inside_the_block_still_trains_the_weights():
    """The path length regulariser: first gradient without weights, second one through them."""
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    w = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)

    def penalty_gradient(block):
        y = both_convolutions(x, w)
        with conv2d_gradfix.no_weight_gradients(disable=block):
            (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), w)[0]

    assert_close(penalty_gradient(True), penalty_gradient(False), OPS_F64)

    # A weight computed from the latent: inside the block, that way back is closed.
    latent = torch.ones(2, dtype=torch.float64, requires_grad=True)
    y = conv2d_gradfix.conv2d(x.detach() * latent[:, None, None], w * latent[:, None, None])
    with conv2d_gradfix.no_weight_gradients():
        (inside,) = torch.autograd.grad(y.sum(), latent, retain_graph=True)
    (outside,) = torch.autograd.grad(y.sum(), latent)
    assert_close(outside, 2 * inside, OPS_F64)


def test_conv2d_fma():
    a, b, c = (
        torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 1), (3, 4), (2, 1, 4))
    )
    assert_close(fma(a, b, c), a * b + c, OPS_F64)
    assert fma(a, b, c[:1, :, :1]).shape == (2, 3, 4)
    assert torch.autograd.gradcheck(fma, (a, b, c))
    assert torch.autograd.gradgradcheck(fma, (a, b, c))
    half = fma(a.half(), b.half(), c.half())
    assert half.dtype == torch.float16
    assert fma(a[:0], b, c[:0]).shape == (0, 3, 4)
