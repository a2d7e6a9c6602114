"""Call the CPU kernels: C functions that take a struct.

ctypes releases the GIL while a kernel runs. The struct without pointers is computed once per spec
and shape and copied for each call. Half precision is computed in float32 and rounded once.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch

from torch_utils import custom_ops

from . import params, specs

_HALF = (torch.float16, torch.bfloat16)
_Tensors = tuple[torch.Tensor, torch.Tensor | None]


class Unsupported(RuntimeError):
    """A kernel has no code for this type, spec or layout."""


def upfirdn2d(x: torch.Tensor, f: torch.Tensor | None, spec: specs.Upfirdn2dSpec) -> torch.Tensor:
    """Run the kernel on `[N, C, H, W]`; the layout of the result is that of `specs.empty_image`."""
    y = specs.empty_image(x, spec.out_h, spec.out_w)
    if x.numel() == 0 or y.numel() == 0:
        return y.zero_()
    if x.dtype in _HALF:
        return y.copy_(upfirdn2d(x.float(), f, spec))
    f = specs.dense_taps(f, x.dtype)
    if not _has_dense_rows(x):
        x = x.contiguous()
    p = specs.template(
        specs.upfirdn2d_params, x.shape, x.stride(), y.stride(), x.dtype, None if f is None else f.shape, spec
    )
    p.x, p.f, p.y = x.data_ptr(), _taps_pointer(f, x.dtype), y.data_ptr()
    try:
        _call("sg_upfirdn2d", p)
    except Unsupported:
        if x.is_contiguous() and y.is_contiguous():
            raise
        return y.copy_(upfirdn2d(x.contiguous(), f, spec))
    return y


def filtered_lrelu(
    x: torch.Tensor,
    fu: torch.Tensor | None,
    fd: torch.Tensor | None,
    b: torch.Tensor | None,
    mask: torch.Tensor | None,
    spec: specs.FilteredLreluSpec | specs.GateSpec,
) -> torch.Tensor:
    """Run the kernel, which writes `mask` if there is one; a GateSpec reads it instead.

    The result's layout is that of `specs.empty_activated`.
    """
    mode = params.ACTIVATE if mask is None else params.RECORD
    if isinstance(spec, specs.GateSpec):
        mode = params.GATE
    shape, dtype = x.shape, x.dtype
    y = specs.empty_activated(x, spec.out_h, spec.out_w)
    if x.numel() == 0 or y.numel() == 0:
        return y.zero_()
    if dtype in _HALF:
        b = None if b is None else b.float()
        return y.copy_(filtered_lrelu(x.float(), fu, fd, b, mask, spec))
    if not (x.is_contiguous() or x.stride(3) == 1):
        x = x.contiguous()
    fu, fd = specs.dense_taps(fu, dtype), specs.dense_taps(fd, dtype)
    filter_shapes = (None if fu is None else fu.shape, None if fd is None else fd.shape)
    mask_shape = None if mask is None else mask.shape
    p = specs.template(
        specs.filtered_lrelu_params,
        *(shape, x.stride(), y.stride(), dtype, filter_shapes, mask_shape, spec, mode),
    )
    p.x, p.y = x.data_ptr(), y.data_ptr()
    p.fu, p.fd = _taps_pointer(fu, dtype), _taps_pointer(fd, dtype)
    if b is not None:
        b = b.contiguous()
        p.b = b.data_ptr()
    if mask is not None:
        p.mask = mask.data_ptr()
    _call("sg_filtered_lrelu", p)
    return y


def filtered_lrelu_gate(
    x: torch.Tensor,
    mask: torch.Tensor,
    fu: torch.Tensor | None,
    fd: torch.Tensor | None,
    spec: specs.GateSpec,
    with_sums: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run the kernel by the bits of `mask`; also return the sums of the result by channel, or None."""
    y = filtered_lrelu(x, fu, fd, None, mask, spec)
    return y, y.sum((0, 2, 3)) if with_sums else None


def fma(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None) -> torch.Tensor:
    """Return `a * b + c`; plain torch, as there is no kernel on the CPU."""
    y = specs.empty_image(a, *a.shape[2:])
    return y.copy_(a * b if c is None else torch.addcmul(c, a, b))


def fma_grad(
    dy: torch.Tensor, a: torch.Tensor, b: torch.Tensor, with_db: bool, with_dc: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Return the gradients of a, of b (or None) and of c [N, 1, H, W] (or None), in plain torch."""
    da = specs.empty_image(a, *a.shape[2:]).copy_(dy * b)
    db = (dy * a).sum((2, 3), keepdim=True) if with_db else None
    return da, db, dy.sum(1, keepdim=True) if with_dc else None


def unit_distance(x: torch.Tensor, y: torch.Tensor, w: torch.Tensor | None) -> torch.Tensor:
    """Return the distance of x and y at each position, `[N, H, W]`; differentiable, in plain torch."""
    dtype, (x, y) = x.dtype, (_at_least_single(t) for t in (x, y))
    difference = x * _per_length(x) - y * _per_length(y)
    squares = difference.square() if w is None else difference.square() * w.reshape(-1, 1, 1)
    return squares.sum(1).to(dtype)


def unit_distance_grad(
    s: torch.Tensor, x: torch.Tensor, y: torch.Tensor, w: torch.Tensor | None
) -> torch.Tensor:
    """Return the gradient of x, channels-last, for the gradient s of the distance, in plain torch."""
    dtype, (s, x, y) = x.dtype, (_at_least_single(t) for t in (s, x, y))
    scale = _per_length(x)
    u = x * scale
    du = 2 * s.unsqueeze(1) * (u - y * _per_length(y))
    du = du if w is None else du * w.reshape(-1, 1, 1)
    dx = scale * (du - u * (du * u).sum(1, keepdim=True))
    return torch.empty_like(dx, dtype=dtype, memory_format=torch.channels_last).copy_(dx)


def _at_least_single(t):
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def _per_length(x):
    # eps² inside the root: outside, as the package lpips has it, the gradient at 0 is not a number.
    return torch.rsqrt(x.square().sum(1, keepdim=True) + 1e-10)


def bias_act(x: torch.Tensor, b: torch.Tensor | None, spec: specs.BiasActSpec) -> torch.Tensor:
    """Return `clamp(act(x + b) * gain)` in dense memory, in the order of axes of `x`."""
    return _bias_act(x, None, None, b, spec, 0, False)[0]


def bias_act_grad(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    b: torch.Tensor | None,
    y: torch.Tensor | None,
    spec: specs.BiasActSpec,
    with_db: bool,
) -> _Tensors:
    """Return the gradients of x and of b (or None), from what `spec.needs()` of the inputs and the output."""
    if spec.act == "swish":
        return _bias_act(dy, None, x, b, spec, 1, with_db)
    return _bias_act(dy, None, y, None, spec, 1, with_db)


def bias_act_grad2(
    dy: torch.Tensor,
    ddx: torch.Tensor,
    x: torch.Tensor | None,
    b: torch.Tensor | None,
    y: torch.Tensor | None,
    spec: specs.BiasActSpec,
) -> torch.Tensor:
    """Return the gradient of x that comes through the slope of the activation."""
    if spec.act == "swish":
        return _bias_act(dy, ddx, x, b, spec, 2, False)[0]
    return _bias_act(dy, ddx, y, None, spec, 2, False)[0]


def _bias_act(input, in2, ref, b, spec, order, with_db):
    dtype = input.dtype
    input, in2, ref = specs.one_layout(input, in2, ref)
    if dtype in _HALF:
        if spec.clamp >= 0:  # as it stands in a half-precision output, which ref may be
            spec = spec._replace(clamp=specs.rounded(spec.clamp, dtype))
        singles = (None if t is None else t.float() for t in (input, in2, ref, b))
        out, db = _bias_act(*singles, spec, order, with_db)
        return out.to(dtype), None if db is None else db.to(dtype)
    out = torch.empty_like(input)
    db = torch.empty(input.shape[spec.dim], dtype=dtype) if with_db else None
    if out.numel() == 0:
        return out, None if db is None else db.zero_()
    p = specs.template(
        specs.bias_act_params, input.shape, input.stride(), dtype, with_db or b is not None, spec, order
    )
    p.input, p.out = input.data_ptr(), out.data_ptr()
    if in2 is not None:
        p.in2 = in2.data_ptr()
    if ref is not None:
        p.ref = ref.data_ptr()
    if b is not None:
        b = b.contiguous()
        p.b = b.data_ptr()
    if db is not None:
        p.db = db.data_ptr()
    _call("sg_bias_act", p)
    return out, db


# ---- Pointers and the library


def _has_dense_rows(x: torch.Tensor) -> bool:
    return x.is_contiguous() or x.stride(3) == 1 or x.is_contiguous(memory_format=torch.channels_last)


# The tap of an identity; the structs hold its address, so it must stay alive.
_ONE = {torch.float32: (ctypes.c_float * 1)(1), torch.float64: (ctypes.c_double * 1)(1)}
_ONE_POINTER = {dtype: ctypes.addressof(one) for dtype, one in _ONE.items()}


def _taps_pointer(f: torch.Tensor | None, dtype: torch.dtype) -> int:
    return _ONE_POINTER[dtype] if f is None else f.data_ptr()


def _call(name: str, p: Any) -> None:
    p.num_threads = torch.get_num_threads()
    status = _functions()[name](ctypes.byref(p))
    if status == params.OK:
        return
    if status == params.NO_MEMORY:
        raise MemoryError(f"{name}: not enough memory for the tiles of {p.num_threads} threads")
    raise Unsupported(f"{name}: this type, spec or layout is not compiled in; use impl='ref' for it")


@functools.cache
def _functions() -> dict[str, Any]:
    library = custom_ops.cpu_library()
    runner = _torch_parallel()
    if runner is not None:
        library.sg_set_parallel_runner(ctypes.c_void_p(runner))
    return {name: getattr(library, name) for name in ("sg_bias_act", "sg_upfirdn2d", "sg_filtered_lrelu")}


def _torch_parallel() -> int | None:
    """Return the address of GOMP_parallel in the OpenMP library of torch, if it has one.

    One pool of threads serves both then; two would wake each other up from their waiting loops. Asking
    torch's library for the name finds the right copy if a process has loaded several.
    """
    torch_cpu = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        return ctypes.cast(ctypes.CDLL(str(torch_cpu)).GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):  # another system, or a torch that brings its own threads
        return None
