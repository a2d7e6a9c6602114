"""The native ops with their gradients, and the three ways to call one.

One set of formulas serves all three. Plain tensors in eager mode go through an `autograd.Function` to the
kernels, or without gradients to take straight to the kernels: Python's overhead is a fraction of that of a
registered op. Under torch.func the same formulas form a Function that can be transformed. All else
(torch.compile, fake tensors, subclasses, dispatch modes) goes through `torch.ops.stylegan_ops`, where
`library.py` registers them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from torch_utils.ops import impl as choice

from . import batching, cpu, cuda, forms
from .building import NativeUnavailable

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def is_plain(x: torch.Tensor) -> bool:
    """Whether `x` is memory that a kernel may be called on, with nobody watching what is called."""
    return (
        type(x) in _PLAIN
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()
    )


def is_exporting() -> bool:
    """Whether a graph is being written down for others (torch.jit.trace, torch.onnx, torch.export).

    What reads such a graph knows torch's own operators, not ours.
    """
    if not torch.compiler.is_compiling():
        return torch.jit.is_tracing()
    if hasattr(torch.compiler, "is_exporting"):
        return torch.compiler.is_exporting()
    return not torch.compiler.is_dynamo_compiling()  # torch 2.6: only torch.export traces without dynamo


def attempt(run: Callable[..., torch.Tensor], op: str, impl: str, *args: Any) -> torch.Tensor | None:
    """Return `run(*args)`, or None where the kernels turn out not to be had and plain torch may step in.

    Raises RuntimeError where an implementation was named, which never falls back.
    """
    if torch.compiler.is_compiling():
        return run(*args)
    try:
        return run(*args)
    except NativeUnavailable as error:
        choice.fall_back(op, impl, args[0].device.type, error)
        return None


class NativeOp:
    """An op of flat arguments, the first `num_tensors` of which are tensors or None."""

    def __init__(self, name: str, num_tensors: int, kernel, setup, backward, batch) -> None:
        self.name, self.num_tensors = name, num_tensors
        self.kernel, self.setup, self.backward = kernel, setup, backward
        self.batch = functools.partial(batch, self)

        def forward(ctx, *inputs):
            output = kernel(*inputs)
            setup(ctx, inputs, output)
            return output

        base, methods = (torch.autograd.Function,), {"backward": staticmethod(backward)}
        self._eager = type(name, base, {**methods, "forward": staticmethod(forward)})
        # torch binds arguments by signature for this one, which takes longer than all of a small kernel.
        methods |= {"forward": staticmethod(kernel), "setup_context": staticmethod(setup)}
        self._transformed = type(f"{name}_transformed", base, {**methods, "vmap": staticmethod(self.batch)})

    def __call__(self, *args: Any) -> Any:
        if is_plain(args[0]):
            if torch.is_grad_enabled():
                for tensor in args[: self.num_tensors]:
                    if tensor is not None and tensor.requires_grad:
                        return self._eager.apply(*args)
            return self.kernel(*args)
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            return self._transformed.apply(*args)
        return getattr(torch.ops.stylegan_ops, self.name)(*args)


def kernels(x: torch.Tensor) -> Any:
    """The module with the kernels for the device of `x`."""
    return cpu if x.is_cpu else cuda


# ---- upfirdn2d: linear, its gradient is itself


def upfirdn2d(x: torch.Tensor, f: torch.Tensor | None, form: forms.Upfirdn2dForm) -> torch.Tensor:
    """Filter `x` with its gradients of every order."""
    return UPFIRDN2D(x, f, *form)


def _upfirdn2d(x, f, *numbers):
    return kernels(x).upfirdn2d(x, f, forms.Upfirdn2dForm._make(numbers))


def _upfirdn2d_setup(ctx, inputs, output) -> None:
    x, f, *numbers = inputs
    ctx.save_for_backward(f)
    ctx.size, ctx.form = x.shape[2:], forms.Upfirdn2dForm._make(numbers)


def _upfirdn2d_backward(ctx, dy):
    (f,) = ctx.saved_tensors
    dx = UPFIRDN2D(dy, f, *ctx.form.adjoint(f, *ctx.size))
    return dx, *(None,) * (1 + len(ctx.form))


UPFIRDN2D = NativeOp("upfirdn2d", 1, _upfirdn2d, _upfirdn2d_setup, _upfirdn2d_backward, batching.upfirdn2d)


# ---- filtered_lrelu: piecewise linear, its gradients are the same filters around recorded bits


def filtered_lrelu(
    x: torch.Tensor,
    fu: torch.Tensor | None,
    fd: torch.Tensor | None,
    b: torch.Tensor | None,
    form: forms.FilteredLreluForm,
) -> torch.Tensor:
    """Run the op, recording bits only where a gradient will want them."""
    record = torch.is_grad_enabled() and (x.requires_grad or (b is not None and b.requires_grad))
    if not record and not torch.compiler.is_compiling():
        record = torch._C._are_functorch_transforms_active()  # which hide who requires gradients
    return FILTERED_LRELU(x, fu, fd, b, *form, record)[0]


def _filtered_lrelu(x, fu, fd, b, *numbers):
    form, record = forms.FilteredLreluForm._make(numbers[:-1]), numbers[-1]
    mask = forms.empty_mask(x, fd, form) if record else x.new_empty(0, dtype=torch.uint8)
    return kernels(x).filtered_lrelu(x, fu, fd, b, mask if record else None, form), mask


def _filtered_lrelu_setup(ctx, inputs, output) -> None:
    x, fu, fd, _, *numbers, _ = inputs
    _, mask = output
    ctx.save_for_backward(mask, fu, fd)
    ctx.mark_non_differentiable(mask)
    ctx.set_materialize_grads(False)
    ctx.size, ctx.form = x.shape[2:], forms.FilteredLreluForm._make(numbers)


def _filtered_lrelu_backward(ctx, dy, _):
    nothing = (None,) * (1 + len(ctx.form))
    if dy is None:
        return None, None, None, None, *nothing
    mask, fu, fd = ctx.saved_tensors
    dx = GATE(dy, mask, fd, fu, *ctx.form.gate(fd).adjoint(fu, fd, *ctx.size))
    db = dx.sum((0, 2, 3)) if ctx.needs_input_grad[3] else None
    return dx, None, None, db, *nothing


FILTERED_LRELU = NativeOp(
    "filtered_lrelu",
    *(4, _filtered_lrelu, _filtered_lrelu_setup, _filtered_lrelu_backward),
    batching.filtered_lrelu,
)


def _gate(x, mask, fu, fd, *numbers):
    return kernels(x).filtered_lrelu(x, fu, fd, None, mask, forms.GateForm._make(numbers))


def _gate_setup(ctx, inputs, output) -> None:
    x, mask, fu, fd, *numbers = inputs
    ctx.save_for_backward(mask, fu, fd)
    ctx.size, ctx.form = x.shape[2:], forms.GateForm._make(numbers)


def _gate_backward(ctx, dy):
    mask, fu, fd = ctx.saved_tensors
    dx = GATE(dy, mask, fd, fu, *ctx.form.adjoint(fu, fd, *ctx.size))
    return dx, *(None,) * (3 + len(ctx.form))


GATE = NativeOp("filtered_lrelu_gate", 1, _gate, _gate_setup, _gate_backward, batching.filtered_lrelu_gate)


# ---- bias_act: elementwise, told by its output (by its input for swish) where it is


def bias_act(x: torch.Tensor, b: torch.Tensor | None, form: forms.BiasActForm) -> torch.Tensor:
    """Run the op with first and second gradients."""
    return BIAS_ACT(x, b, *form)


def _bias_act(x, b, *numbers):
    return kernels(x).bias_act(x, b, forms.BiasActForm._make(numbers))


def _bias_act_setup(ctx, inputs, output) -> None:
    x, b, *numbers = inputs
    ctx.form = forms.BiasActForm._make(numbers)
    inputs_tell, output_tells = ctx.form.needs()
    if not inputs_tell:
        x = b = None
    ctx.save_for_backward(x, b, output if output_tells else None)


def _bias_act_backward(ctx, dy):
    with_db = ctx.needs_input_grad[1]
    dx, db = BIAS_ACT_GRAD(dy, *ctx.saved_tensors, *ctx.form, with_db)
    return dx, db if with_db else None, *(None,) * len(ctx.form)


BIAS_ACT = NativeOp("bias_act", 2, _bias_act, _bias_act_setup, _bias_act_backward, batching.bias_act)


def _bias_act_grad(dy, x, b, y, *numbers):
    form, with_db = forms.BiasActForm._make(numbers[:-1]), numbers[-1]
    dx, db = kernels(dy).bias_act_grad(dy, x, b, y, form, with_db)
    return dx, dy.new_empty(0) if db is None else db


def _bias_act_grad_setup(ctx, inputs, output) -> None:
    dy, x, b, y, *numbers, ctx.with_db = inputs
    ctx.form, ctx.shape = forms.BiasActForm._make(numbers), dy.shape
    ctx.is_curved = ctx.form.needs()[0]
    ctx.save_for_backward(dy if ctx.is_curved else None, x, b, y)
    ctx.set_materialize_grads(False)


def _bias_act_grad_backward(ctx, ddx, ddb):
    form, nothing = ctx.form, (None,) * (2 + len(ctx.form))
    if not ctx.with_db:
        ddb = None
    if ddx is None and ddb is None:
        return None, None, None, *nothing
    dy, x, b, y = ctx.saved_tensors
    axes = range(len(ctx.shape))
    if ddb is not None:  # what arrives at the sum arrives at each of its terms
        spread = ddb.reshape([-1 if axis == form.dim else 1 for axis in axes])
        ddx = spread.expand(ctx.shape) if ddx is None else ddx + spread
    ddy = BIAS_ACT_GRAD(ddx, x, b, y, *form, False)[0] if ctx.needs_input_grad[0] else None
    if not ctx.is_curved or not any(ctx.needs_input_grad[1:3]):
        return ddy, None, None, *nothing
    dx = BIAS_ACT_GRAD2(dy, ddx, x, b, y, *form)
    db = None
    if ctx.needs_input_grad[2]:
        others = [axis for axis in axes if axis != form.dim]
        db = dx.sum(others) if others else dx  # torch takes no axes for all of them
    return ddy, dx, db, *nothing


BIAS_ACT_GRAD = NativeOp(
    "bias_act_grad",
    *(4, _bias_act_grad, _bias_act_grad_setup, _bias_act_grad_backward),
    batching.bias_act_grad,
)


def _bias_act_grad2(dy, ddx, x, b, y, *numbers):
    return kernels(dy).bias_act_grad2(dy, ddx, x, b, y, forms.BiasActForm._make(numbers))


def _no_setup(ctx, inputs, output) -> None:
    pass


def _no_third_gradient(ctx, *grads):
    raise RuntimeError("bias_act: third gradients of curved activations exist with impl='ref' alone")


BIAS_ACT_GRAD2 = NativeOp(
    "bias_act_grad2", 5, _bias_act_grad2, _no_setup, _no_third_gradient, batching.bias_act_grad2
)
