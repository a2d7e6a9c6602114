import torch


def setup_filter(f, device="cpu", normalize=True, flip_filter=False, gain=1, separable=None):
    f = torch.as_tensor(1 if f is None else f, dtype=torch.float32)
    f = f[None] if f.ndim == 0 else f
    separable = (f.ndim == 1 and f.numel() >= 8) if separable is None else separable
    if f.ndim == 1 and not separable:
        f = f[:, None] * f[None, :]
    f = f / f.sum() if normalize else f
    f = f.flip(list(range(f.ndim))) if flip_filter else f
    return (f * gain ** (f.ndim / 2)).to(device)


def _pair(value):
    return (value, value) if isinstance(value, int) else tuple(value)


def _sides(padding):
    padding = [padding] * 2 if isinstance(padding, int) else list(padding)
    return [padding[0], padding[0], padding[1], padding[1]] if len(padding) == 2 else padding


def _width(f, axis):
    return 1 if f is None else f.shape[0 if f.ndim == 1 else axis]


def upfirdn2d(x, f, up=1, down=1, padding=0, flip_filter=False, gain=1):
    (upx, upy), (downx, downy) = _pair(up), _pair(down)
    n, channels, height, width = x.shape
    spread = x.new_zeros([n, channels, height * upy, width * upx])
    spread[:, :, ::upy, ::upx] = x
    spread = torch.nn.functional.pad(spread, _sides(padding))
    if f is not None:
        f = f.to(x.dtype) * gain ** (f.ndim / 2)
        f = f if flip_filter else f.flip(list(range(f.ndim)))
        f = f[:, None] * f[None, :] if f.ndim == 1 else f
        kernel = f[None, None].repeat(channels, 1, 1, 1)
        spread = torch.nn.functional.conv2d(spread, kernel, groups=channels)
    else:
        spread = spread * gain
    return spread[:, :, ::downy, ::downx]


def filter2d(x, f, padding=0, flip_filter=False, gain=1):
    x0, x1, y0, y1 = _sides(padding)
    w, h = _width(f, 1), _width(f, 0)
    pad = [x0 + w // 2, x1 + (w - 1) // 2, y0 + h // 2, y1 + (h - 1) // 2]
    return upfirdn2d(x, f, padding=pad, flip_filter=flip_filter, gain=gain)


def upsample2d(x, f, up=2, padding=0, flip_filter=False, gain=1):
    (ux, uy), (x0, x1, y0, y1) = _pair(up), _sides(padding)
    w, h = _width(f, 1), _width(f, 0)
    pad = [x0 + (w + ux - 1) // 2, x1 + (w - ux) // 2, y0 + (h + uy - 1) // 2, y1 + (h - uy) // 2]
    return upfirdn2d(x, f, up=up, padding=pad, flip_filter=flip_filter, gain=gain * ux * uy)


def downsample2d(x, f, down=2, padding=0, flip_filter=False, gain=1):
    (dx, dy), (x0, x1, y0, y1) = _pair(down), _sides(padding)
    w, h = _width(f, 1), _width(f, 0)
    pad = [x0 + (w - dx + 1) // 2, x1 + (w - dx) // 2, y0 + (h - dy + 1) // 2, y1 + (h - dy) // 2]
    return upfirdn2d(x, f, down=down, padding=pad, flip_filter=flip_filter, gain=gain)
