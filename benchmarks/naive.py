"""The baseline of the benchmarks: the ops as plain-torch code bases of the family compute them.

Zeros are inserted, padded and convolved with, channel by channel, one convolution for each set of taps;
bias, activation, gain and clamp are separate operations. Values and gradients are those of the reference (the
tests of the benchmarks compare them), with torch's autograd only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import _checkout  # noqa: F401
import torch
import torch.nn.functional as F

from torch_utils.ops import bias_act as bias_act_module
from torch_utils.ops import conv2d_gradfix, conv2d_resample
from torch_utils.ops import filtered_lrelu as filtered_lrelu_module
from torch_utils.ops import upfirdn2d as upfirdn2d_module

SQRT_2 = 2**0.5


def upfirdn2d(x, f, up=1, down=1, padding=0, flip_filter=False, gain=1, impl="auto"):
    """Compute `torch_utils.ops.upfirdn2d.upfirdn2d` with every zero multiplied."""
    (ux, uy), (dx, dy) = (
        upfirdn2d_module.parse_scaling(up, "up"),
        upfirdn2d_module.parse_scaling(down, "down"),
    )
    x0, x1, y0, y1 = upfirdn2d_module.parse_padding(padding)
    if f is None:
        f = torch.ones([1, 1], device=x.device)
    batch, channels, height, width = x.shape
    x = x.reshape(batch, channels, height, 1, width, 1)
    x = F.pad(x, [0, ux - 1, 0, 0, 0, uy - 1])
    x = x.reshape(batch, channels, height * uy, width * ux)
    x = F.pad(x, [max(x0, 0), max(x1, 0), max(y0, 0), max(y1, 0)])
    x = x[:, :, max(-y0, 0) : x.shape[2] - max(-y1, 0), max(-x0, 0) : x.shape[3] - max(-x1, 0)]
    f = (f * gain ** (f.ndim / 2)).to(x.dtype)
    f = f if flip_filter else f.flip(list(range(f.ndim)))
    if f.ndim == 2:
        x = F.conv2d(x, f.expand(channels, 1, *f.shape), groups=channels)
    else:
        x = F.conv2d(x, f[None, :].expand(channels, 1, 1, -1), groups=channels)
        x = F.conv2d(x, f[:, None].expand(channels, 1, -1, 1), groups=channels)
    return x[:, :, ::dy, ::dx]


def bias_act(x, b=None, dim=1, act="linear", alpha=None, gain=None, clamp=None, impl="auto"):
    """Compute `torch_utils.ops.bias_act.bias_act`, one operation after the other."""
    spec = bias_act_module.activation_funcs[act]
    alpha = float(spec.def_alpha if alpha is None else alpha)
    gain = float(spec.def_gain if gain is None else gain)
    if b is not None:
        x = x + b.reshape([-1 if axis == dim % x.ndim else 1 for axis in range(x.ndim)])
    x = spec.func(x, alpha)
    if gain != 1:
        x = x * gain
    return x if clamp is None else x.clamp(-clamp, clamp)


def filtered_lrelu(
    x,
    fu=None,
    fd=None,
    b=None,
    up=1,
    down=1,
    padding=0,
    gain=SQRT_2,
    slope=0.2,
    clamp=None,
    flip_filter=False,
    impl="auto",
):
    """Compute `torch_utils.ops.filtered_lrelu.filtered_lrelu` with the upsampled image in memory."""
    x = bias_act(x, b)
    x = upfirdn2d(x, fu, up=up, padding=padding, gain=up**2, flip_filter=flip_filter)
    x = bias_act(x, act="lrelu", alpha=slope, gain=gain, clamp=clamp)
    return upfirdn2d(x, fd, down=down, flip_filter=flip_filter)


@contextlib.contextmanager
def instead_of_ours() -> Iterator[None]:
    """Replace the three ops by the ones above inside the block."""
    places = [
        # Grouped convolutions have the styles inside their weights: the path length needs their gradients.
        (conv2d_gradfix, "no_weight_gradients", contextlib.nullcontext),
        (bias_act_module, "bias_act", bias_act),
        (upfirdn2d_module, "upfirdn2d", upfirdn2d),
        (conv2d_resample, "upfirdn2d", upfirdn2d),
        (filtered_lrelu_module, "filtered_lrelu", filtered_lrelu),
    ]
    ours = [getattr(module, name) for module, name, _ in places]
    for module, name, op in places:
        setattr(module, name, op)
    try:
        yield
    finally:
        for (module, name, _), op in zip(places, ours):
            setattr(module, name, op)
