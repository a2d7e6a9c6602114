"""StyleGAN2's networks beyond the golden numbers: equal paths, wiring, state, and errors."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from tolerances import CONV_F16, NETWORK_F16, NETWORK_F32, SAME_F32, SAME_F64, assert_close

from finetune.models import stylegan2
from torch_utils.ops import upfirdn2d

SMALL = {"channel_base": 128, "channel_max": 8}


def generator(img_resolution=16, c_dim=0, **options):
    return stylegan2.Generator(8, c_dim, 8, img_resolution, 3, **{**SMALL, **options})


def discriminator(img_resolution=16, c_dim=0, **options):
    return stylegan2.Discriminator(c_dim, img_resolution, 3, **{**SMALL, **options})


# Modulated convolution


@pytest.mark.parametrize("demodulate", [True, False])
@pytest.mark.parametrize("up", [1, 2])
def test_stylegan2_fused_and_unfused_agree_in_every_derivative(up, demodulate):
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    styles = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    noise = torch.randn(3, 1, 5 * up, 5 * up, dtype=torch.float64)
    along = torch.randn(3, 6, 5 * up, 5 * up, dtype=torch.float64)
    inputs = [x, weight, styles]

    def derivatives(fused):
        y = stylegan2.modulated_conv2d(
            x,
            weight,
            styles,
            noise,
            up=up,
            resample_filter=upfirdn2d.setup_filter([1, 3, 3, 1]),
            demodulate=demodulate,
            fused=fused,
        )
        first = torch.autograd.grad((y * along).sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
        return [y, *first, *second]

    for one, other in zip(derivatives(True), derivatives(False)):
        assert_close(one, other, SAME_F64)


@pytest.mark.parametrize("kernel", [1, 3])
def test_stylegan2_pointwise_fuses_convolutions_of_single_pixels_alone(kernel):
    x, weight, styles = torch.randn(2, 3, 5, 5), torch.randn(4, 3, kernel, kernel), torch.randn(2, 3)
    actual = stylegan2.modulated_conv2d(x, weight, styles, fused="pointwise")
    assert torch.equal(actual, stylegan2.modulated_conv2d(x, weight, styles, fused=kernel == 1))


@pytest.mark.parametrize("fused", [True, False])
def test_stylegan2_modulated_convolution_follows_its_equations(fused):
    """One sample at a time, with the weights of equations 1 and 3 written out."""
    x, weight, styles = torch.randn(2, 3, 4, 4), torch.randn(5, 3, 3, 3), torch.randn(2, 3)
    actual = stylegan2.modulated_conv2d(x, weight, styles, fused=fused)
    for sample in range(2):
        modulated = weight * styles[sample].reshape(1, 3, 1, 1)
        modulated = modulated / (modulated.square().sum(dim=[1, 2, 3], keepdim=True) + 1e-8).sqrt()
        expected = torch.nn.functional.conv2d(x[sample : sample + 1], modulated, padding=1)
        assert_close(actual[sample : sample + 1], expected, SAME_F32)


@pytest.mark.parametrize("fused", [True, False])
def test_stylegan2_float16_does_not_overflow(fused):
    """Weights and styles whose product is far above float16's largest number still give the right result."""
    x, weight, styles = torch.randn(2, 8, 6, 6), torch.randn(4, 8, 3, 3) * 1e4, torch.randn(2, 8) * 1e3
    expected = stylegan2.modulated_conv2d(x, weight, styles, fused=fused)
    actual = stylegan2.modulated_conv2d(x.half(), weight, styles, fused=fused)
    assert actual.dtype == torch.float16
    assert_close(actual.float(), expected, CONV_F16)


@pytest.mark.parametrize("fused", [True, False])
def test_stylegan2_empty_batch(fused):
    G = generator()
    img = G(torch.zeros(0, 8), None, fused_modconv=fused)
    assert img.shape == (0, 3, 16, 16)
    assert discriminator()(img, None).shape == (0, 1)


# Structure


@pytest.mark.parametrize(
    "architecture, torgb, num_ws", [("skip", [4, 8, 16], 6), ("orig", [16], 6), ("resnet", [16], 6)]
)
def test_stylegan2_layers_of_the_generator(architecture, torgb, num_ws):
    G = generator(architecture=architecture)
    names = dict(G.named_modules())
    assert [r for r in (4, 8, 16) if f"synthesis.b{r}.torgb" in names] == torgb
    assert ("synthesis.b8.skip" in names) == (architecture == "resnet")
    assert "synthesis.b4.conv0" not in names and "synthesis.b4.skip" not in names
    assert G.num_ws == G.synthesis.num_ws == G.mapping.num_ws == num_ws
    assert G.synthesis.block_resolutions == [4, 8, 16]


def test_stylegan2_channels_follow_the_base_and_the_limit():
    G = generator(64, channel_base=512, channel_max=32)
    shapes = {r: list(getattr(G.synthesis, f"b{r}").conv1.weight.shape) for r in (4, 16, 32, 64)}
    assert shapes == {4: [32, 32, 3, 3], 16: [32, 32, 3, 3], 32: [16, 16, 3, 3], 64: [8, 8, 3, 3]}


@pytest.mark.parametrize("num_fp16_res, expected", [(0, []), (1, [32]), (2, [16, 32]), (9, [8, 16, 32])])
def test_stylegan2_blocks_in_half_precision(num_fp16_res, expected):
    G, D = generator(32, num_fp16_res=num_fp16_res), discriminator(32, num_fp16_res=num_fp16_res)
    assert [r for r in (4, 8, 16, 32) if getattr(G.synthesis, f"b{r}").use_fp16] == expected
    assert [r for r in (8, 16, 32) if getattr(D, f"b{r}").use_fp16] == expected


@pytest.mark.parametrize("architecture", ["skip", "orig", "resnet"])
def test_stylegan2_every_parameter_takes_part(architecture):
    G, D = generator(c_dim=2, architecture=architecture), discriminator(c_dim=2, architecture=architecture)
    c = torch.eye(2).repeat(2, 1)
    logits = D(G(torch.randn(4, 8), c), c)
    assert logits.shape == (4, 1) and logits.dtype == torch.float32
    logits.square().sum().backward()
    for name, parameter in [*G.named_parameters(), *D.named_parameters()]:
        assert parameter.grad is not None and parameter.grad.any(), name


def test_stylegan2_residual_branches_of_the_generator_keep_the_variance():
    """Both branches are scaled by sqrt(0.5); leaky ReLU commutes with a positive factor."""
    block = generator(architecture="resnet", conv_clamp=None).synthesis.b8
    x, ws = torch.randn(2, 8, 4, 4), torch.randn(2, 2, 8)
    actual, img = block(x, None, ws, noise_mode="none")
    main = block.conv1(block.conv0(x, ws[:, 0], noise_mode="none"), ws[:, 1], noise_mode="none")
    assert_close(actual, (main + block.skip(x)) * math.sqrt(0.5), SAME_F32)
    assert img is None


def test_stylegan2_residual_branches_of_the_discriminator_keep_the_variance():
    block = discriminator(architecture="resnet", conv_clamp=None).b8
    x = torch.randn(2, 8, 8, 8)
    actual, _ = block(x, None)
    assert_close(actual, (block.conv1(block.conv0(x)) + block.skip(x)) * math.sqrt(0.5), SAME_F32)


def test_stylegan2_skip_discriminator_reads_the_image_at_every_scale():
    """With all features of the first block silenced, what is left comes from the image made smaller."""
    D = discriminator(architecture="skip")
    img = torch.randn(2, 3, 16, 16)
    x, smaller = D.b16(None, img)
    assert_close(smaller, upfirdn2d.downsample2d(img, D.b16.resample_filter), SAME_F32)
    features, _ = D.b8(torch.zeros_like(x), smaller)
    assert_close(features, D.b8.conv1(D.b8.conv0(D.b8.fromrgb(smaller))), SAME_F32)


def test_stylegan2_torgb_shares_its_row_with_the_next_block():
    """Changing a row of ws changes the blocks that read it, and no earlier image."""
    G = generator().eval()
    ws = torch.randn(1, 6, 8)

    def outputs(ws):
        x4, img4 = G.synthesis.b4(None, None, ws[:, 0:2], noise_mode="none")
        x8, img8 = G.synthesis.b8(x4, img4, ws[:, 1:4], noise_mode="none")
        return G.synthesis.b16(x8, img8, ws[:, 3:6], noise_mode="none")[1]

    assert torch.equal(G.synthesis(ws, noise_mode="none"), outputs(ws))


# Start values


def test_stylegan2_initial_values():
    G = stylegan2.Generator(64, 0, 64, 8, 3, channel_base=512, channel_max=64)
    layer = G.synthesis.b8.conv1
    for tensor in (layer.weight, layer.affine.weight, layer.noise_const, G.synthesis.b4.const):
        count = tensor.numel()
        assert abs(tensor.mean()) < 5 / count**0.5 and abs(tensor.std() - 1) < 5 / (2 * count) ** 0.5
    assert layer.noise_strength.shape == () and layer.noise_strength == 0
    assert torch.equal(layer.affine.bias, torch.ones(64)) and not layer.bias.any()
    assert abs(G.mapping.fc0.weight.std() - 100) < 5  # divided by the learning rate multiplier of 0.01
    assert not G.mapping.fc0.bias.any() and not G.mapping.w_avg.any()


def test_stylegan2_features_start_with_unit_variance():
    """Demodulation: whatever the styles are, the first convolution of a fresh network keeps the scale."""
    x = torch.randn(4, 64, 16, 16)
    for scale in (1e-2, 1e2):
        y = stylegan2.modulated_conv2d(x, torch.randn(64, 64, 3, 3), torch.randn(4, 64) * scale)
        assert abs(y.std() - 1) < 0.1


# Mapping


def test_stylegan2_mapping_normalizes_z():
    G = generator()
    z = torch.randn(4, 8)
    assert_close(G.mapping(7 * z, None), G.mapping(z, None), SAME_F32)


def test_stylegan2_truncation():
    G = generator()
    G.mapping.w_avg.normal_()
    z = torch.randn(4, 8)
    ws, average = G.mapping(z, None), G.mapping.w_avg
    assert torch.equal(G.mapping(z, None, truncation_psi=0), average.expand(4, 6, 8))
    half = G.mapping(z, None, truncation_psi=0.5, truncation_cutoff=2)
    assert_close(half[:, :2], (average + ws[:, :2]) / 2, SAME_F32)
    assert torch.equal(half[:, 2:], ws[:, 2:])
    img = G(z, None, truncation_psi=0.5, truncation_cutoff=2, noise_mode="none")
    assert torch.equal(img, G.synthesis(half, noise_mode="none"))


def test_stylegan2_labels_choose_the_image_and_the_logit():
    G, D = generator(c_dim=3), discriminator(c_dim=3, cmap_dim=5)
    assert list(D.b4.out.weight.shape) == [5, 8]
    classes = torch.eye(3)
    ws = G.mapping(torch.randn(1, 8).repeat(3, 1), classes)
    assert not torch.equal(ws[0], ws[1])
    logits = D(torch.randn(1, 3, 16, 16).repeat(3, 1, 1, 1), classes)
    assert not torch.equal(logits[0], logits[1])
    assert "mapping.w_avg" not in dict(D.named_buffers())


# Modes


def test_stylegan2_train_and_eval_mode_give_the_same_images():
    """A student in train mode and a teacher in eval mode, with one random state and one `fused_modconv`."""
    student = generator(fused_modconv_default="inference_only").train()
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if name.endswith("noise_strength"):
                parameter.fill_(0.5)
    teacher = copy.deepcopy(student).eval().requires_grad_(False)
    z = torch.randn(4, 8)
    for fused in (True, False):
        images = []
        for G in (student, teacher):
            torch.manual_seed(1)
            images.append(G(z, None, fused_modconv=fused))
        assert torch.equal(*images)
        torch.manual_seed(2)
        assert not torch.equal(images[1], teacher(z, None, fused_modconv=fused))


@pytest.mark.parametrize("default, train, evaluate", [(True, True, True), ("inference_only", False, True)])
def test_stylegan2_default_fused_mode(default, train, evaluate):
    block = generator(fused_modconv_default=default).synthesis.b8
    other = torch.device("cuda")
    assert block.train().choose_fused(None, other) is train
    assert block.eval().choose_fused(None, other) is evaluate
    for explicit in (True, False):
        assert block.choose_fused(explicit, other) is explicit
        assert block.choose_fused(explicit, torch.device("cpu")) is explicit
    assert block.choose_fused(None, torch.device("cpu")) is False


@pytest.mark.parametrize("architecture", ["orig", "skip", "resnet"])
def test_stylegan2_features_are_channels_last_on_a_cpu(monkeypatch, architecture):
    G = generator(architecture=architecture)
    D = discriminator(architecture=architecture)
    z = torch.randn(4, 8)

    def results():
        G.zero_grad(set_to_none=True)
        img = G(z, None, noise_mode="const")
        logits = D(img, None)
        logits.sum().backward()
        return [img, logits, *(p.grad for p in G.parameters() if p.grad is not None)]

    x, _ = D.b16(None, G(z, None))
    assert x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    ours = results()
    monkeypatch.setattr(stylegan2, "features_format", lambda *given: torch.contiguous_format)
    for number, (last, planes) in enumerate(zip(ours, results(), strict=True)):
        assert_close(last, planes, NETWORK_F32, str(number))


def test_stylegan2_averages_move_only_when_asked():
    G, D = generator().train(), discriminator().train()
    before = copy.deepcopy(G.state_dict())
    z = torch.randn(4, 8)
    D(G(z, None), None, update_emas=True)
    assert all(torch.equal(value, before[name]) for name, value in G.state_dict().items())
    w = G.mapping(z, None, update_emas=True)[:, 0]
    assert_close(G.mapping.w_avg, w.mean(dim=0) * 0.002, NETWORK_F32)  # 1 - 0.998 has lost digits
    assert not G.mapping.w_avg.requires_grad


@pytest.mark.gpu
def test_stylegan2_half_precision_stays_close_to_single():
    G = generator(32, num_fp16_res=3, fp16_channels_last=True).cuda()
    D = discriminator(32, num_fp16_res=3, block_kwargs={"fp16_channels_last": True}).cuda()
    z = torch.randn(4, 8, device="cuda")
    single = G(z, None, noise_mode="const", force_fp32=True)
    for fused in (True, False):
        half = G(z, None, noise_mode="const", fused_modconv=fused)
        assert half.dtype == torch.float32 and not torch.equal(half, single)
        assert_close(half, single, NETWORK_F16)
    assert_close(D(single, None), D(single, None, force_fp32=True), NETWORK_F16)


# FreezeD

ORDER = ["b16.fromrgb", "b16.conv0", "b16.conv1", "b16.skip", "b8.conv0", "b8.conv1", "b8.skip"]


@pytest.mark.parametrize("freeze_layers", [0, 1, 4, 6, 7, 20])
def test_stylegan2_frozen_layers_are_buffers(freeze_layers):
    plain, frozen = discriminator(), discriminator(block_kwargs={"freeze_layers": freeze_layers})
    trained = {name.rpartition(".")[0] for name, _ in frozen.named_parameters()}
    assert [name for name in ORDER if name not in trained] == ORDER[:freeze_layers]
    assert {"b4.conv", "b4.fc", "b4.out"} <= trained
    # The names stay, so weights of the one fit the other.
    frozen.load_state_dict(plain.state_dict())
    img = torch.randn(4, 3, 16, 16)
    assert torch.equal(frozen(img, None), plain(img, None))


def test_stylegan2_frozen_layers_of_the_skip_architecture():
    frozen = discriminator(architecture="skip", block_kwargs={"freeze_layers": 4})
    trained = {name.rpartition(".")[0] for name, _ in frozen.named_parameters()}
    order = ["b16.fromrgb", "b16.conv0", "b16.conv1", "b8.fromrgb", "b8.conv0", "b8.conv1"]
    assert [name for name in order if name not in trained] == order[:4]


# Batch standard deviation


def test_stylegan2_minibatch_std_compares_within_groups():
    """Sample i belongs to group i modulo the number of groups."""
    x = torch.randn(6, 4, 2, 2)
    y = stylegan2.MinibatchStd(group_size=3, num_channels=2)(x)
    assert y.shape == (6, 6, 2, 2)
    assert torch.equal(y[:, :4], x)
    for group in (0, 1):
        members = x[group::2].reshape(3, 2, 2, 2, 2)
        deviation = (members.var(dim=0, unbiased=False) + 1e-8).sqrt().mean(dim=[1, 2, 3])
        for sample in range(group, 6, 2):
            assert_close(y[sample, 4:], deviation.reshape(2, 1, 1).expand(2, 2, 2), SAME_F32)


def test_stylegan2_minibatch_std_of_small_and_uneven_batches():
    layer = stylegan2.MinibatchStd(group_size=4)
    assert_close(layer(torch.randn(1, 3, 2, 2))[:, 3:], torch.full([1, 1, 2, 2], 1e-4), SAME_F32)
    assert layer(torch.randn(3, 3, 2, 2)).shape == (3, 4, 2, 2)
    with pytest.raises(ValueError, match=r"groups of 4, and a batch of 6 .* multiple of 4"):
        layer(torch.randn(6, 3, 2, 2))
    assert stylegan2.MinibatchStd(group_size=None)(torch.randn(6, 3, 2, 2)).shape == (6, 4, 2, 2)


# State


def test_stylegan2_pickles_keep_weights_arguments_and_images():
    G = stylegan2.Generator(
        8, 0, 8, img_resolution=16, img_channels=3, mapping_kwargs={"num_layers": 2}, **SMALL
    )
    z = torch.randn(2, 8)
    for twin in (copy.deepcopy(G), pickle.loads(pickle.dumps(G))):
        assert torch.equal(twin(z, None, noise_mode="const"), G(z, None, noise_mode="const"))
        assert twin.init_args == (8, 0, 8)
        assert twin.init_kwargs["mapping_kwargs"] == {"num_layers": 2}
        rebuilt = type(twin)(*twin.init_args, **twin.init_kwargs)
        assert {k: v.shape for k, v in rebuilt.state_dict().items()} == {
            k: v.shape for k, v in G.state_dict().items()
        }


def test_stylegan2_attributes_are_plain():
    """Numpy scalars or tensors among the attributes would end up in the pickle."""
    plain = (type(None), bool, int, float, str, list, tuple, dict)
    for network in (generator(c_dim=2, architecture="resnet"), discriminator(c_dim=2)):
        for name, module in network.named_modules():
            for key, value in vars(module).items():
                if not key.startswith("_"):
                    assert type(value) in plain, f"{name}.{key}: {type(value)}"


def test_stylegan2_nested_synthesis_options_mean_the_same():
    """Checkpoints of the first PyTorch generation nest what later ones spread."""
    nested = stylegan2.Generator(8, 0, 8, 16, 3, synthesis_kwargs={**SMALL, "architecture": "orig"})
    spread = generator(architecture="orig")
    assert {k: v.shape for k, v in nested.state_dict().items()} == {
        k: v.shape for k, v in spread.state_dict().items()
    }


def test_stylegan2_networks_without_noise():
    G = generator(use_noise=False)
    assert not any("noise" in name for name in G.state_dict())
    z = torch.randn(2, 8)
    assert torch.equal(G(z, None, noise_mode="random"), G(z, None, noise_mode="none"))


# Errors


@pytest.mark.parametrize("resolution", [2, 24, 0])
def test_stylegan2_refused_resolutions(resolution):
    for build in (generator, discriminator):
        with pytest.raises(ValueError, match=f"power of two and at least 4, got {resolution}"):
            build(resolution)


def test_stylegan2_refused_options():
    for build in (generator, discriminator):
        with pytest.raises(ValueError, match="'orig', 'skip' or 'resnet', got 'unet'"):
            build(architecture="unet")
    with pytest.raises(ValueError, match=r"noise_mode must be .* got 'noisy'"):
        generator()(torch.randn(1, 8), None, noise_mode="noisy")
    with pytest.raises(TypeError, match="noise_mod"):
        generator()(torch.randn(1, 8), None, noise_mod="const")
    with pytest.raises(AssertionError):
        discriminator()(torch.randn(1, 3, 8, 8), None)
