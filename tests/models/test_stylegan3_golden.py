"""StyleGAN3's generator, loaded from golden checkpoints, reproduces the golden numbers."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from models import golden_checks

import finetune

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = ["stylegan3-t-32", "stylegan3-r-32"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@functools.cache
def load(name: str, device: str = "cpu"):
    return finetune.load(GOLDEN / f"{name}.pkl", device=device)


@pytest.mark.parametrize("name", NAMES)
def test_stylegan3_weights(name, golden_network):
    """What was loaded is bit for bit what the file holds, filters included, and G is not G_ema."""
    facts, arrays = golden_network(name)
    checkpoint = load(name)
    golden_checks.check_weights(checkpoint.G_ema, checkpoint.D, facts["weights"])
    golden_checks.check_parameter_sums(checkpoint.G, arrays)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fused_modconv", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_stylegan3_images(name, fused_modconv, device, golden_network):
    """Both ways to run a modulated convolution give the golden images."""
    checkpoint = load(name, device)
    arrays = golden_network(name)[1]
    options = {"fused_modconv": fused_modconv, "force_fp32": True}
    golden_checks.check_images(checkpoint.G_ema, checkpoint.D, arrays, **options)


@pytest.mark.parametrize("name", NAMES)
def test_stylegan3_latents(name, golden_network):
    golden_checks.check_latents(load(name).G_ema, None, golden_network(name)[1])


@pytest.mark.parametrize("name", NAMES)
def test_stylegan3_ema_buffers(name, golden_network):
    golden_checks.check_ema_buffers(load(name).G_ema, None, golden_network(name)[1])


@pytest.mark.usefixtures("reference_ops")
@pytest.mark.parametrize("fused_modconv", [True, False])
@pytest.mark.parametrize("check", ["path_lengths", "generator_gradients", "path_length_gradients"])
@pytest.mark.parametrize("name", NAMES)
def test_stylegan3_gradients(name, check, fused_modconv, golden_network):
    """First and second derivatives, in both ways to run a modulated convolution.

    Plain torch computes the ops. Kernels add in another order, and where a pre-activation is zero up to
    rounding, leaky ReLU has another slope: test_native_ops.py compares their derivatives.
    """
    checkpoint = load(name)
    arrays = golden_network(name)[1]
    golden_checks.run(check, checkpoint.G_ema, checkpoint.D, arrays, fused_modconv=fused_modconv)
