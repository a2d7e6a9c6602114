"""The adversarial losses: one function each, from tensors to one number per image.

Everything returned is `[N]` float32, so that the caller decides about averages, weights and accumulation.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from torch_utils.ops import conv2d_gradfix, upfirdn2d


def generator_loss(fake_logits: torch.Tensor) -> torch.Tensor:
    """Return the non-saturating generator loss -log sigmoid(D(G(z))) of logits `[N, 1]`.

    Source: Goodfellow et al. 2014 (1406.2661), section 3.
    """
    return F.softplus(-fake_logits).squeeze(1)


def fake_loss(fake_logits: torch.Tensor) -> torch.Tensor:
    """Return the discriminator loss on generated images, -log(1 - sigmoid(D(x))), logits `[N, 1]`."""
    return F.softplus(fake_logits).squeeze(1)


def real_loss(real_logits: torch.Tensor) -> torch.Tensor:
    """Return the discriminator loss on real images, -log sigmoid(D(x)), logits `[N, 1]`."""
    return F.softplus(-real_logits).squeeze(1)


def r1_penalty(real_logits: torch.Tensor, real_img: torch.Tensor) -> torch.Tensor:
    """Return |∇D(x)|² at real images, differentiable; `real_img [N, C, H, W]` must have been D's input.

    Source: Mescheder et al. 2018 (1801.04406), equation 9, without the factor gamma/2.
    """
    with conv2d_gradfix.no_weight_gradients():
        (gradient,) = torch.autograd.grad(real_logits.sum(), real_img, create_graph=True)
    return gradient.square().sum(dim=[1, 2, 3])


def path_lengths(img: torch.Tensor, ws: torch.Tensor) -> torch.Tensor:
    """Return the length of the Jacobian along a random image direction, |Jᵀy|, differentiable.

    `img [N, C, H, W]` made from `ws [N, num_ws, w_dim]`; the rows of ws are averaged, which makes lengths
    comparable between depths. Source: Karras et al. 2020 (1912.04958), equation 4.
    """
    direction = torch.randn_like(img) / math.sqrt(img.shape[2] * img.shape[3])
    with conv2d_gradfix.no_weight_gradients():
        (gradient,) = torch.autograd.grad((img * direction).sum(), ws, create_graph=True)
    return gradient.square().sum(dim=2).mean(dim=1).sqrt()


def path_penalty(
    lengths: torch.Tensor, mean: torch.Tensor, decay: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the squared deviation of path lengths `[N]` from their running mean, and the updated mean.

    Lengths that are not finite (an overflow in float16) leave the mean as it is.
    """
    newest = lengths.detach().mean()
    mean = torch.where(newest.isfinite(), mean.lerp(newest, decay), mean)
    return (lengths - mean).square(), mean


def blur(img: torch.Tensor, sigma: float) -> torch.Tensor:
    """Blur `[N, C, H, W]` with a Gaussian of standard deviation `sigma` in pixels, cut at 3 sigma."""
    radius = math.floor(sigma * 3)
    if radius < 1:
        return img
    offsets = torch.arange(-radius, radius + 1, device=img.device, dtype=torch.float32)
    taps = torch.exp(-0.5 * (offsets / sigma).square())
    return upfirdn2d.filter2d(img, taps / taps.sum())
