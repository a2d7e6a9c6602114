"""upfirdn2d beyond the golden cases: random forms, orders of gradient, dtypes, layouts, edges, refusals."""

from __future__ import annotations

import random

import naive_ops
import pytest
import torch
from tolerances import OPS_F64, assert_close

from torch_utils.ops import upfirdn2d as module
from torch_utils.ops.upfirdn2d import downsample2d, filter2d, setup_filter, upfirdn2d, upsample2d

pytestmark = pytest.mark.usefixtures("implementation")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def random_form(seed):
    """Draw a shape, a filter and arguments that leave at least one pixel."""
    rng = random.Random(seed)
    while True:
        taps = [rng.randint(1, 12)] if rng.random() < 0.5 else [rng.randint(1, 6), rng.randint(1, 6)]
        up, down = ([rng.choice([1, 1, 2, 3, 4]), rng.choice([1, 1, 2, 3])] for _ in range(2))
        padding = [rng.randint(-5, 12) for _ in range(4)]
        height, width = rng.randint(1, 9), rng.randint(1, 9)
        spare_x = width * up[0] + padding[0] + padding[1] - taps[-1]
        spare_y = height * up[1] + padding[2] + padding[3] - taps[0]
        if spare_x >= 0 and spare_y >= 0:
            flip, gain = rng.random() < 0.5, rng.uniform(-2, 2)
            return (rng.randint(1, 2), rng.randint(1, 3), height, width), taps, up, down, padding, flip, gain


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("chunk", range(4))
def test_upfirdn2d_random_forms_equal_the_definition(chunk, device):
    for seed in range(chunk * 40, chunk * 40 + 40):
        shape, taps, *options = random_form(seed)
        x = torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
        f = torch.randn(taps, dtype=torch.float64, device=device)
        y, expected = upfirdn2d(x, f, *options), naive_ops.upfirdn2d(x, f, *options)
        assert_close(y, expected, OPS_F64, f"{shape} {taps} {options}")
        dy = torch.randn_like(y)
        (dx,), (dx_expected,) = torch.autograd.grad(y, x, dy), torch.autograd.grad(expected, x, dy)
        assert_close(dx, dx_expected, OPS_F64, f"gradient of {shape} {taps} {options}")


@pytest.mark.parametrize("taps", [[4], [3, 2], None])
@pytest.mark.parametrize(("up", "down"), [(1, 1), (2, 1), (1, 2), ([3, 1], [1, 2])])
def test_upfirdn2d_gradients_of_every_order(taps, up, down):
    f = None if taps is None else torch.randn(taps, dtype=torch.float64)
    x = torch.randn(1, 1, 3, 4, dtype=torch.float64, requires_grad=True)

    def op(x):
        return upfirdn2d(x, f, up, down, [2, 1, -1, 3], gain=1.5)

    assert torch.autograd.gradcheck(op, x)
    assert torch.autograd.gradgradcheck(op, x)
    # The third order exists and, the op being linear, gradients of a cubic of it are those of the definition.
    third = x
    expected = x.detach().clone().requires_grad_()
    naive = naive_ops.upfirdn2d(
        expected, f, *([s, s] if isinstance(s, int) else s for s in (up, down)), [2, 1, -1, 3], gain=1.5
    )
    values = []
    for start, y in ((third, op(third)), (expected, naive)):
        total = (y**3).sum()
        for _ in range(3):
            (gradient,) = torch.autograd.grad(total, start, create_graph=True)
            total = (gradient * torch.linspace(-1, 1, gradient.numel()).view_as(gradient)).sum()
        values.append(gradient)
    assert_close(values[0], values[1], OPS_F64)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("taps", "up", "down"), [(12, 2, 1), (12, 1, 2), (4, 2, 1), (4, 1, 2)])
def test_upfirdn2d_low_precision_error_at_most_twice_torch(dtype, device, taps, up, down):
    f = setup_filter(torch.rand(taps).tolist(), device=device)
    x = torch.randn(2, 3, 16, 16, device=device).to(dtype)
    exact = naive_ops.upfirdn2d(x.double(), f.double(), (up, up), (down, down), [6] * 4, gain=up**2)
    plain = naive_ops.upfirdn2d(x, f, (up, up), (down, down), [6] * 4, gain=up**2)
    y = upfirdn2d(x, f, up, down, 6, gain=up**2)
    assert y.dtype == dtype
    assert (y.double() - exact).abs().max() <= 2 * (plain.double() - exact).abs().max()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("f", [[1, 3, 3, 1], [1.0] * 9])
def test_upfirdn2d_layout_of_the_input_does_not_matter(device, f):
    f = setup_filter(f, device=device)
    wide = torch.randn(3, 4, 18, 20, device=device)
    x = wide[:, :, 1::2, ::2]
    expected = upfirdn2d(x.contiguous(), f, up=2, padding=5)
    transposed = x.transpose(2, 3).contiguous().transpose(2, 3)
    for same in (x, x.contiguous(memory_format=torch.channels_last), transposed):
        assert_close(upfirdn2d(same, f, up=2, padding=5), expected, OPS_F64)
    expanded = x[:1].expand(3, -1, -1, -1)
    assert_close(upfirdn2d(expanded, f, down=2, padding=5)[2], upfirdn2d(x, f, down=2, padding=5)[0], OPS_F64)


def test_upfirdn2d_empty_batches_keep_their_gradient():
    x = torch.zeros(0, 3, 8, 8, requires_grad=True)
    y = upfirdn2d(x, setup_filter([1, 3, 3, 1]), up=2, padding=[2, 1])
    assert y.shape == (0, 3, 15, 17)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.shape == x.shape


def test_upfirdn2d_one_pixel_spreads_into_the_filter():
    f = torch.rand(3, 5)
    y = upfirdn2d(torch.full([1, 1, 1, 1], 2.0), f, padding=[4, 4, 2, 2])
    assert_close(y[0, 0], f * 2, OPS_F64)


def test_upfirdn2d_negative_padding_crops_before_filtering():
    x = torch.randn(1, 2, 9, 9)
    f = setup_filter([1, 2, 1])
    cropped = x[:, :, 2:-1, 3:]
    assert_close(upfirdn2d(x, f, padding=[-3, 0, -2, -1]), upfirdn2d(cropped, f), OPS_F64)


def test_upfirdn2d_image_cropped_away_leaves_zeros():
    x = torch.randn(1, 1, 3, 3, requires_grad=True)
    for f in (setup_filter([1, 3, 3, 1]), setup_filter([1.0] * 8), None):
        for options in (
            dict(padding=[-4, 30, 9, 0]),
            dict(padding=[30, -4, 0, 9]),
            dict(up=2, padding=[-9, 40, 9, 9]),
        ):
            y = upfirdn2d(x, f, **options)
            assert y.numel() and not y.any()
            assert not torch.autograd.grad(y.sum(), x)[0].any()


def test_upfirdn2d_identity_returns_memory_of_its_own():
    x = torch.randn(1, 2, 4, 4)
    y = upfirdn2d(x, None)
    assert torch.equal(y, x)
    assert y.data_ptr() != x.data_ptr()


def test_upfirdn2d_centered_helpers():
    constant = torch.ones(1, 1, 16, 16)
    for f in (setup_filter([1, 3, 3, 1]), setup_filter([1.0] * 12), None):
        assert filter2d(constant, f).shape == (1, 1, 16, 16)
        assert downsample2d(constant, f, down=2).shape == (1, 1, 8, 8)
        large = upsample2d(constant, f, up=[2, 1])
        assert large.shape == (1, 1, 16, 32)
        if f is not None:  # away from the border the brightness stays
            assert_close(large[..., 6:-6, 6:-6], torch.ones(1, 1, 4, 20), OPS_F64)
    # A symmetric filter keeps a symmetric image symmetric: nothing moves.
    image = torch.randn(1, 1, 8, 8)
    image = image + image.flip([2, 3])
    for op in (upsample2d, downsample2d):
        result = op(image, setup_filter([1, 3, 3, 1]), 2)
        assert_close(result, result.flip([2, 3]), OPS_F64)
    assert filter2d(image, setup_filter([1, 2, 1]), padding=[1, 0]).shape == (1, 1, 8, 10)


def test_upfirdn2d_setup_filter_forms():
    assert setup_filter(None).tolist() == [[1.0]]
    assert setup_filter([1] * 7).shape == (7, 7)
    assert setup_filter([1] * 8).shape == (8,)
    assert setup_filter([1] * 8, separable=False).shape == (8, 8)
    taps = torch.tensor([1.0, 3.0])
    assert setup_filter(taps, flip_filter=True, normalize=False, separable=True).tolist() == [3.0, 1.0]
    assert taps.tolist() == [1.0, 3.0]


def test_upfirdn2d_numpy_numbers_are_numbers():
    np = pytest.importorskip("numpy")
    x = torch.randn(1, 1, 4, 4)
    y = upfirdn2d(x, None, up=np.int64(2), padding=np.array([1, 0, 0, 1]))
    assert torch.equal(y, upfirdn2d(x, None, up=2, padding=[1, 0, 0, 1]))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (dict(x=[[1]]), TypeError, "x must be a tensor"),
        (dict(x=torch.zeros(1, 4, 4)), ValueError, r"\[N, C, H, W\]"),
        (dict(x=torch.zeros(1, 1, 4, 4, dtype=torch.int32)), ValueError, "int32"),
        (dict(f=[1, 2]), TypeError, "list"),
        (dict(f=torch.zeros(1, 1, 1)), ValueError, "filter"),
        (dict(f=torch.ones(2, 2, requires_grad=True)), ValueError, "requires"),
        (dict(up=0), ValueError, "up"),
        (dict(up=1.5), TypeError, "up"),
        (dict(down=[1, 2, 3]), ValueError, "down"),
        (dict(padding=[1, 2, 3]), ValueError, "padding"),
        (dict(padding=[-3, -1, 0, 0]), ValueError, "width 4"),
        (dict(f=torch.ones(5, 1)), ValueError, "height 4"),
        (dict(impl="fast"), ValueError, "'fast'"),
        (dict(impl="cuda"), RuntimeError, "cuda"),
    ],
)
def test_upfirdn2d_refusals_name_the_problem(arguments, error, words):
    with pytest.raises(error, match=words):
        upfirdn2d(**{"x": torch.zeros(1, 1, 4, 4), "f": None, **arguments})


def test_upfirdn2d_setup_filter_refusals():
    with pytest.raises(ValueError, match="shape"):
        setup_filter([[[1]]])
    with pytest.raises(ValueError, match="shape"):
        setup_filter([])
    with pytest.raises(ValueError, match="1-D"):
        setup_filter([[1, 2], [3, 4]], separable=True)


def test_upfirdn2d_no_zeros_are_multiplied(monkeypatch):
    """Convolutions see the small image, not one with zeros between its pixels."""
    sizes = []
    for name in ("conv2d", "conv_transpose2d"):
        original = getattr(module.F, name)
        monkeypatch.setattr(
            module.F, name, lambda x, *a, _f=original, **k: sizes.append(tuple(x.shape[2:])) or _f(x, *a, **k)
        )
    f = setup_filter([1, 3, 3, 1])
    x = torch.randn(1, 1, 16, 16, requires_grad=True)
    y = upsample2d(x, f, up=4, impl="ref")
    assert y.shape == (1, 1, 64, 64)
    assert max(max(size) for size in sizes) <= 18
    sizes.clear()
    z = downsample2d(torch.randn(1, 1, 64, 64, requires_grad=True), f, down=4, impl="ref")
    z.sum().backward()
    assert sizes[1][0] <= 18, "the gradient of downsampling works on the small image too"
