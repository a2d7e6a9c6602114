"""2-D convolutions whose derivatives of every order are convolutions.

A convolution y = x * w is bilinear. With C(x, w) the convolution, T(y, w) the transposed convolution and
W(x, y) the weight gradient, each derivative of one of the three is again one of the three:

    y = C(x, w):  dx = T(dy, w)   dw = W(x, dy)
    x = T(y, w):  dy = C(dx, w)   dw = W(dx, y)
    w = W(x, y):  dx = T(y, dw)   dy = C(x, dw)

torch's own double backward of a convolution turns W into a convolution with the batch as channels and the
image as kernel, for which cuDNN has no fast kernel (pytorch/pytorch#54840). R1 and path length
regularization take second derivatives, so this matters on CUDA; elsewhere torch's own autograd runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

# How many enclosing blocks ask for no gradients. A plain global, because backward runs in threads of its own.
_blocks = 0


@contextlib.contextmanager
def no_weight_gradients(disable: bool = True) -> Iterator[None]:
    """Skip the weight gradients of this module's convolutions in backward passes inside the block.

    What counts is where the gradient is taken, not where the convolution was called. A weight that is
    computed from other tensors passes no gradient on to them either. `disable=False` makes the block do
    nothing.
    """
    global _blocks
    step = 1 if disable else 0
    _blocks += step
    try:
        yield
    finally:
        _blocks -= step


def conv2d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> torch.Tensor:
    """Convolve as `torch.nn.functional.conv2d` does, with respect for `no_weight_gradients`."""
    if _is_bilinear(input, weight):
        y = _Convolution.apply(input, weight, _geometry(stride, padding, dilation, groups))
        return y if bias is None else y + bias.reshape(1, -1, 1, 1)
    weight = _gated(weight)
    if _is_batch_of_products(input, weight, bias, stride, padding):
        x = input.reshape(groups, weight.shape[1], -1)
        y = torch.bmm(weight.reshape(groups, -1, weight.shape[1]), x)
        return y.reshape(1, weight.shape[0], *input.shape[2:])
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups)


def conv_transpose2d(
    input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1
) -> torch.Tensor:
    """Convolve as `torch.nn.functional.conv_transpose2d` does, with respect for `no_weight_gradients`."""
    if _is_bilinear(input, weight):
        geometry = _geometry(stride, padding, dilation, groups)
        sizes = zip(input.shape[2:], weight.shape[2:], _pair(output_padding), *geometry[:3], strict=True)
        out_size = [(n - 1) * s - 2 * p + d * (k - 1) + 1 + extra for n, k, extra, s, p, d in sizes]
        y = _TransposedConvolution.apply(input, weight, geometry, out_size)
        return y if bias is None else y + bias.reshape(1, -1, 1, 1)
    return F.conv_transpose2d(input, _gated(weight), bias, stride, padding, output_padding, groups, dilation)


def _is_bilinear(input, weight) -> bool:
    """Whether the operations below run: on CUDA, if there is a gradient to take."""
    return input.is_cuda and torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad)


# ---- The three operations of the module's docstring


class _Geometry(NamedTuple):
    """Stride, padding and dilation as (y, x), and the number of groups, as the convolution C has them."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


def _geometry(stride, padding, dilation, groups) -> _Geometry:
    return _Geometry(_pair(stride), _pair(padding), _pair(dilation), groups)


def _pair(value) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


class _Convolution(torch.autograd.Function):
    """C(x, w)."""

    @staticmethod
    def forward(ctx, x, w, geometry):
        ctx.geometry, ctx.x_size, ctx.w_size = geometry, x.shape, w.shape
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, w if ctx.needs_input_grad[0] else None)
        return F.conv2d(x, w, None, *geometry)

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = _TransposedConvolution.apply(dy, w, ctx.geometry, ctx.x_size[2:])
        if ctx.needs_input_grad[1] and not _blocks:
            dw = _WeightGradient.apply(x, dy, ctx.geometry, ctx.w_size)
        return dx, dw, None


class _TransposedConvolution(torch.autograd.Function):
    """T(y, w): the transposed convolution whose result has the height and width `x_size`."""

    @staticmethod
    def forward(ctx, y, w, geometry, x_size):
        ctx.geometry, ctx.w_size = geometry, w.shape
        ctx.save_for_backward(y if ctx.needs_input_grad[1] else None, w if ctx.needs_input_grad[0] else None)
        sizes = zip(x_size, y.shape[2:], w.shape[2:], *geometry[:3], strict=True)
        extra = [x - ((n - 1) * s - 2 * p + d * (k - 1) + 1) for x, n, k, s, p, d in sizes]
        stride, padding, dilation, groups = geometry
        return F.conv_transpose2d(y, w, None, stride, padding, extra, groups, dilation)

    @staticmethod
    def backward(ctx, dx):
        y, w = ctx.saved_tensors
        dy = dw = None
        if ctx.needs_input_grad[0]:
            dy = _Convolution.apply(dx, w, ctx.geometry)
        if ctx.needs_input_grad[1] and not _blocks:
            dw = _WeightGradient.apply(dx, y, ctx.geometry, ctx.w_size)
        return dy, dw, None, None


class _WeightGradient(torch.autograd.Function):
    """W(x, y), of the shape `w_size`."""

    @staticmethod
    def forward(ctx, x, y, geometry, w_size):
        ctx.geometry, ctx.x_size = geometry, x.shape
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, y if ctx.needs_input_grad[0] else None)
        return torch.nn.grad.conv2d_weight(x, w_size, y, *geometry)

    @staticmethod
    def backward(ctx, dw):
        x, y = ctx.saved_tensors
        dx = dy = None
        if ctx.needs_input_grad[0]:
            dx = _TransposedConvolution.apply(y, dw, ctx.geometry, ctx.x_size[2:])
        if ctx.needs_input_grad[1]:
            dy = _Convolution.apply(x, dw, ctx.geometry)
        return dx, dy, None, None


# ---- torch's own convolutions, for devices other than CUDA


class _WeightGate(torch.autograd.Function):
    """The identity, whose gradient vanishes inside `no_weight_gradients`."""

    @staticmethod
    def forward(ctx, weight):
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad):
        return None if _blocks else grad


def _gated(weight: torch.Tensor) -> torch.Tensor:
    if weight.requires_grad and torch.is_grad_enabled():
        return _WeightGate.apply(weight)
    return weight


def _is_batch_of_products(input, weight, bias, stride, padding) -> bool:
    """Whether this is what modulated 1x1 convolutions ask for: a matrix for each sample, side by side.

    CPUs multiply them faster than they convolve in groups, backward above all
    (benchmarks/bench_modulated_conv.py).
    """
    return (
        input.device.type == "cpu"
        and input.ndim == 4
        and input.shape[0] == 1
        and weight.shape[1] < input.shape[1]
        and tuple(weight.shape[2:]) == (1, 1)
        and bias is None
        and stride in (1, (1, 1))
        and padding in (0, (0, 0))
    )
