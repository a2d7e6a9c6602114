"""Upsample, leaky ReLU, downsample: the alias-free nonlinearity of StyleGAN3.

Source: Karras et al., "Alias-Free Generative Adversarial Networks", arXiv 2106.12423, section 3.2, appendix
B.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from torch_utils import misc

from . import impl as _impl
from .bias_act import bias_act, clamp_if_needed
from .native import dispatch
from .native import library as native
from .native.specs import NO_CLAMP, FilteredLreluSpec
from .upfirdn2d import check_filter, check_image, filter_size, parse_padding, positive_int, upfirdn2d


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
    gain: above 0. Returns `[N, C, H', W']` in the dtype of `x`, likewise for H':
    `W' = (W*up + x0 + x1 - (taps_u - 1) - (taps_d - 1) + down - 1) // down`.
    Raises TypeError, ValueError for arguments that are invalid or leave no output pixel.
    """
    up, down = positive_int(up, "up"), positive_int(down, "down")
    padding = list(parse_padding(padding))
    _check(x, fu, fd, b, gain, slope, clamp)
    _check_size(x, fu, fd, up, padding)
    if _impl.choose("filtered_lrelu", impl, x.device.type) != "ref" and not dispatch.is_exporting():
        y = dispatch.attempt(
            native.filtered_lrelu,
            *("filtered_lrelu", impl, x, fu, fd, None if b is None else b.to(x.dtype)),
            _spec(x, fu, fd, up, down, padding, gain, slope, clamp, flip_filter),
        )
        if y is not None:
            return y
    return _reference(x, fu, fd, b, up, down, padding, gain, slope, clamp, flip_filter)


def _spec(x, fu, fd, up, down, padding, gain, slope, clamp, flip_filter):
    px0, px1, py0, py1 = padding
    (up_w, up_h), (down_w, down_h) = filter_size(fu), filter_size(fd)
    out_h = (x.shape[2] * up + py0 + py1 - (up_h - 1) - (down_h - 1) + down - 1) // down
    out_w = (x.shape[3] * up + px0 + px1 - (up_w - 1) - (down_w - 1) + down - 1) // down
    limits = NO_CLAMP if clamp is None else float(clamp)
    # A leaky ReLU commutes with a positive gain, so the first filter carries it.
    return FilteredLreluSpec(
        *(up, down, px0, py0, out_h, out_w, bool(flip_filter)),
        *(up**2 * float(gain), float(slope), limits),
    )


# ---- Reference


def _reference(x, fu, fd, b, up, down, padding, gain, slope, clamp, flip_filter):
    dtype = x.dtype
    if x.device.type == "cpu":
        if dtype in (torch.float16, torch.bfloat16):  # rounded once, at the end
            x = x.float()
        if x.shape[1] >= 16:
            # Here and nowhere else so much is filtered that the layout CPUs filter in twice as fast repays a
            # copy.
            x = x.contiguous(memory_format=torch.channels_last)
    if b is not None:
        x = bias_act(x, b, impl="ref")
    # A leaky ReLU commutes with a positive gain, so the filter carries it and no pass over the pixels is
    # spent.
    x = upfirdn2d(
        x, fu, up=up, padding=padding, flip_filter=flip_filter, gain=up**2 * float(gain), impl="ref"
    )
    x = _activate(x, float(slope), clamp)
    if fd is not None or down > 1:
        x = upfirdn2d(x, fd, down=down, flip_filter=flip_filter, impl="ref")
    return x.to(dtype)


def _activate(x, slope, clamp):
    """Apply leaky ReLU and clamp to upsampled pixels, in place."""
    if x.device.type != "cpu" and x.requires_grad and torch.is_grad_enabled():
        return _MaskedActivation.apply(x, slope, clamp)
    # CPUs work through arithmetic far faster than through masks, so there torch keeps the activated pixels
    # instead.
    x = F.leaky_relu(x, slope, inplace=True)
    return x if clamp is None else clamp_if_needed(x, clamp)


class _MaskedActivation(torch.autograd.Function):
    """Activation that saves one byte per pixel for its gradient: 0 clamped, 1 below zero, 2 above."""

    @staticmethod
    def forward(ctx, x, slope, clamp):
        mask = (x > 0).to(torch.uint8).add_(1)
        y = F.leaky_relu(x, slope)
        if clamp is not None:
            mask.mul_(y.abs() <= clamp)
            y.clamp_(-clamp, clamp)
        ctx.save_for_backward(mask)
        ctx.slope = slope
        return y

    @staticmethod
    def backward(ctx, dy):
        (mask,) = ctx.saved_tensors
        # Kept: a copy from the host would wait for the device, which a CUDA graph does not allow.
        slopes = misc.constant((0.0, ctx.slope, 1.0), dtype=dy.dtype, device=dy.device)
        return dy * slopes[mask.int()], None, None


def _check(x, fu, fd, b, gain, slope, clamp):
    check_image(x, "filtered_lrelu")
    check_filter(fu, "filtered_lrelu", x)
    check_filter(fd, "filtered_lrelu", x)
    if b is not None and (not isinstance(b, torch.Tensor) or b.ndim != 1 or b.shape[0] != x.shape[1]):
        got = list(b.shape) if isinstance(b, torch.Tensor) else type(b).__name__
        raise ValueError(f"filtered_lrelu: b must be a tensor [{x.shape[1]}], got {got}")
    if b is not None and b.device != x.device:
        raise ValueError(f"filtered_lrelu: b is on {b.device}, x on {x.device}")
    if not gain > 0:
        raise ValueError(f"filtered_lrelu: gain must be above 0, got {gain!r}")
    if not slope >= 0:
        raise ValueError(f"filtered_lrelu: slope must be at least 0, got {slope!r}")
    if clamp is not None and not clamp >= 0:
        raise ValueError(f"filtered_lrelu: clamp must be None or at least 0, got {clamp!r}")


def _check_size(x, fu, fd, up, padding):
    px0, px1, py0, py1 = padding
    axes = zip(
        ("width", "height"),
        (x.shape[3], x.shape[2]),
        (px0 + px1, py0 + py1),
        filter_size(fu),
        filter_size(fd),
    )
    for name, size, pad, taps_u, taps_d in axes:
        if size * up + pad < taps_u + taps_d - 1:
            raise ValueError(
                f"filtered_lrelu: {name} {size} with up {up} and padding {pad} becomes {size * up + pad}, "
                f"fewer pixels than filters of {taps_u} and {taps_d} taps need"
            )


def _trial(device: torch.device) -> float:
    """Return the difference between kernel and reference on a small input."""
    x = torch.linspace(-2, 2, 2 * 3 * 12 * 12, device=device).reshape(2, 3, 12, 12).sin()
    b, f = torch.tensor([0.5, -0.5, 0.1], device=device), torch.tensor([1.0, 3, 3, 1], device=device) / 8
    kernel = native.filtered_lrelu(x, f, f, b, FilteredLreluSpec(2, 2, 3, 3, 12, 12, False, 4.0, 0.2, 0.5))
    error = float((kernel - filtered_lrelu(x, f, f, b, 2, 2, 3, gain=1, clamp=0.5, impl="ref")).abs().max())
    if device.type != "cuda":
        return error
    wave = torch.arange(8, device=device).mul(0.4).sin()
    filters = (wave / 4, wave.outer(wave.flip(0)) / 16)  # different in each direction
    return error + sum(_trial_in_half(x, b, f, fd) for fd in filters)


def _trial_in_half(x: torch.Tensor, b: torch.Tensor, fu: torch.Tensor, fd: torch.Tensor) -> float:
    """Return the difference on tensor cores, in float16, scaled to the precision of float32."""
    spec = FilteredLreluSpec(2, 2, 4, 4, 12, 12, False, 4.0, 0.2, 0.5)
    with torch.enable_grad():
        given = [each.half().requires_grad_(True) for each in (x, b)]
        exact = [each.detach().requires_grad_(True) for each in (x, b)]
        kernel = native.filtered_lrelu(given[0], fu, fd, given[1], spec)
        plain = filtered_lrelu(exact[0], fu, fd, exact[1], 2, 2, [4, 5, 4, 5], gain=1, clamp=0.5, impl="ref")
        found = [kernel.detach(), *torch.autograd.grad(kernel, given, x.half())]
        expected = [plain.detach(), *torch.autograd.grad(plain, exact, x)]
    terms = (1, 1, x.numel() / x.shape[1])  # the gradient of the bias is a sum
    errors = [(a - b).abs().max() / n for a, b, n in zip(found, expected, terms, strict=True)]
    return float(torch.stack(errors).max()) * 2**-6  # NaN stays NaN


_impl.register("filtered_lrelu", _trial)
