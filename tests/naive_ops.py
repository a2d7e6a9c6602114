"""The resampling ops written down literally, slow and obvious, for the tests to compare with."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def upfirdn2d(x, f, up=(1, 1), down=(1, 1), padding=(0, 0, 0, 0), flip_filter=False, gain=1):
    """Insert zeros, pad, correlate with a full 2-D filter, drop pixels; up and down are (x, y)."""
    batch, channels, height, width = x.shape
    f = torch.ones(1, 1) if f is None else f
    f = torch.outer(f, f) if f.ndim == 1 else f
    f = (f if flip_filter else f.flip([0, 1])).to(x)
    y = x.new_zeros(batch, channels, height * up[1], width * up[0])
    y[:, :, :: up[1], :: up[0]] = x
    y = F.pad(y, [max(p, 0) for p in padding])
    x0, x1, y0, y1 = (max(-p, 0) for p in padding)
    y = y[:, :, y0 : y.shape[2] - y1, x0 : y.shape[3] - x1]
    y = y.unfold(2, f.shape[0], 1).unfold(3, f.shape[1], 1)
    y = (y * f).sum([4, 5]) * gain
    return y[:, :, :: down[1], :: down[0]]


def filtered_lrelu(x, fu, fd, b, up, down, padding, gain, slope, clamp):
    x = upfirdn2d(x + b[:, None, None], fu, (up, up), padding=padding, gain=up**2)
    x = torch.where(x < 0, x * slope, x) * gain
    return upfirdn2d(x.clamp(-clamp, clamp), fd, down=(down, down))
