"""Surgery on checkpoints: what a network of another shape still computes, and what is said about it."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from tolerances import NETWORK_F32, assert_close

import finetune
from finetune.checkpoint.surgery import TargetShape, operate
from finetune.errors import ConfigError

CHANNEL_CASES = [("stylegan2-32", 1), ("stylegan2-32", 4), ("stylegan3-t-32", 1), ("stylegan3-r-32", 4)]


@pytest.fixture(scope="module")
def load(golden_dir):
    loaded = {}

    def once(name):
        if name not in loaded:
            loaded[name] = finetune.load(golden_dir / f"{name}.pkl")
        return loaded[name]

    return once


def latents(G, count=8):
    return torch.randn(count, G.z_dim, generator=torch.Generator().manual_seed(0))


def labels(c_dim, count=8, classes=None):
    return torch.eye(c_dim)[torch.arange(count) % (classes or c_dim)] if c_dim else torch.zeros(count, 0)


def images(G, c):
    return G(latents(G, len(c)), c, noise_mode="const")


def plain_colors():
    return torch.rand(8, 3, 1, 1, generator=torch.Generator().manual_seed(1)) * 2 - 1


def told(operations, name):
    return next(operation for operation in operations if operation.network == name)


@pytest.mark.parametrize("name, channels", CHANNEL_CASES)
def test_operate_channels_convert_image(load, name, channels):
    checkpoint = load(name)
    c = labels(checkpoint.best.c_dim)
    before = images(checkpoint.G_ema, c)
    after, operations = operate(checkpoint, TargetShape(channels=channels, new_d=checkpoint.D is None))
    img = images(after.G_ema, c)
    assert_close(
        img[:, :3] if channels == 4 else img, before if channels == 4 else before.mean(1, True), NETWORK_F32
    )
    if channels == 4:
        assert_close(img[:, 3:], torch.ones_like(img[:, 3:]), NETWORK_F32)
    gray = before.mean(1, True)
    seen, known = (img, before) if channels == 4 else (gray, gray.expand(-1, 3, -1, -1))
    if checkpoint.D is not None:
        assert_close(after.D(seen, c), checkpoint.D(known, c), NETWORK_F32)
    assert f"converted from 3 to {channels} channels" in "\n".join(told(operations, "G_ema").lines())


def test_operate_channels_round_trip(load):
    checkpoint = load("stylegan2-32")
    c = labels(0)
    for through in (1, 4):
        there, _ = operate(checkpoint, TargetShape(channels=through))
        back, _ = operate(there, TargetShape(channels=3))
        before, img = (images(each.G_ema, c) for each in (checkpoint, back))
        gray = before.mean(1, True).expand_as(before)
        assert_close(img, before if through == 4 else gray, NETWORK_F32)
        assert_close(back.D(gray, c), checkpoint.D(gray, c), NETWORK_F32)


def test_operate_extend_keeps_old_classes(load):
    checkpoint = load("stylegan2-64-cond")
    old = checkpoint.best.c_dim
    after, operations = operate(checkpoint, TargetShape(c_dim=old + 2, classes="extend"))
    c = labels(old + 2, classes=old)
    before = images(checkpoint.G_ema, c[:, :old])
    assert_close(images(after.G_ema, c), before, NETWORK_F32)
    assert_close(after.D(before, c), checkpoint.D(before, c[:, :old]), NETWORK_F32)
    report = "\n".join(told(operations, "G").lines())
    assert f"{old} of {old} classes kept, 2 initialized to their average" in report
    # A new class differs from the old ones.
    new = torch.zeros(8, old + 2)
    new[:, old] = 1
    assert (images(after.G_ema, new) - before).abs().max() > 0.1


def test_operate_keep_first_classes(load):
    checkpoint = load("stylegan2-64-cond")
    after, _ = operate(checkpoint, TargetShape(c_dim=2, classes="keep"))
    c = labels(checkpoint.best.c_dim, classes=2)
    before = images(checkpoint.G_ema, c)
    assert_close(images(after.G_ema, c[:, :2]), before, NETWORK_F32)
    assert_close(after.D(before, c[:, :2]), checkpoint.D(before, c), NETWORK_F32)


@pytest.mark.parametrize(
    "stated, names, classes, kept, words",
    [
        ("abcde", "edcba", "keep", [4, 3, 2, 1, 0], "classes by name: changed mapping.embed: 5 of 5"),
        ("abcde", "bd", "keep", [1, 3], "classes 5 → 2: changed mapping.embed: 2 of 5 classes kept"),
        ("abcde", "abxde", "extend", [0, 1, None, 3, 4], "4 of 5 classes kept, 1 initialized to their"),
        ("abcde", "Aabcde", "extend", [None, 0, 1, 2, 3, 4], "5 of 5 classes kept, 1 initialized to"),
        ("abc", "bcade", "keep", [1, 2, 0, 3, 4], "5 of 5 classes kept"),  # names of the others are not known
        ("", "edc", "keep", [0, 1, 2], "3 of 5 classes kept"),
        ("abcde", "", "keep", [0, 1, 2], "3 of 5 classes kept"),
    ],
)
def test_operate_keeps_classes_by_name(load, stated, names, classes, kept, words):
    checkpoint = dataclasses.replace(
        load("stylegan2-64-cond"), training_set_kwargs={"labels": "classes", "classes": list(stated)}
    )
    wanted = TargetShape(c_dim=len(kept), classes=classes, class_names=tuple(names))
    after, operations = operate(checkpoint, wanted)
    numbers = [(new, old) for new, old in enumerate(kept) if old is not None] * 4
    c_new, c_old = (torch.eye(size)[list(each[:8])] for size, each in zip((len(kept), 5), zip(*numbers)))
    before = images(checkpoint.G_ema, c_old)
    assert_close(images(after.G_ema, c_new), before, NETWORK_F32)
    assert_close(after.D(before, c_new), checkpoint.D(before, c_old), NETWORK_F32)
    assert words in "\n".join(told(operations, "D").lines())


def test_operate_equal_classes_change_nothing(load):
    stated = {"labels": "classes", "classes": list("abcde")}
    checkpoint = dataclasses.replace(load("stylegan2-64-cond"), training_set_kwargs=stated)
    assert operate(checkpoint, TargetShape(classes="keep", class_names=tuple("abcde")))[1] == []


def test_operate_fresh_changes_embeddings_only(load):
    checkpoint = load("stylegan2-64-cond")
    after, operations = operate(checkpoint, TargetShape(classes="fresh"))
    for name in ("G", "G_ema", "D"):
        old, new = getattr(checkpoint, name).state_dict(), getattr(after, name).state_dict()
        changed = {key for key in new if not torch.equal(new[key], old[key])}
        assert changed == {"mapping.embed.weight", "mapping.embed.bias"}
        assert (
            told(operations, name).lines()[-1]
            == f"{name}, fresh classes: initialized at random: mapping.embed"
        )
    assert torch.equal(after.G.mapping.embed.weight, after.G_ema.mapping.embed.weight)


def test_operate_new_classes_are_ignored_initially(load):
    checkpoint = load("stylegan2-32")
    after, _ = operate(checkpoint, TargetShape(c_dim=4))
    c = labels(4)
    before = images(checkpoint.G_ema, labels(0))
    assert_close(images(after.G_ema, c), before, NETWORK_F32)
    scores = checkpoint.D(before, labels(0))
    assert (after.D(before, c) - scores).abs().max() < 0.1 * scores.abs().max()
    # And can learn them: every part that reads labels gets a gradient.
    after.D.requires_grad_(True)
    torch.nn.functional.softplus(after.D(before, c)).mean().backward()
    assert all(p.grad.abs().max() > 0 for key, p in after.D.named_parameters() if "mapping" in key)


def test_operate_no_classes_scores_average(load):
    checkpoint = load("stylegan2-64-cond")
    old = checkpoint.best.c_dim
    after, _ = operate(checkpoint, TargetShape(c_dim=0))
    before = images(checkpoint.G_ema, labels(old))
    every = [checkpoint.D(before, torch.eye(old)[[k] * len(before)]) for k in range(old)]
    assert_close(after.D(before, labels(0)), torch.stack(every).mean(0), NETWORK_F32)
    # The generator's average label went into a bias: exact for a linear layer, which the first one is.
    mapping, new = checkpoint.G_ema.mapping, after.G_ema.mapping
    z = latents(checkpoint.best)
    inputs = [
        torch.cat([_unit(z), _unit(mapping.embed(torch.eye(old)[[k] * len(z)]))], dim=1) for k in range(old)
    ]
    before = torch.stack([_linear(mapping.fc0, x) for x in inputs]).mean(0)
    assert_close(_linear(new.fc0, _unit(z)), before, NETWORK_F32)


def _unit(x):
    return x * (x.square().mean(dim=1, keepdim=True) + 1e-8).rsqrt()


def _linear(layer, x):
    return F.linear(x, layer.weight * layer.weight_gain, layer.bias * layer.bias_gain)


@pytest.mark.parametrize("name", ["stylegan2-32", "stylegan2-ada-32"])
def test_operate_doubled_resolution_keeps_function(load, name):
    checkpoint = load(name)
    c = labels(checkpoint.best.c_dim)
    before = images(checkpoint.G_ema, c)
    after, operations = operate(checkpoint, TargetShape(resolution=64))
    img = images(after.G_ema, c)
    assert img.shape[-1] == 64 and after.G_ema.num_ws == checkpoint.G_ema.num_ws + 2
    enlarged = F.interpolate(before, scale_factor=2, mode="bilinear", align_corners=False)
    assert (img - enlarged).abs().mean() < 0.05 * before.abs().mean()
    scores = checkpoint.D(before, c)
    # The fit on plain colors carries over to images, even to these noisy ones.
    both = torch.cat([after.D(img, c), scores], dim=1)
    assert torch.corrcoef(both.t())[0, 1] > 0.85
    assert (both[:, 0] - both[:, 1]).abs().mean() < scores.std()
    drawn = told(operations, "D").initialized
    assert drawn and all(key.startswith("b64.conv0") for key in drawn)
    after.D.requires_grad_(True)
    after.D(img, c).sum().backward()
    assert all(
        p.grad.abs().max() > 0 for key, p in after.D.named_parameters() if key.startswith("b64.conv1.w")
    )


def test_operate_halved_resolution_keeps_intermediate_image(load):
    checkpoint = load("stylegan2-32")
    c = labels(0)
    after, _ = operate(checkpoint, TargetShape(resolution=16))
    img = images(after.G_ema, c)
    way = {}
    handle = checkpoint.G_ema.synthesis.b16.register_forward_hook(lambda m, i, o: way.update(img=o[1]))
    images(checkpoint.G_ema, c)
    handle.remove()
    assert_close(img, way["img"], NETWORK_F32)
    # Plain colors score as before; edges need not.
    plain = plain_colors()
    old, new = (
        D(plain.expand(-1, -1, size, size).contiguous(), c) for D, size in ((checkpoint.D, 32), (after.D, 16))
    )
    assert (new - old).abs().mean() < 0.5 * old.std()


@pytest.mark.parametrize("name", ["stylegan2-32", "stylegan3-t-32", "stylegan3-r-32"])
def test_operate_new_d_has_published_size(load, name):
    checkpoint = load(name)
    after, operations = operate(checkpoint, TargetShape(new_d=True))
    assert {operation.network for operation in operations} == {"D"}
    settings = {**checkpoint.best.init_kwargs, **(checkpoint.best.init_kwargs.get("synthesis_kwargs") or {})}
    half = 2 if name == "stylegan3-r-32" else 1
    assert after.D.init_kwargs["channel_max"] == settings["channel_max"] // half
    c = labels(checkpoint.best.c_dim)
    assert after.D(images(after.G_ema, c), c).shape == (8, 1)


def test_operate_is_reproducible_and_leaves_original(load):
    checkpoint = load("stylegan2-64-cond")
    original = {key: value.clone() for key, value in checkpoint.D.state_dict().items()}
    torch.manual_seed(3)
    first, _ = operate(checkpoint, TargetShape(c_dim=7, classes="extend", channels=4, resolution=128), seed=5)
    torch.manual_seed(4)
    second, _ = operate(
        checkpoint, TargetShape(c_dim=7, classes="extend", channels=4, resolution=128), seed=5
    )
    for name in ("G", "D", "G_ema"):
        states = [getattr(each, name).state_dict() for each in (first, second)]
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert all(torch.equal(checkpoint.D.state_dict()[key], value) for key, value in original.items())
    c = labels(7)
    assert first.D(images(first.G_ema, c), c).shape == (8, 1)


@pytest.mark.parametrize(
    "name, wanted, words",
    [
        ("stylegan3-t-32", {"resolution": 64}, "--resolution 64: the layers of StyleGAN3"),
        ("stylegan2-32", {"resolution": 48}, "--resolution 48: must be a power of two"),
        ("stylegan2-32", {"channels": 2}, "--channels 2"),
        ("stylegan2-64-cond", {"c_dim": 50, "classes": "keep"}, "--classes keep: .* Use extend or fresh"),
        ("stylegan2-64-cond", {"c_dim": 2, "classes": "extend"}, "--classes extend: .* Use keep or fresh"),
    ],
)
def test_operate_refuses_impossible_shapes(load, name, wanted, words):
    with pytest.raises(ConfigError, match=words):
        operate(load(name), TargetShape(**wanted))
