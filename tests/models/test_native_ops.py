"""Networks on native kernels are the networks on plain torch: images, logits, first and second derivatives.

Leaky ReLUs make derivatives jump. Where a pre-activation is zero up to rounding, two right implementations
take two slopes, so derivatives are compared latent by latent, and one latent in four may meet such a place.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from tolerances import GRADIENT_F32, NETWORK_F32

import finetune
from torch_utils.ops import impl

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = ["stylegan2-32", "stylegan2-64-cond", "stylegan2-32-orig", "stylegan3-t-32", "stylegan3-r-32"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LATENTS = 4


@functools.cache
def load(name: str, device: str):
    return finetune.load(GOLDEN / f"{name}.pkl", device=device)


def on_both(compute, device):
    """What `compute` returns on plain torch and on the kernels of the device."""
    found = []
    for name in ("ref", device):
        impl.set_default_impl(name)
        try:
            found.append(compute())
        finally:
            impl.set_default_impl(None)
    return found


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-12))


def latent(G, seed: int):
    """One latent with its label."""
    z = torch.from_numpy(np.random.RandomState(seed).randn(1, G.z_dim)).float()
    c = torch.eye(G.c_dim)[seed % G.c_dim][None] if G.c_dim else torch.zeros(1, 0)
    device = next(G.parameters()).device
    return z.to(device), c.to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_native_ops_images_and_logits(name, device):
    checkpoint = load(name, device)
    z, c = latent(checkpoint.G_ema, 0)

    def compute():
        with torch.no_grad():
            img = checkpoint.G_ema(z, c, noise_mode="const", force_fp32=True)
            return img, checkpoint.D(img, c, force_fp32=True)

    expected, actual = on_both(compute, device)
    assert error(actual[0], expected[0]) < NETWORK_F32
    assert error(actual[1], expected[1]) < NETWORK_F32


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_native_ops_generators_first_and_second_derivatives(name, device):
    G = copy.deepcopy(load(name, device).G_ema).requires_grad_(True)
    parameters = [value for key, value in G.named_parameters() if key.startswith("synthesis")]
    errors = []
    for seed in range(LATENTS):
        z, c = latent(G, seed)

        def compute(z=z, c=c):
            ws = G.mapping(z, c)
            img = G.synthesis(ws, noise_mode="const", fused_modconv=False, force_fp32=True)
            direction = torch.ones_like(img) / img.shape[2]
            (slopes,) = torch.autograd.grad((img * direction).sum(), ws, create_graph=True)
            grads = torch.autograd.grad(slopes.square().sum(), parameters, allow_unused=True)
            # No gradient and a gradient of zeros say the same.
            flat = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, parameters)]
            return slopes.detach(), torch.cat([g.flatten() for g in flat])

        expected, actual = on_both(compute, device)
        errors.append(max(error(a, e) for a, e in zip(actual, expected)))
    assert sorted(errors)[LATENTS * 3 // 4 - 1] < GRADIENT_F32, errors


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["stylegan2-32", "stylegan2-64-cond"])
def test_native_ops_discriminators_first_and_second_derivatives(name, device):
    checkpoint = load(name, device)
    D = copy.deepcopy(checkpoint.D).requires_grad_(True)
    errors = []
    for seed in range(LATENTS):
        z, c = latent(checkpoint.G_ema, seed)
        with torch.no_grad():
            img = checkpoint.G_ema(z, c, noise_mode="const", force_fp32=True)
        img.requires_grad_(True)

        def compute(img=img, c=c):
            (slopes,) = torch.autograd.grad(D(img, c, force_fp32=True).sum(), img, create_graph=True)
            grads = torch.autograd.grad(slopes.square().sum(), list(D.parameters()), allow_unused=True)
            flat = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, D.parameters())]
            return slopes.detach(), torch.cat([g.flatten() for g in flat])

        expected, actual = on_both(compute, device)
        errors.append(max(error(a, e) for a, e in zip(actual, expected)))
    assert sorted(errors)[LATENTS * 3 // 4 - 1] < GRADIENT_F32, errors
