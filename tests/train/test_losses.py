"""Each adversarial loss against its formula, and against gradients of the original networks."""

import math

import numpy as np
import pytest
import torch
from tolerances import GRADIENT_F32, NETWORK_F32, assert_close

import finetune
from finetune.train import losses


def test_logistic_losses_are_the_formulas():
    logits = torch.tensor([[-3.0], [0.0], [2.0]])
    sigmoid = 1 / (1 + np.exp(-logits.numpy().ravel()))
    assert_close(losses.generator_loss(logits), -np.log(sigmoid), 1e-6)
    assert_close(losses.real_loss(logits), -np.log(sigmoid), 1e-6)
    assert_close(losses.fake_loss(logits), -np.log(1 - sigmoid), 1e-6)


def test_logistic_losses_stay_finite_for_huge_logits():
    logits = torch.tensor([[-1e4], [1e4]])
    for loss in (losses.generator_loss, losses.real_loss, losses.fake_loss):
        assert torch.isfinite(loss(logits)).all()


def test_r1_penalty_of_linear_critic():
    weight = torch.randn(3, 4, 4, dtype=torch.float64, requires_grad=True)
    img = torch.randn(5, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    penalty = losses.r1_penalty((img * weight).sum(dim=[1, 2, 3]).unsqueeze(1), img)
    assert_close(penalty, weight.square().sum().expand(5), 1e-12)
    penalty.mean().backward()
    assert_close(weight.grad, 2 * weight, 1e-12)


def test_path_lengths_of_linear_generator(monkeypatch):
    matrix = torch.randn(2 * 3, 3 * 4 * 4, dtype=torch.float64, requires_grad=True)
    ws = torch.randn(7, 2, 3, dtype=torch.float64, requires_grad=True)
    img = (ws.flatten(1) @ matrix).reshape(7, 3, 4, 4)
    direction = torch.randn_like(img)
    monkeypatch.setattr(torch, "randn_like", lambda x: direction)
    lengths = losses.path_lengths(img, ws)
    back = (direction.flatten(1) / 4 @ matrix.T).reshape(7, 2, 3)
    assert_close(lengths, back.square().sum(2).mean(1).sqrt(), 1e-12)
    lengths.sum().backward()
    assert matrix.grad.abs().max() > 0


def test_path_penalty_uses_running_mean():
    lengths = torch.tensor([1.0, 3.0], requires_grad=True)
    penalty, mean = losses.path_penalty(lengths, torch.tensor(0.0), decay=0.01)
    assert_close(mean, 0.02, 1e-6)
    assert_close(penalty, [0.98**2, 2.98**2], 1e-6)
    assert not mean.requires_grad
    _, mean = losses.path_penalty(torch.tensor([1.0, float("inf")]), torch.tensor(0.5), decay=0.01)
    assert mean == 0.5


def test_blur_width_and_brightness():
    img = torch.zeros(1, 1, 65, 65, dtype=torch.float64)
    img[0, 0, 32, 32] = 1
    blurred = losses.blur(img, 4.0)
    offsets = torch.arange(65, dtype=torch.float64) - 32
    spread = (blurred[0, 0].sum(0) * offsets.square()).sum().sqrt()
    assert float(blurred.sum()) == pytest.approx(1, rel=1e-6)
    assert float(spread) == pytest.approx(4.0, rel=0.02)  # the tails beyond 3 sigma are cut
    assert losses.blur(img, 0.2) is img


@pytest.fixture(scope="module")
def original(golden_dir):
    checkpoint = finetune.load(golden_dir / "stylegan2-32.pkl")
    return checkpoint.G_ema, checkpoint.D


def gradients(module, loss):
    parameters = dict(module.named_parameters())
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    grads = torch.autograd.grad(loss(), list(parameters.values()), allow_unused=True)
    module.requires_grad_(False)
    return {name: grad for name, grad in zip(parameters, grads) if grad is not None and grad.abs().max() > 0}


def compare(grads, arrays, prefix):
    expected = {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}
    expected = {name: value for name, value in expected.items() if np.abs(value).max() > 0}
    assert set(grads) == set(expected)
    for name, value in expected.items():
        assert_close(grads[name], value, GRADIENT_F32, prefix + name)


def test_generator_gradients_match_golden(original, golden_network):
    G, D = original
    _, arrays = golden_network("stylegan2-32")
    z, c = torch.from_numpy(arrays["z"]), torch.from_numpy(arrays["c"])

    def loss():
        return losses.generator_loss(D(G(z, c, noise_mode="const"), c)).mean()

    assert_close(loss(), arrays["loss_G"], NETWORK_F32)
    compare(gradients(G, loss), arrays, "gradG/")


def test_path_length_gradients_match_golden(original, golden_network, monkeypatch):
    G, _ = original
    _, arrays = golden_network("stylegan2-32")
    z, c, noise = (torch.from_numpy(arrays[key]) for key in ("z", "c", "pl_noise"))
    monkeypatch.setattr(torch, "randn_like", lambda x: noise * math.sqrt(x.shape[2] * x.shape[3]))

    def loss():
        ws = G.mapping(z, c)
        lengths = losses.path_lengths(G.synthesis(ws, noise_mode="const"), ws)
        assert_close(lengths, arrays["pl_lengths"], GRADIENT_F32)
        penalty, _ = losses.path_penalty(lengths, torch.tensor(0.5), decay=0.0)
        return 2 * penalty.mean()

    compare(gradients(G, loss), arrays, "gradPL/")


def test_discriminator_gradients_match_golden(original, golden_network):
    _, D = original
    _, arrays = golden_network("stylegan2-32")
    real, c = torch.from_numpy(arrays["real"]).requires_grad_(), torch.from_numpy(arrays["c"])

    def loss():
        logits = D(real, c)
        penalty = losses.r1_penalty(logits, real)
        assert_close(penalty, arrays["r1_penalty"], GRADIENT_F32)
        return losses.real_loss(logits).mean() + 16 * (10 / 2 * penalty).mean()

    compare(gradients(D, loss), arrays, "gradD/")
