"""2-D convolutions whose derivatives of every order are convolutions.

A convolution y = x * w is bilinear. With C(x, w) the convolution, T(y, w) the transposed convolution and
W(x, y) the weight gradient, each derivative of one of the three is again one of the three:

    y = C(x, w):  dx = T(dy, w)   dw = W(x, dy)
    x = T(y, w):  dy = C(dx, w)   dw = W(dx, y)
    w = W(x, y):  dx = T(y, dw)   dy = C(x, dw)

torch's own double backward of a convolution turns W into a convolution with the batch as channels and the
image as kernel, for which cuDNN has no fast kernel (pytorch/pytorch#54840). R1 and path length
regularization take second derivatives, so this matters on CUDA; elsewhere torch's own autograd runs.

Inside `split_float32` C and T run on tensor cores for float32: each factor is split into its leading 11 bits,
which TF32 holds exactly, and the rest, and of the four products all but that of the two rests is kept. The
three products are one convolution over three times as many terms. W is left as it is: cuDNN's own float32
kernels for it are faster than that. `bmm` does the same for matrices, gradients included.
Source: Ootomo and Yokota 2022 (2203.03341), for matrix products.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

# Number of enclosing blocks without weight gradients. A global: backward runs in threads of its own.
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


_splitting = False


@contextlib.contextmanager
def split_float32(enable: bool = True) -> Iterator[None]:
    """Run float32 convolutions, and products by `bmm`, on CUDA as three TF32 products inside the block.

    The error is some five times that of float32, because tensor cores cut off the last bits of a running sum
    where others round. Needs tensor cores with TF32 (compute capability 8.0); on other devices nothing
    changes.
    """
    global _splitting
    before, _splitting = _splitting, enable
    try:
        yield
    finally:
        _splitting = before


def conv2d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> torch.Tensor:
    """Convolve as `torch.nn.functional.conv2d` does; `no_weight_gradients` applies."""
    if _is_bilinear(input, weight):
        y = _Convolution.apply(input, weight, _geometry(stride, padding, dilation, groups))
        return y if bias is None else y + bias.reshape(1, -1, 1, 1)
    if (stride, groups) == (1, 1) and _pair(padding) == (0, 0) and _is_thin(input, weight):
        y = _product(input, _gated(weight))
        return y if bias is None else y + bias.reshape(1, -1, 1, 1)
    return F.conv2d(input, _gated(weight), bias, stride, padding, dilation, groups)


def conv_transpose2d(
    input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1
) -> torch.Tensor:
    """Convolve as `torch.nn.functional.conv_transpose2d` does; `no_weight_gradients` applies."""
    if _is_bilinear(input, weight):
        geometry = _geometry(stride, padding, dilation, groups)
        sizes = zip(input.shape[2:], weight.shape[2:], _pair(output_padding), *geometry[:3], strict=True)
        out_size = [(n - 1) * s - 2 * p + d * (k - 1) + 1 + extra for n, k, extra, s, p, d in sizes]
        y = _TransposedConvolution.apply(input, weight, geometry, out_size)
        return y if bias is None else y + bias.reshape(1, -1, 1, 1)
    return F.conv_transpose2d(input, _gated(weight), bias, stride, padding, output_padding, groups, dilation)


def bmm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Multiply matrices as `torch.bmm` does; `split_float32` applies."""
    return _MatrixProduct.apply(a, b) if _splits_matrices(a, b) else torch.bmm(a, b)


def _is_bilinear(input, weight) -> bool:
    """Return whether the operations below run: on CUDA, with a gradient to take or a factor to split."""
    if not input.is_cuda:
        return False
    return _splits(input, weight, 1) or (
        torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad)
    )


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
        if _splits(x, w, geometry.groups):
            with tf32(True):
                return F.conv2d(_parts(x, 1), _counterparts(w, 1), None, *geometry)
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
        if _splits(y, w, groups):
            y, w = _parts(y, 1), _counterparts(w, 0)
            with tf32(True):
                return F.conv_transpose2d(y, w, None, stride, padding, extra, groups, dilation)
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


# ---- Float32 on tensor cores

# Channels, and pixels of a batch, from which convolutions are split. Measured in whole steps of 32 images on
# an H200; fewer images have not been.
_MANY_CHANNELS, _MANY_PIXELS = 32, 512


def _splits(img: torch.Tensor, w: torch.Tensor, groups: int) -> bool:
    """Return whether the factors of a convolution are split."""
    if not _splitting or img.dtype != torch.float32 or groups > 1:
        return False
    pixels = img.shape[0] * img.shape[2] * img.shape[3]
    return min(w.shape[:2]) >= _MANY_CHANNELS and pixels >= _MANY_PIXELS and _has_tf32(img.device)


def _splits_matrices(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether the factors [N, M, K] and [N, K, P] are split."""
    if not _splitting or not a.dtype == b.dtype == torch.float32:
        return False
    return min(*a.shape[1:], b.shape[2]) >= _MANY_CHANNELS and _has_tf32(a.device)


class _MatrixProduct(torch.autograd.Function):
    """The product of [N, M, K] and [N, K, P], in three parts."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a if ctx.needs_input_grad[1] else None, b if ctx.needs_input_grad[0] else None)
        a_leading, b_leading = _leading_bits(a), _leading_bits(b)
        with tf32(True):
            y = torch.bmm(a - a_leading, b_leading)  # the small parts first
            y.baddbmm_(a_leading, b - b_leading)
            return y.baddbmm_(a_leading, b_leading)

    @staticmethod
    def backward(ctx, dy):
        a, b = ctx.saved_tensors
        da = bmm(dy, b.transpose(1, 2)) if ctx.needs_input_grad[0] else None
        db = bmm(a.transpose(1, 2), dy) if ctx.needs_input_grad[1] else None
        return da, db


def _has_tf32(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def _parts(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Put the leading bits, the rest and the leading bits side by side, to multiply `_counterparts`."""
    leading = _leading_bits(x)
    return torch.cat([leading, x - leading, leading], dim)


def _counterparts(x: torch.Tensor, dim: int) -> torch.Tensor:
    leading = _leading_bits(x)
    return torch.cat([leading, leading, x - leading], dim)


def _leading_bits(x: torch.Tensor) -> torch.Tensor:
    """Drop the 13 bits of float32's mantissa that TF32 does not have."""
    return (x.view(torch.int32) & -(1 << 13)).view(torch.float32)


@contextlib.contextmanager
def tf32(allow: bool) -> Iterator[None]:
    """Compute float32 convolutions and products on CUDA in TF32 or in float32 inside the block.

    torch 2.9 and later have `fp32_precision` beside `allow_tf32`, and refuse to read the latter where the two
    differ, as after a caller set the former. torch.compile reads it, so both are set.
    """
    backends: Any = torch.backends.cudnn, torch.backends.cuda.matmul
    cudnn, matmul = backends
    settings = (cudnn.conv, cudnn.rnn, matmul) if hasattr(matmul, "fp32_precision") else ()
    precisions = [each.fp32_precision for each in settings]
    with _no_advice():
        switches = [_switch(each) for each in backends]
        for each in backends:
            each.allow_tf32 = allow
    for each in settings:  # `allow_tf32` leaves a convolution to the value for all backends
        each.fp32_precision = "tf32" if allow else "ieee"
    try:
        yield
    finally:
        with _no_advice():
            for each, switch in zip(backends, switches, strict=True):
                if switch is not None:
                    each.allow_tf32 = switch
        for each, precision in zip(settings, precisions, strict=True):
            each.fp32_precision = precision


def _switch(backend: Any) -> bool | None:
    """Return `allow_tf32`, or None if torch refuses to read it."""
    try:
        return backend.allow_tf32
    except RuntimeError:
        return None


@contextlib.contextmanager
def _no_advice() -> Iterator[None]:
    """Silence the advice of some versions of torch to set `fp32_precision`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*TF32", category=UserWarning)
        yield


# ---- torch's own convolutions, for devices other than CUDA

_THIN = 4  # channels of an image, whose 1x1 convolutions in channels-last have no fast kernel on a CPU


def _is_thin(input: torch.Tensor, weight: torch.Tensor) -> bool:
    """Return whether a 1x1 convolution takes or makes images and the features are channels-last on a CPU."""
    return (
        input.device.type == "cpu"
        and weight.shape[2:] == (1, 1)
        and min(weight.shape[:2]) <= _THIN
        and input.is_contiguous(memory_format=torch.channels_last)
    )


def _product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Run a 1x1 convolution as a product of matrices, in an order in which each gradient is a fast one."""
    channels_out, channels_in = weight.shape[:2]
    matrix = weight.flatten(1).t()
    if channels_in <= _THIN:
        matrix = matrix.contiguous()  # torch takes the order of the products of a gradient from the strides
    pixels = x.permute(0, 2, 3, 1)
    y = pixels.reshape(-1, channels_in).mm(matrix)
    return y.reshape(*pixels.shape[:3], channels_out).permute(0, 3, 1, 2)


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
