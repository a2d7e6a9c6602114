"""The CUDA specializations that StyleGAN2, StyleGAN3 and LPIPS need, for building ahead of time.

Specializations that are missing here are compiled at their first use.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch

from . import params, specs
from .plan import LaunchPlan

RESOLUTIONS = (8, 16, 32, 64, 128, 256, 512, 1024)
CHANNELS = (3, 32, 64, 512)  # of images, and those of features that share them out to threads differently
MOST = 64 * 1024  # channels times pixels of a side: the widest published networks
# From the pixels of one layer of StyleGAN3 to those of the next: equal, growing, cropped at last.
SIZES = (36, 52, 64, 84, 128, 148, 256, 276, 512, 532, 1024, 1044)
SAME = tuple((size, size, 2) for size in SIZES)
GROWING = ((36, 52, 4), (52, 84, 4), (84, 148, 4), (148, 276, 4), (276, 532, 4), (532, 1044, 4))
CROPPED = tuple((size + 20, size, 2) for size in (64, 128, 256, 512, 1024))
LAYERS = (*SAME, *GROWING, *CROPPED)
LARGE = tuple(layer for layer in SAME if layer[0] >= 64)
TAPS = 6  # that meet a pixel, in all published networks
CLAMP = 256.0
ALIGNED = 4096  # an address that stands for any that torch gives


def specializations(capability: tuple[int, int]) -> list[LaunchPlan]:
    """Return one plan for each specialization, of no particular launch."""
    found = {}
    for dtype in (torch.float16, torch.float32):
        needed = (_bias_act, _fma, _unit_distance, _upfirdn2d, _filtered_lrelu)
        for op, struct in itertools.chain(*(each(dtype) for each in needed)):
            for name in ("input", "out", "x", "y"):
                if hasattr(struct, name):
                    setattr(struct, name, ALIGNED)
            plan = importlib.import_module(f"{__package__}.{op}.plan").plan(struct, capability)
            found[plan.specialization()] = None
    return list(found)


def _bias_act(dtype: torch.dtype) -> Iterator[tuple[str, Any]]:
    features, dense = torch.Size((4, 64, 32, 32)), torch.Size((4, 512))
    shapes = [(features, CLAMP, False), (features, specs.NO_CLAMP, False), (dense, specs.NO_CLAMP, False)]
    if dtype == torch.float16:  # layers in half precision may be channels-last
        shapes.append((features, CLAMP, True))
    kinds = list(itertools.product(("linear", "lrelu"), shapes))
    if dtype == torch.float32:  # LPIPS
        kinds.append(("relu", (features, specs.NO_CLAMP, True)))
    for (act, (shape, clamp, last)), order, has_bias in itertools.product(kinds, (0, 1), (True, False)):
        if not has_bias and (order or act != "linear" or shape is features):
            continue  # a layer without a bias or an activation has a gain at most
        spec = specs.BiasActSpec(1, act, 0.2, 1.0, clamp)
        p = specs.bias_act_params(shape, _strides(shape, last), dtype, order == 0 and has_bias, spec, order)
        p.b = ALIGNED if order == 0 and has_bias else None
        p.ref = ALIGNED if order and spec.needs()[1] else None
        yield "bias_act", p
    # The gradient of the bias comes along; channels-last, a thread holds 1 to 4 vectors of channels.
    wide = [(torch.Size((4, channels, 32, 32)), CLAMP, True) for channels in (512, 1024)]
    shapes += wide if dtype == torch.float16 else []
    for act, (shape, clamp, last) in itertools.product(("linear", "lrelu"), shapes):
        spec = specs.BiasActSpec(1, act, 0.2, 1.0, clamp)
        p = specs.bias_act_params(shape, _strides(shape, last), dtype, True, spec, 1)
        p.ref, p.db = ALIGNED if spec.needs()[1] else None, ALIGNED
        yield "bias_act", p


def _fma(dtype: torch.dtype) -> Iterator[tuple[str, Any]]:
    shapes = [((4, 64, 64, 64), False)]
    if (
        dtype == torch.float16
    ):  # planes of StyleGAN3 have borders; channels-last, a thread holds 1 to 4 vectors
        shapes += [((4, 64, 38, 38), False), *(((4, channels, 64, 64), True) for channels in (64, 512, 1024))]
    for shape, last in shapes:
        for addend in (params.NO_ADDEND, params.NUMBER, params.MAP):
            yield "fma", _product(shape, last, dtype, addend)
        for with_dc in (False, True) if last else (False,):
            p = _product(shape, last, dtype, params.NO_ADDEND)
            p.other = p.db = ALIGNED
            p.dc = ALIGNED if with_dc else None
            yield "fma", p


def _product(shape: tuple[int, ...], last: bool, dtype: torch.dtype, addend: int) -> params.Fma:
    p = specs.fma_params(torch.Size(shape), not last, dtype, addend, True)
    p.b, p.c = ALIGNED, ALIGNED if addend != params.NO_ADDEND else None
    return p


def _unit_distance(dtype: torch.dtype) -> Iterator[tuple[str, Any]]:
    # LPIPS, in whose maps a thread holds 1 to 4 vectors.
    for channels in (128, 256, 384, 512) if dtype == torch.float32 else ():
        for with_s in (False, True):
            p = specs.unit_distance_params(torch.Size((4, channels, 32, 32)), dtype)
            p.w, p.s = ALIGNED, ALIGNED if with_s else None
            yield "unit_distance", p


def _upfirdn2d(dtype: torch.dtype) -> Iterator[tuple[str, Any]]:
    taps = torch.Size((4, 4))
    layouts = (False, True) if dtype == torch.float16 else (False,)  # what layers in half precision may use
    for size, channels, last in itertools.product(RESOLUTIONS, CHANNELS, layouts):
        if size * channels > MOST:
            continue
        # Around a convolution that doubles or halves, on the other way past it, and back: four calls in all.
        for before, after, up, down, pad in (
            (size + 1, size, 1, 1, 1),
            (size, size + 1, 1, 1, 2),
            (size // 2, size, 2, 1, 2),
            (size, size // 2, 1, 2, 1),
        ):
            x, y = torch.Size((4, channels, before, before)), torch.Size((4, channels, after, after))
            spec = specs.Upfirdn2dSpec(up, up, down, down, pad, pad, after, after, False, 1.0)
            numbers = (x, _strides(x, last), _strides(y, last), dtype, taps, spec)
            yield "upfirdn2d", specs.upfirdn2d_params(*numbers)


def _filtered_lrelu(dtype: torch.dtype) -> Iterator[tuple[str, Any]]:
    # T, whose 3x3 convolutions come with their border; R, and its last layers, which are not radial.
    kinds = ((False, 2, LAYERS), (True, 0, LAYERS[: -len(CROPPED)]), (False, 0, (*LARGE, *CROPPED)))
    for radial, border, layers in kinds:
        for (before, after, up), mode in itertools.product(layers, (0, 1, 2)):
            fu = torch.empty(TAPS * up, device="meta")
            fd = torch.empty((TAPS * 2,) * (2 if radial else 1), device="meta")
            yield (
                "filtered_lrelu",
                _layer(dtype, before + border, fu, fd, _spec_of(before + border, after, up), mode),
            )
    for mode in (0, 1, 2):  # colors, of which the last layer makes an image without filters
        spec = specs.FilteredLreluSpec(1, 1, 0, 0, 64, 64, False, 1.0, 1.0, CLAMP)
        yield "filtered_lrelu", _layer(dtype, 64, None, None, spec, mode)


def _spec_of(size: int, after: int, up: int) -> specs.FilteredLreluSpec:
    """Return a layer with its padding. Source: StyleGAN3, appendix on layer specifications."""
    spare = (after - 1) * 2 + 1 - size * up + TAPS * (up + 2) - 2
    pad = (spare + up) // 2
    return specs.FilteredLreluSpec(up, 2, pad, pad, after, after, False, 1.0, 0.2, CLAMP)


def _layer(dtype: torch.dtype, size: int, fu: Any, fd: Any, spec: Any, mode: int) -> Any:
    """Return the struct of a layer with an input of that size; for GATE, of its backward pass."""
    height, _, row_bytes = spec.mask_size(fd)
    mask = None if mode == params.ACTIVATE else torch.Size((4, 64, height, row_bytes))
    out = spec.out_h
    if mode == params.GATE:
        spec = spec.gate(fd).adjoint(fu, fd, size, size)
        fu, fd, size, out = fd, fu, out, size
    x, y = torch.Size((4, 64, size, size)), torch.Size((4, 64, out, out))
    shapes = tuple(torch.Size((1, 1)) if f is None else f.shape for f in (fu, fd))
    p = specs.filtered_lrelu_params(x, _strides(x), _strides(y), dtype, shapes, mask, spec, mode)
    p.b = ALIGNED if mode != params.GATE else None
    return p


def _strides(shape: torch.Size, channels_last: bool = False) -> tuple[int, ...]:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, device="meta", memory_format=layout).stride()
