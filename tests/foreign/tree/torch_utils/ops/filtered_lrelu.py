import torch

from . import upfirdn2d as resampling


def filtered_lrelu(
    x,
    fu=None,
    fd=None,
    b=None,
    up=1,
    down=1,
    padding=0,
    gain=2**0.5,
    slope=0.2,
    clamp=None,
    flip_filter=False,
):
    x = x if b is None else x + b.reshape(1, -1, 1, 1)
    x = resampling.upfirdn2d(x, fu, up=up, padding=padding, gain=up**2, flip_filter=flip_filter)
    x = torch.nn.functional.leaky_relu(x, slope) * gain
    x = x if clamp is None else x.clamp(-clamp, clamp)
    return resampling.upfirdn2d(x, fd, down=down, flip_filter=flip_filter)
