"""The native ops in `torch.ops.stylegan_ops`: schemas, fake kernels, gradients, batching rules.

Importing this module registers them. What torch.compile, torch.export, torch.func, fake tensors and tensor
subclasses see is here; eager mode takes the shorter way that `autograd.py` describes.
"""

from __future__ import annotations

from typing import Any

import torch

from . import autograd, forms
from .autograd import attempt as attempt
from .autograd import bias_act as bias_act
from .autograd import filtered_lrelu as filtered_lrelu
from .autograd import is_exporting as is_exporting
from .autograd import is_plain as is_plain
from .autograd import upfirdn2d as upfirdn2d

NAMESPACE = "stylegan_ops"

_ACT = "int dim, str act, float alpha, float gain, float clamp"
_SIZES = "SymInt pad_x0, SymInt pad_y0, SymInt out_h, SymInt out_w, bool flip_filter"
_GATE = f"int up, int down, {_SIZES}, float up_gain, float slope"
SCHEMAS = {
    "upfirdn2d": (
        f"(Tensor x, Tensor? f, int up_x, int up_y, int down_x, int down_y, {_SIZES}, float gain) -> Tensor"
    ),
    "filtered_lrelu": (
        f"(Tensor x, Tensor? fu, Tensor? fd, Tensor? b, {_GATE}, float clamp, bool record)"
        " -> (Tensor, Tensor)"
    ),
    "filtered_lrelu_gate": (
        f"(Tensor x, Tensor mask, Tensor? fu, Tensor? fd, {_GATE},"
        " SymInt mask_w, SymInt mask_off_x, SymInt mask_off_y) -> Tensor"
    ),
    "bias_act": f"(Tensor x, Tensor? b, {_ACT}) -> Tensor",
    "bias_act_grad": (
        f"(Tensor dy, Tensor? x, Tensor? b, Tensor? y, {_ACT}, bool with_db) -> (Tensor, Tensor)"
    ),
    "bias_act_grad2": f"(Tensor dy, Tensor ddx, Tensor? x, Tensor? b, Tensor? y, {_ACT}) -> Tensor",
}


# ---- Kernels: flat arguments in, tensors out


def _upfirdn2d(x, f, *numbers):
    return autograd.kernels(x).upfirdn2d(x, f, forms.Upfirdn2dForm(*numbers))


def _filtered_lrelu(x, fu, fd, b, *numbers):
    form, record = forms.FilteredLreluForm(*numbers[:-1]), numbers[-1]
    y, mask = autograd.kernels(x).filtered_lrelu(x, fu, fd, b, form, record)
    return y, x.new_empty(0, dtype=torch.uint8) if mask is None else mask


def _filtered_lrelu_gate(x, mask, fu, fd, *numbers):
    return autograd.kernels(x).filtered_lrelu_gate(x, mask, fu, fd, forms.GateForm(*numbers))


def _bias_act(x, b, *numbers):
    return autograd.kernels(x).bias_act(x, b, forms.BiasActForm(*numbers))


def _bias_act_grad(dy, x, b, y, *numbers):
    form, with_db = forms.BiasActForm(*numbers[:-1]), numbers[-1]
    dx, db = autograd.kernels(dy).bias_act_grad(dy, x, b, y, form, with_db)
    return dx, dy.new_empty(0) if db is None else db


def _bias_act_grad2(dy, ddx, x, b, y, *numbers):
    return autograd.kernels(dy).bias_act_grad2(dy, ddx, x, b, y, forms.BiasActForm(*numbers))


# ---- Fake kernels: the sizes and layouts of the results


def _fake_upfirdn2d(x, f, *numbers):
    form = forms.Upfirdn2dForm(*numbers)
    return forms.empty_image(x, form.out_h, form.out_w)


def _fake_filtered_lrelu(x, fu, fd, b, *numbers):
    form, record = forms.FilteredLreluForm(*numbers[:-1]), numbers[-1]
    y = forms.empty_activated(x, form.out_h, form.out_w)
    return y, forms.empty_mask(x, fd, form) if record else x.new_empty(0, dtype=torch.uint8)


def _fake_filtered_lrelu_gate(x, mask, fu, fd, *numbers):
    form = forms.GateForm(*numbers)
    return forms.empty_activated(x, form.out_h, form.out_w)


def _fake_bias_act(x, b, *numbers):
    return torch.empty_like(x)


def _fake_bias_act_grad(dy, x, b, y, *numbers):
    form, with_db = forms.BiasActForm(*numbers[:-1]), numbers[-1]
    return torch.empty_like(_leader(dy, x, y, form)), dy.new_empty(dy.shape[form.dim] if with_db else 0)


def _fake_bias_act_grad2(dy, ddx, x, b, y, *numbers):
    return torch.empty_like(_leader(dy, x, y, forms.BiasActForm(*numbers)))


def _leader(dy, x, y, form):
    """The tensor whose order of memory the result follows, as `forms.one_layout` has it."""
    told = x if form.act == "swish" else y
    return dy if told is None else told


# ---- torch.vmap: one more batch is a longer batch, or more channels where a bias goes along


def _fold(tensor, batch_axis, size, axis):
    """Merge the batch into `axis`; what has no batch is repeated."""
    if tensor is None:
        return None
    if batch_axis is None:
        shape = list(tensor.shape)
        tensor = tensor.unsqueeze(axis).expand(*shape[:axis], size, *shape[axis:])
    else:
        tensor = tensor.movedim(batch_axis, axis)
    return tensor.flatten(axis, axis + 1)


def _unfold(tensor, size, axis):
    return tensor.unflatten(axis, (size, tensor.shape[axis] // size))


def _refuse_filters(*batch_axes):
    if any(axis is not None for axis in batch_axes):
        raise NotImplementedError("torch.vmap over the filters of an op: call it once for each filter")


def _vmap_upfirdn2d(info, in_dims, x, f, *numbers):
    _refuse_filters(in_dims[1])
    x = _fold(x, in_dims[0], info.batch_size, 0)
    return _unfold(_op("upfirdn2d")(x, f, *numbers), info.batch_size, 0), 0


def _vmap_filtered_lrelu(info, in_dims, x, fu, fd, b, *numbers):
    _refuse_filters(*in_dims[1:3])
    axis = 0 if in_dims[3] is None else 1
    x = _fold(x, in_dims[0], info.batch_size, axis)
    b = b if axis == 0 else _fold(b, in_dims[3], info.batch_size, 0)
    y, mask = _op("filtered_lrelu")(x, fu, fd, b, *numbers)
    y = _unfold(y, info.batch_size, axis)
    if not numbers[-1]:
        return (y, mask), (axis, None)
    return (y, _unfold(mask, info.batch_size, axis)), (axis, axis)


def _vmap_filtered_lrelu_gate(info, in_dims, x, mask, fu, fd, *numbers):
    _refuse_filters(*in_dims[2:4])
    x, mask = (_fold(t, axis, info.batch_size, 0) for t, axis in zip((x, mask), in_dims))
    return _unfold(_op("filtered_lrelu_gate")(x, mask, fu, fd, *numbers), info.batch_size, 0), 0


def _vmap_bias_act(info, in_dims, *args):
    return _vmap_elementwise("bias_act", info.batch_size, in_dims, args, tensors=2, bias=1)


def _vmap_bias_act_grad(info, in_dims, *args):
    return _vmap_elementwise("bias_act_grad", info.batch_size, in_dims, args, tensors=4, bias=2)


def _vmap_bias_act_grad2(info, in_dims, *args):
    return _vmap_elementwise("bias_act_grad2", info.batch_size, in_dims, args, tensors=5, bias=3)


def _vmap_elementwise(name, size, in_dims, args, tensors, bias):
    dim, *numbers = args[tensors:]
    ndim = args[0].ndim - (in_dims[0] is not None)
    axis = dim if dim < ndim else 0  # without a bias, dim may mean nothing
    folded = [
        _fold(t, batch_axis, size, 0 if place == bias else axis)
        for place, (t, batch_axis) in enumerate(zip(args[:tensors], in_dims))
    ]
    result = _op(name)(*folded, dim, *numbers)
    if not isinstance(result, tuple):
        return _unfold(result, size, axis), axis
    dx, db = result
    if not numbers[-1]:
        return (_unfold(dx, size, axis), db), (axis, None)
    return (_unfold(dx, size, axis), _unfold(db, size, 0)), (axis, 0)


# ---- Registration


def _op(name: str) -> Any:
    return getattr(getattr(torch.ops, NAMESPACE), name)


def _register(name: str, kernel, fake, batch, backward, setup=None) -> None:
    _library.define(name + SCHEMAS[name], tags=(torch.Tag.pt2_compliant_tag,))
    for device in ("CPU", "CUDA"):
        _library.impl(name, kernel, device)
    qualified = f"{NAMESPACE}::{name}"
    torch.library.register_fake(qualified, fake, lib=_library)
    torch.library.register_autograd(qualified, backward, setup_context=setup, lib=_library)
    torch.library.register_vmap(qualified, batch, lib=_library)


_library = torch.library.Library(NAMESPACE, "DEF")
_register(
    "upfirdn2d",
    *(_upfirdn2d, _fake_upfirdn2d, _vmap_upfirdn2d),
    *(autograd.upfirdn2d_backward, autograd.upfirdn2d_setup),
)
_register(
    "filtered_lrelu",
    *(_filtered_lrelu, _fake_filtered_lrelu, _vmap_filtered_lrelu),
    *(autograd.filtered_lrelu_backward, autograd.filtered_lrelu_setup),
)
_register(
    "filtered_lrelu_gate",
    *(_filtered_lrelu_gate, _fake_filtered_lrelu_gate, _vmap_filtered_lrelu_gate),
    *(autograd.gate_backward, autograd.gate_setup),
)
_register(
    "bias_act",
    *(_bias_act, _fake_bias_act, _vmap_bias_act),
    *(autograd.bias_act_backward, autograd.bias_act_setup),
)
_register(
    "bias_act_grad",
    *(_bias_act_grad, _fake_bias_act_grad, _vmap_bias_act_grad),
    *(autograd.bias_act_grad_backward, autograd.bias_act_grad_setup),
)
_register(
    "bias_act_grad2",
    *(_bias_act_grad2, _fake_bias_act_grad2, _vmap_bias_act_grad2),
    autograd.no_third_gradient,
)
