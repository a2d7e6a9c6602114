import torch

from . import upfirdn2d as resampling


def conv2d_resample(x, w, f=None, up=1, down=1, padding=0, groups=1, flip_weight=True, flip_filter=False):
    pad = [padding] * 4 if isinstance(padding, int) else list(padding)
    pad = [pad[0], pad[0], pad[1], pad[1]] if len(pad) == 2 else pad
    if f is not None:
        for side, taps in ((0, f.shape[-1]), (2, f.shape[0])):
            if up > 1:
                pad[side] += (taps + up - 1) // 2
                pad[side + 1] += (taps - up) // 2
            if down > 1:
                pad[side] += (taps - down + 1) // 2
                pad[side + 1] += (taps - down) // 2
    x = resampling.upfirdn2d(
        x, f if up > 1 else None, up=up, padding=pad, gain=up**2, flip_filter=flip_filter
    )
    x = torch.nn.functional.conv2d(x, w if flip_weight else w.flip([2, 3]), groups=groups)
    return resampling.upfirdn2d(x, f, down=down, flip_filter=flip_filter) if down > 1 else x
