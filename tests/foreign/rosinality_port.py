"""A stand-in for the StyleGAN2 port by rosinality, from the description of its files: plain torch functions.

`generator` and `discriminator` take a state dict and use every tensor in it, or fail.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

SQRT2 = math.sqrt(2)


class State:
    """A state dict that knows which tensors were used."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.left = {name: tensor.float() for name, tensor in tensors.items()}

    def take(self, name: str) -> torch.Tensor:
        return self.left.pop(name)


def lrelu(x, bias):
    return F.leaky_relu(x + bias, 0.2) * SQRT2


def linear(state, name, x, lr_multiplier=1.0):
    weight, bias = state.take(f"{name}.weight"), state.take(f"{name}.bias")
    return F.linear(x, weight * lr_multiplier / math.sqrt(x.shape[1]), bias * lr_multiplier)


def blur(x, kernel, before, behind):
    x = F.pad(x, (before, behind, before, behind))
    y = F.conv2d(x.flatten(0, 1)[:, None], kernel.flip([0, 1])[None, None])
    return y.reshape(*x.shape[:2], *y.shape[2:])


def modulated(state, name, x, w, demodulate=True, upsample=False):
    style = linear(state, f"{name}.modulation", w)
    weight = state.take(f"{name}.weight")
    n, (o, i, k) = len(x), weight.shape[1:4]
    weight = weight / math.sqrt(i * k * k) * style[:, None, :, None, None]
    if demodulate:
        weight = weight * (weight.square().sum([2, 3, 4], keepdim=True) + 1e-8).rsqrt()
    x = x.reshape(1, n * i, *x.shape[2:])
    if not upsample:
        y = F.conv2d(x, weight.reshape(n * o, i, k, k), padding=k // 2, groups=n)
        return y.reshape(n, o, *y.shape[2:])
    weight = weight.transpose(1, 2).reshape(n * i, o, k, k)
    y = F.conv_transpose2d(x, weight, stride=2, groups=n)
    return blur(y.reshape(n, o, *y.shape[2:]), state.take(f"{name}.blur.kernel"), 1, 1)


def styled(state, name, x, w, index, noise, upsample=False):
    x = modulated(state, f"{name}.conv", x, w, upsample=upsample)
    x = x + noise * state.take(f"{name}.noise.weight") * state.take(f"noises.noise_{index}")
    return lrelu(x, state.take(f"{name}.activate.bias").reshape(1, -1, 1, 1))


def to_rgb(state, name, x, w, skip=None):
    img = modulated(state, f"{name}.conv", x, w, demodulate=False) + state.take(f"{name}.bias")
    if skip is None:
        return img
    n, c, h, _ = skip.shape
    zeros = torch.zeros([n, c, h, 2, h, 2])
    zeros[:, :, :, 0, :, 0] = skip
    return img + blur(zeros.reshape(n, c, 2 * h, 2 * h), state.take(f"{name}.upsample.kernel"), 2, 1)


def generator(tensors, z, latent_avg=None, psi=1.0, noise=1.0):
    """z [N, w_dim] -> images; noise: factor of the stored noise."""
    state = State(tensors)
    w = z * (z.square().mean(1, keepdim=True) + 1e-8).rsqrt()
    for index in range(1, 1 + sum(name.startswith("style.") and name.endswith("weight") for name in tensors)):
        w = F.leaky_relu(linear(state, f"style.{index}", w, 0.01), 0.2) * SQRT2
    if psi != 1:
        w = latent_avg + psi * (w - latent_avg)
    x = state.take("input.input").repeat(len(z), 1, 1, 1)
    x = styled(state, "conv1", x, w, 0, noise)
    img = to_rgb(state, "to_rgb1", x, w)
    for k in range(sum(name.startswith("to_rgbs.") and name.endswith("upsample.kernel") for name in tensors)):
        x = styled(state, f"convs.{2 * k}", x, w, 2 * k + 1, noise, upsample=True)
        x = styled(state, f"convs.{2 * k + 1}", x, w, 2 * k + 2, noise)
        img = to_rgb(state, f"to_rgbs.{k}", x, w, img)
    assert not state.left, sorted(state.left)
    return img


def convolution(state, name, x, stride=1, padding=0):
    weight = state.take(f"{name}.weight")
    return F.conv2d(x, weight / math.sqrt(weight[0].numel()), stride=stride, padding=padding)


def discriminator(tensors, img):
    state = State(tensors)
    x = lrelu(convolution(state, "convs.0.0", img), state.take("convs.0.1.bias").reshape(1, -1, 1, 1))
    for j in range(1, 1 + sum(name.endswith(".conv1.0.weight") for name in tensors)):
        name = f"convs.{j}"
        y = convolution(state, f"{name}.conv1.0", x, padding=1)
        y = lrelu(y, state.take(f"{name}.conv1.1.bias").reshape(1, -1, 1, 1))
        y = blur(y, state.take(f"{name}.conv2.0.kernel"), 2, 2)
        y = convolution(state, f"{name}.conv2.1", y, stride=2)
        y = lrelu(y, state.take(f"{name}.conv2.2.bias").reshape(1, -1, 1, 1))
        skip = blur(x, state.take(f"{name}.skip.0.kernel"), 1, 1)
        x = (y + convolution(state, f"{name}.skip.1", skip, stride=2)) / SQRT2
    n, _, h, w = x.shape
    groups = x.reshape(min(n, 4), -1, *x.shape[1:])
    deviation = (groups.var(0, unbiased=False) + 1e-8).sqrt().mean([1, 2, 3])
    x = torch.cat([x, deviation.repeat(min(n, 4))[:, None, None, None].expand(n, 1, h, w)], 1)
    x = convolution(state, "final_conv.0", x, padding=1)
    x = lrelu(x, state.take("final_conv.1.bias").reshape(1, -1, 1, 1))
    x = F.leaky_relu(linear(state, "final_linear.0", x.flatten(1)), 0.2) * SQRT2
    x = linear(state, "final_linear.1", x)
    assert not state.left, sorted(state.left)
    return x
