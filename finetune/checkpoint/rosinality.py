"""The `.pt` layout of the StyleGAN2 port by rosinality: its tensor names and shapes, and ours.

A file is a dict with any of `g_ema`, `g`, `d` (state dicts) and `latent_avg`, the mean w. Only the skip
generator and the residual discriminator exist there. Weights have the same scale and no kernel is flipped:
names and axes of length 1 differ, and filters are stored with their gain.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from finetune.checkpoint.rebuild import values_of
from finetune.checkpoint.state_dict import BILINEAR, StateDict, Tensors
from finetune.checkpoint.unpickle.stubs import Tensor
from torch_utils.ops import upfirdn2d

NAMES = {"G_ema": "g_ema", "G": "g", "D": "d"}  # ours -> entry of a file
LATENT_AVG = "latent_avg"
G_LATENT_AVG = "g_latent_avg"  # of ours alone: the mean w of g, if it differs from that of g_ema
ENTRIES = (*NAMES.values(), LATENT_AVG, G_LATENT_AVG)
ASSUMED = {"conv_clamp": None, "num_fp16_res": 0}  # the port has neither
UPSAMPLING_GAIN = 4  # of a filter that upsamples by 2 in both directions
MAX_BLOCKS = 12

Pairs = Iterator[tuple[str, str]]  # our name, theirs


def is_port(state: Mapping[str, Any]) -> bool:
    """Return whether the names of a state dict are those of the port."""
    return {"style.1.weight", "conv1.conv.weight"} <= state.keys() or "final_linear.0.weight" in state


def generator_names(resolution: int, num_layers: int) -> Pairs:
    """Return the names of the tensors of a generator but w_avg and filters; num_layers: of its mapping."""
    for index in range(num_layers):
        for part in ("weight", "bias"):
            yield f"mapping.fc{index}.{part}", f"style.{index + 1}.{part}"
    yield "synthesis.b4.const", "input.input"
    layers = [("b4.conv1", "conv1")]
    to_rgbs = [("b4", "to_rgb1")]
    for index in range(resolution.bit_length() - 3):
        block = f"b{8 << index}"
        layers += [(f"{block}.conv{i}", f"convs.{2 * index + i}") for i in (0, 1)]
        to_rgbs.append((block, f"to_rgbs.{index}"))
    for index, (ours, theirs) in enumerate(layers):
        yield from _modulated(f"synthesis.{ours}", theirs)
        yield f"synthesis.{ours}.bias", f"{theirs}.activate.bias"
        yield f"synthesis.{ours}.noise_strength", f"{theirs}.noise.weight"
        yield f"synthesis.{ours}.noise_const", f"noises.noise_{index}"
    for ours, theirs in to_rgbs:
        yield from _modulated(f"synthesis.{ours}.torgb", theirs)
        yield f"synthesis.{ours}.torgb.bias", f"{theirs}.bias"


def _modulated(ours: str, theirs: str) -> Pairs:
    yield f"{ours}.weight", f"{theirs}.conv.weight"
    for part in ("weight", "bias"):
        yield f"{ours}.affine.{part}", f"{theirs}.conv.modulation.{part}"


def discriminator_names(resolution: int) -> Pairs:
    """Return the names of all tensors of a discriminator but filters."""
    yield f"b{resolution}.fromrgb.weight", "convs.0.0.weight"
    yield f"b{resolution}.fromrgb.bias", "convs.0.1.bias"
    for index in range(1, resolution.bit_length() - 2):
        block = f"b{resolution >> (index - 1)}"
        yield f"{block}.conv0.weight", f"convs.{index}.conv1.0.weight"
        yield f"{block}.conv0.bias", f"convs.{index}.conv1.1.bias"
        yield f"{block}.conv1.weight", f"convs.{index}.conv2.1.weight"
        yield f"{block}.conv1.bias", f"convs.{index}.conv2.2.bias"
        yield f"{block}.skip.weight", f"convs.{index}.skip.1.weight"
    yield "b4.conv.weight", "final_conv.0.weight"
    yield "b4.conv.bias", "final_conv.1.bias"
    for ours, theirs in (("b4.fc", "final_linear.0"), ("b4.out", "final_linear.1")):
        for part in ("weight", "bias"):
            yield f"{ours}.{part}", f"{theirs}.{part}"


def generator_filters(resolution: int) -> Pairs:
    """Return the names of the filters of a generator; unused ones get the name of one with equal values."""
    for index in range(resolution.bit_length() - 3):
        block, kernel = f"synthesis.b{8 << index}", f"to_rgbs.{index}.upsample.kernel"
        yield f"{block}.conv0.resample_filter", f"convs.{2 * index}.conv.blur.kernel"
        yield from ((f"{block}.{name}resample_filter", kernel) for name in ("", "conv1."))
    first = "to_rgbs.0.upsample.kernel" if resolution > 4 else ""
    yield from ((f"synthesis.b4.{name}resample_filter", first) for name in ("", "conv1."))


def discriminator_filters(resolution: int) -> Pairs:
    """Return the names of the filters of a discriminator; '' for unused ones, whose values are fixed."""
    for index in range(1, resolution.bit_length() - 2):
        block, kernel = f"b{resolution >> (index - 1)}", f"convs.{index}.conv2.0.kernel"
        yield f"{block}.skip.resample_filter", f"convs.{index}.skip.0.kernel"
        yield from ((f"{block}.{name}resample_filter", kernel) for name in ("", "conv1."))
        yield f"{block}.conv0.resample_filter", ""
    yield from ((f"{name}.resample_filter", "") for name in (f"b{resolution}.fromrgb", "b4.conv"))


def extra_axes(ours: str) -> tuple[int, int]:
    """Return how many axes of length 1 the port has before and behind those of the tensor `ours`."""
    if ours.endswith(".torgb.bias"):
        return 1, 2
    if ours.endswith(".noise_const"):
        return 2, 0
    is_kernel = ours.startswith("synthesis.") and ours.endswith(".weight") and ".affine." not in ours
    return (1 if is_kernel or ours.endswith((".const", ".noise_strength")) else 0), 0


def read_state(theirs: Tensors, mean: Tensor | None, stated: Mapping[str, Any] | None) -> StateDict:
    """Return a state dict of the port under our names; mean: w_avg, to be estimated if None."""
    is_generator = "conv1.conv.weight" in theirs
    block = r"to_rgbs\.\d+\.bias" if is_generator else r"convs\.\d+\.conv1\.0\.weight"
    resolution = 4 << min(_count(theirs, block), MAX_BLOCKS)
    if is_generator:
        names = generator_names(resolution, _count(theirs, r"style\.\d+\.weight"))
        filters, gain = generator_filters(resolution), np.float32(UPSAMPLING_GAIN)
    else:
        names = discriminator_names(resolution)
        filters, gain = discriminator_filters(resolution), np.float32(1)
    left = dict(theirs)
    found: dict[str, Tensor] = {}
    for ours, name in names:
        if (tensor := left.pop(name, None)) is not None:
            found[ours] = _reshaped(tensor, *extra_axes(ours))
    for ours, name in filters:
        left.pop(name, None)
        if name == "":
            found[ours] = Tensor(upfirdn2d.setup_filter(BILINEAR).numpy(), "float32", 0)
        elif name in theirs:
            found[ours] = _divided(theirs[name], gain)
    if is_generator:
        modulation = theirs.get("conv1.conv.modulation.weight")
        width = modulation.array.shape[-1] if modulation is not None and modulation.array.ndim else 0
        found["mapping.w_avg"] = mean or Tensor(np.zeros(width, np.float32), "float32", 0)
    # What is left has no place, and the comparison with the network reports it.
    return StateDict({**found, **left}, stated, ASSUMED, "rosinality", is_generator and mean is None)


def _divided(tensor: Tensor, gain: np.float32) -> Tensor:
    """Divide a filter by its gain; the comparison with the network reports one that is not of floats."""
    if tensor.array.dtype.kind != "f" and tensor.dtype != "bfloat16":
        return tensor
    return Tensor(values_of(tensor) / gain, "float32", tensor.offset)


def _count(tensors: Tensors, pattern: str) -> int:
    return sum(re.fullmatch(pattern, key) is not None for key in tensors)


def _reshaped(tensor: Tensor, before: int, behind: int) -> Tensor:
    """Drop axes of length 1; another shape stays as it is, and the comparison with the network reports it."""
    shape = tensor.array.shape
    end = len(shape) - behind
    if end >= before and set(shape[:before] + shape[end:]) <= {1}:
        return Tensor(tensor.array.reshape(shape[before:end]), tensor.dtype, tensor.offset, is_parameter=True)
    return tensor
