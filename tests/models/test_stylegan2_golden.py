"""StyleGAN2's networks, loaded from golden checkpoints, reproduce the golden numbers."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from models import golden_checks

import finetune

GOLDEN = Path(__file__).parents[1] / "golden"
GENERATIONS = [
    "stylegan2-32",
    "stylegan2-64-cond",
    "stylegan2-32-orig",
    "stylegan2-ada-32",
    "stylegan2-tf-32",
]
WITH_GRADIENTS = GENERATIONS[:-1]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@functools.cache
def load(name: str, device: str = "cpu"):
    return finetune.load(GOLDEN / f"{name}.pkl", device=device)


@pytest.mark.parametrize("name", GENERATIONS)
def test_stylegan2_weights(name, golden_network):
    """What was loaded is bit for bit what the file holds, and G is not G_ema."""
    facts, arrays = golden_network(name)
    checkpoint = load(name)
    golden_checks.check_weights(checkpoint.G_ema, checkpoint.D, facts["weights"])
    if "G/param_sums" in arrays:
        golden_checks.check_parameter_sums(checkpoint.G, arrays)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fused_modconv", [True, False])
@pytest.mark.parametrize("name", GENERATIONS)
def test_stylegan2_images(name, fused_modconv, device, golden_network):
    """Both ways to run a modulated convolution give the golden images."""
    checkpoint = load(name, device)
    arrays = golden_network(name)[1]
    options = {"fused_modconv": fused_modconv, "force_fp32": True}
    golden_checks.check_images(checkpoint.G_ema, checkpoint.D, arrays, **options)


@pytest.mark.parametrize("check", ["latents", "logits"])
@pytest.mark.parametrize("name", GENERATIONS)
def test_stylegan2_values(name, check, golden_network):
    checkpoint = load(name)
    golden_checks.run(check, checkpoint.G_ema, checkpoint.D, golden_network(name)[1])


@pytest.mark.usefixtures("reference_ops")
@pytest.mark.parametrize("check", ["r1_gradients", "discriminator_gradients"])
@pytest.mark.parametrize("name", [*WITH_GRADIENTS, "stylegan3-t-32", "stylegan3-r-32"])
def test_stylegan2_gradients_of_the_discriminator(name, check, golden_network):
    """First and second derivatives; StyleGAN3's checkpoints hold the same discriminator."""
    checkpoint = load(name)
    golden_checks.run(check, None, checkpoint.D, golden_network(name)[1])


@pytest.mark.usefixtures("reference_ops")
@pytest.mark.parametrize("check", ["path_lengths", "generator_gradients", "path_length_gradients"])
@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_stylegan2_gradients_of_the_generator(name, check, golden_network):
    """First and second derivatives, in the mode the golden numbers were made in.

    A pre-activation of stylegan2-32-orig is zero up to rounding, where leaky ReLU has two slopes: its
    gradients depend on the order of additions, so plain torch computes the ops (test_native_ops.py compares
    the derivatives of kernels). The other mode has a float64 test in test_stylegan2.py.
    """
    checkpoint = load(name)
    arrays = golden_network(name)[1]
    golden_checks.run(check, checkpoint.G_ema, checkpoint.D, arrays, fused_modconv=True)


@pytest.mark.usefixtures("reference_ops")
@pytest.mark.parametrize("check", ["path_lengths", "generator_gradients", "path_length_gradients"])
def test_stylegan2_gradients_of_the_unfused_generator(check, golden_network):
    checkpoint = load("stylegan2-32")
    arrays = golden_network("stylegan2-32")[1]
    golden_checks.run(check, checkpoint.G_ema, checkpoint.D, arrays, fused_modconv=False)


@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_stylegan2_ema_buffers(name, golden_network):
    checkpoint = load(name)
    golden_checks.check_ema_buffers(checkpoint.G_ema, checkpoint.D, golden_network(name)[1])


@pytest.mark.parametrize("name", ["stylegan3-t-32", "stylegan3-r-32"])
def test_stylegan2_logits_of_stylegan3_checkpoints(name, golden_network):
    golden_checks.check_logits(None, load(name).D, golden_network(name)[1])
