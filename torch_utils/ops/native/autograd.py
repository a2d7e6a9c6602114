"""The native ops with their gradients, as eager mode calls them and as `torch.library` registers them.

One set of formulas serves two ways to run. Plain tensors in eager mode go through `autograd.Function`s that
call the kernels directly, which costs a fraction of a registered op. Everything else (torch.compile,
torch.func, fake tensors, subclasses, dispatch modes) goes through `torch.ops.stylegan_ops`, which
`library.py` registers with the same formulas.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from torch_utils.ops import impl as choice

from . import cpu, cuda, forms
from .building import NativeUnavailable

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def is_plain(x: torch.Tensor) -> bool:
    """Whether `x` is memory that a kernel may be called on, with nobody watching what is called."""
    return (
        type(x) in _PLAIN
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()
        and not torch.compiler.is_compiling()
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


def kernels(x: torch.Tensor) -> Any:
    """The module with the kernels for the device of `x`."""
    return cpu if x.is_cpu else cuda


def _registered() -> Any:
    return torch.ops.stylegan_ops


# ---- upfirdn2d: linear, its gradient is itself


def upfirdn2d(x: torch.Tensor, f: torch.Tensor | None, form: forms.Upfirdn2dForm) -> torch.Tensor:
    """Filter `x` with its gradients of every order."""
    if not is_plain(x):
        return _registered().upfirdn2d(x, f, *form)
    if x.requires_grad and torch.is_grad_enabled():
        return _Upfirdn2d.apply(x, f, *form)
    return kernels(x).upfirdn2d(x, f, form)


def upfirdn2d_setup(ctx, inputs, output) -> None:
    x, f, *numbers = inputs
    ctx.save_for_backward(f)
    ctx.size, ctx.form = x.shape[2:], forms.Upfirdn2dForm(*numbers)


def upfirdn2d_backward(ctx, dy):
    (f,) = ctx.saved_tensors
    dx = upfirdn2d(dy, f, ctx.form.adjoint(f, *ctx.size))
    return dx, *(None,) * (1 + len(ctx.form))


class _Upfirdn2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, f, *numbers):
        upfirdn2d_setup(ctx, (x, f, *numbers), None)
        return kernels(x).upfirdn2d(x, f, ctx.form)

    backward = staticmethod(upfirdn2d_backward)


# ---- filtered_lrelu: piecewise linear, its gradients are the same filters around recorded bits


def filtered_lrelu(
    x: torch.Tensor,
    fu: torch.Tensor | None,
    fd: torch.Tensor | None,
    b: torch.Tensor | None,
    form: forms.FilteredLreluForm,
) -> torch.Tensor:
    """Run the op, recording bits only where a gradient will want them."""
    plain = is_plain(x)
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or (b is not None and b.requires_grad))
    if not plain:
        record = needs_grad or torch._C._are_functorch_transforms_active()
        return _registered().filtered_lrelu(x, fu, fd, b, *form, record)[0]
    if needs_grad:
        return _FilteredLrelu.apply(x, fu, fd, b, *form, True)[0]
    return kernels(x).filtered_lrelu(x, fu, fd, b, form, False)[0]


def filtered_lrelu_setup(ctx, inputs, output) -> None:
    x, fu, fd, _, *numbers, _ = inputs
    _, mask = output
    ctx.save_for_backward(mask, fu, fd)
    ctx.mark_non_differentiable(mask)
    ctx.set_materialize_grads(False)
    ctx.size, ctx.form = x.shape[2:], forms.FilteredLreluForm(*numbers)


def filtered_lrelu_backward(ctx, dy, _):
    nothing = (None,) * (1 + len(ctx.form))
    if dy is None:
        return None, None, None, None, *nothing
    mask, fu, fd = ctx.saved_tensors
    dx = filtered_lrelu_gate(dy, mask, fd, fu, ctx.form.gate(fd).adjoint(fu, fd, *ctx.size))
    db = dx.sum((0, 2, 3)) if ctx.needs_input_grad[3] else None
    return dx, None, None, db, *nothing


class _FilteredLrelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, fu, fd, b, *numbers):
        form = forms.FilteredLreluForm(*numbers[:-1])
        output = kernels(x).filtered_lrelu(x, fu, fd, b, form, True)
        filtered_lrelu_setup(ctx, (x, fu, fd, b, *numbers), output)
        return output

    backward = staticmethod(filtered_lrelu_backward)


def filtered_lrelu_gate(
    x: torch.Tensor,
    mask: torch.Tensor,
    fu: torch.Tensor | None,
    fd: torch.Tensor | None,
    form: forms.GateForm,
) -> torch.Tensor:
    """What is linear about the op once the bits are known; its gradient is itself, with filters exchanged."""
    if not is_plain(x):
        return _registered().filtered_lrelu_gate(x, mask, fu, fd, *form)
    if x.requires_grad and torch.is_grad_enabled():
        return _Gate.apply(x, mask, fu, fd, *form)
    return kernels(x).filtered_lrelu_gate(x, mask, fu, fd, form)


def gate_setup(ctx, inputs, output) -> None:
    x, mask, fu, fd, *numbers = inputs
    ctx.save_for_backward(mask, fu, fd)
    ctx.size, ctx.form = x.shape[2:], forms.GateForm(*numbers)


def gate_backward(ctx, dy):
    mask, fu, fd = ctx.saved_tensors
    dx = filtered_lrelu_gate(dy, mask, fd, fu, ctx.form.adjoint(fu, fd, *ctx.size))
    return dx, *(None,) * (3 + len(ctx.form))


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, mask, fu, fd, *numbers):
        gate_setup(ctx, (x, mask, fu, fd, *numbers), None)
        return kernels(x).filtered_lrelu_gate(x, mask, fu, fd, ctx.form)

    backward = staticmethod(gate_backward)


# ---- bias_act: elementwise, told by its output (by its input for swish) where it is


def bias_act(x: torch.Tensor, b: torch.Tensor | None, form: forms.BiasActForm) -> torch.Tensor:
    """Run the op with first and second gradients."""
    if not is_plain(x):
        return _registered().bias_act(x, b, *form)
    if torch.is_grad_enabled() and (x.requires_grad or (b is not None and b.requires_grad)):
        return _BiasAct.apply(x, b, *form)
    return kernels(x).bias_act(x, b, form)


def bias_act_setup(ctx, inputs, output) -> None:
    x, b, *numbers = inputs
    form = ctx.form = forms.BiasActForm(*numbers)
    of_inputs, of_output = form.needs()
    ctx.save_for_backward(x if of_inputs else None, b if of_inputs else None, output if of_output else None)


def bias_act_backward(ctx, dy):
    dx, db = bias_act_grad(dy, *ctx.saved_tensors, ctx.form, ctx.needs_input_grad[1])
    return dx, db if ctx.needs_input_grad[1] else None, *(None,) * len(ctx.form)


class _BiasAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, b, *numbers):
        output = kernels(x).bias_act(x, b, forms.BiasActForm(*numbers))
        bias_act_setup(ctx, (x, b, *numbers), output)
        return output

    backward = staticmethod(bias_act_backward)


def bias_act_grad(dy, x, b, y, form, with_db):
    """Return the gradients of x and b; `BiasActForm.needs` says which of x, b and y are given."""
    if not is_plain(dy):
        return _registered().bias_act_grad(dy, x, b, y, *form, with_db)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (dy, x, b)):
        return _BiasActGrad.apply(dy, x, b, y, *form, with_db)
    return kernels(dy).bias_act_grad(dy, x, b, y, form, with_db)


def bias_act_grad_setup(ctx, inputs, output) -> None:
    dy, x, b, y, *numbers, _ = inputs
    ctx.form = forms.BiasActForm(*numbers)
    ctx.curved, ctx.shape = ctx.form.needs()[0], dy.shape
    ctx.save_for_backward(dy if ctx.curved else None, x, b, y)
    ctx.set_materialize_grads(False)


def bias_act_grad_backward(ctx, ddx, ddb):
    form, nothing = ctx.form, (None,) * (2 + len(ctx.form))
    if ddx is None and ddb is None:
        return None, None, None, *nothing
    dy, x, b, y = ctx.saved_tensors
    if ddb is not None:  # what arrives at the sum arrives at each of its terms
        spread = _along(ddb, form.dim, len(ctx.shape))
        ddx = spread.expand(ctx.shape) if ddx is None else ddx + spread
    ddy = bias_act_grad(ddx, x, b, y, form, False)[0] if ctx.needs_input_grad[0] else None
    if not ctx.curved or not any(ctx.needs_input_grad[1:3]):
        return ddy, None, None, *nothing
    through_slope = bias_act_grad2(dy, ddx, x, b, y, form)
    db = None
    if ctx.needs_input_grad[2]:
        db = through_slope.sum([axis for axis in range(through_slope.ndim) if axis != form.dim])
    return ddy, through_slope, db, *nothing


def _along(b, dim, ndim):
    return b.reshape([-1 if axis == dim else 1 for axis in range(ndim)])


class _BiasActGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dy, x, b, y, *numbers):
        form = forms.BiasActForm(*numbers[:-1])
        output = kernels(dy).bias_act_grad(dy, x, b, y, form, numbers[-1])
        bias_act_grad_setup(ctx, (dy, x, b, y, *numbers), output)
        return output

    backward = staticmethod(bias_act_grad_backward)


def bias_act_grad2(dy, ddx, x, b, y, form):
    """Return the gradient of x through the slope; the last derivative that curved activations have here."""
    if not is_plain(dy):
        return _registered().bias_act_grad2(dy, ddx, x, b, y, *form)
    return _BiasActGrad2.apply(dy, ddx, x, b, y, *form)


def no_third_gradient(ctx, *grads):
    raise RuntimeError("bias_act: third gradients of curved activations exist with impl='ref' alone")


class _BiasActGrad2(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dy, ddx, x, b, y, *numbers):
        return kernels(dy).bias_act_grad2(dy, ddx, x, b, y, forms.BiasActForm(*numbers))

    backward = staticmethod(no_third_gradient)
