"""Bilinear grid sampling that can be differentiated more than once.

torch's own backward pass is not differentiable. Sampling is linear in the image, so for a fixed grid the op
and its adjoint differentiate into each other, any number of times. Where the grid itself needs gradients the
op is written out as gathers, which torch differentiates.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def grid_sample(input: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """Sample images bilinearly at normalized positions; zero outside, pixel edges at -1 and 1.

    input: `[N, C, H, W]`. grid: `[N, H', W', 2]` in the dtype of `input`, (x, y) in [-1, 1] where the image
    is. Equals `torch.nn.functional.grid_sample(..., mode='bilinear', padding_mode='zeros',
    align_corners=False)`.
    Returns `[N, C, H', W']`. Raises ValueError for shapes that do not fit.
    """
    if input.ndim != 4 or grid.ndim != 4 or grid.shape[3] != 2 or grid.shape[0] != input.shape[0]:
        raise ValueError(
            "grid_sample: input must be [N, C, H, W] and grid [N, H', W', 2], "
            f"got {list(input.shape)} and {list(grid.shape)}"
        )
    dtype = input.dtype
    needs_grid = torch.is_grad_enabled() and grid.requires_grad
    # Positions need more digits than half precision has. torch's kernels for CUDA compute them in float32.
    if dtype in (torch.float16, torch.bfloat16) and (needs_grid or input.device.type == "cpu"):
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
        with torch.enable_grad():
            image = dy.new_zeros(size).requires_grad_()
            (dx,) = torch.autograd.grad(_sample(image, grid), image, dy)
        return dx

    @staticmethod
    def backward(ctx, ddx):
        (grid,) = ctx.saved_tensors
        return _Sample.call(ddx, grid), None, None


def _sample(image, grid):
    return F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _gathered(image, grid):
    """Compute the same values by four gathers, differentiable in image and grid."""
    batch, channels, height, width = image.shape
    x = ((grid[..., 0] + 1) * width - 1) / 2
    y = ((grid[..., 1] + 1) * height - 1) / 2
    x0, y0 = x.detach().floor(), y.detach().floor()
    flat = image.reshape(batch, channels, height * width)
    total = None
    for row, weight_y in ((y0, y0 + 1 - y), (y0 + 1, y - y0)):
        for column, weight_x in ((x0, x0 + 1 - x), (x0 + 1, x - x0)):
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            index = row.clamp(0, height - 1).long() * width + column.clamp(0, width - 1).long()
            index = index.reshape(batch, 1, -1).expand(-1, channels, -1)
            weight = weight_y * weight_x * inside
            term = flat.gather(2, index).reshape(batch, channels, *grid.shape[1:3]) * weight[:, None]
            total = term if total is None else total + term
    return total
