"""The augmentation pipe: golden cases, second derivatives, chances, channels, and state."""

from __future__ import annotations

import copy
import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from tolerances import GRADIENT_F32, NETWORK_F32, OPS_F64, SAME_F32, SAME_F64, assert_close

from finetune.models import augment
from finetune.models.augment import AugmentPipe, reflect_pad
from torch_utils.ops import upfirdn2d

CASES = [
    case
    for case in json.loads((Path(__file__).parents[1] / "golden" / "ops.json").read_text())
    if case["op"] == "augment"
]
GEOMETRY = ("xflip", "rotate90", "xint", "scale", "rotate", "aniso", "xfrac")
COLOR = ("brightness", "contrast", "lumaflip", "hue", "saturation")
ALL = (*GEOMETRY, *COLOR, "imgfilter", "noise", "cutout")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def pipe(*kinds, p=1.0, **strengths):
    """A pipe whose `kinds` have probability 1, all multiplied by p."""
    made = AugmentPipe(**dict.fromkeys(kinds, 1), **strengths)
    made.p.fill_(p)
    return made


def seeded(module, images, seed=0, **options):
    torch.manual_seed(seed)
    return module(images, **options)


# Golden numbers


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{'+'.join(c['enabled'][:3])}-{c['percentile']}")
def test_augment_golden_cases(case, device, golden_ops):
    """Float32 positions are exact to 1e-6 of the image, which noise from pixel to pixel multiplies."""
    arrays = golden_ops[1]
    x = torch.from_numpy(arrays["augment/x"]).to(device)
    expected = arrays[f"augment/{case['case']}/{case['percentile']}"]
    actual = pipe(*case["enabled"]).to(device)(x, debug_percentile=case["percentile"])
    warped = any(kind in GEOMETRY for kind in case["enabled"])
    assert_close(actual, expected, NETWORK_F32 if warped else SAME_F32)


def test_augment_golden_cases_are_many():
    assert len(CASES) == 30 and {kind for case in CASES for kind in case["enabled"]} == set(ALL) - {"noise"}


# Derivatives


@pytest.mark.parametrize("kinds", [GEOMETRY, COLOR, ("imgfilter",), ("noise", "cutout"), ALL])
def test_augment_two_derivatives(kinds):
    """The pipe is affine in the images, so its second derivative comes from what follows it: a cube here."""
    module = pipe(*kinds)
    images = torch.randn(2, 3, 7, 6, dtype=torch.float64, requires_grad=True)

    def cubed(images):
        return seeded(module, images, seed=3).pow(3).mean(dim=1)

    assert torch.autograd.gradcheck(cubed, (images,), fast_mode=True)
    assert torch.autograd.gradgradcheck(cubed, (images,), fast_mode=True)


def test_augment_r1_through_the_pipe():
    """Parameter gradients of the gradient penalty, in float32 as in training, against float64."""
    images = torch.randn(4, 3, 16, 16)
    D = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.Softplus(), torch.nn.Conv2d(8, 1, 3), torch.nn.Softplus()
    )

    def penalty_gradients(dtype):
        real = images.to(dtype).requires_grad_(True)
        net = copy.deepcopy(D).to(dtype)
        logits = net(seeded(pipe(*ALL[:-2]), real, seed=5))
        (grads,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
        return torch.autograd.grad(grads.square().sum(), list(net.parameters()), allow_unused=True)

    for single, double in zip(penalty_gradients(torch.float32), penalty_gradients(torch.float64)):
        assert double.any()
        assert_close(single, double, GRADIENT_F32)


# Chance


def test_augment_one_seed_gives_one_result():
    module = pipe(*ALL, p=0.5)
    images = torch.randn(8, 3, 16, 16)
    assert torch.equal(seeded(module, images, 1), seeded(module, images, 1))
    assert not torch.equal(seeded(module, images, 1), seeded(module, images, 2))


@pytest.mark.parametrize("kind", ALL)
def test_augment_p_is_fraction_of_images(kind):
    """p is read at every call; half of the flips and a quarter of the turns have no effect.

    The image filter draws for each of its four bands.
    """
    module = pipe(kind)
    images = torch.randn(400, 3, 4, 4)
    visible = {"xflip": 1 / 2, "lumaflip": 1 / 2, "rotate90": 3 / 4}.get(kind, 1)
    if kind == "xint":
        images = torch.randn(400, 3, 32, 32)
        visible = 1 - (1 / 8) ** 2  # of the shifts round(U(-4, 4)), one in eight is 0, in x and in y
    for p in (0.0, 0.3, 1.0):
        module.p.fill_(p)
        changed = (module(images) - images).flatten(1).abs().amax(dim=1) > 1e-4
        share = 1 - (1 - p) ** 4 if kind == "imgfilter" else p * visible
        sigma = math.sqrt(share * (1 - share) / 400)
        assert abs(changed.float().mean() - share) <= 4 * sigma, f"p={p}"


def test_augment_probabilities_multiply():
    """A strength of 0.5 under p = 0.4 touches one image in five."""
    module = AugmentPipe(brightness=0.5)
    module.p.fill_(0.4)
    changed = (module(torch.zeros(2000, 1, 1, 1)) != 0).float().mean()
    assert abs(changed - 0.2) < 4 * math.sqrt(0.2 * 0.8 / 2000)


@pytest.mark.parametrize("kind", [*COLOR, "imgfilter", "noise", "cutout"])
def test_augment_without_geometry_nothing_is_resampled(kind, monkeypatch):
    monkeypatch.setattr(AugmentPipe, "_resample", None)
    assert pipe(kind)(torch.randn(2, 3, 8, 8)).shape == (2, 3, 8, 8)


def test_augment_pipe_of_nothing_returns_its_input():
    images = torch.randn(2, 3, 8, 8)
    assert AugmentPipe()(images) is images


def test_augment_distributions():
    draws = augment._Draws(20_000, "cpu")
    for values, mean, std in [
        (draws.unit(), 0.5, 12**-0.5),
        (draws.symmetric(2.0), 0.0, 4 * 12**-0.5),
        (draws.level(4), 1.5, 1.25**0.5),
        (draws.normal(0.3), 0.0, 0.3),
        (draws.half_normal(0.3), 0.3 * (2 / math.pi) ** 0.5, 0.3 * (1 - 2 / math.pi) ** 0.5),
    ]:
        assert values.shape == (20_000, 1)
        assert abs(values.mean() - mean) < 5 * std / 20_000**0.5
        assert abs(values.std() - std) < 0.03 * std
    columns = draws.normal(1.0, columns=2)
    assert abs(np.corrcoef(columns.t().numpy())[0, 1]) < 5 / 20_000**0.5


def test_augment_noise_has_the_strength_drawn():
    noise = pipe("noise", noise_std=0.2)(torch.zeros(50, 3, 16, 16), debug_percentile=0.5)
    assert abs(noise.std() / (0.2 * 0.4769363) - 1) < 0.02
    assert abs(noise.mean()) < 5e-3


def test_augment_strengths_are_those_of_the_constructor():
    """A constant gray image shows brightness and contrast directly."""
    images = torch.full([4000, 1, 1, 1], 0.5)
    brighter = pipe("brightness", brightness_std=0.3)(images) - 0.5
    assert abs(brighter.std() - 0.3) < 0.015 and abs(brighter.mean()) < 0.025
    contrast = torch.log2(pipe("contrast", contrast_std=0.7)(images) / 0.5)
    assert abs(contrast.std() - 0.7) < 0.035 and abs(contrast.mean()) < 0.06


def test_augment_cutout_blanks_a_square():
    images = torch.ones(1, 3, 16, 16, requires_grad=True)
    y = pipe("cutout")(images, debug_percentile=0.5)
    expected = torch.ones(1, 3, 16, 16)
    expected[:, :, 4:12, 4:12] = 0
    assert torch.equal(y, expected)
    (grad,) = torch.autograd.grad(y.sum(), images)
    assert torch.equal(grad, expected)


def test_augment_cutout_is_anywhere():
    """The middle of the hole is uniform along x and y, independently."""
    kept = pipe("cutout", cutout_size=1 / 16)(torch.ones(500, 1, 16, 16))
    assert not kept.flatten(1).all(dim=1).any()
    hole = (kept == 0).flatten(1).float().argmax(dim=1)
    row, column = (hole // 16).float(), (hole % 16).float()
    for middle in (row, column):
        assert abs(middle.mean() - 7.5) < 5 * (16**2 / 12 / 500) ** 0.5
        assert middle.min() == 0 and middle.max() >= 14
    assert abs(np.corrcoef(row.numpy(), column.numpy())[0, 1]) < 5 / 500**0.5


# Geometry


def test_augment_both_ways_to_resample_agree():
    """On CPUs the filters act as matrices; elsewhere, and here by hand, as convolutions."""
    module = pipe("rotate")
    images = torch.randn(2, 3, 9, 12, dtype=torch.float64)
    padded = torch.nn.functional.pad(images, [3, 8, 5, 2], mode="reflect")
    large = upfirdn2d.upsample2d(padded, module.Hz_geom, up=2)
    assert_close(module._enlarge(images, 3, 8, 5, 2), large, SAME_F64)
    small = upfirdn2d.downsample2d(large, module.Hz_geom, down=2, padding=-5, flip_filter=True)
    assert_close(module._shrink(large, 5), small, SAME_F64)


@pytest.mark.parametrize("pad", [(3, 8, 5, 2), (0, 4, 0, 0), (11, 11, 8, 8)])
def test_reflect_pad_equals_torch(pad):
    images = torch.randn(2, 3, 9, 12, dtype=torch.float64, requires_grad=True)
    ours, theirs = reflect_pad(images, *pad), torch.nn.functional.pad(images, pad, mode="reflect")
    assert torch.equal(ours, theirs)
    gradients = [torch.autograd.grad(each.square().sum(), images)[0] for each in (ours, theirs)]
    assert_close(*gradients, SAME_F64)


@pytest.mark.gpu
def test_augment_gpu_resamples_as_the_cpu_does():
    images = torch.randn(4, 3, 32, 24)
    module = pipe(*GEOMETRY, *COLOR, "imgfilter", "cutout")
    expected = module(images, debug_percentile=0.7)
    assert_close(module.cuda()(images.cuda(), debug_percentile=0.7), expected, NETWORK_F32)


def test_augment_wavelet_gives_the_image_back():
    """Upsampled and downsampled without a warp between, an image is what it was, up to its borders too."""
    module = pipe("scale", p=0)
    images = torch.randn(2, 3, 12, 20, dtype=torch.float64)
    assert_close(module(images), images, OPS_F64)


def test_augment_whole_pixel_shifts_on_an_oblong_image():
    """Percentile 0.3 of +-0.125 is -0.05: two pixels of 40 to the left, one of 20 up; borders reflect."""
    images = torch.randn(2, 3, 20, 40)
    moved = pipe("xint")(images, debug_percentile=0.3)
    assert_close(moved[:, :, :-1, :-2], images[:, :, 1:, 2:], NETWORK_F32)
    assert_close(moved[:, :, 0, -2:], images[:, :, 1, [38, 37]], NETWORK_F32)
    assert_close(moved[:, :, -1, 0], images[:, :, 18, 2], NETWORK_F32)


def test_augment_images_in_one_batch_do_not_mix():
    """The padding is shared; what an image becomes depends on the draws for it alone."""
    warp = augment._Warp(2, "cpu")
    warp.rotate(torch.tensor([[0.0], [0.7]]))
    alone = augment._Warp(1, "cpu")
    module, images = pipe("rotate"), torch.randn(2, 3, 16, 16)
    together = module._resample(images, warp)
    assert_close(together[:1], images[:1], NETWORK_F32)
    assert_close(module._resample(images[:1], alone), together[:1], NETWORK_F32)


def test_augment_full_padding_changes_nothing():
    module, images = pipe(*GEOMETRY), torch.randn(3, 3, 12, 20)
    expected = module(images, debug_percentile=0.7)
    assert_close(module(images, debug_percentile=0.7, full_padding=True), expected, NETWORK_F32)


@pytest.mark.parametrize("size", [(4, 4), (9, 5), (1, 6)])
def test_augment_small_images(size):
    """Filters reach further than such an image is wide."""
    images = torch.randn(3, 3, *size)
    y = pipe(*ALL)(images)
    assert y.shape == images.shape and y.isfinite().all()


def test_augment_memory_formats():
    module = pipe(*ALL)
    images = torch.randn(2, 3, 16, 16)
    expected = seeded(module, images)
    assert_close(seeded(module, images.to(memory_format=torch.channels_last)), expected, SAME_F32)
    assert_close(seeded(module, images.transpose(2, 3).contiguous().transpose(2, 3)), expected, SAME_F32)


# Channels


def test_augment_gray_is_the_mean_of_equal_channels():
    gray = torch.randn(4, 1, 8, 8)
    module = pipe(*COLOR)
    colored = module(gray.repeat(1, 3, 1, 1), debug_percentile=0.8)
    assert_close(module(gray, debug_percentile=0.8), colored.mean(dim=1, keepdim=True), SAME_F32)


def test_augment_alpha_keeps_its_values():
    images = torch.randn(4, 4, 8, 8)
    module = pipe(*COLOR)
    y = module(images, debug_percentile=0.8)
    assert torch.equal(y[:, 3], images[:, 3])
    assert_close(y[:, :3], module(images[:, :3], debug_percentile=0.8), SAME_F32)
    assert not torch.equal(y[:, :3], images[:, :3])


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_augment_everything_but_color_takes_any_channels(channels):
    module = pipe(*GEOMETRY, "imgfilter", "cutout")
    images = torch.randn(2, 3, 8, 8).repeat(1, 2, 1, 1)[:, :channels]
    both = module(torch.cat([images, images[:, :1]], dim=1), debug_percentile=0.6)
    assert torch.equal(both[:, :1], both[:, -1:])
    with pytest.raises(ValueError, match=r"1, 3 or 4 channels, not 5: set brightness"):
        pipe("hue")(torch.randn(2, 5, 8, 8))


# Filters


def test_augment_octave_filter_bank():
    """Four bands of zero phase that add up to the image, the lowest passing constants alone."""
    bank = augment.octave_filter_bank(augment.SYM2, 4)
    assert bank.shape == (4, 43)
    impulse = np.zeros(43)
    impulse[21] = 1
    np.testing.assert_allclose(bank.sum(axis=0), impulse, atol=1e-9)
    np.testing.assert_allclose(bank, bank[:, ::-1], atol=1e-12)
    np.testing.assert_allclose(bank.sum(axis=1), [1, 0, 0, 0], atol=1e-9)
    response = np.abs(np.fft.rfft(bank, 512))
    strongest = response.argmax(axis=0)  # which band owns a frequency
    assert (np.diff(strongest) >= 0).all() and set(strongest) == {0, 1, 2, 3}
    edges = np.flatnonzero(np.diff(strongest)) / 256  # of the highest frequency
    np.testing.assert_allclose(edges, [1 / 8, 1 / 4, 1 / 2], atol=0.02)


@pytest.mark.parametrize("band", range(4))
def test_augment_filter_keeps_the_power_of_natural_images(band, monkeypatch):
    """Where one band is changed, the squared gains weighted by the power expected in each octave sum to 1."""
    seen = []
    monkeypatch.setattr(augment, "_convolve_each", lambda images, taps: seen.append(taps))
    module = pipe("imgfilter", imgfilter_bands=[float(i == band) for i in range(4)])
    module.Hz_fbank = torch.eye(4)  # so that the filters are the gains
    module._filter_octaves(torch.zeros(2000, 1, 1, 1), augment._Draws(2000, "cpu"))
    (gains,) = seen
    power = gains.square() @ torch.tensor(augment.BAND_POWER)
    assert_close(power, torch.ones(2000), SAME_F32)
    ratio = torch.log2(gains[:, band] / gains[:, band - 1])
    assert abs(ratio.std() - 1) < 0.08 and abs(ratio.mean()) < 0.11


# State


def test_augment_state():
    """Buffers as other code bases name them, plain attributes, and settings that survive a pickle."""
    module = pipe(*ALL, p=0.25, imgfilter_bands=[1, 0, 1, 0], noise_std=0.3)
    assert list(dict(module.named_buffers())) == ["p", "Hz_geom", "Hz_fbank"]
    assert module.p.shape == () and module.Hz_geom.shape == (12,) and module.Hz_fbank.shape == (4, 43)
    assert AugmentPipe().p == 1
    hidden = ("_parameters", "_buffers", "_modules")
    for name, value in vars(module).items():
        if not name.startswith("_") and name not in hidden:
            assert type(value) in (bool, float, list), name
    images = torch.randn(4, 3, 8, 8)
    for other in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert other.p == 0.25 and other.noise_std == 0.3 and other.init_kwargs == module.init_kwargs
        assert torch.equal(seeded(other, images), seeded(module, images))
