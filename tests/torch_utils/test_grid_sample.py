"""grid_sample_gradfix against torch's own, and further than torch's own can be differentiated."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tolerances import OPS_F64, assert_close

from torch_utils.ops import grid_sample_gradfix
from torch_utils.ops.grid_sample_gradfix import grid_sample

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def torchs(x, grid):
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def inputs(size=(2, 3, 5, 6), out=(4, 7), device="cpu"):
    """An image, and positions that reach beyond it on every side."""
    x = torch.randn(size, dtype=torch.float64, device=device, requires_grad=True)
    grid = torch.rand(size[0], *out, 2, dtype=torch.float64, device=device) * 3 - 1.5
    return x, grid


@pytest.fixture(params=["torch's order", "fixed order"])
def order(request, monkeypatch):
    """Both ways to compute the gradient of the image."""
    if request.param == "fixed order":
        monkeypatch.setattr(grid_sample_gradfix, "_in_fixed_order", lambda device: True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("grid_gradient", [False, True])
def test_grid_sample_equals_torch(device, grid_gradient, order):
    x, grid = inputs(device=device)
    grid.requires_grad_(grid_gradient)
    wanted = [x, grid] if grid_gradient else [x]
    results = []
    for op in (grid_sample, torchs):
        y = op(x, grid)
        dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=device).view_as(y)
        results.append((y, *torch.autograd.grad(y, wanted, dy)))
    for ours, theirs in zip(*results):
        assert_close(ours, theirs, OPS_F64)


def test_grid_sample_image_gradients_of_every_order(order):
    x, grid = inputs((1, 2, 3, 4), (3, 2))
    assert torch.autograd.gradcheck(lambda x: grid_sample(x, grid), x)
    assert torch.autograd.gradgradcheck(lambda x: grid_sample(x, grid), x)
    # third: of a cubic, through torch's gradient written as a matrix
    matrix = torch.autograd.functional.jacobian(lambda x: torchs(x, grid), x).reshape(12, 24)
    gradients = []
    for op in (lambda x: grid_sample(x, grid).flatten(), lambda x: matrix @ x.flatten()):
        total = op(x).pow(3).sum()
        for _ in range(3):
            (gradient,) = torch.autograd.grad(total, x, create_graph=True)
            total = gradient.cumsum(-1).sum()
        gradients.append(gradient)
    assert_close(*gradients, OPS_F64)


def test_grid_sample_grid_gradients():
    x, grid = inputs((1, 2, 3, 4), (3, 2))
    grid.requires_grad_()
    assert torch.autograd.gradcheck(grid_sample, (x, grid))
    assert torch.autograd.gradgradcheck(grid_sample, (x, grid))


def test_grid_sample_gradient_penalty_reaches_through():
    """R1 through the augmentation pipe: the squared gradient at the image, differentiated for the network."""
    x, grid = inputs((2, 1, 4, 4), (4, 4))
    w = torch.randn(1, 1, 3, 3, dtype=torch.float64, requires_grad=True)

    def penalty(w):
        logits = F.conv2d(grid_sample(x, grid), w).tanh().sum()
        (gradient,) = torch.autograd.grad(logits, x, create_graph=True)
        return gradient.square().sum()

    assert torch.autograd.gradcheck(penalty, w)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("grid_gradient", [False, True])
def test_grid_sample_low_precision(device, dtype, grid_gradient):
    x, grid = (t.detach().to(dtype) for t in inputs(device=device))
    exact = torchs(x.double(), grid.double())
    y = grid_sample(x, grid.requires_grad_(grid_gradient))
    assert y.dtype == dtype
    # The measure is torch's own loss; where torch has no half precision, the rounding of the exact result.
    native = device == "cuda" or dtype == torch.float32
    plain = torchs(x, grid.detach()) if native else exact.to(dtype)
    assert (y.double() - exact).abs().max() <= 2 * (plain.double() - exact).abs().max()


def test_grid_sample_layouts_and_empty_batches():
    x, grid = inputs((2, 4, 6, 6))
    expected = grid_sample(x, grid)
    assert_close(grid_sample(x.contiguous(memory_format=torch.channels_last), grid), expected, OPS_F64)
    empty = torch.zeros(0, 3, 4, 4, requires_grad=True)
    y = grid_sample(empty, torch.zeros(0, 5, 6, 2))
    assert y.shape == (0, 3, 5, 6)
    assert torch.autograd.grad(y.sum(), empty)[0].shape == empty.shape


@pytest.mark.parametrize(
    ("image", "grid"),
    [((1, 2, 3), (1, 2, 2, 2)), ((1, 1, 2, 2), (1, 2, 2, 3)), ((1, 1, 2, 2), (2, 2, 2, 2))],
)
def test_grid_sample_refusals_name_the_shapes(image, grid):
    with pytest.raises(ValueError, match="grid"):
        grid_sample(torch.zeros(image), torch.zeros(grid))
