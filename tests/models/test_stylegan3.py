"""StyleGAN3's generator beyond the golden numbers: filters, layer plans, equivariance, state, and errors."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import scipy.signal
import scipy.special
import torch
from tolerances import CONV_F16, NETWORK_F16, NETWORK_F32, SAME_F32, SAME_F64, assert_close

import finetune
from finetune.models import stylegan3

SMALL = {"channel_base": 256, "channel_max": 12, "num_layers": 6}
ROTATION = {"conv_kernel": 1, "use_radial_filters": True}


def generator(img_resolution=16, c_dim=0, **options):
    return stylegan3.Generator(8, c_dim, 8, img_resolution, 3, **{**SMALL, **options})


def layers(G):
    return [getattr(G.synthesis, name) for name in G.synthesis.layer_names]


# Filters


@pytest.mark.parametrize("name", ["stylegan3-t-32", "stylegan3-r-32"])
def test_stylegan3_filters_are_those_of_the_checkpoint(name, golden_dir, golden_network):
    """A network created again has, bit for bit, the filters that the file holds."""
    stored = dict(finetune.load(golden_dir / f"{name}.pkl").G_ema.named_buffers())
    fresh = dict(stylegan3.Generator(**golden_network(name)[0]["generator"]).named_buffers())
    filters = [key for key in stored if key.endswith("_filter")]
    assert len(filters) == 12 and set(stored) == set(fresh)
    for key in filters:
        assert torch.equal(fresh[key], stored[key]), key


@pytest.mark.parametrize("num_taps, cutoff, width", [(12, 2, 12), (24, 9.5, 13), (7, 3, 2), (48, 1.5, 0.1)])
def test_stylegan3_separable_filters_are_firwin(num_taps, cutoff, width):
    """All three branches of the window's shape, even and odd lengths."""
    expected = scipy.signal.firwin(num_taps, cutoff, width=width, fs=64)
    assert_close(stylegan3.design_lowpass(num_taps, cutoff, width, 64), expected.astype(np.float32), SAME_F32)


@pytest.mark.parametrize("num_taps", [12, 7])
def test_stylegan3_radial_filters(num_taps):
    """A jinc under the outer product of the window; symmetric, and an odd one has its limit in the middle."""
    taps = stylegan3.design_lowpass(num_taps, 3, 10, 64, radial=True)
    assert taps.shape == (num_taps, num_taps) and taps.dtype == torch.float32
    assert abs(float(taps.double().sum()) - 1) < 1e-6
    for other in (taps.t(), taps.flip(0), taps.flip(1)):
        assert torch.equal(taps, other)
    x = (np.arange(num_taps) - (num_taps - 1) / 2) / 64
    r = np.maximum(np.hypot(x, x[:, None]), 1e-9)
    window = np.kaiser(num_taps, scipy.signal.kaiser_beta(scipy.signal.kaiser_atten(num_taps, 10 / 32)))
    expected = scipy.special.j1(2 * np.pi * 3 * r) / (np.pi * r) * np.outer(window, window)
    assert_close(taps, (expected / expected.sum()).astype(np.float32), SAME_F32)


def test_stylegan3_bessel_function():
    x = np.linspace(-40, 40, 997)
    np.testing.assert_allclose(stylegan3.bessel_j1(x), scipy.special.j1(x), rtol=0, atol=1e-15)


def test_stylegan3_one_tap_is_no_filter():
    assert stylegan3.design_lowpass(1, 2, 12, 64) is None
    torgb = layers(generator())[-1]
    assert torgb.up_filter is None and torgb.down_filter is None
    assert not any("L6" in name and "filter" in name for name in generator().state_dict())


# Plans

# The layers of the two public resolutions, as their training logs print them.
LAYERS_256 = [
    *(
        "L0_36_512",
        "L1_36_512",
        "L2_36_512",
        "L3_52_512",
        "L4_52_512",
        "L5_84_512",
        "L6_84_512",
        "L7_148_512",
    ),
    *("L8_148_512", "L9_148_362", "L10_276_256", "L11_276_181", "L12_276_128", "L13_256_128", "L14_256_3"),
]
LAYERS_1024 = [
    *("L0_36_512", "L1_36_512", "L2_52_512", "L3_52_512", "L4_84_512", "L5_148_512", "L6_148_512"),
    *("L7_276_323", "L8_276_203", "L9_532_128", "L10_1044_81", "L11_1044_51", "L12_1044_32", "L13_1024_32"),
    "L14_1024_3",
]


@pytest.mark.parametrize("resolution, names, single", [(256, LAYERS_256, 3), (1024, LAYERS_1024, 5)])
def test_stylegan3_layers_of_public_resolutions(resolution, names, single):
    """Sizes and channels, and which layers are too slow for float16."""
    with torch.device("meta"):
        G = stylegan3.Generator(512, 0, 512, resolution, 3)
    assert G.synthesis.layer_names == names
    assert G.num_ws == G.mapping.num_ws == 16 and G.mapping.num_layers == 2
    assert [layer.use_fp16 for layer in layers(G)] == [False] * single + [True] * (15 - single)


def test_stylegan3_configuration_r():
    G = generator(32, **ROTATION)
    assert [layer.down_radial for layer in layers(G)] == [True] * 4 + [False] * 3
    assert [layer.is_critically_sampled for layer in layers(G)] == [False] * 4 + [True] * 3
    assert all(layer.weight.shape[2:] == (1, 1) for layer in layers(G))
    for layer in layers(G)[:4]:
        assert layer.down_filter.ndim == 2 and layer.up_filter.ndim == 1


@pytest.mark.parametrize("options", [{}, ROTATION, {"filter_size": 5}, {"lrelu_upsampling": 4}])
def test_stylegan3_layer_sizes(options):
    G = generator(32, margin_size=4, **options)
    ws = torch.randn(1, 8, 8)
    x = G.synthesis.input(ws[:, 0])
    assert x.shape == (1, 12, 24, 24)
    for index, layer in enumerate(layers(G)):
        x = layer(x, ws[:, index + 1])
        assert list(x.shape) == [1, layer.out_channels, *layer.out_size]


@pytest.mark.parametrize(
    "options, message",
    [({"img_resolution": 48}, "power of two.* 48"), ({"num_layers": 2}, "above num_critical 2, got 2")],
)
def test_stylegan3_impossible_plans(options, message):
    with pytest.raises(ValueError, match=message):
        generator(**options)


# Modulated convolution


@pytest.mark.parametrize("demodulate", [True, False])
def test_stylegan3_fused_and_unfused_agree_in_every_derivative(demodulate):
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    styles = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    gain = torch.tensor(0.7, dtype=torch.float64)
    along = torch.randn(3, 6, 7, 7, dtype=torch.float64)
    inputs = [x, weight, styles]

    def derivatives(fused):
        y = stylegan3.modulated_conv2d(x, weight, styles, gain, demodulate, padding=2, fused=fused)
        first = torch.autograd.grad((y * along).sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
        return [y, *first, *second]

    for one, other in zip(derivatives(True), derivatives(False)):
        assert_close(one, other, SAME_F64)


@pytest.mark.parametrize("kernel", [1, 3])
def test_stylegan3_pointwise_fuses_convolutions_of_single_pixels_alone(kernel):
    x, weight, styles = torch.randn(2, 3, 5, 5), torch.randn(4, 3, kernel, kernel), torch.randn(2, 3)
    gain = torch.tensor(2.0)
    actual = stylegan3.modulated_conv2d(x, weight, styles, gain, fused="pointwise")
    assert torch.equal(actual, stylegan3.modulated_conv2d(x, weight, styles, gain, fused=kernel == 1))


@pytest.mark.parametrize("fused", [True, False])
def test_stylegan3_modulated_convolution_follows_its_equations(fused):
    """One sample at a time, with the weights written out; demodulation cancels the normalization."""
    x, weight, styles = torch.randn(2, 3, 4, 4), torch.randn(5, 3, 3, 3), torch.randn(2, 3)
    actual = stylegan3.modulated_conv2d(x, weight, styles, torch.tensor(2.0), padding=2, fused=fused)
    for sample in range(2):
        modulated = weight * styles[sample].reshape(1, 3, 1, 1)
        modulated = modulated / modulated.square().sum(dim=[1, 2, 3], keepdim=True).sqrt()
        expected = torch.nn.functional.conv2d(2 * x[sample : sample + 1], modulated, padding=2)
        assert_close(actual[sample : sample + 1], expected, SAME_F32)


@pytest.mark.parametrize("fused", [True, False])
def test_stylegan3_float16_does_not_overflow(fused):
    x, weight, styles = torch.randn(2, 8, 6, 6), torch.randn(4, 8, 3, 3) * 1e4, torch.randn(2, 8) * 1e5
    gain = torch.tensor(1.0)
    expected = stylegan3.modulated_conv2d(x, weight, styles, gain, fused=fused)
    actual = stylegan3.modulated_conv2d(x.half(), weight, styles, gain, fused=fused)
    assert actual.dtype == torch.float16
    assert_close(actual.float(), expected, CONV_F16)


# Input and equivariance


def test_stylegan3_input_signal_follows_its_definition():
    """Pixels from the sum of waves written out, the plane turned and shifted by w and by the user."""
    layer = stylegan3.FourierInput(4, channels=6, size=10, sampling_rate=8, bandwidth=2.0).double()
    with torch.no_grad():
        layer.affine.weight.normal_()
        layer.transform.copy_(torch.tensor([[1.4, 0.5, 0.2], [-0.3, 0.9, -0.1], [0, 0, 1]]))
    w = torch.randn(3, 4, dtype=torch.float64)
    actual = layer(w)
    pose = layer.affine(w)
    faded = 0
    for sample in range(3):
        cos, sin, right, down = pose[sample] / pose[sample, :2].norm()
        turn = torch.stack([torch.stack([cos, -sin]), torch.stack([sin, cos])])
        freqs = layer.freqs @ turn @ layer.transform[:2, :2]
        amplitudes = (1 - (freqs.norm(dim=1) - 2) / (8 / 2 - 2)).clamp(0, 1)
        faded += int((amplitudes < 1).sum())
        for row, column in [(0, 0), (3, 7), (9, 2)]:
            place = torch.tensor([column - 4.5, row - 4.5], dtype=torch.float64) / 8
            place = layer.transform[:2, :2] @ place + layer.transform[:2, 2]
            place = turn @ (place - torch.stack([right, down]))
            waves = (2 * math.pi * (layer.freqs @ place + layer.phases)).sin() * amplitudes
            assert_close(actual[sample, :, row, column], layer.weight @ waves / math.sqrt(6), SAME_F64)
    assert faded > 0


def test_stylegan3_frequencies_are_uniform_on_a_disk():
    layer = stylegan3.FourierInput(4, channels=4000, size=4, sampling_rate=16, bandwidth=3.0)
    radii = layer.freqs.norm(dim=1)
    assert radii.max() <= 3
    for share in (0.25, 0.5, 0.75):  # of the area; three standard deviations of the count
        assert abs((radii < 3 * share**0.5).float().mean() - share) < 3 * (share * (1 - share) / 4000) ** 0.5
    assert abs(layer.freqs.mean()) < 0.1
    assert layer.phases.min() >= -0.5 and layer.phases.max() <= 0.5
    assert torch.equal(layer.affine(torch.randn(2, 4)), torch.tensor([[1.0, 0, 0, 0]]).repeat(2, 1))


def place(G, matrix):
    G.synthesis.input.transform.copy_(torch.tensor(matrix, dtype=torch.float32))


@pytest.mark.parametrize("options", [{}, ROTATION])
def test_stylegan3_moving_the_input_moves_the_image(options):
    """Shifts by whole pixels of every layer commute with the network; a wide margin keeps the borders out."""
    G = generator(32, margin_size=20, **options).requires_grad_(False)
    ws = torch.randn(2, 8, 8)
    img = G.synthesis(ws)
    place(G, [[1, 0, 1 / 16], [0, 1, -1 / 16], [0, 0, 1]])
    moved = G.synthesis(ws)
    inner = slice(8, 24)
    assert_close(moved[:, :, inner, inner], img[:, :, 6:22, 10:26], NETWORK_F32)


def test_stylegan3_turning_the_input_of_r_turns_the_image():
    """With 1x1 convolutions every part of the network is symmetric under quarter turns."""
    G = generator(32, **ROTATION).requires_grad_(False)
    ws = torch.randn(2, 8, 8)
    img = G.synthesis(ws)
    place(G, [[0, -1, 0], [1, 0, 0], [0, 0, 1]])
    assert_close(G.synthesis(ws), torch.rot90(img, 1, [2, 3]), NETWORK_F32)


# Modes


@pytest.mark.parametrize("options", [{}, ROTATION])
def test_stylegan3_train_and_eval_mode_give_the_same_images(options):
    """A student in train mode and a teacher in eval mode; noise does not exist here."""
    student = generator(**options).train()
    teacher = copy.deepcopy(student).eval().requires_grad_(False)
    z = torch.randn(4, 8)
    expected = student(z, None)
    for noise_mode in ("random", "const", "none"):
        assert torch.equal(teacher(z, None, noise_mode=noise_mode), expected)
    for fused in (True, False):
        images = [G(z, None, fused_modconv=fused) for G in (student, teacher)]
        assert torch.equal(*images)
        assert_close(images[0], expected, NETWORK_F32)


def test_stylegan3_averages_move_only_when_asked():
    G = generator().train()
    before = copy.deepcopy(G.state_dict())
    z = torch.randn(4, 8)
    img = G(z, None)
    assert all(torch.equal(value, before[name]) for name, value in G.state_dict().items())
    updated = G(z, None, update_emas=True)
    moved = {name for name, value in G.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"mapping.w_avg"} | {f"synthesis.{n}.magnitude_ema" for n in G.synthesis.layer_names}
    assert not torch.equal(updated, img)  # each layer divides by the average that it has just moved
    assert not any(buffer.requires_grad for buffer in G.buffers())
    x = G.synthesis.input(G.mapping(z, None)[:, 0])
    assert_close(layers(G)[0].magnitude_ema, 0.999 + 0.001 * x.square().mean(), NETWORK_F32)


def test_stylegan3_cpu_computes_in_single_precision():
    G = generator(num_fp16_res=8)
    assert all(layer.use_fp16 for layer in layers(G))
    z = torch.randn(2, 8)
    assert torch.equal(G(z, None), G(z, None, force_fp32=True))
    assert G(z.double(), None).dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, ROTATION])
def test_stylegan3_half_precision_stays_close_to_single(options):
    G = generator(32, num_fp16_res=8, **options).cuda()
    z = torch.randn(4, 8, device="cuda")
    single = G(z, None, force_fp32=True)
    for fused in (True, False):
        half = G(z, None, fused_modconv=fused)
        assert half.dtype == torch.float32 and not torch.equal(half, single)
        assert_close(half, single, NETWORK_F16)


@pytest.mark.gpu
def test_stylegan3_half_precision_measures_magnitudes_in_single():
    """The sum of squares is beyond the range of float16."""
    layer = layers(generator(32, num_fp16_res=8).cuda())[2]
    layer.magnitude_ema_beta = 0
    x = 300 * torch.randn(2, layer.in_channels, *layer.in_size, device="cuda").half()
    layer(x, torch.randn(2, layer.w_dim, device="cuda"), update_emas=True)
    assert float(layer.magnitude_ema) == pytest.approx(float(x.double().square().mean()), rel=1e-4)


# Wiring and state


@pytest.mark.parametrize("options", [{}, ROTATION])
def test_stylegan3_every_parameter_takes_part(options):
    G = generator(c_dim=2, **options)
    with torch.no_grad():
        G.synthesis.input.affine.weight.normal_()
    c = torch.eye(2).repeat(2, 1)
    G(torch.randn(4, 8), c).square().sum().backward()
    for name, parameter in G.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_stylegan3_each_layer_reads_its_own_row():
    """Changing one row of ws changes the outputs of its layer and of those behind it, and no earlier one."""
    G = generator().requires_grad_(False)
    with torch.no_grad():
        G.synthesis.input.affine.weight.normal_()

    def outputs(ws):
        found = []
        hooks = [
            module.register_forward_hook(lambda *args: found.append(args[2]))
            for module in [G.synthesis.input, *layers(G)]
        ]
        G.synthesis(ws)
        for hook in hooks:
            hook.remove()
        return found

    ws = torch.randn(1, 8, 8)
    original = outputs(ws)
    assert len(original) == G.num_ws == 8
    for row in range(8):
        other = ws.clone()
        other[:, row] += 1
        same = [torch.equal(a, b) for a, b in zip(original, outputs(other))]
        assert same == [True] * row + [False] * (8 - row)


def test_stylegan3_truncation():
    G = generator()
    G.mapping.w_avg.normal_()
    z = torch.randn(4, 8)
    ws, average = G.mapping(z, None), G.mapping.w_avg
    assert torch.equal(G.mapping(z, None, truncation_psi=0), average.expand(4, 8, 8))
    half = G.mapping(z, None, truncation_psi=0.5, truncation_cutoff=2)
    assert_close(half[:, :2], (average + ws[:, :2]) / 2, SAME_F32)
    assert torch.equal(half[:, 2:], ws[:, 2:])
    assert torch.equal(G(z, None, truncation_psi=0.5, truncation_cutoff=2), G.synthesis(half))


def test_stylegan3_labels_choose_the_image():
    G = generator(c_dim=3)
    ws = G.mapping(torch.randn(1, 8).repeat(3, 1), torch.eye(3))
    assert not torch.equal(ws[0], ws[1]) and not torch.equal(ws[1], ws[2])


def test_stylegan3_output_scale():
    G, other = generator(output_scale=0.25), generator(output_scale=2.0)
    other.load_state_dict(G.state_dict())
    z = torch.randn(2, 8)
    assert torch.equal(other(z, None), 8 * G(z, None))


def test_stylegan3_every_layer_is_clamped():
    """Between the filters; ToRGB has none, so its clamp is that of the image."""
    free, clamped = generator(conv_clamp=None), generator(conv_clamp=0.05)
    clamped.load_state_dict(free.state_dict())
    z = torch.randn(2, 8)
    assert free(z, None).abs().max() > 0.25 * 0.05
    assert clamped(z, None).abs().max() == 0.25 * torch.tensor(0.05)
    x = torch.ones(2, 12, 36, 36)
    for layer in (layers(free)[0], layers(clamped)[0]):
        with torch.no_grad():
            layer.bias.fill_(10)  # far above the limit everywhere, and filters pass constants
    w = torch.randn(2, 8)
    assert_close(layers(clamped)[0](x, w)[:, :, 12:24, 12:24], torch.full([2, 12, 12, 12], 0.05), NETWORK_F32)
    assert layers(free)[0](x, w).max() > 1


def test_stylegan3_empty_batch():
    assert generator()(torch.zeros(0, 8), None).shape == (0, 3, 16, 16)


def test_stylegan3_initial_values():
    G = stylegan3.Generator(64, 0, 64, 16, 3, **{**SMALL, "channel_base": 4096, "channel_max": 64})
    layer = layers(G)[2]
    for tensor in (layer.weight, layer.affine.weight, G.synthesis.input.weight):
        count = tensor.numel()
        assert abs(tensor.mean()) < 5 / count**0.5 and abs(tensor.std() - 1) < 5 / (2 * count) ** 0.5
    assert torch.equal(layer.affine.bias, torch.ones(64)) and not layer.bias.any()
    assert layer.magnitude_ema.shape == () and layer.magnitude_ema == 1
    assert torch.equal(G.synthesis.input.transform, torch.eye(3))
    assert not G.synthesis.input.affine.weight.any()
    assert abs(G.mapping.fc0.weight.std() - 100) < 5  # divided by the learning rate multiplier of 0.01


def plain_values(value):
    """Every leaf of nested containers."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from (*plain_values(key), *plain_values(item))
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            yield from plain_values(item)
    else:
        yield value


@pytest.mark.parametrize("options", [{}, ROTATION])
def test_stylegan3_attributes_are_plain_python(options):
    """A numpy number in an attribute would end up in the pickle."""
    for path, module in generator(**options).named_modules():
        state = {k: v for k, v in vars(module).items() if k not in ("_parameters", "_buffers", "_modules")}
        for value in plain_values(state):
            assert value is None or type(value) in (bool, int, float, str), f"{path}: {value!r}"


def test_stylegan3_pickle_and_copy():
    G = generator(**ROTATION).eval()
    z = torch.randn(2, 8)
    for other in (pickle.loads(pickle.dumps(G)), copy.deepcopy(G)):
        assert torch.equal(other(z, None), G(z, None))
        assert other.init_kwargs == G.init_kwargs and not other.training
