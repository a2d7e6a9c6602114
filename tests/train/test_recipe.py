"""The recipe as the loop carries it out: what the plan holds, and what each phase does to the weights."""

import dataclasses

import pytest
import torch
from tolerances import GRADIENT_F32, assert_close

import finetune
from finetune.config import TrainConfig
from finetune.recipes import Facts, resolve
from finetune.train import loop
from finetune.train.build import build_plan, build_state
from finetune.train.distill import Distillation
from finetune.train.latents import Draw
from finetune.train.perceptual import mean_squared
from finetune.train.watch import Watch

CPU = torch.device("cpu")
FAMILIES = ["stylegan2", "stylegan3-t", "stylegan3-r"]
SIZE = {"resolution": 16, "cbase": 128, "cmax": 8, "z_dim": 8, "w_dim": 8, "map_depth": 2}
GOLDEN = {"stylegan2": "stylegan2-ada-32", "stylegan3-t": "stylegan3-t-32", "stylegan3-r": "stylegan3-r-32"}


def no_labels(count):
    return torch.zeros(count, 0)


def parts_of_run(family, checkpoint=None, **changes):
    """State and plan of a small run, from scratch or from a checkpoint, without any pictures."""
    start = {"resume": "a.pkl"} if checkpoint else {"scratch": family, **SIZE}
    config = TrainConfig(data="x", **({"batch": 8, "sd_weight": 0.0, **start} | changes))
    facts = Facts(family, 32 if checkpoint else 16, 3, 0, 100, "cpu", 2, from_scratch=checkpoint is None)
    config, _ = resolve(config, facts)
    torch.manual_seed(0)
    state = build_state(config, facts, checkpoint, CPU)
    return state, build_plan(config, facts, None, no_labels, CPU)


def quiet_watch():
    return Watch(CPU, 10**9, lambda state, numbers: None)


@pytest.mark.parametrize("scratch", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_published_settings(family, scratch, golden_dir):
    checkpoint = None if scratch else finetune.load(golden_dir / f"{GOLDEN[family]}.pkl")
    state, plan = parts_of_run(family, checkpoint)
    stylegan2 = family == "stylegan2"
    assert (plan.r1_interval, plan.path_interval) == (16, 4 if stylegan2 else None)
    assert (plan.path_weight, plan.path_decay) == (2.0, 0.01)
    assert plan.mixing == (0.9 if stylegan2 else 0.0)
    assert plan.ema_nimg == pytest.approx(8 * 10 / 32 * 1000)
    assert plan.ema_rampup == (0.05 if scratch else None)
    blurred = scratch and family == "stylegan3-r"
    assert (plan.blur_at(0), plan.blur_at(100_000), plan.blur_at(200_000)) == (
        (10.0, 5.0, 0.0) if blurred else (0.0, 0.0, 0.0)
    )
    assert (state.ada.p, state.ada.target, state.ada.swing_kimg) == (0.0, 0.6, 500 if scratch else 100)
    settings = [optimizer.param_groups[0] for optimizer in (state.opt_G, state.opt_D)]
    lazy_G = 4 / 5 if stylegan2 else 1.0
    assert settings[0]["lr"] == pytest.approx((0.002 if stylegan2 else 0.0025) * lazy_G)
    assert settings[0]["betas"] == (0.0, pytest.approx(0.99**lazy_G))
    assert settings[1]["lr"] == pytest.approx(0.002 * 16 / 17)
    assert settings[1]["betas"] == (0.0, pytest.approx(0.99 ** (16 / 17)))
    if not stylegan2:
        # Half of the magnitude averages is forgotten in 20,000 images.
        for network in (state.G, state.G_ema):
            layers = [module for module in network.modules() if hasattr(module, "magnitude_ema_beta")]
            assert layers
            for layer in layers:
                assert layer.magnitude_ema_beta ** (20_000 / 8) == pytest.approx(0.5)


def test_without_r1_the_discriminator_takes_no_extra_steps():
    state, _ = parts_of_run("stylegan2", gamma=0.0)
    assert state.opt_D.param_groups[0]["lr"] == 0.002


def test_student_and_average_start_from_networks_of_their_own(golden_dir):
    checkpoint = finetune.load(golden_dir / "stylegan2-ada-32.pkl")
    with torch.no_grad():
        checkpoint.G.synthesis.b4.const.add_(1)
    state, _ = parts_of_run("stylegan2", checkpoint)
    for name in ("G", "D", "G_ema"):
        for key, value in getattr(checkpoint, name).state_dict().items():
            assert torch.equal(getattr(state, name).state_dict()[key], value), (name, key)


class Critic(torch.nn.Module):
    """A discriminator that looks at every image alone, so that a batch may be cut anywhere."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(3, 16, 16))

    def forward(self, img, c, force_fp32=False):
        return (img * self.weight).mean(dim=[1, 2, 3]).unsqueeze(1)


@pytest.mark.parametrize("batch_gpu", [8, 2])
def test_the_generator_step_is_the_gradient_of_both_losses(batch_gpu, monkeypatch):
    state, plan = parts_of_run("stylegan2", aug="noaug", batch_gpu=batch_gpu)
    critic = Critic().requires_grad_(False)
    distil = Distillation(
        mean_squared, weight=0.3, interval=2, warmup_nimg=2000, batch_share=1.0, resolution=8
    )
    plan = dataclasses.replace(
        plan, mixing=0.0, distillation=distil, synthesis={**plan.synthesis, "noise_mode": "const"}
    )
    teacher = build_teacher(state.G)
    optimizer = torch.optim.SGD(state.G.parameters(), lr=0.0)  # the gradients are looked at
    state = dataclasses.replace(state, D=critic, teacher=teacher, opt_G=optimizer, nimg=1000, step=2)

    z = torch.randn(8, 8)
    parts = iter(z.split(batch_gpu))
    monkeypatch.setattr(loop, "draw_latents", lambda G, c, mixing: Draw(next(parts), c))
    parameters = dict(state.G.named_parameters())
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    kwargs = {"noise_mode": "const", "fused_modconv": False}
    img, target = state.G(z, no_labels(8), **kwargs), teacher(z, no_labels(8), **kwargs)
    adversarial = torch.nn.functional.softplus(-critic(img, None)).mean()
    small = [torch.nn.functional.avg_pool2d(x, 2) for x in (img, target)]
    distance = (small[0] - small[1]).square().mean()
    # λ = 0.3, counted twice, and half way through the warm-up.
    loss = adversarial + 0.3 * 2 * 0.5 * distance
    expected = torch.autograd.grad(loss, list(parameters.values()))
    state.G.requires_grad_(False)

    loop.generator_step(state, plan, quiet_watch())
    for (name, parameter), gradient in zip(parameters.items(), expected):
        assert_close(parameter.grad, gradient, GRADIENT_F32, name)
    state.step = 3  # not due: the adversarial loss alone
    parts = iter(z.split(batch_gpu))
    watch = quiet_watch()
    loop.generator_step(state, plan, watch)
    assert "loss_sd" not in watch.sums and "loss_G" in watch.sums


def build_teacher(G):
    teacher, _ = parts_of_run("stylegan2", seed=1)
    teacher = teacher.G_ema
    with torch.no_grad():
        for value, other in zip(teacher.parameters(), G.parameters()):
            value.copy_(other + 0.1 * torch.randn_like(other))
    return teacher


@pytest.mark.parametrize("batch_gpu", [8, 4])
def test_the_path_length_step_counts_the_penalty_of_half_a_batch_by_its_interval(batch_gpu, monkeypatch):
    state, plan = parts_of_run("stylegan2", batch_gpu=batch_gpu)
    const = state.G.synthesis.b4.const
    state = dataclasses.replace(state, opt_G=torch.optim.SGD([const], lr=1.0), path_mean=torch.tensor(0.5))
    sizes = []

    def lengths(img, ws):
        assert img.shape[0] == ws.shape[0] and ws.requires_grad
        sizes.append(len(ws))
        return const.sum().expand(len(ws))

    monkeypatch.setattr(loop.losses, "path_lengths", lengths)
    old, length, mean = const.detach().clone(), float(const.sum()), 0.5
    gradient = 0.0
    for _ in range(8 // batch_gpu):
        mean += 0.01 * (length - mean)
        gradient += 2.0 * 4 * 2 * (length - mean) * batch_gpu / 8
    loop.path_length_step(state, plan, quiet_watch())
    assert sizes == [batch_gpu // 2] * (8 // batch_gpu)
    assert float(state.path_mean) == pytest.approx(mean, rel=1e-5)
    torch.testing.assert_close(old - const.detach(), torch.full_like(old, gradient), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["stylegan2", "stylegan3-t"])
def test_the_averages_inside_the_student_move_once_a_step(family, monkeypatch):
    state, plan = parts_of_run(family, aug="noaug", batch_gpu=4)
    plan = dataclasses.replace(plan, total_nimg=8)
    moves = []
    mapping, synthesis = state.G.mapping.forward, state.G.synthesis.forward

    def spy(name, forward):
        def call(*args, update_emas=False, **kwargs):
            moves.extend([name] if update_emas else [])
            return forward(*args, update_emas=update_emas, **kwargs)

        return call

    monkeypatch.setattr(state.G.mapping, "forward", spy("mapping", mapping))
    monkeypatch.setattr(state.G.synthesis, "forward", spy("synthesis", synthesis))
    batches = iter([(torch.zeros(8, 3, 16, 16, dtype=torch.uint8), no_labels(8))])
    loop.train(state, plan, batches, quiet_watch())
    assert moves == ["mapping", "synthesis"]


def test_the_discriminator_sees_the_range_from_minus_1_to_1(monkeypatch):
    state, plan = parts_of_run("stylegan2", aug="noaug")
    plan = dataclasses.replace(plan, total_nimg=8)
    seen = []
    monkeypatch.setattr(loop, "discriminator_step", lambda state, plan, reals, watch: seen.append(reals))
    pixels = torch.zeros(8, 3, 16, 16, dtype=torch.uint8)
    pixels[4:] = 255
    loop.train(state, plan, iter([(pixels, no_labels(8))]), quiet_watch())
    ((img, _),) = seen[0]
    assert (img[:4] == -1).all() and (img[4:] == 1).all()
