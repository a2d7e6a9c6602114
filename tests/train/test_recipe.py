"""The recipe as the loop carries it out: what the plan holds, and what each phase does to the weights."""

import dataclasses

import pytest
import torch
from tiny_runs import train_alone
from tolerances import GRADIENT_F32, assert_close

import finetune
from finetune.metrics.perceptual import mean_squared
from finetune.options import TrainOptions
from finetune.recipes import RunFacts, resolve
from finetune.train import steps
from finetune.train.build import build_plan, build_state
from finetune.train.distill import Distillation
from finetune.train.latents import Latents
from finetune.train.stats import Stats

CPU = torch.device("cpu")
FAMILIES = ["stylegan2", "stylegan3-t", "stylegan3-r"]
SIZE = {"resolution": 16, "cbase": 128, "cmax": 8, "z_dim": 8, "map_depth": 2}
GOLDEN = {"stylegan2": "stylegan2-ada-32", "stylegan3-t": "stylegan3-t-32", "stylegan3-r": "stylegan3-r-32"}


def no_labels(count):
    return torch.zeros(count, 0)


def parts_of_run(family, checkpoint=None, **changes):
    """State and plan of a small run, from scratch or from a checkpoint, without any images."""
    start = {"resume": "a.pkl"} if checkpoint else {"scratch": family, **SIZE}
    config = TrainOptions(data="x", **({"batch": 8, "sd_weight": 0.0, **start} | changes))
    facts = RunFacts(family, 32 if checkpoint else 16, 3, 0, 100, "cpu", 2, from_scratch=checkpoint is None)
    config, _ = resolve(config, facts)
    torch.manual_seed(0)
    state = build_state(config, facts, checkpoint, CPU)
    return state, build_plan(config, facts, None, no_labels, CPU)


def quiet_stats():
    return Stats(CPU)


@pytest.mark.parametrize("scratch", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_recipe_published_plan(family, scratch, golden_dir):
    checkpoint = None if scratch else finetune.load(golden_dir / f"{GOLDEN[family]}.pkl")
    state, plan = parts_of_run(family, checkpoint)
    blocks = [module for module in state.D.modules() if hasattr(module, "channels_last")]
    assert blocks and all(block.channels_last for block in blocks)
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


@pytest.mark.parametrize("family", FAMILIES)
def test_recipe_published_optimizers(family):
    state, _ = parts_of_run(family)
    settings = [optimizer.param_groups[0] for optimizer in (state.opt_G, state.opt_D)]
    lazy_G = 4 / 5 if family == "stylegan2" else 1.0
    assert settings[0]["lr"] == pytest.approx((0.002 if family == "stylegan2" else 0.0025) * lazy_G)
    assert settings[0]["betas"] == (0.0, pytest.approx(0.99**lazy_G))
    assert settings[1]["lr"] == pytest.approx(0.002 * 16 / 17)
    assert settings[1]["betas"] == (0.0, pytest.approx(0.99 ** (16 / 17)))


@pytest.mark.parametrize("family", FAMILIES[1:])
def test_recipe_magnitude_averages_have_half_life_of_20_kimg(family):
    state, _ = parts_of_run(family)
    for network in (state.G, state.G_ema):
        layers = [module for module in network.modules() if hasattr(module, "magnitude_ema_beta")]
        assert layers
        for layer in layers:
            assert layer.magnitude_ema_beta ** (20_000 / 8) == pytest.approx(0.5)


def test_build_stylegan3_r_kernels_and_channels():
    kwargs = [parts_of_run(family)[0].G.init_kwargs for family in ("stylegan3-t", "stylegan3-r")]
    for name, value in (("channel_base", 128), ("channel_max", 8)):
        assert [each[name] for each in kwargs] == [value, 2 * value]
    assert (kwargs[1]["conv_kernel"], kwargs[1]["use_radial_filters"]) == (1, True)
    assert "conv_kernel" not in kwargs[0]


def test_r1_off_takes_no_extra_steps():
    state, _ = parts_of_run("stylegan2", gamma=0.0)
    assert state.opt_D.param_groups[0]["lr"] == 0.002


def test_build_student_and_ema_are_separate(golden_dir):
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
def test_generator_step_gradient(batch_gpu, monkeypatch):
    state, plan = parts_of_run("stylegan2", aug="noaug", batch_gpu=batch_gpu)
    critic = Critic().requires_grad_(False)
    distil = Distillation(mean_squared, weight=0.3, interval=2, resolution=8)
    plan = dataclasses.replace(
        plan, mixing=0.0, distillation=distil, synthesis={**plan.synthesis, "noise_mode": "const"}
    )
    teacher = build_teacher(state.G)
    optimizer = torch.optim.SGD(state.G.parameters(), lr=0.0)  # the gradients are looked at
    state = dataclasses.replace(state, D=critic, teacher=teacher, opt_G=optimizer, nimg=1000, step=2)

    z = torch.randn(8, 8)
    parts = iter(z.split(batch_gpu))
    monkeypatch.setattr(steps, "draw_latents", lambda G, c, mixing, **_: Latents(next(parts), c))
    parameters = dict(state.G.named_parameters())
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    kwargs = {"noise_mode": "const", "fused_modconv": False}
    img, target = state.G(z, no_labels(8), **kwargs), teacher(z, no_labels(8), **kwargs)
    adversarial = torch.nn.functional.softplus(-critic(img, None)).mean()
    small = [torch.nn.functional.avg_pool2d(x, 2) for x in (img, target)]
    distance = (small[0] - small[1]).square().mean()
    # λ = 0.3, counted twice.
    loss = adversarial + 0.3 * 2 * distance
    expected = torch.autograd.grad(loss, list(parameters.values()))
    state.G.requires_grad_(False)

    steps.generator_step(state, plan, quiet_stats())
    for (name, parameter), gradient in zip(parameters.items(), expected):
        assert_close(parameter.grad, gradient, GRADIENT_F32, name)
    state.step = 3  # not due: the adversarial loss alone
    parts = iter(z.split(batch_gpu))
    watch = quiet_stats()
    steps.generator_step(state, plan, watch)
    assert "loss_sd" not in watch.sums and "loss_G" in watch.sums


def build_teacher(G):
    teacher, _ = parts_of_run("stylegan2", seed=1)
    teacher = teacher.G_ema
    with torch.no_grad():
        for value, other in zip(teacher.parameters(), G.parameters()):
            value.copy_(other + 0.1 * torch.randn_like(other))
    return teacher


@pytest.mark.parametrize("batch_gpu", [8, 4])
def test_path_length_step_gradient(batch_gpu, monkeypatch):
    state, plan = parts_of_run("stylegan2", batch_gpu=batch_gpu)
    const = state.G.synthesis.b4.const
    state = dataclasses.replace(state, opt_G=torch.optim.SGD([const], lr=1.0), path_mean=torch.tensor(0.5))
    sizes = []

    def lengths(img, ws):
        assert img.shape[0] == ws.shape[0] and ws.requires_grad
        sizes.append(len(ws))
        return const.sum().expand(len(ws))

    monkeypatch.setattr(steps.losses, "path_lengths", lengths)
    old, length, mean = const.detach().clone(), float(const.sum()), 0.5
    gradient = 0.0
    mean += 0.01 * (length - mean)  # once a step, whatever the number of parts
    for _ in range(8 // batch_gpu):
        gradient += 2.0 * 4 * 2 * (length - mean) * batch_gpu / 8
    steps.path_length_step(state, plan, quiet_stats())
    assert sizes == [batch_gpu // 2] * (8 // batch_gpu)
    assert float(state.path_mean) == pytest.approx(mean, rel=1e-5)
    torch.testing.assert_close(old - const.detach(), torch.full_like(old, gradient), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["stylegan2", "stylegan3-t"])
def test_discriminator_step_updates_w_avg_once(family, monkeypatch):
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
    train_alone(state, plan, batches)
    assert moves == ["mapping", "synthesis"]


def test_discriminator_step_input_range(monkeypatch):
    state, plan = parts_of_run("stylegan2", aug="noaug")
    plan = dataclasses.replace(plan, total_nimg=8)
    seen = []
    monkeypatch.setattr(steps, "discriminator_step", lambda state, plan, reals, watch: seen.append(reals))
    pixels = torch.zeros(8, 3, 16, 16, dtype=torch.uint8)
    pixels[4:] = 255
    train_alone(state, plan, iter([(pixels, no_labels(8))]))
    ((img, _),) = seen[0]
    assert (img[:4] == -1).all() and (img[4:] == 1).all()


@pytest.mark.parametrize("batch_gpu", [8, 2])
def test_discriminator_step_gradient(batch_gpu, monkeypatch):
    state, plan = parts_of_run("stylegan2", aug="ada", batch_gpu=batch_gpu)
    plan = dataclasses.replace(plan, synthesis={**plan.synthesis, "noise_mode": "const"})
    critic = Critic().requires_grad_(False)
    state = dataclasses.replace(state, D=critic, opt_D=torch.optim.SGD(critic.parameters(), lr=0.0))
    z, real = torch.randn(8, 8), torch.randn(8, 3, 16, 16)
    parts = iter(z.split(batch_gpu))
    monkeypatch.setattr(steps, "draw_latents", lambda G, c, mixing, **_: Latents(next(parts), c))
    fake = state.G(z, no_labels(8), noise_mode="const")
    weight = critic.weight.detach().clone().requires_grad_()
    logits = [(img * weight).mean(dim=[1, 2, 3]) for img in (fake, real)]
    loss = torch.nn.functional.softplus(logits[0]).mean() + torch.nn.functional.softplus(-logits[1]).mean()
    (expected,) = torch.autograd.grad(loss, weight)

    reals = [(part, no_labels(len(part))) for part in real.split(batch_gpu)]
    steps.discriminator_step(state, plan, reals, quiet_stats())
    assert_close(critic.weight.grad, expected, GRADIENT_F32)
    assert all(parameter.grad is None for parameter in state.G.parameters())
    assert (state.ada.count, float(state.ada.sign_sum)) == (8, int(logits[1].detach().sign().sum()))


def test_ada_increases_for_confident_d():
    state, plan = parts_of_run("stylegan2")
    plan = dataclasses.replace(plan, total_nimg=4 * 8)
    critic = Critic().requires_grad_(False)
    critic.weight.fill_(1.0)
    state = dataclasses.replace(state, D=critic, opt_D=torch.optim.SGD(critic.parameters(), lr=0.0))
    white = torch.full([8, 3, 16, 16], 255, dtype=torch.uint8)
    train_alone(state, plan, iter([(white, no_labels(8))] * 4))
    assert state.ada.p == pytest.approx(4 * 8 / 500_000)


def test_score_blurs_then_augments():
    state, plan = parts_of_run("stylegan3-r")
    seen = []

    class Pipe(torch.nn.Module):
        p = torch.zeros([])

        def forward(self, images, full_padding):
            return images + 1

    pipe = Pipe()
    state = dataclasses.replace(
        state, D=lambda img, c, **kwargs: seen.append(img), augment_pipe=pipe, nimg=100_000
    )
    img = torch.randn(2, 3, 16, 16)
    steps.score(state, plan, img, no_labels(2))
    state.ada.p = 0.25
    assert steps.set_augmentation(state)
    steps.score(state, plan, img, no_labels(2))
    state.nimg = 200_000
    steps.score(state, plan, img, no_labels(2))
    blurred = steps.losses.blur(img, 5.0)
    for found, expected in zip(seen, (blurred, blurred + 1, img + 1), strict=True):
        assert torch.equal(found, expected)
    assert float(pipe.p) == 0.25


def test_regularization_intervals(monkeypatch):
    state, plan = parts_of_run("stylegan2", aug="noaug")
    plan = dataclasses.replace(plan, total_nimg=33 * 8)
    seen = {"r1_step": [], "path_length_step": []}
    for name, found in seen.items():
        monkeypatch.setattr(steps, name, lambda state, *rest, found=found: found.append(state.step))
    for name in ("generator_step", "discriminator_step"):
        monkeypatch.setattr(steps, name, lambda *args: None)
    batch = torch.zeros(8, 3, 16, 16, dtype=torch.uint8), no_labels(8)
    train_alone(state, plan, iter([batch] * 33))
    assert seen == {"r1_step": [0, 16, 32], "path_length_step": list(range(0, 33, 4))}
