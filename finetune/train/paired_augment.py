"""Paired augmentation: one random geometric change of student and teacher images before their distance."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from torch_utils.ops.grid_sample_gradfix import grid_sample

MAX_DEGREES = 5.0
MAX_SHIFT = 0.01  # of the size
PROBABILITY = 0.5  # of each change, for each image


def augment_pair(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Change both batches `[N, C, H, W]` by the same draw, differentiably; equal batches stay equal.

    Two of three changes are chosen for the batch: a horizontal flip, a rotation within ±5°, a shift within
    ±1 %. Bilinear, with reflection padding. All numbers are drawn on the device, in shapes that depend on
    that of the batch alone, as CUDA graphs need it.
    Source: the public code of the authors of 2605.08577 draws so by default.
    """
    theta = draw_transforms(len(a), a.device, aspect=a.shape[2] / a.shape[3])
    grid = reflect(F.affine_grid(theta, list(a.shape), align_corners=False), a.shape[2], a.shape[3])
    return grid_sample(a, grid), grid_sample(b, grid)


def reflect(grid: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Move positions (x, y) from -1 to 1 into an image, by reflection at its edges.

    At most to the centers of the outermost pixels, beyond which sampling would fade to zero.
    """
    x, y = (1 - (torch.remainder(grid + 1, 4) - 2).abs()).unbind(dim=3)
    most_x, most_y = 1 - 1 / width, 1 - 1 / height
    return torch.stack([x.clamp(-most_x, most_x), y.clamp(-most_y, most_y)], dim=3)


def draw_transforms(count: int, device: torch.device, aspect: float = 1.0) -> torch.Tensor:
    """Return affine matrices `[count, 2, 3]` from output to input coordinates, both from -1 to 1.

    aspect: height divided by width, without which a rotation would shear images that are not square.
    """
    chosen = torch.arange(3, device=device) != torch.rand([3], device=device).argmin()
    applied = (torch.rand([count, 3], device=device) < PROBABILITY) & chosen
    degrees, right, down = (2 * torch.rand([count, 3], device=device) - 1).unbind(dim=1)
    flip = torch.where(applied[:, 0], -1.0, 1.0)
    angle = applied[:, 1] * degrees * math.radians(MAX_DEGREES)
    shift = applied[:, 2:] * torch.stack([right, down], dim=1) * (2 * MAX_SHIFT)
    cos, sin = angle.cos(), angle.sin()
    rows = [torch.stack([flip * cos, -flip * sin * aspect], dim=1), torch.stack([sin / aspect, cos], dim=1)]
    return torch.cat([torch.stack(rows, dim=1), shift.unsqueeze(2)], dim=2)
