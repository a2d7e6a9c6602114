"""Upsample, leaky ReLU, downsample: the nonlinearity of StyleGAN3, free of aliasing.

Source: Karras et al., "Alias-Free Generative Adversarial Networks", arXiv 2106.12423, section 3.2 and appendix B.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from . import impl as _impl
from .bias_act import bias_act, limit
from .upfirdn2d import check_filter, check_image, filter_size, parse_padding, upfirdn2d


def filtered_lrelu(
    x: torch.Tensor,
    fu: torch.Tensor | None = None,
    fd: torch.Tensor | None = None,
    b: torch.Tensor | None = None,
    up: int = 1,
    down: int = 1,
    padding: int | Sequence[int] = 0,
    gain: float = math.sqrt(2),
    slope: float = 0.2,
    clamp: float | None = None,
    flip_filter: bool = False,
    impl: str = "auto",
) -> torch.Tensor:
    """Add the bias, upsample with `fu`, apply leaky ReLU times gain, clamp, downsample with `fd`.

    x: `[N, C, H, W]`, floating point. fu, fd: `[t]` or `[ty, tx]`, None for the identity. b: `[C]` or None.
    up, down: int. padding: int, `[x, y]` or `[x0, x1, y0, y1]` in upsampled pixels, negative crops.
    slope: of the leaky ReLU below zero. clamp: limit of the magnitude between the filters, None for none.
    Returns `[N, C, H', W']`, `W' = (W*up + x0 + x1 - (taps_u - 1) - (taps_d - 1) + down - 1) // down`, likewise H'.
    Raises TypeError, ValueError for arguments that are out of form or leave no output pixel.
    """
    _impl.choose("filtered_lrelu", impl)
    padding = _check(x, fu, fd, b, up, down, padding, slope, clamp)
    if x.device.type == "cpu" and x.shape[1] >= 16:
        # Here and nowhere else so much is filtered that the layout that CPUs filter in twice as fast repays a copy.
        x = x.contiguous(memory_format=torch.channels_last)
    x = x if b is None else bias_act(x, b)
    # A leaky ReLU commutes with a positive gain, so the filter carries it and no pass over the pixels is spent.
    fold = gain if gain > 0 else 1
    x = upfirdn2d(x, fu, up=up, padding=padding, flip_filter=flip_filter, gain=up**2 * fold)
    x = _activate(x, float(slope), gain / fold, clamp)
    return upfirdn2d(x, fd, down=down, flip_filter=flip_filter)


def _activate(x, slope, gain, clamp):
    """Leaky ReLU, gain and clamp on upsampled pixels that nobody else holds."""
    if x.device.type != "cpu" and x.requires_grad and torch.is_grad_enabled():
        return _MaskedActivation.apply(x, slope, gain, clamp)
    # CPUs work through arithmetic far faster than through masks: torch keeps the activated pixels instead.
    x = F.leaky_relu(x, slope, inplace=True)
    x = x if gain == 1 else x * gain
    return x if clamp is None else limit(x, clamp)


class _MaskedActivation(torch.autograd.Function):
    """The activation that keeps one byte a pixel for its gradient: 0 clamped, 1 below zero, 2 above."""

    @staticmethod
    def forward(ctx, x, slope, gain, clamp):
        mask = (x > 0).to(torch.uint8).add_(1)
        y = F.leaky_relu(x, slope) * gain
        if clamp is not None:
            mask.mul_(y.abs() <= clamp)
            y = y.clamp_(-clamp, clamp)
        ctx.save_for_backward(mask)
        ctx.slope, ctx.gain = slope, gain
        return y

    @staticmethod
    def backward(ctx, dy):
        (mask,) = ctx.saved_tensors
        # Steps as constants of the dtype of dy: a lookup keeps half precision half and makes no float64.
        steps = dy.new_tensor([0.0, ctx.slope * ctx.gain, ctx.gain])
        return dy * steps[mask.int()], None, None, None


def _check(x, fu, fd, b, up, down, padding, slope, clamp):
    check_image(x, "filtered_lrelu")
    check_filter(fu, "filtered_lrelu", x)
    check_filter(fd, "filtered_lrelu", x)
    for name, factor in (("up", up), ("down", down)):
        if not isinstance(factor, int) or isinstance(factor, bool) or factor < 1:
            raise ValueError(f"filtered_lrelu: {name} must be a positive int, got {factor!r}")
    if b is not None and (not isinstance(b, torch.Tensor) or b.ndim != 1 or b.shape[0] != x.shape[1]):
        got = list(b.shape) if isinstance(b, torch.Tensor) else type(b).__name__
        raise ValueError(f"filtered_lrelu: b must be a tensor [{x.shape[1]}], got {got}")
    if not slope >= 0:
        raise ValueError(f"filtered_lrelu: slope must be at least 0, got {slope!r}")
    if clamp is not None and not clamp >= 0:
        raise ValueError(f"filtered_lrelu: clamp must be None or at least 0, got {clamp!r}")
    px0, px1, py0, py1 = parse_padding(padding)
    widths = (("width", x.shape[3], px0 + px1, 0), ("height", x.shape[2], py0 + py1, 1))
    for name, size, pad, axis in widths:
        left = size * up + pad - (filter_size(fu)[axis] - 1) - (filter_size(fd)[axis] - 1)
        if left < 1:
            raise ValueError(
                f"filtered_lrelu: {name} {size} with up {up} and padding {pad} leaves no pixel under filters of "
                f"{filter_size(fu)[axis]} and {filter_size(fd)[axis]} taps"
            )
    return [px0, px1, py0, py1]
