"""Distances: zero, range checks, channels, agreement with the package lpips, and missing weights."""

import sys
import types
import warnings

import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F
from tolerances import NETWORK_F32, SAME_F32, assert_close

from finetune.device import float32_math
from finetune.errors import ConfigError, FinetuneError, WeightsMissing
from finetune.metrics import perceptual
from finetune.options import BACKBONES
from torch_utils.ops import unit_distance

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def distances():
    """backbone -> distance with a random trunk where weights would have to be fetched, built once."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        names = ("lpips-alex", "lpips-squeeze", "st-lpips-alex", "efficientnet-lite0", "ms-ssim", "l2")
        return {name: perceptual.build_distance(name, 3, CPU, random_trunk=True) for name in names}


def images(count=2, channels=3, resolution=32):
    return torch.rand(count, channels, resolution, resolution) * 2 - 1


@pytest.mark.parametrize("backbone", [name for name in BACKBONES if not name.endswith("vgg")])
@pytest.mark.parametrize("channels, resolution", [(3, 32), (1, 16), (4, 48)])
def test_distance_zero_for_equal_images(distances, backbone, channels, resolution):
    distance = distances[backbone]
    a, b = images(2, channels, resolution), images(2, channels, resolution).requires_grad_()
    assert torch.equal(distance(a, a.clone()), torch.zeros(2))
    values = distance(b, a)
    assert values.shape == (2,) and (values > 0).all()
    (gradient,) = torch.autograd.grad(values.sum(), b)
    assert torch.isfinite(gradient).all()
    assert all(gradient[:, channel].abs().max() > 0 for channel in range(channels))


def test_lpips_agrees_with_package():
    import lpips

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.manual_seed(5)
        package = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    torch.manual_seed(5)
    ours = perceptual.build_distance("lpips-vgg", 3, CPU, random_trunk=True)
    a, b = images(), images()
    with torch.no_grad():
        assert_close(ours(a, b), package(a, b).flatten(), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("trunk", ["alex", "vgg"])
def test_st_lpips_agrees_with_package(trunk, monkeypatch):
    for name in ("IPython", "torchsummary"):  # imported by the package, which uses neither
        unused = types.SimpleNamespace(embed=None, summary=None)
        monkeypatch.setitem(sys.modules, name, unused)
    package = pytest.importorskip("stlpips_pytorch.stlpips")
    theirs = package.LPIPS(net=trunk, variant="shift_tolerant", verbose=False)
    ours = perceptual.build_distance(f"st-lpips-{trunk}", 3, CPU)
    for resolution in (32, 64):
        a, b = images(resolution=resolution), images(resolution=resolution)
        with torch.no_grad():
            assert_close(ours(a, b), theirs(a, b).flatten(), 1e-4)
            assert torch.equal(ours(a, a.clone()), torch.zeros(2))


def gradient(distance, a, b):
    """The distances of two batches, and their gradient to the first."""
    a = a.detach().requires_grad_()
    values = distance(a, b)
    return values.detach(), torch.autograd.grad(values.sum(), a)[0]


@pytest.mark.parametrize(
    ("backbone", "joined"), [("lpips-vgg", 13), ("lpips-alex", 5), ("lpips-squeeze", 1), ("st-lpips-alex", 4)]
)
def test_join_relus_keeps_distances(backbone, joined, monkeypatch):
    networks = []
    monkeypatch.setattr(perceptual, "fast_on_cuda", lambda network, _: networks.append(network) or network)
    distance = perceptual.build_distance(backbone, 3, CPU, random_trunk=True)
    a, b = images(), images()
    before = gradient(distance, a, b)
    perceptual.join_relus(networks[0])
    assert sum(isinstance(layer, perceptual.ConvReLU) for layer in networks[0].modules()) == joined
    for value, expected in zip(gradient(distance, a, b), before, strict=True):
        assert_close(value, expected, SAME_F32)
    assert torch.equal(distance(a, a.clone()), torch.zeros(2))


@pytest.mark.gpu
@pytest.mark.parametrize("backbone", [name for name in BACKBONES if name not in ("l2", "ms-ssim")])
def test_distance_on_a_gpu_is_that_of_the_cpu(backbone):
    if backbone.startswith("st-"):
        pytest.importorskip("stlpips_pytorch")
    a, b = images(), images()
    found = []
    for device in (CPU, torch.device("cuda")):
        torch.manual_seed(1)
        distance = perceptual.build_distance(backbone, 3, device, random_trunk=True)
        there = a.to(device)
        with float32_math():
            values, grad = gradient(distance, there, b.to(device))
            assert not any(value.any() for value in gradient(distance, there, there.clone()))
            assert_close(distance(there, b.to(device)), values, SAME_F32)  # without gradients
        found.append((values.cpu(), grad.cpu()))
    if not backbone.startswith("st-"):  # whose blurs choose their layout
        maps = distance.distance.stages(perceptual._as_rgb(there))
        assert all(unit_distance._has_kernels(x, x, None) for x in maps)
    (expected, exact), (values, grad) = found
    assert_close(values, expected, NETWORK_F32)
    # A ReLU whose sign is a matter of rounding changes the gradient of the few pixels that it sees.
    assert (grad - exact).norm() < 1e-2 * exact.norm()


def reference_ms_ssim(a, b, window, scales):
    """MS-SSIM of one channel `[H, W]` in [0, 1] in float64, the means of windows by scipy."""
    taps = torch.exp(-((torch.arange(window) - window // 2).double() ** 2) / 4.5)
    taps, cut = (taps / taps.sum()).numpy(), slice(window // 2, -(window // 2))

    def mean(x):
        for axis in (0, 1):
            x = scipy.ndimage.correlate1d(x, taps, axis=axis)
        return x[cut, cut]

    weights, result = [0.0448, 0.2856, 0.3001, 0.2363, 0.1333][:scales], 1.0
    for scale, weight in enumerate(weights):
        ma, mb = mean(a), mean(b)
        value = (2 * (mean(a * b) - ma * mb) + 9e-4) / (mean(a * a) - ma**2 + mean(b * b) - mb**2 + 9e-4)
        if scale == scales - 1:
            value = value * (2 * ma * mb + 1e-4) / (ma**2 + mb**2 + 1e-4)
        result *= value.mean() ** (weight / sum(weights))
        a, b = ((x[::2, ::2] + x[1::2, ::2] + x[::2, 1::2] + x[1::2, 1::2]) / 4 for x in (a, b))
    return result


@pytest.mark.parametrize("resolution, window, scales", [(32, 7, 3), (64, 7, 4), (128, 7, 5), (256, 11, 5)])
def test_ms_ssim_values(distances, resolution, window, scales):
    distance = distances["ms-ssim"]
    smooth = torch.nn.functional.interpolate(images(1, 2, 8), size=(resolution, resolution), mode="bicubic")
    a, b = smooth, smooth + 0.2 * torch.randn_like(smooth)
    pairs = zip((a[0].double().numpy() + 1) / 2, (b[0].double().numpy() + 1) / 2, strict=True)
    expected = 1 - sum(reference_ms_ssim(*pair, window, scales) for pair in pairs) / 2
    assert distance(a, b).item() == pytest.approx(expected, rel=1e-4)
    assert distance(a, a.clone()).item() == 0


def test_ms_ssim_inverted_image_has_finite_gradient(distances):
    a, b = images(), images().requires_grad_()
    (gradient,) = torch.autograd.grad(distances["ms-ssim"](-b, b).sum() + distances["ms-ssim"](a, b).sum(), b)
    assert torch.isfinite(gradient).all()


def test_distance_gradient_finite_for_zero_features():
    distance = perceptual.FeatureDistance(lambda img: [img])
    values, grad = gradient(distance, torch.zeros(2, 3, 32, 32), images())
    assert_close(values, torch.ones(2), SAME_F32)
    assert torch.isfinite(grad).all()


def test_feature_distance_formula():
    distance = perceptual.FeatureDistance(lambda img: [img[:, :2]], [torch.tensor([2.0, 3.0])])
    a, b = images(), images()
    unit_a, unit_b = (x[:, :2] / x[:, :2].norm(dim=1, keepdim=True) for x in (a, b))
    expected = ((unit_a - unit_b) ** 2 * torch.tensor([2.0, 3.0]).reshape(1, 2, 1, 1)).sum(1).mean([1, 2])
    assert_close(distance(a, b), expected, 1e-5)


def test_distance_alpha_by_absolute_difference():
    distance = perceptual.FeatureDistance(lambda img: [img * 0])
    a, b = images(channels=4), images(channels=4)
    assert_close(distance(a, b), (a[:, 3] - b[:, 3]).abs().mean([1, 2]), 1e-6)


def test_small_images_are_enlarged_as_torch_does():
    img = images(resolution=16)[:, :, :, :12]
    expected = F.interpolate(img[:, :3], size=[42, 32], mode="bilinear")
    assert_close(perceptual._as_rgb(img), expected, 1e-6)


def test_distance_repeats_gray(distances):
    distance = distances["lpips-squeeze"]
    a, b = images(channels=1), images(channels=1)
    assert torch.equal(distance(a, b), distance(a.repeat(1, 3, 1, 1), b.repeat(1, 3, 1, 1)))


@pytest.mark.parametrize(
    "img, message",
    [
        (torch.randint(0, 256, [2, 3, 8, 8], dtype=torch.uint8), "torch.uint8"),
        (torch.rand(2, 3, 8, 8) * 255, "0 to 255"),
        (torch.rand(2, 3, 8, 8), r"range 0 to 1"),
    ],
)
def test_distance_refuses_other_range(img, message):
    distance = perceptual.build_distance("l2", 3, CPU)
    with pytest.raises(ConfigError, match=message):
        distance(images(resolution=8), img)


def test_distance_accepts_overshoot():
    distance = perceptual.build_distance("l2", 3, CPU)
    a, b = images(resolution=8) * 1.7, images(resolution=8)
    assert_close(distance(a, b), (a - b).square().mean([1, 2, 3]), 1e-6)


def test_distance_refuses_other_channels():
    with pytest.raises(ConfigError, match="2-channel"):
        perceptual.build_distance("lpips-vgg", 2, CPU)


@pytest.mark.parametrize("backbone", ["lpips-vgg", "lpips-alex", "lpips-squeeze"])
def test_ensure_weights_missing_file_message(backbone, monkeypatch, tmp_path):
    monkeypatch.setenv("FINETUNE_OFFLINE", "1")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(WeightsMissing) as caught:
        perceptual.ensure_weights(backbone)
    message = str(caught.value)
    assert perceptual.WEIGHTS[backbone][0] in message and str(tmp_path / "checkpoints") in message
    assert "efficientnet-lite0" in message and "l2" in message


def test_ensure_weights_refuses_damaged_file(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    name = perceptual.WEIGHTS["lpips-alex"][0]
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / name).write_bytes(b"not the weights")
    with pytest.raises(FinetuneError, match=name):
        perceptual.ensure_weights("lpips-alex")


def test_ensure_weights_backbones_without_file():
    assert perceptual.ensure_weights("l2") is None
    assert perceptual.ensure_weights("efficientnet-lite0") is None
    assert perceptual.ensure_weights("st-lpips-alex") is None
    assert perceptual.ensure_weights("ms-ssim") is None
