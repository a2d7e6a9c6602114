"""Bilinear grid sampling that can be differentiated more than once.

torch's own backward pass is not differentiable. Sampling is linear in the image, so for a fixed grid the op
and its adjoint differentiate into each other, any number of times. Where the grid itself needs gradients the
op is written out as gathers, which torch differentiates. So is the adjoint on CUDA under
`torch.use_deterministic_algorithms`, since torch's kernel adds in the order in which threads finish.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def grid_sample(input: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """Sample images bilinearly at normalized positions; zero outside, pixel edges at -1 and 1.

    input: `[N, C, H, W]`. grid: `[N, H', W', 2]` in the dtype of `input`, (x, y) in [-1, 1] where the image
    is. Equals `torch.nn.functional.grid_sample(..., mode='bilinear', padding_mode='zeros',
    align_corners=False)`. Returns `[N, C, H', W']`. Raises ValueError for shapes that do not fit.
    """
    if input.ndim != 4 or grid.ndim != 4 or grid.shape[3] != 2 or grid.shape[0] != input.shape[0]:
        raise ValueError(
            "grid_sample: input must be [N, C, H, W] and grid [N, H', W', 2], "
            f"got {list(input.shape)} and {list(grid.shape)}"
        )
    dtype = input.dtype
    needs_grid = torch.is_grad_enabled() and grid.requires_grad
    # Positions need more digits than half precision has. torch's kernels for CUDA compute them in float32.
    by_torch = input.device.type == "cuda" and not needs_grid and not _in_fixed_order(input.device)
    if dtype in (torch.float16, torch.bfloat16) and not by_torch:
        input, grid = input.float(), grid.float()
    return (_gathered(input, grid) if needs_grid else _Sample.call(input, grid)).to(dtype)


class _Sample(torch.autograd.Function):
    """Sampling with a fixed grid."""

    @classmethod
    def call(cls, image, grid):
        if torch.is_grad_enabled() and image.requires_grad:
            return cls.apply(image, grid)
        return _sample(image, grid)

    @staticmethod
    def forward(ctx, image, grid):
        ctx.save_for_backward(grid)
        ctx.size = image.shape
        return _sample(image, grid)

    @staticmethod
    def backward(ctx, dy):
        (grid,) = ctx.saved_tensors
        return _Adjoint.apply(dy, grid, ctx.size), None


class _Adjoint(torch.autograd.Function):
    """The gradient of sampling, itself linear in what it is given."""

    @staticmethod
    def forward(ctx, dy, grid, size):
        ctx.save_for_backward(grid)
        sample = _gathered if _in_fixed_order(dy.device) else _sample
        with torch.enable_grad():
            image = dy.new_zeros(size).requires_grad_()
            (dx,) = torch.autograd.grad(sample(image, grid), image, dy)
        return dx

    @staticmethod
    def backward(ctx, ddx):
        (grid,) = ctx.saved_tensors
        return _Sample.call(ddx, grid), None, None


def _sample(image, grid):
    return F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _in_fixed_order(device):
    """Return whether gradients have to be added in a fixed order, which torch's kernel for CUDA does not."""
    return device.type == "cuda" and torch.are_deterministic_algorithms_enabled()


def _gathered(image, grid):
    """Compute the same values by four gathers, differentiable in image and grid.

    torch sorts the indices to compute the gradient of such a gather on CUDA, and adds in their order.
    """
    batch, channels, height, width = image.shape
    x = ((grid[..., 0] + 1) * width - 1) / 2
    y = ((grid[..., 1] + 1) * height - 1) / 2
    x0, y0 = x.detach().floor(), y.detach().floor()
    pixels = image.permute(0, 2, 3, 1).reshape(-1, channels)
    first = torch.arange(batch, device=image.device).reshape(-1, 1, 1) * (height * width)
    total = None
    for row, weight_y in ((y0, y0 + 1 - y), (y0 + 1, y - y0)):
        for column, weight_x in ((x0, x0 + 1 - x), (x0 + 1, x - x0)):
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            # Positions outside, of weight 0, are spread over the image: terms of one pixel are added in turn.
            index = first + row.remainder(height).long() * width + column.remainder(width).long()
            weight = (weight_y * weight_x * inside).to(image.dtype)
            term = pixels[index] * weight.unsqueeze(3)
            total = term if total is None else total + term
    return total.permute(0, 3, 1, 2)
