"""torch's 2-D convolutions, with a switch that keeps a backward pass away from their weights.

Outside `no_weight_gradients` these are torch's own convolutions with torch's own autograd. The only addition
is an identity on the weight, which lets the switch be thrown after the forward pass, when the gradient is
taken.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F

# How many enclosing blocks ask for no gradients. A plain global, because backward runs in threads of its own.
_blocks = 0


@contextlib.contextmanager
def no_weight_gradients(disable: bool = True) -> Iterator[None]:
    """Inside the block, backward passes through this module's convolutions give their weights no gradient.

    What counts is where the gradient is taken, not where the convolution was called. A weight that is
    computed from something else passes nothing on to it either. `disable=False` makes the block do nothing.
    """
    global _blocks
    step = 1 if disable else 0
    _blocks += step
    try:
        yield
    finally:
        _blocks -= step


class _WeightGate(torch.autograd.Function):
    """The identity, whose gradient vanishes inside `no_weight_gradients`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight):
        return weight.view_as(weight)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return None if _blocks else grad


def _gated(weight: torch.Tensor) -> torch.Tensor:
    if weight.requires_grad and torch.is_grad_enabled():
        return _WeightGate.apply(weight)
    return weight


def conv2d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> torch.Tensor:
    """`torch.nn.functional.conv2d` that heeds `no_weight_gradients`."""
    weight = _gated(weight)
    if _is_batch_of_products(input, weight, bias, stride, padding):
        x = input.reshape(groups, weight.shape[1], -1)
        y = torch.bmm(weight.reshape(groups, -1, weight.shape[1]), x)
        return y.reshape(1, weight.shape[0], *input.shape[2:])
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups)


def _is_batch_of_products(input, weight, bias, stride, padding) -> bool:
    """Whether this is what modulated 1x1 convolutions ask for: a matrix for each sample, side by side.

    CPUs multiply them faster than they convolve in groups, backward above all
    (benchmarks/bench_modulated_conv.py).
    """
    return (
        input.device.type == "cpu"
        and input.ndim == 4
        and input.shape[0] == 1
        and weight.shape[1] < input.shape[1]
        and tuple(weight.shape[2:]) == (1, 1)
        and bias is None
        and stride in (1, (1, 1))
        and padding in (0, (0, 0))
    )


def conv_transpose2d(
    input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1
) -> torch.Tensor:
    """`torch.nn.functional.conv_transpose2d` that heeds `no_weight_gradients`."""
    return F.conv_transpose2d(input, _gated(weight), bias, stride, padding, output_padding, groups, dilation)
