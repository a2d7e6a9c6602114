"""Call the CUDA kernels, launched through the driver.

Binaries are from `custom_ops.cubin`, one per specialization. Plan, binary, function and struct are computed
once per device, spec and shape; a call copies the struct, fills in the pointers and launches on torch's
current stream of the device.

No tensor needs `record_stream`: results and temporaries are allocated under the stream that the kernel runs
on, so the allocator, which reuses memory in the order of that stream, cannot reuse it too early. Structs are
passed by value. Tensors used on another stream need the same care as with any op of torch.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from torch_utils import custom_ops

from . import driver, params, specs
from .building import NativeUnavailable
from .plan import LaunchPlan
from .sums import biased_images


class _Launch(NamedTuple):
    """Everything of a kernel call except the pointers."""

    struct: ctypes.Structure
    context: int
    function: int
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int


def upfirdn2d(x: torch.Tensor, f: torch.Tensor | None, spec: specs.Upfirdn2dSpec) -> torch.Tensor:
    """Run the kernel on `[N, C, H, W]` of any strides; the result's layout is that of `specs.empty_image`."""
    y = specs.empty_image(x, spec.out_h, spec.out_w)
    if x.numel() == 0 or y.numel() == 0:
        return y.zero_()
    f = _taps(f, x)
    pointers = {"x": x.data_ptr(), "f": f.data_ptr(), "y": y.data_ptr()}
    _run("upfirdn2d", x, pointers, (x.shape, x.stride(), y.stride(), x.dtype, f.shape, spec))
    return y


def filtered_lrelu(
    x: torch.Tensor,
    fu: torch.Tensor | None,
    fd: torch.Tensor | None,
    b: torch.Tensor | None,
    mask: torch.Tensor | None,
    spec: specs.FilteredLreluSpec,
) -> torch.Tensor:
    """Run the kernel, which writes `mask` if there is one.

    The result's layout is that of `specs.empty_activated`.
    """
    return _filtered_lrelu(x, fu, fd, b, mask, spec, params.ACTIVATE if mask is None else params.RECORD)[0]


def filtered_lrelu_gate(
    x: torch.Tensor,
    mask: torch.Tensor,
    fu: torch.Tensor | None,
    fd: torch.Tensor | None,
    spec: specs.GateSpec,
    with_sums: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run the kernel by the bits of `mask`; also return the sums of the result by channel, or None."""
    return _filtered_lrelu(x, fu, fd, None, mask, spec, params.GATE, with_sums)


def _filtered_lrelu(x, fu, fd, b, mask, spec, mode, with_sums=False):
    y = specs.empty_activated(x, spec.out_h, spec.out_w)
    if x.numel() == 0 or y.numel() == 0:
        return y.zero_(), y.new_zeros(y.shape[1]) if with_sums else None
    if x.stride(3) != 1:  # channels-last: one copy costs less than reading pixels far apart
        x = x.contiguous()
    fu, fd, b = _taps(fu, x), _taps(fd, x), _dense(b)
    pointers = {"x": x.data_ptr(), "fu": fu.data_ptr(), "fd": fd.data_ptr(), "y": y.data_ptr()}
    if b is not None:
        pointers["b"] = b.data_ptr()
    if mask is not None:
        pointers["mask"] = mask.data_ptr()
    mask_shape = None if mask is None else mask.shape
    numbers = (x.shape, x.stride(), y.stride(), x.dtype, (fu.shape, fd.shape), mask_shape, spec, mode)
    sums = _run("filtered_lrelu", x, pointers, numbers, with_sums)
    if sums is None:
        return y, None
    return y, sums.reshape(y.shape[0], y.shape[1], -1).sum((0, 2)).to(y.dtype)


def bias_act(x: torch.Tensor, b: torch.Tensor | None, spec: specs.BiasActSpec) -> torch.Tensor:
    """Return `clamp(act(x + b) * gain)` in dense memory, in the order of axes of `x`."""
    return _bias_act(x, None, None, b, spec, 0)[0]


def bias_act_grad(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    b: torch.Tensor | None,
    y: torch.Tensor | None,
    spec: specs.BiasActSpec,
    with_db: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the gradients of x and of b (or None), from what `spec.needs()` of the inputs and the output."""
    dx, db = _bias_act(dy, None, *((x, b) if spec.act == "swish" else (y, None)), spec, 1, with_db)
    if db is not None or not with_db:
        return dx, db
    others = [axis for axis in range(dx.ndim) if axis != spec.dim]
    return dx, dx.sum(others) if others else dx.clone()


def bias_act_grad2(
    dy: torch.Tensor,
    ddx: torch.Tensor,
    x: torch.Tensor | None,
    b: torch.Tensor | None,
    y: torch.Tensor | None,
    spec: specs.BiasActSpec,
) -> torch.Tensor:
    """Return the gradient of x that comes through the slope of the activation."""
    return _bias_act(dy, ddx, *((x, b) if spec.act == "swish" else (y, None)), spec, 2)[0]


def _bias_act(input, in2, ref, b, spec, order, with_db=False):
    """Return the result, and its sums by bias if needed and free in the same pass."""
    input, in2, ref = specs.one_layout(input, in2, ref)
    out, b = torch.empty_like(input), _dense(b)
    if out.numel() == 0:
        return out, None
    pointers = {"input": input.data_ptr(), "out": out.data_ptr()}
    sums = None
    if with_db:
        channels = input.shape[spec.dim]
        images = biased_images(input.numel(), channels, max(input.stride(spec.dim), 1))
        if images.is_fast(params.DTYPES[input.dtype]):
            sums = empty_sums(images.sums_shape(params.DTYPES[input.dtype]), input)
            pointers["db"] = sums.data_ptr()
    for name, tensor in (("in2", in2), ("ref", ref), ("b", b)):
        if tensor is not None:
            pointers[name] = tensor.data_ptr()
    numbers = (input.shape, input.stride(), input.dtype, b is not None or sums is not None, spec, order)
    _run("bias_act", input, pointers, numbers)
    if sums is None:
        return out, None
    sums = sums.reshape(-1, channels, sums.shape[1]).sum((0, 2)) if images.planar else sums.sum((0, 1))
    return out, sums.to(out.dtype)


def fma(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None) -> torch.Tensor:
    """Return `a * b + c`: a [N, C, H, W], b [N, C, 1, 1], c None, a number, [H, W] or [1 or N, 1, H, W]."""
    return _fma(a, None, b, c, specs.image_layout(a), False)[0]


def fma_grad(
    dy: torch.Tensor, a: torch.Tensor, b: torch.Tensor, with_db: bool, with_dc: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Return the gradients of a, of b (or None) and of c [N, 1, H, W] (or None).

    One pass over dy and a writes them all, except that torch adds up the channels of planar images.
    """
    layout = specs.image_layout(a)
    is_planar = layout == torch.contiguous_format
    da, db, dc = _fma(dy, a if with_db else None, b, None, layout, with_dc and not is_planar)
    if with_dc and is_planar:
        dc = dy.sum(1, keepdim=True)
    return da, db, dc


def _fma(x, other, b, c, layout, with_dc):
    """Return x * b + c, the sums of x * other over pixels if there is other, and those of x over channels."""
    x, b, c = x.contiguous(memory_format=layout), b.contiguous(), _dense(c)
    out = torch.empty_like(x, memory_format=layout)
    dc = x.new_empty((x.shape[0], 1, *x.shape[2:])) if with_dc else None
    if x.numel() == 0:
        return out, None if other is None else torch.zeros_like(b), None if dc is None else dc.zero_()
    addend = params.NO_ADDEND
    if c is not None:
        addend = params.NUMBER if c.numel() == 1 else params.MAP
    per_image = c is not None and c.numel() > x.shape[2] * x.shape[3]
    numbers = (x.shape, layout == torch.contiguous_format, x.dtype, addend, per_image)
    pointers = {"input": x.data_ptr(), "b": b.data_ptr(), "out": out.data_ptr()}
    sums = None
    if other is not None:
        other = other.contiguous(memory_format=layout)
        sums = empty_sums(specs.fma_images(*numbers[:2]).sums_shape(params.DTYPES[x.dtype]), x)
        pointers |= {"other": other.data_ptr(), "db": sums.data_ptr()}
    if c is not None:
        pointers["c"] = c.data_ptr()
    if dc is not None:
        pointers["dc"] = dc.data_ptr()
    _run("fma", x, pointers, numbers)
    if sums is None:
        return out, None, dc
    sums = sums.sum(1) if sums.shape[1] > 1 else sums
    return out, sums.reshape(b.shape).to(b.dtype), dc


def empty_sums(shape: tuple[int, ...], x: torch.Tensor) -> torch.Tensor:
    """Allocate sums in the type that a kernel computes in."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.empty(shape, dtype=dtype, device=x.device)


def unit_distance(x: torch.Tensor, y: torch.Tensor, w: torch.Tensor | None) -> torch.Tensor:
    """Return the distance of x and y at each position, `[N, H, W]`."""
    return _unit_distance(x, y, w, None, x.new_empty((x.shape[0], *x.shape[2:])))


def unit_distance_grad(
    s: torch.Tensor, x: torch.Tensor, y: torch.Tensor, w: torch.Tensor | None
) -> torch.Tensor:
    """Return the gradient of x, channels-last, for the gradient s of the distance."""
    return _unit_distance(x, y, w, s, torch.empty_like(x, memory_format=torch.channels_last))


def _unit_distance(x, y, w, s, out):
    if x.numel() == 0:
        return out.zero_()
    x, y = (t.contiguous(memory_format=torch.channels_last) for t in (x, y))
    pointers = {"x": x.data_ptr(), "y": y.data_ptr(), "out": out.data_ptr()}
    if w is not None:
        w = w.to(torch.float64 if x.dtype == torch.float64 else torch.float32).contiguous()
        pointers["w"] = w.data_ptr()
    if s is not None:
        s = s.contiguous()
        pointers["s"] = s.data_ptr()
    _run("unit_distance", x, pointers, (x.shape, x.dtype))
    return out


# ---- Plans and launches

_MAKE = {
    "bias_act": specs.bias_act_params,
    "fma": specs.fma_params,
    "unit_distance": specs.unit_distance_params,
    "upfirdn2d": specs.upfirdn2d_params,
    "filtered_lrelu": specs.filtered_lrelu_params,
}
_launches: dict[Any, _Launch] = {}
_functions: dict[Any, int] = {}  # (device, plan) -> function of a module that stays loaded
_MAX_LAUNCHES = 4096  # shapes that never come back must not pile up


def _run(
    op: str, x: torch.Tensor, pointers: dict[str, int], numbers: tuple[Any, ...], with_sums: bool = False
) -> torch.Tensor | None:
    """Launch `op` on the device of `x`, on torch's current stream there.

    with_sums: also return the sums that the kernel writes, one for each tile; the grid has a block for each.
    """
    device = x.get_device()
    # Wide loads need aligned memory, and which arguments there are is part of a specialization.
    alignment = tuple([(name, pointer & 15) for name, pointer in pointers.items()])
    key = (op, device, alignment, numbers)
    launch = _launches.get(key)
    if launch is None:
        launch = _prepare(op, device, pointers, numbers)
        if len(_launches) >= _MAX_LAUNCHES:
            _launches.clear()
        _launches[key] = launch
    p = type(launch.struct).from_buffer_copy(launch.struct)
    for name, pointer in pointers.items():
        setattr(p, name, pointer)
    sums = None
    if with_sums:
        sums = empty_sums(launch.grid[:1], x)
        p.sums = sums.data_ptr()
    driver.launch(launch.context, launch.function, launch.grid, launch.block, launch.shared_bytes, device, p)
    return sums


def _prepare(op: str, device: int, pointers: dict[str, int], numbers: tuple[Any, ...]) -> _Launch:
    make: Callable[..., Any] = _MAKE[op]
    p = make(*numbers)
    for name, pointer in pointers.items():
        setattr(p, name, pointer)
    capability = torch.cuda.get_device_capability(device)
    plan = importlib.import_module(f"{__package__}.{op}.plan").plan(p, capability)
    context = driver.primary_context(device)
    key = (device, plan.source, plan.entry, plan.defines)
    function = _functions.get(key)
    if function is None:
        function = _functions[key] = _load(context, plan, capability)
    driver.allow_shared_bytes(context, function, plan.shared_bytes)
    return _Launch(p, context, function, plan.grid, plan.block, plan.shared_bytes)


def _load(context: int, plan: LaunchPlan, capability: tuple[int, int]) -> int:
    """Load a kernel; compile it again if the driver refuses a cached binary, as that of a newer compiler."""
    try:
        return driver.load_function(context, custom_ops.cubin(plan, capability), plan.entry)
    except driver.BinaryRefused as refusal:
        try:
            binary = custom_ops.recompiled(plan, capability)
        except NativeUnavailable:
            raise refusal from None
        return driver.load_function(context, binary, plan.entry)


_ones: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}


def _taps(f: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    if f is not None:
        return specs.dense_taps(f, x.dtype)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    key = (x.device, dtype)
    if key not in _ones:
        _ones[key] = torch.ones((1, 1), dtype=dtype, device=x.device)
    return _ones[key]


def _dense(b: torch.Tensor | None) -> torch.Tensor | None:
    return b if b is None else b.contiguous()
