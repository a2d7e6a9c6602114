"""The CUDA specialisations that StyleGAN2 and StyleGAN3 need, so that they can be built before anybody waits.

What is missing here is not missing at run time: it is compiled at its first use.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from . import cuda, forms, params
from .plan import Plan

RESOLUTIONS = (8, 16, 32, 64, 128, 256, 512, 1024)
CHANNELS = (3, 32, 64, 512)  # of images, and those of features that share them out to threads differently
# Sizes of StyleGAN3's layers from 64 to 1024 px, and what its last layers crop to.
SIZES = (36, 52, 64, 84, 128, 148, 256, 276, 512, 532, 1024, 1044)
TAPS = 6  # that meet a pixel, in all published networks
CLAMP = 256.0
ALIGNED = 4096  # an address that stands for any that torch gives


def specialisations(
    capability: tuple[int, int], dtypes: Iterable[torch.dtype] = (torch.float16, torch.float32)
) -> list[Plan]:
    """One plan for each specialisation, of no particular launch."""
    found = {}
    for dtype in dtypes:
        for op, struct in itertools.chain(_bias_act(dtype), _upfirdn2d(dtype), _filtered_lrelu(dtype)):
            for name in ("input", "out", "x", "y"):
                if hasattr(struct, name):
                    setattr(struct, name, ALIGNED)
            plan = importlib.import_module(f"{__package__}.{op}.plan").plan(struct, capability)
            plan = plan._replace(grid=(1, 1, 1), block=(1, 1, 1), shared_bytes=0)
            found[plan] = None
    return list(found)


def _bias_act(dtype: torch.dtype) -> Iterator[tuple[str, Any]]:
    for act, order, clamp in itertools.product(("linear", "lrelu"), (0, 1), (CLAMP, forms.NO_CLAMP)):
        for shape in (torch.Size((4, 64, 32, 32)), torch.Size((4, 512))):
            form = forms.BiasActForm(1, act, 0.2, 1.0, clamp)
            p = forms.bias_act_params(shape, _strides(shape), dtype, order == 0, form, order)
            p.b = ALIGNED if order == 0 else None
            p.ref = ALIGNED if order and form.needs()[1] else None
            yield "bias_act", p


def _upfirdn2d(dtype: torch.dtype) -> Iterator[tuple[str, Any]]:
    taps = torch.Size((4, 4))
    for size, channels, last in itertools.product(RESOLUTIONS, CHANNELS, (False, True)):
        # Around a convolution that doubles or halves, on the other way past it, and back: four forms in all.
        for before, after, up, down, pad in (
            (size + 1, size, 1, 1, 1),
            (size, size + 1, 1, 1, 2),
            (size // 2, size, 2, 1, 2),
            (size, size // 2, 1, 2, 1),
        ):
            x, y = torch.Size((4, channels, before, before)), torch.Size((4, channels, after, after))
            form = forms.Upfirdn2dForm(up, up, down, down, pad, pad, after, after, False, 1.0)
            yield (
                "upfirdn2d",
                forms.upfirdn2d_params(x, _strides(x, last), _strides(y, last), dtype, taps, form),
            )


def _filtered_lrelu(dtype: torch.dtype) -> Iterator[tuple[str, Any]]:
    for up, size, radial, mode in itertools.product((2, 4), SIZES, (False, True), (0, 1, 2)):
        fu, fd = torch.Size((TAPS * up,)), torch.Size((TAPS * 2,) * (2 if radial else 1))
        down = 2
        if mode == params.GATE:  # the way back
            fu, fd, up, down = fd, fu, down, up
        x = torch.Size((4, 64, size * down // up + 8, size * down // up + 8))
        y = torch.Size((4, 64, size, size))
        form: Any = forms.FilteredLreluForm(up, down, 9, 9, size, size, False, 1.0, 0.2, CLAMP)
        mask = None if mode == params.ACTIVATE else torch.Size((4, 64, size * down + 10, 1024))
        if mode == params.GATE:
            form = forms.GateForm(*form[:9], size * down + 10, 0, 0)
        p = forms.filtered_lrelu_params(x, _strides(x), _strides(y), dtype, (fu, fd), mask, form, mode)
        p.b = ALIGNED if mode != params.GATE else None
        yield "filtered_lrelu", p


def _strides(shape: torch.Size, channels_last: bool = False) -> tuple[int, ...]:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, device="meta", memory_format=layout).stride()


def trial(device: torch.device) -> str | None:
    """Run each kernel once on a device beside plain torch; None, or what is wrong with which."""
    from torch_utils.ops.bias_act import bias_act
    from torch_utils.ops.filtered_lrelu import filtered_lrelu
    from torch_utils.ops.upfirdn2d import upfirdn2d

    ramp = torch.arange(2 * 3 * 12 * 12, device=device, dtype=torch.float32)
    x = (ramp * 0.7).sin().reshape(2, 3, 12, 12)
    f = torch.tensor([1.0, 3, 3, 1], device=device) / 8
    b = torch.tensor([0.5, -0.5, 0.1], device=device)
    act = forms.BiasActForm(1, "lrelu", 0.2, 1.0, 0.5)
    fir = forms.Upfirdn2dForm(2, 2, 1, 1, 2, 2, 24, 24, False, 4.0)
    layer = forms.FilteredLreluForm(2, 2, 3, 3, 12, 12, False, 4.0, 0.2, 0.5)
    runs = {
        "bias_act": (
            lambda: cuda.bias_act(x, b, act),
            lambda: bias_act(x, b, act="lrelu", gain=1, clamp=0.5, impl="ref"),
        ),
        "upfirdn2d": (
            lambda: cuda.upfirdn2d(x, f, fir),
            lambda: upfirdn2d(x, f, up=2, padding=[2, 1, 2, 1], gain=4, impl="ref"),
        ),
        "filtered_lrelu": (
            lambda: cuda.filtered_lrelu(x, f, f, b, None, layer),
            lambda: filtered_lrelu(x, f, f, b, 2, 2, 3, gain=1, clamp=0.5, impl="ref"),
        ),
    }
    for op, (kernel, reference) in runs.items():
        try:
            actual, expected = kernel(), reference()
            error = float((actual - expected).abs().max())
        except Exception as problem:
            return f"{op} fails on {device}: {problem}"
        if not error < 1e-4:
            return f"{op} is wrong on {device}, by {error:g}"
    return None
