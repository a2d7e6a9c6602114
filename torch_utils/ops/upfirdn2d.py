"""Pad, upsample, filter and downsample images in one step.

Along one axis, with `t` taps g (in correlation order) the op is `y[m] = sum_i g[i*up + pad0 - m*down] * x[i]`. The zeros
between the pixels are never made: outputs whose positions `m*down` agree modulo `up` share one short kernel (a
phase), so the op is one strided depthwise convolution a phase, followed by interleaving the phases.
The adjoint of the op is the same op with `up` and `down` exchanged and the filter flipped, hence every order of
gradient.

Source: Karras et al., "Analyzing and Improving the Image Quality of StyleGAN", arXiv 1912.04958, appendix B;
polyphase form: Crochiere and Rabiner, "Multirate Digital Signal Processing", 1983, section 3.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from . import impl as _impl

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
    # The device is named at once: a default device, 'meta' above all, must not decide where the taps are.
    taps = torch.as_tensor(1 if f is None else f, dtype=torch.float32, device=device)
    if taps.ndim > 2 or taps.numel() == 0:
        raise ValueError(f"setup_filter: f must be a scalar, [t] or [ty, tx] with taps, got shape {list(taps.shape)}")
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

    x: `[N, C, H, W]`, floating point. f: `[ty, tx]`, or `[t]` for `f` along both axes, or None for the identity.
    up, down: int or `[x, y]`. padding: int, `[x, y]` or `[x0, x1, y0, y1]` in upsampled pixels, negative crops.
    flip_filter: False convolves, True correlates.
    Returns `[N, C, (H*up + y0 + y1 - ty) // down + 1, likewise W]` in the dtype of `x`; f gets no gradient.
    Raises TypeError, ValueError for arguments that are out of form or leave no output pixel.
    """
    _impl.choose("upfirdn2d", impl)
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
                f"upfirdn2d: {name} {size} with up {axis.up}, padding [{axis.pad0}, {axis.pad1}] is "
                f"{size * axis.up + axis.pad0 + axis.pad1} pixels, fewer than the {axis.taps} taps of the filter"
            )
    return _Upfirdn2d.call(x, f, axes, bool(flip_filter), float(gain))


def filter2d(x, f, padding=0, flip_filter=False, gain=1, impl="auto") -> torch.Tensor:
    """Filter `x` so that with padding 0 the size stays; arguments as in `upfirdn2d`, padding is added."""
    px0, px1, py0, py1 = parse_padding(padding)
    fw, fh = filter_size(f)
    pad = [px0 + fw // 2, px1 + (fw - 1) // 2, py0 + fh // 2, py1 + (fh - 1) // 2]
    return upfirdn2d(x, f, padding=pad, flip_filter=flip_filter, gain=gain, impl=impl)


def upsample2d(x, f, up=2, padding=0, flip_filter=False, gain=1, impl="auto") -> torch.Tensor:
    """Enlarge `x` by `up`, keeping it centred and its brightness; arguments as in `upfirdn2d`, padding is added."""
    ux, uy = parse_scaling(up, "up")
    px0, px1, py0, py1 = parse_padding(padding)
    fw, fh = filter_size(f)
    pad = [px0 + (fw + ux - 1) // 2, px1 + (fw - ux) // 2, py0 + (fh + uy - 1) // 2, py1 + (fh - uy) // 2]
    return upfirdn2d(x, f, up=up, padding=pad, flip_filter=flip_filter, gain=gain * ux * uy, impl=impl)


def downsample2d(x, f, down=2, padding=0, flip_filter=False, gain=1, impl="auto") -> torch.Tensor:
    """Shrink `x` by `down`, keeping it centred; arguments as in `upfirdn2d`, padding is added."""
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


def _ints(value: int | Sequence[int], name: str) -> list[int]:
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
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{op}: x must be a tensor, got {type(x).__name__}")
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"{op}: x must be [N, C, H, W] floating point, got {list(x.shape)} {x.dtype}")


def check_filter(f: torch.Tensor | None, op: str, x: torch.Tensor) -> None:
    if f is None:
        return
    if not isinstance(f, torch.Tensor):
        raise TypeError(f"{op}: a filter must be a tensor or None, got {type(f).__name__}; setup_filter makes one")
    if f.ndim not in (1, 2) or f.numel() == 0 or not f.is_floating_point():
        raise ValueError(f"{op}: a filter must be [t] or [ty, tx] floating point, got {list(f.shape)} {f.dtype}")
    if f.device != x.device:
        raise ValueError(f"{op}: filter is on {f.device}, x on {x.device}")
    if f.requires_grad:
        raise ValueError(f"{op}: filters get no gradient, but this one requires it; pass f.detach()")


# ---- Reference


class Axis(NamedTuple):
    """What happens along one axis."""

    taps: int
    up: int
    down: int
    pad0: int
    pad1: int

    def num_outputs(self, size: int) -> int:
        return (size * self.up + self.pad0 + self.pad1 - self.taps) // self.down + 1

    def adjoint(self, size: int) -> Axis:
        """The axis that takes gradients of the outputs back to an input of `size` pixels."""
        pad0 = self.taps - 1 - self.pad0
        pad1 = (size - 1) * self.up - self.num_outputs(size) * self.down + 1 + self.pad0
        return Axis(self.taps, self.down, self.up, pad0, pad1)


class _Upfirdn2d(torch.autograd.Function):
    """The op as a linear map that knows its adjoint."""

    @classmethod
    def call(cls, x, f, axes, flip_filter, gain):
        if x.requires_grad and torch.is_grad_enabled():
            return cls.apply(x, f, axes, flip_filter, gain)
        return _reference(x, f, axes, flip_filter, gain)

    @staticmethod
    def forward(ctx, x, f, axes, flip_filter, gain):
        ctx.save_for_backward(f)
        ctx.size, ctx.axes, ctx.flip_filter, ctx.gain = x.shape[2:], axes, flip_filter, gain
        return _reference(x, f, axes, flip_filter, gain)

    @staticmethod
    def backward(ctx, dy):
        (f,) = ctx.saved_tensors
        axes = tuple(axis.adjoint(size) for axis, size in zip(ctx.axes, ctx.size))
        return _Upfirdn2d.call(dy, f, axes, not ctx.flip_filter, ctx.gain), None, None, None, None


def _reference(x, f, axes, flip_filter, gain):
    """Run one 2-D pass, or two 1-D passes for a 1-D filter; half precision on the CPU is summed in float32."""
    dtype = x.dtype
    if x.device.type == "cpu" and dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    if f is None:
        f = torch.full([1, 1], gain, dtype=x.dtype, device=x.device)
    else:
        taps_dtype = torch.promote_types(f.dtype, torch.float32) if x.dtype != torch.float64 else x.dtype
        f = f.to(taps_dtype)
        f = f if flip_filter else f.flip(list(range(f.ndim)))
    y_axis, x_axis = axes
    if f.ndim == 2:
        x = _correlate(x, (f * gain).to(x.dtype), y_axis, x_axis)
    else:
        idle = Axis(1, 1, 1, 0, 0)
        x = _correlate(x, (f * gain).to(x.dtype)[None, :], idle, x_axis)
        x = _correlate(x, f.to(x.dtype)[:, None], y_axis, idle)
    return x.to(dtype)


class _Phases(NamedTuple):
    """How one axis becomes a strided convolution with several output channels."""

    count: int  # phases, that is output channels
    stride: int
    kernel: int  # length of the kernels
    first: int  # input pixel under the first tap of the first output
    index: tuple[tuple[int, ...], ...]  # [count][kernel]: which tap of the filter; `taps` where there is none


@functools.lru_cache(maxsize=1024)
def _phases(taps: int, up: int, down: int, pad0: int) -> _Phases:
    common = math.gcd(up, down)
    count = up // common
    first = -(pad0 // up)  # ceil(-pad0 / up)
    last = (down * (count - 1) + taps - 1 - pad0) // up
    kernel = max(last - first + 1, 1)
    index = []
    for phase in range(count):
        tap = [(first + j) * up + pad0 - phase * down for j in range(kernel)]
        index.append(tuple(k if 0 <= k < taps else taps for k in tap))
    return _Phases(count, down // common, kernel, first, tuple(index))


@functools.lru_cache(maxsize=1024)
def _index_tensor(index, device):
    with torch.inference_mode(False):
        return torch.tensor(index, device=device)


def _correlate(x, g, y_axis, x_axis):
    """Correlate `[N, C, H, W]` with taps `[ty, tx]` along both axes."""
    batch, channels, height, width = x.shape
    ay, ax = (_phases(*axis[:4]) for axis in (y_axis, x_axis))
    out_h, out_w = y_axis.num_outputs(height), x_axis.num_outputs(width)
    num_h, num_w = -(-out_h // ay.count), -(-out_w // ax.count)
    pad = []
    for a, num, size in ((ax, num_w, width), (ay, num_h, height)):
        pad += [-a.first, a.first + (num - 1) * a.stride + a.kernel - size]
    if any(pad):
        x = F.pad(x, pad)
    # One depthwise convolution a phase: on CPUs 20 to 50 times as fast as one convolution with all pictures and
    # channels folded into the batch, and several times as fast as one with a channel per phase.
    phases = []
    for row_taps in ay.index:
        for column_taps in ax.index:
            kernel = g if ay.count * ax.count == 1 else _pick(g, row_taps, column_taps)
            kernel = kernel.expand(channels, 1, ay.kernel, ax.kernel)
            phases.append(F.conv2d(x, kernel, stride=(ay.stride, ax.stride), groups=channels))
    if len(phases) == 1:
        return phases[0]
    y = x.new_empty([batch, channels, num_h * ay.count, num_w * ax.count])
    for i, phase in enumerate(phases):
        y[:, :, i // ax.count :: ay.count, i % ax.count :: ax.count] = phase
    return y[:, :, :out_h, :out_w]


def _pick(g, row_taps, column_taps):
    """The kernel of one phase: the named taps of `g [ty, tx]`, zero where the index is one past the end."""
    rows = _index_tensor(row_taps, g.device)[:, None]
    columns = _index_tensor(column_taps, g.device)[None, :]
    return F.pad(g, [0, 1, 0, 1])[rows, columns]
