"""Add a bias, apply an activation, scale and clamp."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from dnnlib import EasyDict

from . import impl as _impl
from .native import dispatch
from .native import library as native
from .native.specs import NO_CLAMP, BiasActSpec

# Foreign pickles read `activation_funcs[name].def_gain` and `.def_alpha`; func is (x, alpha) -> y.
activation_funcs = {
    "linear": EasyDict(func=lambda x, alpha: x, def_alpha=0, def_gain=1),
    "relu": EasyDict(func=lambda x, alpha: F.relu(x), def_alpha=0, def_gain=math.sqrt(2)),
    "lrelu": EasyDict(func=lambda x, alpha: F.leaky_relu(x, alpha), def_alpha=0.2, def_gain=math.sqrt(2)),
    "tanh": EasyDict(func=lambda x, alpha: torch.tanh(x), def_alpha=0, def_gain=1),
    "sigmoid": EasyDict(func=lambda x, alpha: torch.sigmoid(x), def_alpha=0, def_gain=1),
    "elu": EasyDict(func=lambda x, alpha: F.elu(x), def_alpha=0, def_gain=1),
    "selu": EasyDict(func=lambda x, alpha: F.selu(x), def_alpha=0, def_gain=1),
    "softplus": EasyDict(func=lambda x, alpha: F.softplus(x), def_alpha=0, def_gain=1),
    "swish": EasyDict(func=lambda x, alpha: F.silu(x), def_alpha=0, def_gain=math.sqrt(2)),
}


def bias_act(
    x: torch.Tensor,
    b: torch.Tensor | None = None,
    dim: int = 1,
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Return `clamp(act(x + b) * gain)` in the shape and dtype of `x`.

    x: any shape, floating point. b: `[x.shape[dim]]` or None. alpha: slope of lrelu below zero (default 0.2),
    unused by the others. gain: default sqrt(2) for relu, lrelu, swish, else 1. clamp: limit of the magnitude,
    None for none; where it is active, the gradient is zero. First and second gradients exist for x and b.
    Raises TypeError, ValueError for invalid arguments.
    """
    _check(x, b, dim, act, clamp)
    activation = activation_funcs[act]
    alpha = float(activation.def_alpha if alpha is None else alpha)
    gain = float(activation.def_gain if gain is None else gain)
    if b is not None and b.dtype != x.dtype:
        b = b.to(x.dtype)
    if _impl.choose("bias_act", impl, x.device.type) != "ref" and gain > 0 and alpha >= 0:
        if not dispatch.is_exporting():
            limits = NO_CLAMP if clamp is None else float(clamp)
            spec = BiasActSpec(0 if b is None else dim % x.ndim, act, alpha, gain, limits)
            y = dispatch.attempt(native.bias_act, "bias_act", impl, x, b, spec)
            if y is not None:
                return y
    if b is not None:
        b = b.reshape([-1 if axis == dim % x.ndim else 1 for axis in range(x.ndim)])
    if act in _HOMOGENEOUS and gain > 0 and alpha >= 0:
        x = _scaled_sum(x, b, gain)
        x = _HOMOGENEOUS[act](x, alpha)
    else:
        x = activation.func(x if b is None else x + b, alpha)
        x = x if gain == 1 else x * gain
    return x if clamp is None else clamp_if_needed(x, clamp)


# For positive gains act(x) * gain == act(x * gain): the gain joins the bias and the activation works in
# place, which torch can differentiate unless alpha is negative.
_HOMOGENEOUS: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "linear": lambda x, alpha: x,
    "relu": lambda x, alpha: F.relu(x, inplace=True),
    "lrelu": lambda x, alpha: F.leaky_relu(x, alpha, inplace=True),
}


def _scaled_sum(x, b, gain):
    """Return `(x + b) * gain` in memory of its own."""
    if b is None:
        return x * gain
    return x + b if gain == 1 else torch.add(b * gain, x, alpha=gain)


def clamp_if_needed(x: torch.Tensor, clamp: float) -> torch.Tensor:
    """Return `x` clamped to [-clamp, clamp]; the gradient is zero where that changes it.

    On the CPU the gradient of a clamp costs many times the clamp, so values that are all within the limit
    skip it.
    """
    saves = x.requires_grad and torch.is_grad_enabled() and x.device.type == "cpu" and x.numel()
    if saves and dispatch.is_plain(x) and not dispatch.is_exporting():
        values = x.detach()
        if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
            values = values.permute(0, 2, 3, 1)  # in the order of memory
        low, high = torch.aminmax(values)
        if low >= -clamp and high <= clamp:
            return x
    return x.clamp(-clamp, clamp)


def _check(x, b, dim, act, clamp):
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"bias_act: x must be a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise ValueError(f"bias_act: x must be floating point, got {x.dtype}")
    if act not in activation_funcs:
        raise ValueError(f"bias_act: act must be one of {', '.join(activation_funcs)}, got {act!r}")
    if clamp is not None and not clamp >= 0:
        raise ValueError(f"bias_act: clamp must be None or at least 0, got {clamp!r}")
    if b is None:
        return
    if not isinstance(b, torch.Tensor):
        raise TypeError(f"bias_act: b must be a tensor or None, got {type(b).__name__}")
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(f"bias_act: dim {dim} does not exist in x of shape {list(x.shape)}")
    if b.device != x.device:
        raise ValueError(f"bias_act: b is on {b.device}, x on {x.device}")
    if b.ndim != 1 or b.shape[0] != x.shape[dim]:
        raise ValueError(
            f"bias_act: b must be [{x.shape[dim]}] for dim {dim} of {list(x.shape)}, got {list(b.shape)}"
        )


def _trial(device: torch.device) -> float:
    """Return the difference between kernel and reference on a small input."""
    x = torch.linspace(-2, 2, 2 * 3 * 12 * 12, device=device).reshape(2, 3, 12, 12)
    b = torch.tensor([0.5, -0.5, 0.1], device=device)
    spec = BiasActSpec(1, "lrelu", 0.2, 1.0, 0.5)
    kernel, plain = native.bias_act(x, b, spec), bias_act(x, b, act="lrelu", gain=1, clamp=0.5, impl="ref")
    dx, db = native.BIAS_ACT_GRAD(x, None, None, plain, *spec, True)
    pairs = (kernel, plain), (db, dx.sum((0, 2, 3)))
    return sum(float((kernel - plain).abs().max()) for kernel, plain in pairs)


_impl.register("bias_act", _trial)
