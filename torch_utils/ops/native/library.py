"""The native ops in `torch.ops.stylegan_ops`: schemas, fake kernels, gradients, batching rules.

Importing this module registers them. torch.compile, fake tensors, tensor subclasses and dispatch modes see
what is here; `autograd.py` says who else calls what.
"""

from __future__ import annotations

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
_FILTERS = f"int up, int down, {_SIZES}, float up_gain, float slope"
_MASK = "SymInt mask_w, SymInt mask_off_x, SymInt mask_off_y"
SCHEMAS = {
    "upfirdn2d": (
        f"(Tensor x, Tensor? f, int up_x, int up_y, int down_x, int down_y, {_SIZES}, float gain) -> Tensor"
    ),
    "filtered_lrelu": (
        f"(Tensor x, Tensor? fu, Tensor? fd, Tensor? b, {_FILTERS}, float clamp, bool record)"
        " -> (Tensor, Tensor)"
    ),
    "filtered_lrelu_gate": (
        f"(Tensor x, Tensor mask, Tensor? fu, Tensor? fd, {_FILTERS}, {_MASK}) -> Tensor"
    ),
    "bias_act": f"(Tensor x, Tensor? b, {_ACT}) -> Tensor",
    "bias_act_grad": (
        f"(Tensor dy, Tensor? x, Tensor? b, Tensor? y, {_ACT}, bool with_db) -> (Tensor, Tensor)"
    ),
    "bias_act_grad2": f"(Tensor dy, Tensor ddx, Tensor? x, Tensor? b, Tensor? y, {_ACT}) -> Tensor",
}


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


# ---- Registration


def _filtered_lrelu(x, fu, fd, b, *numbers):
    """The kernel on a mask of zeros: what no gradient reads stays unwritten, and torch compares results."""
    form, record = forms.FilteredLreluForm(*numbers[:-1]), numbers[-1]
    if not record:
        return autograd.FILTERED_LRELU.kernel(x, fu, fd, b, *numbers)
    mask = forms.empty_mask(x, fd, form).zero_()
    return autograd.kernels(x).filtered_lrelu(x, fu, fd, b, mask, form), mask


def _register(op: autograd.NativeOp, fake, kernel=None) -> None:
    _library.define(op.name + SCHEMAS[op.name], tags=(torch.Tag.pt2_compliant_tag,))
    for device in ("CPU", "CUDA"):
        _library.impl(op.name, kernel or op.kernel, device)
    name = f"{NAMESPACE}::{op.name}"
    torch.library.register_fake(name, fake, lib=_library)
    torch.library.register_autograd(name, op.backward, setup_context=op.setup, lib=_library)
    torch.library.register_vmap(name, op.batch, lib=_library)


_library = torch.library.Library(NAMESPACE, "DEF")
_register(autograd.UPFIRDN2D, _fake_upfirdn2d)
_register(autograd.FILTERED_LRELU, _fake_filtered_lrelu, _filtered_lrelu)
_register(autograd.GATE, _fake_filtered_lrelu_gate)
_register(autograd.BIAS_ACT, _fake_bias_act)
_register(autograd.BIAS_ACT_GRAD, _fake_bias_act_grad)
_register(autograd.BIAS_ACT_GRAD2, _fake_bias_act_grad2)
