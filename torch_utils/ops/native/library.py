"""The native ops as operators of torch: schemas, kernels, fake kernels and gradients.

Importing this module registers them in `torch.ops.stylegan_ops`. torch.compile, fake tensors, tensor
subclasses and dispatch modes call them there. Plain tensors in eager mode skip the dispatcher (`NativeOp`).
torch.func cannot differentiate them; `impl='ref'` can be.
"""

from __future__ import annotations

from typing import Any

import torch

from . import cpu, cuda, specs
from .dispatch import NativeOp


def kernels(x: torch.Tensor) -> Any:
    """Return the module with the kernels for the device of `x`."""
    return cpu if x.is_cpu else cuda


_SIZES = "SymInt pad_x0, SymInt pad_y0, SymInt out_h, SymInt out_w, bool flip_filter"
_FILTERS = f"int up, int down, {_SIZES}, float up_gain, float slope"
_ACT = "int dim, str act, float alpha, float gain, float clamp"


# ---- upfirdn2d: linear, its gradient is itself


def upfirdn2d(x: torch.Tensor, f: torch.Tensor | None, spec: specs.Upfirdn2dSpec) -> torch.Tensor:
    """Filter `x` with its gradients of every order."""
    return UPFIRDN2D(x, f, *spec)


def _upfirdn2d(x, f, *numbers):
    return kernels(x).upfirdn2d(x, f, specs.Upfirdn2dSpec._make(numbers))


def _upfirdn2d_setup(ctx, inputs, output) -> None:
    x, f, *numbers = inputs
    ctx.save_for_backward(f)
    ctx.size, ctx.spec = x.shape[2:], specs.Upfirdn2dSpec._make(numbers)


def _upfirdn2d_backward(ctx, dy):
    (f,) = ctx.saved_tensors
    dx = UPFIRDN2D(dy, f, *ctx.spec.adjoint(f, *ctx.size))
    return dx, *(None,) * (1 + len(ctx.spec))


def _upfirdn2d_fake(x, f, *numbers):
    spec = specs.Upfirdn2dSpec._make(numbers)
    return specs.empty_image(x, spec.out_h, spec.out_w)


UPFIRDN2D = NativeOp(
    "upfirdn2d",
    f"(Tensor x, Tensor? f, int up_x, int up_y, int down_x, int down_y, {_SIZES}, float gain) -> Tensor",
    *(1, _upfirdn2d),
)
UPFIRDN2D.register(_upfirdn2d_fake, _upfirdn2d_setup, _upfirdn2d_backward)


# ---- filtered_lrelu: piecewise linear, its gradients are the same filters around recorded bits


def filtered_lrelu(
    x: torch.Tensor,
    fu: torch.Tensor | None,
    fd: torch.Tensor | None,
    b: torch.Tensor | None,
    spec: specs.FilteredLreluSpec,
) -> torch.Tensor:
    """Run the op, recording bits only if a gradient will need them."""
    record = torch.is_grad_enabled() and (x.requires_grad or (b is not None and b.requires_grad))
    return FILTERED_LRELU(x, fu, fd, b, *spec, record)[0]


def _filtered_lrelu(x, fu, fd, b, *numbers):
    spec, record = specs.FilteredLreluSpec._make(numbers[:-1]), numbers[-1]
    mask = specs.empty_mask(x, fd, spec) if record else x.new_empty(0, dtype=torch.uint8)
    return kernels(x).filtered_lrelu(x, fu, fd, b, mask if record else None, spec), mask


def _filtered_lrelu_setup(ctx, inputs, output) -> None:
    x, fu, fd, _, *numbers, _ = inputs
    _, mask = output
    ctx.save_for_backward(mask, fu, fd)
    ctx.mark_non_differentiable(mask)
    ctx.set_materialize_grads(False)
    ctx.size, ctx.spec = x.shape[2:], specs.FilteredLreluSpec._make(numbers)


def _filtered_lrelu_backward(ctx, dy, _):
    nothing = (None,) * (1 + len(ctx.spec))
    if dy is None:
        return None, None, None, None, *nothing
    mask, fu, fd = ctx.saved_tensors
    with_db = ctx.needs_input_grad[3]
    dx, db = GATE(dy, mask, fd, fu, *ctx.spec.gate(fd).adjoint(fu, fd, *ctx.size), with_db)
    return dx, None, None, db if with_db else None, *nothing


def _filtered_lrelu_zeroed(x, fu, fd, b, *numbers):
    """Run the kernel on a mask of zeros: unread bits stay unwritten, and torch compares results."""
    spec, record = specs.FilteredLreluSpec._make(numbers[:-1]), numbers[-1]
    if not record:
        return _filtered_lrelu(x, fu, fd, b, *numbers)
    mask = specs.empty_mask(x, fd, spec).zero_()
    return kernels(x).filtered_lrelu(x, fu, fd, b, mask, spec), mask


def _filtered_lrelu_fake(x, fu, fd, b, *numbers):
    spec, record = specs.FilteredLreluSpec._make(numbers[:-1]), numbers[-1]
    y = specs.empty_activated(x, spec.out_h, spec.out_w)
    return y, specs.empty_mask(x, fd, spec) if record else x.new_empty(0, dtype=torch.uint8)


FILTERED_LRELU = NativeOp(
    "filtered_lrelu",
    f"(Tensor x, Tensor? fu, Tensor? fd, Tensor? b, {_FILTERS}, float clamp, bool record)"
    " -> (Tensor, Tensor)",
    *(4, _filtered_lrelu),
)
FILTERED_LRELU.register(
    _filtered_lrelu_fake, _filtered_lrelu_setup, _filtered_lrelu_backward, kernel=_filtered_lrelu_zeroed
)


def _gate(x, mask, fu, fd, *numbers):
    spec, with_sums = specs.GateSpec._make(numbers[:-1]), numbers[-1]
    y, sums = kernels(x).filtered_lrelu_gate(x, mask, fu, fd, spec, with_sums)
    return y, x.new_empty(0) if sums is None else sums


def _gate_setup(ctx, inputs, output) -> None:
    x, mask, fu, fd, *numbers, ctx.with_sums = inputs
    ctx.save_for_backward(mask, fu, fd)
    ctx.set_materialize_grads(False)
    ctx.shapes, ctx.spec = (x.shape, output[0].shape), specs.GateSpec._make(numbers)


def _gate_backward(ctx, dy, dsums):
    nothing = (None,) * (4 + len(ctx.spec))
    x_shape, y_shape = ctx.shapes
    if ctx.with_sums and dsums is not None:  # the gradient of a sum is that of each of its terms
        spread = dsums.reshape(1, -1, 1, 1).expand(y_shape)
        dy = spread if dy is None else dy + spread
    if dy is None:
        return None, *nothing
    mask, fu, fd = ctx.saved_tensors
    dx, _ = GATE(dy, mask, fd, fu, *ctx.spec.adjoint(fu, fd, *x_shape[2:]), False)
    return dx, *nothing


def _gate_fake(x, mask, fu, fd, *numbers):
    spec, with_sums = specs.GateSpec._make(numbers[:-1]), numbers[-1]
    return specs.empty_activated(x, spec.out_h, spec.out_w), x.new_empty(x.shape[1] if with_sums else 0)


GATE = NativeOp(
    "filtered_lrelu_gate",
    f"(Tensor x, Tensor mask, Tensor? fu, Tensor? fd, {_FILTERS},"
    " SymInt mask_w, SymInt mask_off_x, SymInt mask_off_y, bool with_sums) -> (Tensor, Tensor)",
    *(1, _gate),
)
GATE.register(_gate_fake, _gate_setup, _gate_backward)


# ---- fma: a product with a number for each image and channel, plus a map; linear in each


def fma(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None) -> torch.Tensor:
    """Run the op with its gradients of every order."""
    return FMA(a, b, c)


def _fma(a, b, c):
    return kernels(a).fma(a, b, c)


def _fma_setup(ctx, inputs, output) -> None:
    a, b, c = inputs
    ctx.save_for_backward(a, b)
    ctx.c_shape = None if c is None else c.shape


def _fma_backward(ctx, dy):
    a, b = ctx.saved_tensors
    _, with_db, with_c = ctx.needs_input_grad
    with_dc = with_c and ctx.c_shape == (dy.shape[0], 1, *dy.shape[2:])
    da, db, dc = FMA_GRAD(dy, a, b, with_db, with_dc)
    if not with_dc:
        dc = dy.sum_to_size(ctx.c_shape) if with_c else None
    return da, db if with_db else None, dc


def _fma_fake(a, b, c):
    return specs.empty_image(a, *a.shape[2:])


FMA = NativeOp("fma", "(Tensor a, Tensor b, Tensor? c) -> Tensor", 3, _fma)
FMA.register(_fma_fake, _fma_setup, _fma_backward)


def _fma_grad(dy, a, b, with_db, with_dc):
    da, db, dc = kernels(dy).fma_grad(dy, a, b, with_db, with_dc)
    return da, dy.new_empty(0) if db is None else db, dy.new_empty(0) if dc is None else dc


def _fma_grad_setup(ctx, inputs, output) -> None:
    dy, a, b, ctx.with_db, ctx.with_dc = inputs
    ctx.save_for_backward(dy, a, b)
    ctx.set_materialize_grads(False)


def _fma_grad_backward(ctx, dda, ddb, ddc):
    dy, a, b = ctx.saved_tensors
    ddb = ddb if ctx.with_db else None
    ddc = ddc if ctx.with_dc else None
    terms, da, db = [], None, None
    if dda is not None:
        needs_db = ctx.needs_input_grad[2]
        ddy, db, _ = FMA_GRAD(dda, dy, b, needs_db, False)  # dda * b, and the sums of dda * dy
        terms.append(ddy)
        db = db if needs_db else None
    if ddb is not None:
        terms.append(FMA(a, ddb, ddc))
        da = FMA(dy, ddb, None) if ctx.needs_input_grad[1] else None
    elif ddc is not None:
        terms.append(ddc.expand(dy.shape))
    return sum(terms[1:], terms[0]) if terms else None, da, db, None, None


def _fma_grad_fake(dy, a, b, with_db, with_dc):
    dc = dy.new_empty((dy.shape[0], 1, *dy.shape[2:]) if with_dc else 0)
    return specs.empty_image(a, *a.shape[2:]), dy.new_empty(b.shape if with_db else 0), dc


FMA_GRAD = NativeOp(
    "fma_grad",
    "(Tensor dy, Tensor a, Tensor b, bool with_db, bool with_dc) -> (Tensor, Tensor, Tensor)",
    *(3, _fma_grad),
)
FMA_GRAD.register(_fma_grad_fake, _fma_grad_setup, _fma_grad_backward)


# ---- unit_distance: symmetric, so the gradient to y is that to x with both exchanged


def unit_distance(x: torch.Tensor, y: torch.Tensor, w: torch.Tensor | None) -> torch.Tensor:
    """Run the op with first gradients to x and y."""
    return UNIT_DISTANCE(x, y, w)


def _unit_distance(x, y, w):
    return kernels(x).unit_distance(x, y, w)


def _unit_distance_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _unit_distance_backward(ctx, s):
    x, y, w = ctx.saved_tensors
    dx = UNIT_DISTANCE_GRAD(s, x, y, w) if ctx.needs_input_grad[0] else None
    dy = UNIT_DISTANCE_GRAD(s, y, x, w) if ctx.needs_input_grad[1] else None
    return dx, dy, None


def _unit_distance_fake(x, y, w):
    return x.new_empty((x.shape[0], *x.shape[2:]))


UNIT_DISTANCE = NativeOp("unit_distance", "(Tensor x, Tensor y, Tensor? w) -> Tensor", 2, _unit_distance)
UNIT_DISTANCE.register(_unit_distance_fake, _unit_distance_setup, _unit_distance_backward)


def _unit_distance_grad(s, x, y, w):
    return kernels(x).unit_distance_grad(s, x, y, w)


def _unit_distance_grad_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _unit_distance_grad_backward(ctx, grad):
    *inputs, w = ctx.saved_tensors
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():  # in plain torch, which has the gradients of every order
        views = [each.view_as(each) if each.requires_grad else each.detach() for each in inputs]
        views = [each.requires_grad_(True) for each in views]
        dx = cpu.unit_distance_grad(*views, w)
    return *torch.autograd.grad(dx, views, grad, create_graph=create_graph), None


def _unit_distance_grad_fake(s, x, y, w):
    return torch.empty_like(x, memory_format=torch.channels_last)


UNIT_DISTANCE_GRAD = NativeOp(
    "unit_distance_grad",
    "(Tensor s, Tensor x, Tensor y, Tensor? w) -> Tensor",
    *(3, _unit_distance_grad),
)
UNIT_DISTANCE_GRAD.register(_unit_distance_grad_fake, _unit_distance_grad_setup, _unit_distance_grad_backward)


# ---- bias_act: elementwise, differentiated from its output (from its input for swish)


def bias_act(x: torch.Tensor, b: torch.Tensor | None, spec: specs.BiasActSpec) -> torch.Tensor:
    """Run the op with first and second gradients."""
    return BIAS_ACT(x, b, *spec)


def _bias_act(x, b, *numbers):
    return kernels(x).bias_act(x, b, specs.BiasActSpec._make(numbers))


def _bias_act_setup(ctx, inputs, output) -> None:
    x, b, *numbers = inputs
    ctx.spec = specs.BiasActSpec._make(numbers)
    needs_inputs, needs_output = ctx.spec.needs()
    if not needs_inputs:
        x = b = None
    ctx.save_for_backward(x, b, output if needs_output else None)


def _bias_act_backward(ctx, dy):
    with_db = ctx.needs_input_grad[1]
    dx, db = BIAS_ACT_GRAD(dy, *ctx.saved_tensors, *ctx.spec, with_db)
    return dx, db if with_db else None, *(None,) * len(ctx.spec)


def _bias_act_fake(x, b, *numbers):
    return torch.empty_like(x)


BIAS_ACT = NativeOp("bias_act", f"(Tensor x, Tensor? b, {_ACT}) -> Tensor", 2, _bias_act)
BIAS_ACT.register(_bias_act_fake, _bias_act_setup, _bias_act_backward)


def _bias_act_grad(dy, x, b, y, *numbers):
    spec, with_db = specs.BiasActSpec._make(numbers[:-1]), numbers[-1]
    dx, db = kernels(dy).bias_act_grad(dy, x, b, y, spec, with_db)
    return dx, dy.new_empty(0) if db is None else db


def _bias_act_grad_setup(ctx, inputs, output) -> None:
    dy, x, b, y, *numbers, ctx.with_db = inputs
    ctx.spec, ctx.shape = specs.BiasActSpec._make(numbers), dy.shape
    ctx.is_curved = ctx.spec.needs()[0]
    ctx.save_for_backward(dy if ctx.is_curved else None, x, b, y)
    ctx.set_materialize_grads(False)


def _bias_act_grad_backward(ctx, ddx, ddb):
    spec, nothing = ctx.spec, (None,) * (2 + len(ctx.spec))
    if not ctx.with_db:
        ddb = None
    if ddx is None and ddb is None:
        return None, None, None, *nothing
    dy, x, b, y = ctx.saved_tensors
    axes = range(len(ctx.shape))
    if ddb is not None:  # what arrives at the sum arrives at each of its terms
        spread = ddb.reshape([-1 if axis == spec.dim else 1 for axis in axes])
        ddx = spread.expand(ctx.shape) if ddx is None else ddx + spread
    ddy = BIAS_ACT_GRAD(ddx, x, b, y, *spec, False)[0] if ctx.needs_input_grad[0] else None
    if not ctx.is_curved or not any(ctx.needs_input_grad[1:3]):
        return ddy, None, None, *nothing
    dx = BIAS_ACT_GRAD2(dy, ddx, x, b, y, *spec)
    db = None
    if ctx.needs_input_grad[2]:
        others = [axis for axis in axes if axis != spec.dim]
        db = dx.sum(others) if others else dx  # torch takes no axes for all of them
    return ddy, dx, db, *nothing


def _leader(dy, x, y, spec):
    """Return the tensor whose memory order the result follows, as in `specs.one_layout`."""
    reference = x if spec.act == "swish" else y
    return dy if reference is None else reference


def _bias_act_grad_fake(dy, x, b, y, *numbers):
    spec, with_db = specs.BiasActSpec._make(numbers[:-1]), numbers[-1]
    return torch.empty_like(_leader(dy, x, y, spec)), dy.new_empty(dy.shape[spec.dim] if with_db else 0)


BIAS_ACT_GRAD = NativeOp(
    "bias_act_grad",
    f"(Tensor dy, Tensor? x, Tensor? b, Tensor? y, {_ACT}, bool with_db) -> (Tensor, Tensor)",
    *(4, _bias_act_grad),
)
BIAS_ACT_GRAD.register(_bias_act_grad_fake, _bias_act_grad_setup, _bias_act_grad_backward)


def _bias_act_grad2(dy, ddx, x, b, y, *numbers):
    return kernels(dy).bias_act_grad2(dy, ddx, x, b, y, specs.BiasActSpec._make(numbers))


def _bias_act_grad2_setup(ctx, inputs, output) -> None:
    pass


def _bias_act_grad2_backward(ctx, *grads):
    raise RuntimeError("bias_act: third gradients of curved activations exist with impl='ref' only")


def _bias_act_grad2_fake(dy, ddx, x, b, y, *numbers):
    return torch.empty_like(_leader(dy, x, y, specs.BiasActSpec._make(numbers)))


BIAS_ACT_GRAD2 = NativeOp(
    "bias_act_grad2",
    f"(Tensor dy, Tensor ddx, Tensor? x, Tensor? b, Tensor? y, {_ACT}) -> Tensor",
    *(5, _bias_act_grad2),
)
BIAS_ACT_GRAD2.register(_bias_act_grad2_fake, _bias_act_grad2_setup, _bias_act_grad2_backward)
