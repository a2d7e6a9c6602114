"""Squared distance of two feature maps whose vectors of channels are scaled to unit length.

Source: Zhang et al. 2018 (1801.03924), equation 1, before the mean over space.
"""

from __future__ import annotations

import torch

from . import impl as _impl
from .native import cpu, dispatch
from .native import library as native
from .native.params import DTYPES
from .native.sums import MAX_CHANNELS


def unit_distance(x: torch.Tensor, y: torch.Tensor, w: torch.Tensor | None = None) -> torch.Tensor:
    """Return `sum over c of w[c] * (unit(x)[c] - unit(y)[c]) ** 2` at each position, `[N, H, W]`.

    x, y: `[N, C, H, W]`, floating point. w: `[C]`, None for ones. Exactly 0, with a gradient of 0, where x
    and y are equal. The result has the dtype of x.

    On CUDA, a kernel computes channels-last maps in one pass, and the gradient to each of them in another.
    Second gradients, and maps with a gradient to w, are computed in plain torch.
    """
    if _has_kernels(x, y, w) and _impl.choose("unit_distance", "auto", x.device.type) != "ref":
        d = dispatch.attempt(native.unit_distance, "unit_distance", "auto", x, y, w)
        if d is not None:
            return d
    return cpu.unit_distance(x, y, w)  # plain torch, on any device


def _has_kernels(x, y, w) -> bool:
    if x.device.type == "cpu" or x.dtype not in DTYPES or x.shape[1] > MAX_CHANNELS:
        return False
    return (
        x.shape == y.shape
        and x.dtype == y.dtype
        and x.device == y.device
        and all(t.is_contiguous(memory_format=torch.channels_last) for t in (x, y))
        and (w is None or (w.shape == x.shape[1:2] and w.device == x.device and not w.requires_grad))
        and not dispatch.is_exporting()
    )


def _trial(device: torch.device) -> float:
    """Return the difference between kernels and reference on a small input, gradient included."""
    x = torch.linspace(-2, 2, 2 * 6 * 4 * 5, device=device).reshape(2, 4, 5, 6).permute(0, 3, 1, 2)
    y, w = x.cos(), torch.linspace(0, 1, 6, device=device)
    d, dx = cpu.unit_distance(x, y, w), cpu.unit_distance_grad(x[:, 0], x, y, w)
    pairs = (native.unit_distance(x, y, w), d), (native.UNIT_DISTANCE_GRAD(x[:, 0], x, y, w), dx)
    return sum(float((kernel - plain).abs().max()) for kernel, plain in pairs)


_impl.register("unit_distance", _trial, devices=("cuda",))
