"""2-D convolution with up- or downsampling, in the order that costs least."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .conv2d_gradfix import conv2d, conv_transpose2d
from .upfirdn2d import check_filter, check_image, filter_size, parse_padding, positive_int, upfirdn2d


def conv2d_resample(
    x: torch.Tensor,
    w: torch.Tensor,
    f: torch.Tensor | None = None,
    up: int = 1,
    down: int = 1,
    padding: int | Sequence[int] = 0,
    groups: int = 1,
    flip_weight: bool = True,
    flip_filter: bool = False,
) -> torch.Tensor:
    """Upsample with `f`, convolve with `w`, downsample with `f`.

    x: `[N, I, H, W]`. w: `[O, I/groups, kh, kw]`. f: filter of `setup_filter`, None for the identity.
    padding: int, `[x, y]` or `[x0, x1, y0, y1]` in upsampled pixels; the half widths of `f` are added to it.
    flip_weight, flip_filter: True correlates with `w` or `f`, as torch does; False convolves.
    Returns `[N, O, H', W']`; with padding `k//2` for odd k, `H' = H * up / down`.
    Raises TypeError, ValueError for arguments that are out of form.
    """
    up, down, groups = (positive_int(v, n) for v, n in ((up, "up"), (down, "down"), (groups, "groups")))
    _check(x, w, f, groups)
    px0, px1, py0, py1 = parse_padding(padding)
    fw, fh = filter_size(f)
    if up > 1:
        px0, px1 = px0 + (fw + up - 1) // 2, px1 + (fw - up) // 2
        py0, py1 = py0 + (fh + up - 1) // 2, py1 + (fh - up) // 2
    if down > 1:
        px0, px1 = px0 + (fw - down + 1) // 2, px1 + (fw - down) // 2
        py0, py1 = py0 + (fh - down + 1) // 2, py1 + (fh - down) // 2
    pad = [px0, px1, py0, py1]
    pointwise = tuple(w.shape[2:]) == (1, 1)

    if up == 1 and (down == 1 or pointwise):  # filter, which shrinks, then convolve what is left
        if down > 1:
            x = upfirdn2d(x, f, down=down, padding=pad, flip_filter=flip_filter)
            pad = [0, 0, 0, 0]
        return _convolve(x, w, pad, groups, flip_weight)
    if up == 1:  # the convolution itself skips the pixels that are dropped
        x = upfirdn2d(x, f, padding=pad, flip_filter=flip_filter)
        return _convolve(x, w, [0, 0, 0, 0], groups, flip_weight, stride=down)
    if pointwise:  # a 1x1 convolution commutes with resampling: run it on the smaller image
        x = _convolve(x, w, [0, 0, 0, 0], groups, flip_weight)
        x = upfirdn2d(x, f, up=up, padding=pad, flip_filter=flip_filter, gain=up**2)
    else:
        x = _convolve_up(x, w, f, up, pad, groups, flip_weight, flip_filter)
    if down > 1:
        x = upfirdn2d(x, f, down=down, flip_filter=flip_filter)
    return x


def _convolve(x, w, pad, groups, flip_weight, stride=1):
    """Convolve with zero padding, which torch does itself if both sides are equal."""
    if not flip_weight and tuple(w.shape[2:]) != (1, 1):
        w = w.flip([2, 3])
    px0, px1, py0, py1 = pad
    if px0 != px1 or py0 != py1 or min(pad) < 0:
        x = torch.nn.functional.pad(x, pad)
        px0 = py0 = 0
    return conv2d(x, w, stride=stride, padding=(py0, px0), groups=groups)


def _convolve_up(x, w, f, up, pad, groups, flip_weight, flip_filter):
    """Run the transposed convolution first, the low-pass second: so no inserted zero is ever seen."""
    out_channels, in_per_group, kh, kw = w.shape
    if groups == 1:
        w = w.transpose(0, 1)
    else:
        w = w.reshape(groups, out_channels // groups, in_per_group, kh, kw).transpose(1, 2)
        w = w.reshape(groups * in_per_group, out_channels // groups, kh, kw)
    if flip_weight:  # a transposed convolution is a true convolution of the zero-inserted image
        w = w.flip([2, 3])
    # The full transposed convolution reaches k-1 beyond the first pixel and k-up beyond the last zero.
    px0, px1, py0, py1 = pad[0] - (kw - 1), pad[1] - (kw - up), pad[2] - (kh - 1), pad[3] - (kh - up)
    crop_x, crop_y = max(min(-px0, -px1), 0), max(min(-py0, -py1), 0)
    x = conv_transpose2d(x, w, stride=up, padding=(crop_y, crop_x), groups=groups)
    pad = [px0 + crop_x, px1 + crop_x, py0 + crop_y, py1 + crop_y]
    return upfirdn2d(x, f, padding=pad, flip_filter=flip_filter, gain=up**2)


def _check(x, w, f, groups):
    check_image(x, "conv2d_resample")
    check_filter(f, "conv2d_resample", x)
    if not isinstance(w, torch.Tensor) or w.ndim != 4:
        raise ValueError("conv2d_resample: w must be a tensor [O, I/groups, kh, kw]")
    if w.dtype != x.dtype or w.shape[1] * groups != x.shape[1] or w.shape[0] % groups:
        raise ValueError(
            f"conv2d_resample: w {list(w.shape)} {w.dtype} does not fit "
            f"x {list(x.shape)} {x.dtype} in {groups} groups"
        )
