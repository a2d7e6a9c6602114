"""Self-distillation: exactly 0 for equal networks, and its schedule, ratio and resolution."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close

from finetune.metrics.perceptual import mean_squared
from finetune.train.distill import Distillation, area_resize
from finetune.train.latents import Latents, NoiseReplay, draw_latents, map_latents
from finetune.train.paired_augment import augment_pair, draw_transforms, reflect
from torch_utils.ops.grid_sample_gradfix import grid_sample

CPU = torch.device("cpu")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SYNTHESIS = {"noise_mode": "random", "fused_modconv": False, "force_fp32": False}


def generator(family, c_dim=0, device="cpu"):
    shape = {"z_dim": 8, "c_dim": c_dim, "w_dim": 8, "img_resolution": 16, "img_channels": 3}
    if family == "stylegan2":
        from finetune.models.stylegan2 import Generator

        G = Generator(**shape, channel_base=256, channel_max=16, mapping_kwargs={"num_layers": 2})
        for name, parameter in G.named_parameters():
            if name.endswith("noise_strength"):
                torch.nn.init.constant_(parameter, 0.5)
    else:
        from finetune.models.stylegan3 import Generator

        radial = {"use_radial_filters": True, "conv_kernel": 1} if family == "stylegan3-r" else {}
        G = Generator(**shape, channel_base=256, channel_max=16, mapping_kwargs={"num_layers": 2}, **radial)
    return G.to(device).train().requires_grad_(False)


def distillation(**changes):
    settings = {"weight": 1.0, "interval": 1, "resolution": 256}
    return Distillation(distance=mean_squared, **(settings | changes))


def student_images(G, draw):
    replay = NoiseReplay()
    G.requires_grad_(True)
    with replay:
        img = G.synthesis(map_latents(G, draw), **SYNTHESIS)
    G.requires_grad_(False)
    return img.detach(), replay


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", ["stylegan2", "stylegan3-t", "stylegan3-r"])
def test_distillation_equal_teacher_gives_exactly_zero(family, device):
    G = generator(family, c_dim=2, device=device)
    teacher = copy.deepcopy(G).eval()
    c = F.one_hot(torch.tensor([0, 1, 1, 0]), 2).float().to(device)
    z = torch.randn(4, 8, device=device)
    draw = Latents(z, c, torch.randn_like(z), cut=3)
    img, replay = student_images(G, draw)
    distil = distillation()
    gradient, distances = distil.image_gradient(teacher, img, draw, replay, SYNTHESIS)
    assert torch.equal(distances, torch.zeros(4, device=device))
    assert torch.equal(gradient, torch.zeros_like(img))


def test_distillation_needs_shared_noise_and_cut():
    G = generator("stylegan2")
    z, z2 = torch.randn(2, 2, 8)
    draw = Latents(z, torch.zeros(2, 0), z2, cut=2)
    img, replay = student_images(G, draw)
    teacher = copy.deepcopy(G).eval()
    _, other_noise = student_images(G, draw)
    other_cut = Latents(z, torch.zeros(2, 0), z2, cut=1)
    for changed in ((draw, other_noise), (other_cut, replay)):
        _, distances = distillation().image_gradient(teacher, img, *changed, SYNTHESIS)
        assert (distances > 1e-6).all()


@pytest.mark.parametrize("device", DEVICES)
def test_paired_augmentation_changes_both_alike(device):
    torch.manual_seed(0)
    a = torch.randn(64, 3, 16, 16, device=device).requires_grad_()
    b = torch.randn_like(a)
    first, second = augment_pair(a, a.detach())
    assert torch.equal(first, second) and not torch.equal(first, a)
    state = torch.get_rng_state() if device == "cpu" else torch.cuda.get_rng_state()
    first, _ = augment_pair(a, b)
    (torch.set_rng_state if device == "cpu" else torch.cuda.set_rng_state)(state)
    _, second = augment_pair(b, a)
    assert torch.equal(first, second)
    (gradient,) = torch.autograd.grad(first.sum(), a)
    assert torch.isfinite(gradient).all() and (gradient.abs().sum(dim=[1, 2, 3]) > 0).all()


def test_paired_augmentation_draws_two_of_three():
    torch.manual_seed(0)
    rows = []
    for _ in range(300):
        theta = draw_transforms(40, CPU)
        linear, shift = theta[:, :, :2], theta[:, :, 2]
        angle = torch.rad2deg(torch.asin(linear[:, 1, 0]))
        flipped = linear.det() < 0
        assert angle.abs().max() <= 5 and shift.abs().max() <= 0.02
        rows.append([flipped.float().mean(), (angle != 0).float().mean(), (shift != 0).all(1).float().mean()])
    rates = torch.tensor(rows)
    assert ((rates == 0).sum(dim=1) == 1).all()  # one of the three is left out
    applied = rates.sum(dim=0) / (rates > 0).sum(dim=0)
    assert_close(applied, torch.full([3], 0.5), 0.05)


@pytest.mark.parametrize("family", ["stylegan2", "stylegan3-t"])
def test_distillation_equal_teacher_gives_exactly_zero_with_augmentation(family):
    G = generator(family)
    draw = draw_latents(G, torch.zeros(8, 0), mixing=0)
    img, replay = student_images(G, draw)
    distil = distillation(augment=True)
    gradient, distances = distil.image_gradient(copy.deepcopy(G).eval(), img, draw, replay, SYNTHESIS)
    assert torch.equal(distances, torch.zeros(8)) and torch.equal(gradient, torch.zeros_like(img))


def test_distillation_of_weight_zero_measures_only():
    G, teacher = generator("stylegan2"), generator("stylegan2").eval()
    draw = draw_latents(G, torch.zeros(4, 0), mixing=0)
    img, replay = student_images(G, draw)
    gradient, distances = distillation(weight=0.0).image_gradient(teacher, img, draw, replay, SYNTHESIS)
    _, expected = distillation().image_gradient(teacher, img, draw, replay, SYNTHESIS)
    assert gradient is None and torch.equal(distances, expected) and not distances.requires_grad


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_distillation_averages_leave_out_what_is_not_finite(bad):
    G, teacher = generator("stylegan2"), generator("stylegan2").eval()
    draw = draw_latents(G, torch.zeros(2, 0), mixing=0)
    img, replay = student_images(G, draw)
    distil, norms = distillation(ratio=1.0), torch.tensor([1.0, 2.0])
    adversarial = torch.full_like(img, bad)
    distil.image_gradient(teacher, img, draw, replay, SYNTHESIS, adversarial, norms)
    assert norms.tolist() == [1, 2]
    distil.image_gradient(teacher, img, draw, replay, SYNTHESIS, torch.zeros_like(img), norms)
    assert float(norms[0]) == pytest.approx(0.95) and norms[1] != 2


def test_distillation_keeps_random_state():
    G = generator("stylegan2")
    draw = draw_latents(G, torch.zeros(2, 0), mixing=0.9)
    img, replay = student_images(G, draw)
    before = torch.get_rng_state()
    distillation().image_gradient(copy.deepcopy(G).eval(), img, draw, replay, SYNTHESIS)
    assert torch.equal(before, torch.get_rng_state())


def test_distillation_gradient_is_weighted_distance_gradient():
    G, teacher = generator("stylegan2"), generator("stylegan2").eval()
    draw = draw_latents(G, torch.zeros(4, 0), mixing=0)
    img, replay = student_images(G, draw)
    distil = distillation(weight=0.3, interval=4)
    gradient, distances = distil.image_gradient(teacher, img, draw, replay, SYNTHESIS)
    with replay.again():
        target = teacher.synthesis(map_latents(teacher, draw), **SYNTHESIS)
    assert_close(distances, (img - target).square().mean([1, 2, 3]), 1e-6)
    assert_close(gradient, 0.3 * 4 * 2 * (img - target) / img.numel(), 1e-5)


def test_distillation_interval_scales_gradient():
    distil = distillation(weight=0.2, interval=4)
    assert [step for step in range(12) if distil.due(step)] == [0, 4, 8]
    weights = [distil.scale if distil.due(step) else 0.0 for step in range(12)]
    assert sum(weights) / 12 == pytest.approx(0.2)


def test_area_resize_averages_by_whole_factors():
    img = torch.randn(2, 3, 8, 4)
    assert_close(area_resize(img, 4), F.interpolate(img, size=[4, 2], mode="area"), 1e-6)
    assert area_resize(img, 16) is area_resize(img, 8) is img
    odd = area_resize(img[:, :, :7], 3)  # the last row is left alone
    assert odd.shape == (2, 3, 3, 2)
    assert_close(odd[:, :, 2, 0], img[:, :, 6, :3].mean(dim=2), 1e-6)


def test_paired_augmentation_reflects_as_torch():
    img, grid = torch.randn(2, 3, 9, 14), torch.rand(2, 6, 5, 2) * 6 - 3
    expected = F.grid_sample(img, grid, padding_mode="reflection", align_corners=False)
    assert_close(grid_sample(img, reflect(grid, 9, 14)), expected, 1e-5)


def test_map_latents_mixes_from_cut():
    G = generator("stylegan2")
    z, z2 = torch.randn(2, 3, 8)
    c = torch.zeros(3, 0)
    ws = map_latents(G, Latents(z, c, z2, cut=2))
    assert torch.equal(ws[:, :2], G.mapping(z, c)[:, :2])
    assert torch.equal(ws[:, 2:], G.mapping(z2, c)[:, 2:])
    cuts = [draw_latents(G, c, mixing=0.9).cut for _ in range(200)]
    assert set(cuts) == {None, *range(1, G.num_ws)}
    assert 5 <= cuts.count(None) <= 40
    assert draw_latents(G, c, mixing=0).z2 is None
