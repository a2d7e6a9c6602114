"""Fused multiply-add."""

from __future__ import annotations

import torch


def fma(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """Return `a * b + c` with broadcasting; differentiable any number of times."""
    return torch.addcmul(c, a, b)
