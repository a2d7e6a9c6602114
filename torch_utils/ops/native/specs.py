"""Specs of calls, one tuple of numbers per op: geometry, adjoint, and the struct of the kernel.

The tuples are flat so that `torch.library` can pass them unchanged: `op(*tensors, *spec)`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from . import params
from .sums import Images

ROW_BYTES = 16  # rows of a mask start at multiples of this
NO_CLAMP = -1.0


class BiasActSpec(NamedTuple):
    """bias_act; dim counts from 0, clamp is negative for none."""

    dim: int
    act: str
    alpha: float
    gain: float
    clamp: float

    def needs(self) -> tuple[bool, bool]:
        """Return whether derivatives are computed from (the inputs, the output)."""
        curved = self.act not in ("linear", "relu", "lrelu")
        return curved, self.act != "swish" and (self.act != "linear" or self.clamp >= 0)


class Upfirdn2dSpec(NamedTuple):
    """upfirdn2d; out_h and out_w stand for the padding behind the image."""

    up_x: int
    up_y: int
    down_x: int
    down_y: int
    pad_x0: int
    pad_y0: int
    out_h: int
    out_w: int
    flip_filter: bool
    gain: float

    def adjoint(self, f: torch.Tensor | None, height: int, width: int) -> Upfirdn2dSpec:
        """Return the spec that takes gradients back to images of that size."""
        taps_h, taps_w = taps(f)
        return Upfirdn2dSpec(
            self.down_x,
            self.down_y,
            self.up_x,
            self.up_y,
            taps_w - 1 - self.pad_x0,
            taps_h - 1 - self.pad_y0,
            height,
            width,
            not self.flip_filter,
            self.gain,
        )


class FilteredLreluSpec(NamedTuple):
    """filtered_lrelu by value; up_gain is all that scales the upsampled image, clamp is negative for none."""

    up: int
    down: int
    pad_x0: int
    pad_y0: int
    out_h: int
    out_w: int
    flip_filter: bool
    up_gain: float
    slope: float
    clamp: float

    def mask_size(self, fd: torch.Tensor | None) -> tuple[int, int, int]:
        """Return (height, width, bytes a row) of the bits that are kept of the upsampled image."""
        taps_h, taps_w = taps(fd)
        width = (self.out_w - 1) * self.down + taps_w
        height = (self.out_h - 1) * self.down + taps_h
        # The CPU deals columns out to lcm(up, down) planes, whole words each, and reads a little beyond.
        planes = math.lcm(self.up, self.down)
        needed = 4 * planes * -(-width // (16 * planes)) + 4
        return height, width, (needed + ROW_BYTES - 1) // ROW_BYTES * ROW_BYTES

    def gate(self, fd: torch.Tensor | None) -> GateSpec:
        """Return the same geometry with the recorded bits in place of values: the linear part of the op."""
        mask_w = self.mask_size(fd)[1]
        return GateSpec(*self[:9], mask_w, 0, 0)


class GateSpec(NamedTuple):
    """filtered_lrelu by recorded bits; element (h, w) of its grid has its bits at (h + off_y, w + off_x)."""

    up: int
    down: int
    pad_x0: int
    pad_y0: int
    out_h: int
    out_w: int
    flip_filter: bool
    up_gain: float
    slope: float
    mask_w: int
    mask_off_x: int
    mask_off_y: int

    def adjoint(self, fu: torch.Tensor | None, fd: torch.Tensor | None, height: int, width: int) -> GateSpec:
        """Return the spec that takes gradients back to images of that size."""
        (up_h, up_w), (down_h, down_w) = taps(fu), taps(fd)
        return GateSpec(
            self.down,
            self.up,
            up_w + down_w - 2 - self.pad_x0,
            up_h + down_h - 2 - self.pad_y0,
            height,
            width,
            not self.flip_filter,
            self.up_gain,
            self.slope,
            self.mask_w,
            self.mask_off_x + self.pad_x0 - (up_w - 1),
            self.mask_off_y + self.pad_y0 - (up_h - 1),
        )


def taps(f: torch.Tensor | None) -> tuple[int, int]:
    """Return (height, width) of a filter."""
    return (1, 1) if f is None else (f.shape[0], f.shape[-1])


# ---- Memory


def image_layout(x: torch.Tensor) -> torch.memory_format:
    """Return channels-last if `x` is dense in that layout, else contiguous."""
    if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def empty_image(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Allocate a result of another size, in the layout of `image_layout`."""
    layout = image_layout(x)
    size = (x.shape[0], x.shape[1], height, width)
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=layout)


def empty_activated(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Allocate a result of filtered_lrelu, which is contiguous: its kernels work plane by plane."""
    return torch.empty((x.shape[0], x.shape[1], height, width), dtype=x.dtype, device=x.device)


def empty_mask(x: torch.Tensor, fd: torch.Tensor | None, spec: FilteredLreluSpec) -> torch.Tensor:
    """Allocate two bits for each element of the upsampled image."""
    height, _, row_bytes = spec.mask_size(fd)
    return torch.empty((x.shape[0], x.shape[1], height, row_bytes), dtype=torch.uint8, device=x.device)


def one_layout(
    first: torch.Tensor, second: torch.Tensor | None, reference: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Return the values, dense and in one memory order: that of the reference, else of the first."""
    leader = first if reference is None else reference
    if leader.is_contiguous():
        strides = leader.stride()
    else:
        pattern = torch.empty_like(leader)  # keeps the order of axes and leaves no gaps
        strides = pattern.stride()
        leader = leader if leader.stride() == strides else pattern.copy_(leader)
    if reference is None:
        first = leader
    elif first.stride() != strides:
        first = torch.empty_like(leader, dtype=first.dtype).copy_(first)
    if second is not None and second.stride() != strides:
        second = torch.empty_like(leader, dtype=second.dtype).copy_(second)
    return first, second, None if reference is None else leader


def dense_taps(f: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """Return taps as kernels read them: float32, float64 for images of that type, dense."""
    if f is None:
        return None
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    return f.to(kind).contiguous() if f.dtype != kind or not f.is_contiguous() else f


# ---- Structs

_templates: dict[Any, Any] = {}
_MAX_TEMPLATES = 4096  # of some hundred bytes each; shapes that never come back must not pile up


def template(make: Callable[..., Any], *numbers: Any) -> Any:
    """Return a copy of `make(*numbers)`, computed once."""
    key = (make, numbers)
    found = _templates.get(key)
    if found is None:
        if len(_templates) >= _MAX_TEMPLATES:
            _templates.clear()
        found = _templates[key] = make(*numbers)
    return type(found).from_buffer_copy(found)


@functools.lru_cache(maxsize=256)
def rounded(value: float, dtype: torch.dtype) -> float:
    """Round `value` to `dtype`, so that a result equal to the clamp compares equal."""
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=dtype, device="cpu").item()


def _filter_sizes(shape: torch.Size | None) -> tuple[int, int]:
    """Return (height, width) as the structs count them: height 0 for taps used along both axes."""
    if shape is None:
        return 1, 1
    return (0, shape[0]) if len(shape) == 1 else (shape[0], shape[1])


def _strides(strides: tuple[int, ...], width: int) -> tuple[int, ...]:
    """Return the strides; torch leaves that of an axis of one pixel open, kernels require 1 along w."""
    return (*strides[:3], 1) if width == 1 else strides


def bias_act_params(
    shape: torch.Size,
    strides: tuple[int, ...],
    dtype: torch.dtype,
    has_bias: bool,
    spec: BiasActSpec,
    order: int,
) -> params.BiasAct:
    """Fill in the struct except pointers and threads; the strides are those of dense memory."""
    p = params.BiasAct()
    p.size = shape.numel()
    # Dense memory sorts its axes by stride, so one that is a stride of `s` away changes every `s` elements.
    p.bias_size, p.bias_step = 1, 1
    if has_bias:
        p.bias_size, p.bias_step = shape[spec.dim], max(strides[spec.dim], 1)
    p.alpha, p.gain = spec.alpha, spec.gain
    p.clamp = rounded(spec.clamp, dtype) if spec.clamp >= 0 else NO_CLAMP
    p.dtype, p.act, p.order = params.DTYPES[dtype], params.ACTIVATIONS[spec.act], order
    return p


def fma_images(shape: torch.Size, planar: bool) -> Images:
    """Return how the kernel of fma goes through memory."""
    n, channels, height, width = shape
    return Images(planar, n * channels if planar else n, height * width, channels)


def fma_params(
    shape: torch.Size, planar: bool, dtype: torch.dtype, addend: int, per_image: bool
) -> params.Fma:
    """Fill in the struct except pointers; per_image: c is a map for each image."""
    p = params.Fma()
    p.n, p.channels, p.size = shape[0], shape[1], shape[2] * shape[3]
    p.c_step = p.size if per_image else 0
    p.planar, p.addend, p.dtype = planar, addend, params.DTYPES[dtype]
    return p


def unit_distance_params(shape: torch.Size, dtype: torch.dtype) -> params.UnitDistance:
    """Fill in the struct except pointers."""
    p = params.UnitDistance()
    p.positions, p.channels = shape[0] * shape[2] * shape[3], shape[1]
    p.dtype = params.DTYPES[dtype]
    return p


def upfirdn2d_params(
    shape: torch.Size,
    x_strides: tuple[int, ...],
    y_strides: tuple[int, ...],
    dtype: torch.dtype,
    filter_shape: torch.Size | None,
    spec: Upfirdn2dSpec,
) -> params.Upfirdn2d:
    """Fill in the struct except pointers and threads."""
    p = params.Upfirdn2d()
    p.x_stride[:], p.y_stride[:] = _strides(x_strides, shape[3]), _strides(y_strides, spec.out_w)
    p.n, p.c, p.in_h, p.in_w = shape
    p.f_h, p.f_w = _filter_sizes(filter_shape)
    p.up_x, p.up_y, p.down_x, p.down_y, p.pad_x0, p.pad_y0, p.out_h, p.out_w = spec[:8]
    p.flip_filter, p.gain, p.dtype = spec.flip_filter, spec.gain, params.DTYPES[dtype]
    return p


def filtered_lrelu_params(
    shape: torch.Size,
    x_strides: tuple[int, ...],
    y_strides: tuple[int, ...],
    dtype: torch.dtype,
    filter_shapes: tuple[torch.Size | None, torch.Size | None],
    mask_shape: torch.Size | None,
    spec: FilteredLreluSpec | GateSpec,
    mode: int,
) -> params.FilteredLrelu:
    """Fill in the struct except pointers and threads."""
    p = params.FilteredLrelu()
    p.x_stride[:], p.y_stride[:] = _strides(x_strides, shape[3]), _strides(y_strides, spec.out_w)
    p.n, p.c, p.in_h, p.in_w = shape
    p.fu_h, p.fu_w = _filter_sizes(filter_shapes[0])
    p.fd_h, p.fd_w = _filter_sizes(filter_shapes[1])
    p.up, p.down, p.pad_x0, p.pad_y0, p.out_h, p.out_w = spec[:6]
    p.flip_filter, p.up_gain, p.slope = spec[6:9]
    p.mode, p.dtype, p.clamp = mode, params.DTYPES[dtype], NO_CLAMP
    if mask_shape is not None:
        p.mask_h, p.mask_row_bytes = mask_shape[2:]
    if isinstance(spec, GateSpec):
        p.mask_w, p.mask_off_x, p.mask_off_y = spec.mask_w, spec.mask_off_x, spec.mask_off_y
    elif mask_shape is not None:
        p.mask_w = (spec.out_w - 1) * spec.down + max(p.fd_w, 1)
    if not isinstance(spec, GateSpec):
        p.clamp = rounded(spec.clamp, dtype) if spec.clamp >= 0 else NO_CLAMP
    return p
