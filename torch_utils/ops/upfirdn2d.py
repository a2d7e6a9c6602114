"""Pad, upsample, filter and downsample images in one step.

Along one axis, with taps g in correlation order, the op is `y[m] = sum_i g[i*up + pad0 - m*down] * x[i]`.
Nothing is multiplied with the zeros between the pixels: upsampling is a transposed convolution with stride
`up`, downsampling a convolution with stride `down`, each channel by itself. The adjoint of the op is the same
op with `up` and `down` exchanged and the filter flipped, hence every order of gradient.

Source: Karras et al., "Analyzing and Improving the Image Quality of StyleGAN", arXiv 1912.04958, appendix B.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from . import impl as _impl
from .native import dispatch
from .native import library as native
from .native.specs import Upfirdn2dSpec

MIN_SEPARABLE_TAPS = 8  # a shorter 1-D filter is cheaper as one 2-D pass than as two 1-D passes


def setup_filter(
    f: Any,
    device: torch.device | str = "cpu",
    normalize: bool = True,
    flip_filter: bool = False,
    gain: float = 1,
    separable: bool | None = None,
) -> torch.Tensor:
    """Build the float32 filter tensor that `upfirdn2d` takes.

    f: scalar, taps `[t]`, taps `[ty, tx]`, tensor or array; None means the identity.
    separable: keep 1-D taps 1-D (True) or make their outer product (False); default: 1-D from 8 taps on.
    Returns `[t]` or `[ty, tx]`, summing to 1 if `normalize`, times `gain ** (ndim / 2)`.
    Raises ValueError for taps of more than two dimensions, or none.
    """
    # Name the device explicitly: a default device, such as 'meta', must not determine that of the taps.
    taps = torch.as_tensor(1 if f is None else f, dtype=torch.float32, device=device)
    if taps.ndim > 2 or taps.numel() == 0:
        raise ValueError(f"setup_filter: f must be a scalar, [t] or [ty, tx], got shape {list(taps.shape)}")
    if taps.ndim == 0:
        taps = taps[None]
    if separable is None:
        separable = taps.ndim == 1 and taps.numel() >= MIN_SEPARABLE_TAPS
    if separable and taps.ndim == 2:
        raise ValueError("setup_filter: separable=True needs a 1-D filter, got a 2-D one")
    if taps.ndim == 1 and not separable:
        taps = torch.outer(taps, taps)
    if normalize:
        taps = taps / taps.sum()
    if flip_filter:
        taps = taps.flip(list(range(taps.ndim)))
    return taps * gain ** (taps.ndim / 2)


def upfirdn2d(
    x: torch.Tensor,
    f: torch.Tensor | None,
    up: int | Sequence[int] = 1,
    down: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    flip_filter: bool = False,
    gain: float = 1,
    impl: str = "auto",
) -> torch.Tensor:
    """Insert zeros, pad, convolve with `f` over full overlaps, keep every `down`-th pixel, times `gain`.

    x: `[N, C, H, W]`, floating point. f: `[ty, tx]`, or `[t]` to be used along both axes, or None for the
    identity; it gets no gradient. up, down: int or `[x, y]`. padding: int, `[x, y]` or `[x0, x1, y0, y1]` in
    upsampled pixels, negative crops. flip_filter: False convolves, True correlates.
    Returns `[N, C, (H*up + y0 + y1 - ty) // down + 1, likewise W]` in the dtype of `x`.
    Raises TypeError, ValueError for arguments that are invalid or leave no output pixel.
    """
    ux, uy = parse_scaling(up, "up")
    dx, dy = parse_scaling(down, "down")
    px0, px1, py0, py1 = parse_padding(padding)
    check_image(x, "upfirdn2d")
    check_filter(f, "upfirdn2d", x)
    fw, fh = filter_size(f)
    axes = (Axis(fh, uy, dy, py0, py1), Axis(fw, ux, dx, px0, px1))
    for axis, size, name in zip(axes, x.shape[2:], ("height", "width")):
        if axis.num_outputs(size) < 1:
            raise ValueError(
                f"upfirdn2d: {name} {size} with up {axis.up} and padding [{axis.pad0}, {axis.pad1}] becomes "
                f"{size * axis.up + axis.pad0 + axis.pad1}, fewer than the {axis.taps} taps of the filter"
            )
    if _impl.choose("upfirdn2d", impl, x.device.type) != "ref" and not dispatch.is_exporting():
        out_h, out_w = axes[0].num_outputs(x.shape[2]), axes[1].num_outputs(x.shape[3])
        spec = Upfirdn2dSpec(ux, uy, dx, dy, px0, py0, out_h, out_w, bool(flip_filter), float(gain))
        y = dispatch.attempt(native.upfirdn2d, "upfirdn2d", impl, x, f, spec)
        if y is not None:
            return y
    return _Upfirdn2d.call(x, f, axes, bool(flip_filter), float(gain))


def filter2d(x, f, padding=0, flip_filter=False, gain=1, impl="auto") -> torch.Tensor:
    """Filter `x` so that with padding 0 the size stays; arguments as in `upfirdn2d`, padding is added."""
    px0, px1, py0, py1 = parse_padding(padding)
    fw, fh = filter_size(f)
    pad = [px0 + fw // 2, px1 + (fw - 1) // 2, py0 + fh // 2, py1 + (fh - 1) // 2]
    return upfirdn2d(x, f, padding=pad, flip_filter=flip_filter, gain=gain, impl=impl)


def upsample2d(x, f, up=2, padding=0, flip_filter=False, gain=1, impl="auto") -> torch.Tensor:
    """Enlarge `x` by `up`, centered, at equal brightness; arguments as in `upfirdn2d`, padding is added."""
    ux, uy = parse_scaling(up, "up")
    px0, px1, py0, py1 = parse_padding(padding)
    fw, fh = filter_size(f)
    pad = [px0 + (fw + ux - 1) // 2, px1 + (fw - ux) // 2, py0 + (fh + uy - 1) // 2, py1 + (fh - uy) // 2]
    return upfirdn2d(x, f, up=up, padding=pad, flip_filter=flip_filter, gain=gain * ux * uy, impl=impl)


def downsample2d(x, f, down=2, padding=0, flip_filter=False, gain=1, impl="auto") -> torch.Tensor:
    """Shrink `x` by `down`, keeping it centered; arguments as in `upfirdn2d`, padding is added."""
    dx, dy = parse_scaling(down, "down")
    px0, px1, py0, py1 = parse_padding(padding)
    fw, fh = filter_size(f)
    pad = [px0 + (fw - dx + 1) // 2, px1 + (fw - dx) // 2, py0 + (fh - dy + 1) // 2, py1 + (fh - dy) // 2]
    return upfirdn2d(x, f, down=down, padding=pad, flip_filter=flip_filter, gain=gain, impl=impl)


# ---- Checks, shared with the ops that are built on this one


def parse_scaling(scaling: int | Sequence[int], name: str) -> tuple[int, int]:
    """Return (x, y) of a factor given as int or `[x, y]`."""
    pair = _ints(scaling, name)
    pair = pair * 2 if len(pair) == 1 else pair
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"{name} must be a positive int or a pair [x, y] of them, got {scaling!r}")
    return pair[0], pair[1]


def parse_padding(padding: int | Sequence[int]) -> tuple[int, int, int, int]:
    """Return (x0, x1, y0, y1) of a padding given as int, `[x, y]` or `[x0, x1, y0, y1]`."""
    values = _ints(padding, "padding")
    if len(values) == 1:
        values = values * 4
    elif len(values) == 2:
        values = [values[0], values[0], values[1], values[1]]
    if len(values) != 4:
        raise ValueError(f"padding must be an int, [x, y] or [x0, x1, y0, y1], got {padding!r}")
    return values[0], values[1], values[2], values[3]


def positive_int(value: int, name: str) -> int:
    """Return a factor that must be one int for both axes."""
    (number,) = _ints(value, name) if not isinstance(value, (Sequence, np.ndarray)) else (0,)
    if number < 1:
        raise ValueError(f"{name} must be a positive int, got {value!r}")
    return number


def _ints(value: int | Sequence[int], name: str) -> list[int]:
    if isinstance(value, np.ndarray):
        value = value.tolist()
    values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if not all(isinstance(v, (int, np.integer)) and not isinstance(v, bool) for v in values):
        raise TypeError(f"{name} must hold ints, got {value!r}")
    return [int(v) for v in values]


def filter_size(f: torch.Tensor | None) -> tuple[int, int]:
    """Return (width, height) in taps; (1, 1) for the identity None."""
    if f is None:
        return 1, 1
    return f.shape[-1], f.shape[0]


def check_image(x: torch.Tensor, op: str) -> None:
    """Raise unless `x` is a batch of images."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{op}: x must be a tensor, got {type(x).__name__}")
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"{op}: x must be [N, C, H, W] floating point, got {list(x.shape)} {x.dtype}")


def check_filter(f: torch.Tensor | None, op: str, x: torch.Tensor) -> None:
    """Raise unless `f` is a filter that can be applied to `x`."""
    if f is None:
        return
    if not isinstance(f, torch.Tensor):
        raise TypeError(f"{op}: a filter must be a tensor of setup_filter or None, got {type(f).__name__}")
    if f.ndim not in (1, 2) or f.numel() == 0 or not f.is_floating_point():
        raise ValueError(f"{op}: a filter must be float [t] or [ty, tx], got {list(f.shape)} {f.dtype}")
    if f.device != x.device:
        raise ValueError(f"{op}: filter is on {f.device}, x on {x.device}")
    if f.requires_grad:
        raise ValueError(f"{op}: filters get no gradient, but this one requires it; pass f.detach()")


# ---- Reference


class Axis(NamedTuple):
    """Geometry along one axis."""

    taps: int
    up: int
    down: int
    pad0: int
    pad1: int

    def num_outputs(self, size: int) -> int:
        return (size * self.up + self.pad0 + self.pad1 - self.taps) // self.down + 1

    def adjoint(self, size: int) -> Axis:
        """Return the spec that takes gradients back to images of that size."""
        pad0 = self.taps - 1 - self.pad0
        pad1 = (size - 1) * self.up - self.num_outputs(size) * self.down + 1 + self.pad0
        return Axis(self.taps, self.down, self.up, pad0, pad1)


class _Upfirdn2d(torch.autograd.Function):
    """The op as a linear map with its adjoint."""

    @classmethod
    def call(cls, x, f, axes, flip_filter, gain):
        if x.requires_grad and torch.is_grad_enabled():
            return cls.apply(x, f, axes, flip_filter, gain)
        return _reference(x, f, axes, flip_filter, gain)

    @staticmethod
    def forward(x, f, axes, flip_filter, gain):
        return _reference(x, f, axes, flip_filter, gain)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, f, *ctx.options = inputs
        ctx.save_for_backward(f)
        ctx.size = x.shape[2:]

    @staticmethod
    def backward(ctx, dy):
        (f,) = ctx.saved_tensors
        axes, flip_filter, gain = ctx.options
        axes = tuple(axis.adjoint(size) for axis, size in zip(axes, ctx.size))
        return _Upfirdn2d.call(dy, f, axes, not flip_filter, gain), None, None, None, None


def _reference(x, f, axes, flip_filter, gain):
    """Run one 2-D pass, or two 1-D passes for 1-D taps; half precision on the CPU is summed in float32."""
    dtype = x.dtype
    y_axis, x_axis = axes
    if x.numel() == 0:
        return x.new_zeros(*x.shape[:2], y_axis.num_outputs(x.shape[2]), x_axis.num_outputs(x.shape[3]))
    if x.device.type == "cpu" and dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    if f is None:
        if y_axis.up == x_axis.up == 1:
            # Nothing to filter. The product also makes the memory the caller's own.
            x = _pad(x, x_axis.pad0, x_axis.pad1, y_axis.pad0, y_axis.pad1)
            return (x[:, :, :: y_axis.down, :: x_axis.down] * gain).to(dtype)
        f = torch.ones([1, 1], dtype=x.dtype, device=x.device)
    taps = f.to(torch.promote_types(f.dtype, x.dtype))  # gain and taps are joined before any rounding to half
    if not flip_filter:
        taps = taps.flip(list(range(taps.ndim)))
    weighted = (taps * gain).to(x.dtype)

    separable = f.ndim == 1
    grows_y, grows_x = y_axis.up > 1, x_axis.up > 1
    if not separable:
        grows_y = grows_x = grows_y or grows_x
    y_step, lead_y, trail_y = _plan(y_axis, grows_y)
    x_step, lead_x, trail_x = _plan(x_axis, grows_x)
    x = _pad(x, lead_x, trail_x, lead_y, trail_y)
    if separable:
        x = _pass(x, weighted[None, :], _IDLE, x_step)
        return _pass(x, taps.to(x.dtype)[:, None], y_step, _IDLE).to(dtype)
    return _pass(x, weighted, y_step, x_step).to(dtype)


def _pad(x, x0, x1, y0, y1):
    """Pad with zeros or crop, even if that crops the whole image away."""
    if not (x0 or x1 or y0 or y1):
        return x
    height, width = x.shape[2:]
    if min(width + x0, width + x1, height + y0, height + y1) <= 0:
        return x.new_zeros(*x.shape[:2], height + y0 + y1, width + x0 + x1)
    return F.pad(x, [x0, x1, y0, y1])


class _Step(NamedTuple):
    """Arguments of a convolution along one axis."""

    up: int
    down: int
    padding: int  # as torch counts it: added on both sides by a convolution, cut off by a transposed one
    output_padding: int


_IDLE = _Step(1, 1, 0, 0)


def _plan(axis: Axis, grows: bool) -> tuple[_Step, int, int]:
    """Return the step of one axis, and how many pixels to pad (or crop) before and after the image first."""
    if not grows:
        if axis.pad0 == axis.pad1 >= 0:  # the convolution pads by itself, which spares a copy
            return _Step(1, axis.down, axis.pad0, 0), 0, 0
        return _Step(1, axis.down, 0, 0), axis.pad0, axis.pad1
    up = axis.up
    # A full transposed convolution starts taps-1 before the first pixel and ends taps-1 behind the last one,
    # which its up-1 zeros follow. So much is missing (or, negative, too much) on either side:
    before, after = axis.pad0 - (axis.taps - 1), axis.pad1 - (axis.taps - up)
    # Zero pixels around the small image make that a common cut and an output_padding below up.
    lead = max(0, -(-before // up), -((after - before) // up))
    cut = lead * up - before
    trail = max(0, (after + cut) // up)
    return _Step(up, axis.down, cut, after + cut - trail * up), lead, trail


def _pass(x, g, y_step, x_step):
    """Correlate each channel by itself with the taps `[ty, tx]`: a strided or a transposed convolution."""
    channels = x.shape[1]
    stride, padding, output_padding = zip(
        (y_step.up, y_step.padding, y_step.output_padding), (x_step.up, x_step.padding, x_step.output_padding)
    )
    drop = (y_step.down, x_step.down)
    if stride == (1, 1):
        kernels = g.expand(channels, 1, *g.shape).contiguous()
        return F.conv2d(x, kernels, stride=drop, padding=padding, groups=channels)
    kernels = g.flip([0, 1]).expand(channels, 1, *g.shape).contiguous()  # torch transposes the correlation
    x = F.conv_transpose2d(
        x, kernels, stride=stride, padding=padding, output_padding=output_padding, groups=channels
    )
    return x if drop == (1, 1) else x[:, :, :: drop[0], :: drop[1]].contiguous()


def _trial(device: torch.device) -> float:
    """Return the difference between kernel and reference on a small input."""
    x = torch.linspace(-2, 2, 2 * 3 * 12 * 12, device=device).reshape(2, 3, 12, 12).sin()
    f = setup_filter([1, 3, 3, 1], device=device)
    kernel = native.upfirdn2d(x, f, Upfirdn2dSpec(2, 2, 1, 1, 2, 2, 24, 24, False, 4.0))
    return float((kernel - upfirdn2d(x, f, up=2, padding=[2, 1, 2, 1], gain=4, impl="ref")).abs().max())


_impl.register("upfirdn2d", _trial)
