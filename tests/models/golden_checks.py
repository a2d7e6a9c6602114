"""Compare a network with its golden numbers: one function for each thing that the golden files state.

Every function takes modules that hold the golden weights, and `arrays` as the fixture `golden_network` gives
them. Images use constant noise; `options` go to the synthesis network.
"""

from __future__ import annotations

import copy
import hashlib

import numpy as np
import torch
from tolerances import GRADIENT_F32, NETWORK_F32, assert_close

# What the golden file of every network holds; the TensorFlow generation's has the first three only.
VALUE_CHECKS = ("latents", "images", "logits")
GRADIENT_CHECKS = (
    "r1_gradients",
    "path_lengths",
    "generator_gradients",
    "path_length_gradients",
    "discriminator_gradients",
)


def run(check: str, G, D, arrays: dict, **options) -> None:
    """Run one check of VALUE_CHECKS, GRADIENT_CHECKS or "ema_buffers" by its name."""
    globals()["check_" + check](G, D, arrays, **options)


def tensor(arrays: dict, key: str, device) -> torch.Tensor:
    return torch.from_numpy(arrays[key]).to(device)


def device_of(module: torch.nn.Module) -> torch.device:
    return next(iter(module.parameters())).device


def tensors_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def check_weights(G_ema, D, weights: dict) -> None:
    """Every weight that the golden file lists is there bit for bit, and there is no other parameter."""
    for prefix, module in (("G_ema", G_ema), ("D", D)):
        found = tensors_of(module)
        start = len(prefix) + 1
        listed = {key[start:]: entry for key, entry in weights.items() if key.startswith(prefix + "/")}
        assert set(dict(module.named_parameters())) <= set(listed) <= set(found)
        for name, (shape, sha256) in listed.items():
            value = found[name].detach().cpu().numpy().astype("<f4")
            value = np.ascontiguousarray(value)  # makes a scalar [1], as the golden shapes have it
            assert list(value.shape) == shape, f"{prefix}/{name}: {value.shape}, expected {shape}"
            digest = hashlib.sha256(value.tobytes()).hexdigest()
            assert digest == sha256, f"{prefix}/{name}: other bytes"


def check_latents(G, D, arrays: dict) -> None:
    """w, and w truncated with psi 0.7 in its first three rows."""
    z, c = (tensor(arrays, key, device_of(G)) for key in "zc")
    assert_close(G.mapping(z, c), arrays["ws"], NETWORK_F32, "ws")
    truncated = G.mapping(z, c, truncation_psi=0.7, truncation_cutoff=3)
    assert_close(truncated, arrays["ws_trunc"], NETWORK_F32, "ws_trunc")


def check_images(G, D, arrays: dict, **options) -> None:
    """Images with constant noise, without noise, and truncated with psi 0.5 (the last where it is given)."""
    z, c = (tensor(arrays, key, device_of(G)) for key in "zc")
    with torch.no_grad():
        img = G(z, c, noise_mode="const", **options)
        assert img.dtype == torch.float32
        assert_close(img, arrays["img"], NETWORK_F32, "img")
        assert_close(G(z, c, noise_mode="none", **options), arrays["img_none"], NETWORK_F32, "img_none")
        if "img_trunc" in arrays:
            img = G(z, c, truncation_psi=0.5, noise_mode="const", **options)
            assert_close(img, arrays["img_trunc"], NETWORK_F32, "img_trunc")


def check_logits(G, D, arrays: dict) -> None:
    """Logits of real and of generated images."""
    c = tensor(arrays, "c", device_of(D))
    with torch.no_grad():
        for images, logits in (("real", "logits_real"), ("img", "logits_fake")):
            actual = D(tensor(arrays, images, c.device), c)
            assert_close(actual, arrays[logits], NETWORK_F32, logits)


def r1(D, arrays: dict, create_graph: bool):
    """Logits of the real images, their gradient by the images, and its squared length [N]."""
    real = tensor(arrays, "real", device_of(D)).requires_grad_(True)
    logits = D(real, tensor(arrays, "c", real.device))
    (grads,) = torch.autograd.grad(logits.sum(), real, create_graph=create_graph)
    return logits, grads, grads.square().sum(dim=[1, 2, 3])


def check_r1_gradients(G, D, arrays: dict) -> None:
    """The gradient that R1 penalizes and its squared length."""
    _, grads, penalty = r1(D, arrays, create_graph=False)
    assert_close(grads, arrays["r1_grads"], GRADIENT_F32, "r1_grads")
    assert_close(penalty, arrays["r1_penalty"], GRADIENT_F32, "r1_penalty")


def path_lengths(G, arrays: dict, create_graph: bool, **options):
    """Gradient of sum(img * pl_noise) by ws, and its length averaged over the rows [N]."""
    device = device_of(G)
    z, c = (tensor(arrays, key, device) for key in "zc")
    ws = G.mapping(z, c)
    if not ws.requires_grad:
        ws.requires_grad_(True)
    img = G.synthesis(ws, noise_mode="const", **options)
    along = (img * tensor(arrays, "pl_noise", device)).sum()
    (grads,) = torch.autograd.grad(along, ws, create_graph=create_graph)
    return grads, grads.square().sum(dim=2).mean(dim=1).sqrt()


def check_path_lengths(G, D, arrays: dict, **options) -> None:
    """Path length gradients and lengths."""
    grads, lengths = path_lengths(G, arrays, create_graph=False, **options)
    assert_close(grads, arrays["pl_grads"], GRADIENT_F32, "pl_grads")
    assert_close(lengths, arrays["pl_lengths"], GRADIENT_F32, "pl_lengths")


def compare_gradients(module, loss: torch.Tensor, arrays: dict, prefix: str) -> None:
    """The gradients of `loss` are those under `prefix`, and absent or zero for every other parameter."""
    parameters = dict(module.named_parameters())
    expected = {key[len(prefix) :]: value for key, value in arrays.items() if key.startswith(prefix)}
    assert expected and set(expected) <= set(parameters)
    grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    for name, grad in zip(parameters, grads):
        if name in expected:
            assert grad is not None, f"{prefix}{name}: no gradient"
            assert_close(grad, expected[name], GRADIENT_F32, prefix + name)
        else:
            assert grad is None or not grad.any(), f"{prefix}{name}: a gradient where none was expected"


def trainable(module):
    """A copy whose parameters take gradients."""
    return copy.deepcopy(module).requires_grad_(True)


def check_generator_gradients(G, D, arrays: dict, **options) -> None:
    """The non-saturating loss of G and its gradients."""
    G = trainable(G)
    z, c = (tensor(arrays, key, device_of(G)) for key in "zc")
    loss = torch.nn.functional.softplus(-D(G(z, c, noise_mode="const", **options), c)).mean()
    assert_close(loss, arrays["loss_G"], NETWORK_F32, "loss_G")
    compare_gradients(G, loss, arrays, "gradG/")


def check_path_length_gradients(G, D, arrays: dict, **options) -> None:
    """Gradients of the path length penalty, a second derivative of G."""
    G = trainable(G)
    _, lengths = path_lengths(G, arrays, create_graph=True, **options)
    compare_gradients(G, (2 * (lengths - 0.5).square()).mean(), arrays, "gradPL/")


def check_discriminator_gradients(G, D, arrays: dict) -> None:
    """Gradients of D's loss on real images with R1, a second derivative of D."""
    D = trainable(D)
    logits, _, penalty = r1(D, arrays, create_graph=True)
    loss = torch.nn.functional.softplus(-logits).mean() + 16 * (5 * penalty).mean()
    compare_gradients(D, loss, arrays, "gradD/")


def check_ema_buffers(G, D, arrays: dict, **options) -> None:
    """Buffers after one pass with update_emas; every buffer not listed stays as it was."""
    updated = copy.deepcopy(G)
    z, c = (tensor(arrays, key, device_of(G)) for key in "zc")
    with torch.no_grad():
        updated(z, c, noise_mode="const", update_emas=True, **options)
    before = dict(G.named_buffers())
    expected = {key[len("ema/") :]: value for key, value in arrays.items() if key.startswith("ema/")}
    assert expected and set(expected) <= set(before)
    for name, value in updated.named_buffers():
        if name in expected:
            assert_close(value, expected[name], NETWORK_F32, "ema/" + name)
            assert not torch.equal(value, before[name]), f"ema/{name} did not move"
        else:
            assert torch.equal(value, before[name]), f"{name} moved"


def check_parameter_sums(G, arrays: dict) -> None:
    """The sums of each parameter of G, which is not G_ema, in order."""
    sums = [float(parameter.detach().cpu().double().sum()) for parameter in G.parameters()]
    assert_close(np.array(sums), arrays["G/param_sums"], NETWORK_F32, "G/param_sums")
