"""Fused multiply-add."""

from __future__ import annotations

import torch

from . import impl as _impl
from .native import dispatch
from .native import library as native
from .native.params import DTYPES
from .native.sums import MAX_CHANNELS


def fma(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """Return `a * b + c` with broadcasting; differentiable any number of times.

    On CUDA, kernels compute images [N, C, H, W] times [N, C, 1, 1] plus a number (0-dim), [H, W] or
    [1 or N, 1, H, W] in one pass, likewise the gradients. Everything else is torch.addcmul.
    """
    if _has_kernels(a, b, c) and _impl.choose("fma", "auto", a.device.type) != "ref":
        y = dispatch.attempt(native.fma, "fma", "auto", a, b, c)
        if y is not None:
            return y
    return torch.addcmul(c, a, b)


def _has_kernels(a, b, c) -> bool:
    if a.device.type == "cpu" or a.ndim != 4 or a.dtype not in DTYPES or a.shape[1] > MAX_CHANNELS:
        return False
    n, channels, height, width = a.shape
    return (
        b.shape == (n, channels, 1, 1)
        and c.shape in ((), (height, width), (1, 1, height, width), (n, 1, height, width))
        and a.dtype == b.dtype == c.dtype
        and a.device == b.device == c.device
        and not dispatch.is_exporting()
    )


def _trial(device: torch.device) -> float:
    """Return the difference between kernels and reference on a small input, gradients included."""
    error = 0.0
    for layout in (torch.contiguous_format, torch.channels_last):
        a = torch.linspace(-2, 2, 2 * 4 * 6 * 8, device=device).reshape(2, 4, 6, 8).to(memory_format=layout)
        b, dy = a[:, :, :1, :1].contiguous(), a.sin()
        c = torch.linspace(-1, 1, 2 * 6 * 8, device=device).reshape(2, 1, 6, 8)
        da, db, dc = native.FMA_GRAD(dy, a, b, True, True)
        pairs = (
            (native.fma(a, b, c), torch.addcmul(c, a, b)),
            (da, dy * b),
            (db, (dy * a).sum((2, 3), keepdim=True)),
            (dc, dy.sum(1, keepdim=True)),
        )
        error += sum(float((kernel - plain).abs().max()) for kernel, plain in pairs)
    return error


_impl.register("fma", _trial, devices=("cuda",))
