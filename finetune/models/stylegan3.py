# SPDX-License-Identifier: Apache-2.0
"""StyleGAN3: the alias-free generator, configurations T (translation) and R (translation and rotation).

The source of this file is embedded in every exported pickle and executed by other programs: see README.md
next to it for what it may import and which names may not change. The discriminator is StyleGAN2's.

Shapes: z [N, z_dim], c [N, c_dim], ws [N, num_ws, w_dim], img [N, img_channels, R, R] float32, about [-1, 1].
Frequencies are in cycles per image width, sampling rates in pixels per image width; feature maps continue
`margin_size` pixels beyond the image on every side.
Source: Karras et al., "Alias-Free Generative Adversarial Networks" (arXiv 2106.12423).
"""

import math

import numpy as np
import torch

from torch_utils import misc, persistence
from torch_utils.ops import bias_act, conv2d_gradfix, filtered_lrelu, fma

EPSILON = 1e-8  # keeps every normalization finite


def unit_rms(x, dim):
    """Scale `x` to root mean square 1 over `dim`. Source: Progressive GAN (1710.10196), 4.2."""
    return x * (x.square().mean(dim=dim, keepdim=True) + EPSILON).rsqrt()


# ---- Filter design, in float64


def kaiser_beta(num_taps, width, sampling_rate):
    """Return beta of the Kaiser window whose low-pass of `num_taps` has a transition band of `width`.

    Source: Kaiser and Schafer, "On the use of the I0-sinh window for spectrum analysis" (1980).
    """
    attenuation = 2.285 * (num_taps - 1) * math.pi * width / (sampling_rate / 2) + 7.95  # in decibels
    if attenuation > 50:
        return 0.1102 * (attenuation - 8.7)
    if attenuation > 21:
        return 0.5842 * (attenuation - 21) ** 0.4 + 0.07886 * (attenuation - 21)
    return 0.0


def bessel_j1(x):
    """Return the Bessel function of the first kind, order 1, to double precision for |x| below some hundred.

    Its integral over one period of a smooth function, which equidistant points give to rounding.
    """
    angles = np.arange(4096) * (2 * math.pi / 4096)
    return np.cos(angles - np.asarray(x)[..., None] * np.sin(angles)).mean(axis=-1)


def design_lowpass(num_taps, cutoff, width, sampling_rate, radial=False):
    """Return a windowed low-pass that sums to 1: taps [t], radially symmetric [t, t], or None for one tap.

    cutoff, width (of the transition band): cycles per image width.
    Source: StyleGAN3, appendix B, "Kaiser low-pass filters" (sinc) and "rotation" (jinc).
    """
    if num_taps == 1:
        return None
    window = np.kaiser(num_taps, kaiser_beta(num_taps, width, sampling_rate))
    position = (np.arange(num_taps) - (num_taps - 1) / 2) / sampling_rate
    if radial:
        radii, places = np.unique(np.hypot(position, position[:, None]), return_inverse=True)
        at = np.maximum(radii, 1e-12)  # where J1(2 pi f r) / (pi r) has its limit f
        profile = np.where(radii > 0, bessel_j1(2 * math.pi * cutoff * at) / (math.pi * at), cutoff)
        taps = profile[places].reshape(num_taps, num_taps) * np.outer(window, window)
    else:
        taps = np.sinc(2 * cutoff * position) * window
    return torch.as_tensor(taps / taps.sum(), dtype=torch.float32)


# ---- Layers


def batched_matmul(a, b):
    """Multiply the matrices of each sample, [N, M, K] and [N, K, P]."""
    # Ours splits float32 as convolutions do. Other code bases have torch's only.
    return getattr(conv2d_gradfix, "bmm", torch.bmm)(a, b)


def scale_channels(x, factors):
    """Multiply each channel of each sample of `x` [N, C, H, W] by its number in `factors` [N, C]."""
    factors = factors.to(x.dtype).reshape(x.shape[0], x.shape[1], 1, 1)
    if x.device.type == "cpu":
        return x * factors  # adding a zero would cost time, and change the sign of zeros
    return fma.fma(x, factors, misc.constant(0, dtype=x.dtype, device=x.device))


def modulated_conv2d(x, weight, styles, gain, demodulate=True, padding=0, fused=True):
    """Convolve each sample with its own modulated weights.

    x [N, I, H, W]; weight [O, I, k, k] and styles [N, I] float32; gain [] scales x.
    Returns [N, O, H + 2 padding - k + 1, likewise W] in the dtype of x. `fused` builds the weights of every
    sample and runs one grouped convolution; otherwise the features are scaled before and after an ordinary
    one: equal up to rounding. "pointwise" does the first if k is 1, as products of matrices.
    Source: StyleGAN2 (1912.04958), equations 1 and 3; StyleGAN3, section 3.2.
    """
    batch, channels_in, height, width = x.shape
    channels_out, _, kernel, _ = weight.shape
    misc.assert_shape(styles, [batch, channels_in])
    if fused == "pointwise":
        fused = kernel == 1
    demodulation = None
    if demodulate:
        # Demodulation cancels both factors; with them, numbers stay near 1 and float16 does not overflow.
        weight = unit_rms(weight, dim=[1, 2, 3])
        styles = unit_rms(styles, dim=[0, 1])
        power = styles.square().matmul(weight.square().sum(dim=[2, 3]).t())
        demodulation = (power + EPSILON).rsqrt()
    styles = styles * gain

    if fused and batch > 0:
        per_sample = weight.unsqueeze(0) * styles.reshape(batch, 1, channels_in, 1, 1)
        if demodulation is not None:
            per_sample = per_sample * demodulation.reshape(batch, channels_out, 1, 1, 1)
        if kernel == 1 and padding == 0:  # a matrix for each sample, in either memory format
            y = batched_matmul(per_sample.to(x.dtype).flatten(2), x.flatten(2))
            return y.reshape(batch, channels_out, height, width)
        grouped = per_sample.to(x.dtype).reshape(batch * channels_out, channels_in, kernel, kernel)
        y = x.reshape(1, batch * channels_in, height, width)
        y = conv2d_gradfix.conv2d(y, grouped, padding=padding, groups=batch)
        return y.reshape(batch, channels_out, y.shape[2], y.shape[3])

    y = scale_channels(x, styles)
    y = conv2d_gradfix.conv2d(y, weight.to(x.dtype), padding=padding)
    return y if demodulation is None else scale_channels(y, demodulation)


@persistence.persistent_class
class Dense(torch.nn.Module):
    """Fully connected layer whose weights are scaled when used, so that all learn at one rate.

    [N, in_features] -> [N, out_features]. `lr_multiplier` scales the learning rate: the stored weights are
    divided by it. `bias_init` is a number or one for each output. Source: Progressive GAN (1710.10196), 4.1.
    """

    def __init__(
        self, in_features, out_features, activation="linear", lr_multiplier=1, weight_init=1, bias_init=0
    ):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.activation = activation
        self.weight_gain = lr_multiplier / math.sqrt(in_features)
        self.bias_gain = lr_multiplier
        self.weight = torch.nn.Parameter(
            torch.randn([out_features, in_features]) * (weight_init / lr_multiplier)
        )
        bias = bias_init if isinstance(bias_init, (list, tuple)) else [bias_init] * out_features
        self.bias = torch.nn.Parameter(torch.tensor([value / lr_multiplier for value in bias]))

    def forward(self, x):
        weight = (self.weight * self.weight_gain).to(x.dtype)
        bias = (self.bias * self.bias_gain).to(x.dtype)
        if self.activation == "linear":
            return torch.nn.functional.linear(x, weight, bias)
        return bias_act.bias_act(torch.nn.functional.linear(x, weight), bias, act=self.activation)

    def extra_repr(self):
        return "%d -> %d, %s" % (self.in_features, self.out_features, self.activation)


@persistence.persistent_class
class MappingNetwork(torch.nn.Module):
    """Latents and labels to intermediate latents: z [N, z_dim], c [N, c_dim] -> ws [N, num_ws, w_dim].

    StyleGAN2's with two layers instead of eight. Source: StyleGAN3, section 3.2.
    """

    def __init__(
        self,
        z_dim,
        c_dim,
        w_dim,
        num_ws,
        num_layers=2,
        embed_features=None,
        layer_features=None,
        activation="lrelu",
        lr_multiplier=0.01,
        w_avg_beta=0.998,
    ):
        super().__init__()
        self.z_dim = z_dim
        self.c_dim = c_dim
        self.w_dim = w_dim
        self.num_ws = num_ws
        self.num_layers = num_layers
        self.w_avg_beta = w_avg_beta

        embed_features = (w_dim if embed_features is None else embed_features) if c_dim > 0 else 0
        hidden = w_dim if layer_features is None else layer_features
        if c_dim > 0:
            self.embed = Dense(c_dim, embed_features)
        width = z_dim + embed_features
        for index in range(num_layers):
            next_width = w_dim if index == num_layers - 1 else hidden
            layer = Dense(width, next_width, activation=activation, lr_multiplier=lr_multiplier)
            setattr(self, "fc%d" % index, layer)
            width = next_width
        self.register_buffer("w_avg", torch.zeros([w_dim]))

    def forward(self, z, c, truncation_psi=1, truncation_cutoff=None, update_emas=False):
        misc.assert_shape(z, [None, self.z_dim])
        w = unit_rms(z.to(torch.float32), dim=1)
        if self.c_dim > 0:
            misc.assert_shape(c, [None, self.c_dim])
            w = torch.cat([w, unit_rms(self.embed(c.to(torch.float32)), dim=1)], dim=1)
        for index in range(self.num_layers):
            w = getattr(self, "fc%d" % index)(w)

        if update_emas and self.w_avg_beta is not None:
            with torch.no_grad():
                self.w_avg.copy_(w.mean(dim=0).lerp(self.w_avg, self.w_avg_beta))
        ws = w.unsqueeze(1).repeat(1, self.num_ws, 1)
        if truncation_psi == 1:
            return ws
        cutoff = self.num_ws if truncation_cutoff is None else truncation_cutoff
        return torch.cat([self.w_avg.lerp(ws[:, :cutoff], truncation_psi), ws[:, cutoff:]], dim=1)

    def extra_repr(self):
        return "z_dim=%d, c_dim=%d, w_dim=%d, num_ws=%d" % (self.z_dim, self.c_dim, self.w_dim, self.num_ws)


@persistence.persistent_class
class FourierInput(torch.nn.Module):
    """The infinite input signal, sampled: w [N, w_dim] -> x [N, channels, size, size].

    Each channel is a mixture of plane waves; w turns and shifts the plane, and `transform` [3, 3] maps the
    coordinates of the image before that, for callers that turn or shift the images themselves.
    bandwidth: highest frequency of the waves. Source: StyleGAN3, section 3.1 and appendix F.
    """

    def __init__(self, w_dim, channels, size, sampling_rate, bandwidth):
        super().__init__()
        self.w_dim = w_dim
        self.channels = channels
        self.size = [size, size]
        self.sampling_rate = sampling_rate
        self.bandwidth = bandwidth

        # Frequencies are uniform on a disk.
        direction = torch.rand([channels]) * (2 * math.pi)
        length = torch.rand([channels]).sqrt() * bandwidth
        freqs = torch.stack([direction.cos() * length, direction.sin() * length], dim=1)
        self.weight = torch.nn.Parameter(torch.randn([channels, channels]))
        self.affine = Dense(w_dim, 4, weight_init=0, bias_init=[1, 0, 0, 0])
        self.register_buffer("transform", torch.eye(3))
        self.register_buffer("freqs", freqs)
        self.register_buffer("phases", torch.rand([channels]) - 0.5)

    def placement(self, w):
        """Return the transform of the coordinates that w sets: matrix [N, 2, 2] and shift [N, 2, 1]."""
        pose = self.affine(w)
        pose = pose / pose[:, :2].norm(dim=1, keepdim=True)
        cos, sin, right, down = pose.unbind(dim=1)
        turn = torch.stack([cos, -sin, sin, cos], dim=1).reshape(-1, 2, 2)
        shift = turn @ -torch.stack([right, down], dim=1).unsqueeze(2)
        return turn @ self.transform[:2, :2], turn @ self.transform[:2, 2:] + shift

    def forward(self, w):
        matrix, shift = self.placement(w)
        freqs = self.freqs @ matrix  # [N, C, 2]
        phases = self.phases + (self.freqs @ shift).squeeze(2)
        # What the transformation made faster than the sampling rate can hold fades out.
        room = self.sampling_rate / 2 - self.bandwidth
        amplitudes = (1 - (freqs.norm(dim=2) - self.bandwidth) / room).clamp(0, 1)

        # sin(a + b) = sin(a) cos(b) + cos(a) sin(b) needs the angles of the rows and of the columns alone.
        across, along = [
            (torch.arange(size, device=w.device) - (size - 1) / 2) / self.sampling_rate for size in self.size
        ]
        a = (2 * math.pi) * (freqs[:, :, :1] * across + phases.unsqueeze(2))
        b = (2 * math.pi) * (freqs[:, :, 1:] * along)
        strength = amplitudes.unsqueeze(2)
        x = (a.sin() * strength).unsqueeze(2) * b.cos().unsqueeze(3)
        x = x + (a.cos() * strength).unsqueeze(2) * b.sin().unsqueeze(3)
        weight = self.weight / math.sqrt(self.channels)
        if x.is_cuda:
            # Not `@`, which takes another kernel there if the weight needs gradients: a student and a teacher
            # of equal weights would differ in their last bits.
            x = batched_matmul(weight.expand(w.shape[0], -1, -1), x.flatten(2))
        else:
            x = weight @ x.flatten(2)
        return x.reshape(w.shape[0], self.channels, self.size[1], self.size[0])

    def extra_repr(self):
        values = (self.channels, self.size, self.sampling_rate, self.bandwidth)
        return "channels=%d, size=%s, sampling_rate=%g, bandwidth=%g" % values


@persistence.persistent_class
class FilteredConv(torch.nn.Module):
    """Modulated convolution, then a leaky ReLU between a low-pass upsampling and a low-pass downsampling.

    x [N, in_channels, in_size, in_size], w [N, w_dim] -> [N, out_channels, out_size, out_size].
    The nonlinearity runs at `lrelu_upsampling` times the higher of both sampling rates. `is_torgb`: 1x1,
    neither demodulated nor filtered, linear. Source: StyleGAN3, section 3.2 and figure 4.
    """

    def __init__(
        self,
        w_dim,
        is_torgb,
        is_critically_sampled,
        use_fp16,
        in_channels,
        out_channels,
        in_size,
        out_size,
        in_sampling_rate,
        out_sampling_rate,
        in_cutoff,
        out_cutoff,
        in_half_width,
        out_half_width,
        conv_kernel=3,
        filter_size=6,
        lrelu_upsampling=2,
        use_radial_filters=False,
        conv_clamp=256,
        magnitude_ema_beta=0.999,
    ):
        super().__init__()
        self.w_dim = w_dim
        self.is_torgb = is_torgb
        self.is_critically_sampled = is_critically_sampled
        self.use_fp16 = use_fp16
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.in_size = [in_size, in_size]
        self.out_size = [out_size, out_size]
        self.in_sampling_rate = in_sampling_rate
        self.out_sampling_rate = out_sampling_rate
        self.tmp_sampling_rate = max(in_sampling_rate, out_sampling_rate) * (
            1 if is_torgb else lrelu_upsampling
        )
        self.in_cutoff = in_cutoff
        self.out_cutoff = out_cutoff
        self.in_half_width = in_half_width
        self.out_half_width = out_half_width
        self.conv_kernel = 1 if is_torgb else conv_kernel
        self.conv_clamp = conv_clamp
        self.magnitude_ema_beta = magnitude_ema_beta

        self.affine = Dense(w_dim, in_channels, bias_init=1)
        kernel = self.conv_kernel
        self.weight = torch.nn.Parameter(torch.randn([out_channels, in_channels, kernel, kernel]))
        self.bias = torch.nn.Parameter(torch.zeros([out_channels]))
        self.register_buffer("magnitude_ema", torch.ones([]))

        rate = self.tmp_sampling_rate
        self.up_factor = rate // in_sampling_rate
        self.down_factor = rate // out_sampling_rate
        if self.up_factor * in_sampling_rate != rate or self.down_factor * out_sampling_rate != rate:
            rates = (in_sampling_rate, out_sampling_rate, rate)
            raise ValueError("sampling rates %d and %d do not divide %d" % rates)
        self.up_taps = filter_size * self.up_factor if self.up_factor > 1 and not is_torgb else 1
        self.down_taps = filter_size * self.down_factor if self.down_factor > 1 and not is_torgb else 1
        self.down_radial = use_radial_filters and not is_critically_sampled
        up_filter = design_lowpass(self.up_taps, in_cutoff, 2 * in_half_width, rate)
        down_filter = design_lowpass(self.down_taps, out_cutoff, 2 * out_half_width, rate, self.down_radial)
        self.register_buffer("up_filter", up_filter)
        self.register_buffer("down_filter", down_filter)

        # Pixels at the temporary rate, that the output needs, less those that there are.
        needed = (out_size - 1) * self.down_factor + 1 + (self.up_taps - 1) + (self.down_taps - 1)
        missing = needed - (in_size + self.conv_kernel - 1) * self.up_factor
        before = (missing + self.up_factor) // 2
        self.padding = [before, missing - before, before, missing - before]

    def forward(self, x, w, update_emas=False, force_fp32=False, fused_modconv=None):
        misc.assert_shape(x, [None, self.in_channels, self.in_size[1], self.in_size[0]])
        misc.assert_shape(w, [x.shape[0], self.w_dim])
        if update_emas:
            with torch.no_grad():
                if x.device.type == "cuda" and x.dtype != torch.float64:  # one pass instead of three
                    magnitude = torch.linalg.vector_norm(x, dtype=torch.float32).square() / x.numel()
                else:
                    magnitude = x.to(torch.float32).square().mean()
                self.magnitude_ema.copy_(magnitude.lerp(self.magnitude_ema, self.magnitude_ema_beta))

        styles = self.affine(w)
        if self.is_torgb:
            styles = styles / math.sqrt(self.in_channels * self.conv_kernel**2)
        use_half = self.use_fp16 and not force_fp32 and x.device.type == "cuda"
        x = x.to(torch.float16 if use_half else torch.float32)
        # On a CPU scale-convolve-scale trains faster, and holds no weights of each sample.
        fused = x.device.type != "cpu" if fused_modconv is None else fused_modconv
        x = modulated_conv2d(
            x,
            self.weight,
            styles,
            gain=self.magnitude_ema.rsqrt(),
            demodulate=not self.is_torgb,
            padding=self.conv_kernel - 1,
            fused=fused,
        )
        return filtered_lrelu.filtered_lrelu(
            x,
            fu=self.up_filter,
            fd=self.down_filter,
            b=self.bias.to(x.dtype),
            up=self.up_factor,
            down=self.down_factor,
            padding=self.padding,
            gain=1 if self.is_torgb else math.sqrt(2),
            slope=1 if self.is_torgb else 0.2,
            clamp=self.conv_clamp,
        )

    def extra_repr(self):
        sizes = (self.in_channels, self.out_channels, self.in_size[0], self.out_size[0])
        rates = (self.in_sampling_rate, self.tmp_sampling_rate, self.out_sampling_rate)
        cutoffs = (self.in_cutoff, self.out_cutoff, self.use_fp16)
        return "%d -> %d, size %d -> %d, rate %d -> %d -> %d, cutoff %.4g -> %.4g, use_fp16=%s" % (
            sizes + rates + cutoffs
        )


def band_limits(img_resolution, num_layers, num_critical, first_cutoff, first_stopband, last_stopband_rel):
    """Return cutoff, stopband, sampling rate and half width of the transition band of each layer and ToRGB.

    Both frequencies grow geometrically up to the first critically sampled layer and stay. Source: StyleGAN3,
    section 3.2, "Flexible layer specifications".
    """
    if img_resolution < 4 or img_resolution & (img_resolution - 1) != 0:
        raise ValueError("img_resolution must be a power of two and at least 4, got %r" % (img_resolution,))
    if num_layers <= num_critical:
        raise ValueError("num_layers must be above num_critical %r, got %r" % (num_critical, num_layers))
    last_cutoff = img_resolution / 2
    last_stopband = last_cutoff * last_stopband_rel
    limits = []
    for index in range(num_layers + 1):
        part = min(index / (num_layers - num_critical), 1)
        cutoff = first_cutoff * (last_cutoff / first_cutoff) ** part
        stopband = first_stopband * (last_stopband / first_stopband) ** part
        rate = 2 ** math.ceil(math.log2(min(stopband * 2, img_resolution)))
        limits.append((cutoff, stopband, rate, max(stopband, rate / 2) - cutoff))
    return limits


@persistence.persistent_class
class SynthesisNetwork(torch.nn.Module):
    """Intermediate latents to images: ws [N, num_ws, w_dim] -> img [N, img_channels, R, R] float32."""

    def __init__(
        self,
        w_dim,
        img_resolution,
        img_channels,
        channel_base=32768,
        channel_max=512,
        num_layers=14,
        num_critical=2,
        first_cutoff=2,
        first_stopband=2**2.1,
        last_stopband_rel=2**0.3,
        margin_size=10,
        output_scale=0.25,
        num_fp16_res=4,
        **layer_kwargs,
    ):
        super().__init__()
        self.w_dim = w_dim
        self.num_ws = num_layers + 2
        self.img_resolution = img_resolution
        self.img_channels = img_channels
        self.num_layers = num_layers
        self.num_critical = num_critical
        self.margin_size = margin_size
        self.output_scale = output_scale
        self.num_fp16_res = num_fp16_res

        limits = band_limits(
            img_resolution, num_layers, num_critical, first_cutoff, first_stopband, last_stopband_rel
        )
        sizes = [rate + 2 * margin_size for _, _, rate, _ in limits[:-2]] + [img_resolution] * 2
        channels = [round(min(channel_base / 2 / limit[0], channel_max)) for limit in limits]
        channels[-1] = img_channels
        self.input = FourierInput(
            w_dim, channels[0], sizes[0], sampling_rate=limits[0][2], bandwidth=limits[0][0]
        )
        self.layer_names = []
        for index, (cutoff, _, rate, half_width) in enumerate(limits):
            before = max(index - 1, 0)
            layer = FilteredConv(
                w_dim=w_dim,
                is_torgb=index == num_layers,
                is_critically_sampled=index >= num_layers - num_critical,
                use_fp16=rate * 2**num_fp16_res > img_resolution,
                in_channels=channels[before],
                out_channels=channels[index],
                in_size=sizes[before],
                out_size=sizes[index],
                in_sampling_rate=limits[before][2],
                out_sampling_rate=rate,
                in_cutoff=limits[before][0],
                out_cutoff=cutoff,
                in_half_width=limits[before][3],
                out_half_width=half_width,
                **layer_kwargs,
            )
            name = "L%d_%d_%d" % (index, sizes[index], channels[index])
            setattr(self, name, layer)
            self.layer_names.append(name)

    def forward(self, ws, update_emas=False, noise_mode=None, fused_modconv=None, force_fp32=False):
        """Generate images; `noise_mode` is accepted for StyleGAN2's interface, this family has no noise."""
        del noise_mode
        misc.assert_shape(ws, [None, self.num_ws, self.w_dim])
        rows = ws.to(torch.float32).unbind(dim=1)
        x = self.input(rows[0])
        for name, w in zip(self.layer_names, rows[1:]):
            layer = getattr(self, name)
            x = layer(x, w, update_emas=update_emas, force_fp32=force_fp32, fused_modconv=fused_modconv)
        return x.to(torch.float32) * self.output_scale

    def extra_repr(self):
        sizes = (self.w_dim, self.num_ws, self.img_resolution, self.img_channels, self.num_fp16_res)
        return "w_dim=%d, num_ws=%d, img_resolution=%d, img_channels=%d, num_fp16_res=%d" % sizes


@persistence.persistent_class
class Generator(torch.nn.Module):
    """StyleGAN3's generator: z [N, z_dim], c [N, c_dim] -> img [N, img_channels, R, R] float32.

    Keywords of the synthesis network: channel_base, channel_max, num_layers, num_critical, first_cutoff,
    first_stopband, last_stopband_rel, margin_size, output_scale, num_fp16_res, conv_kernel, filter_size,
    lrelu_upsampling, use_radial_filters, conv_clamp, magnitude_ema_beta. The defaults are configuration T; R
    has conv_kernel 1, use_radial_filters, and twice the channel_base and channel_max.
    """

    def __init__(
        self, z_dim, c_dim, w_dim, img_resolution, img_channels, mapping_kwargs=None, **synthesis_kwargs
    ):
        super().__init__()
        self.z_dim = z_dim
        self.c_dim = c_dim
        self.w_dim = w_dim
        self.img_resolution = img_resolution
        self.img_channels = img_channels
        self.synthesis = SynthesisNetwork(w_dim, img_resolution, img_channels, **synthesis_kwargs)
        self.num_ws = self.synthesis.num_ws
        self.mapping = MappingNetwork(z_dim, c_dim, w_dim, self.num_ws, **(mapping_kwargs or {}))

    def forward(self, z, c, truncation_psi=1, truncation_cutoff=None, update_emas=False, **synthesis_kwargs):
        ws = self.mapping(
            z,
            c,
            truncation_psi=truncation_psi,
            truncation_cutoff=truncation_cutoff,
            update_emas=update_emas,
        )
        return self.synthesis(ws, update_emas=update_emas, **synthesis_kwargs)
