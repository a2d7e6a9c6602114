# SPDX-License-Identifier: Apache-2.0
"""StyleGAN2: the generator, and the discriminator that StyleGAN3 shares.

The source of this file is embedded in every exported pickle and executed by other programs: see README.md
next to it for what it may import and which names may not change.

Shapes: z [N, z_dim], c [N, c_dim], ws [N, num_ws, w_dim], img [N, img_channels, H, W] float32, about [-1, 1].
A resolution is the longer side of an image; its height and width follow from `base_shape`, those of the 4x4
block: (4, 4) for square images, (4, 2) for images twice as high as wide.
Source: Karras et al., "Analyzing and Improving the Image Quality of StyleGAN" (arXiv 1912.04958); mixed
precision and conditioning as in "Training GANs with Limited Data" (arXiv 2006.06676).
"""

import math

import torch

from torch_utils import misc, persistence
from torch_utils.ops import bias_act, conv2d_resample, fma, upfirdn2d

EPSILON = 1e-8  # keeps every normalization finite
HALVED_POWER = math.sqrt(0.5)  # two branches of equal variance, each times this, add up to that variance


def unit_rms(x):
    """Scale each row of `x` [N, F] to root mean square 1. Source: Progressive GAN (1710.10196), 4.2."""
    return x * (x.square().mean(dim=1, keepdim=True) + EPSILON).rsqrt()


def block_sizes(img_resolution):
    """List the block resolutions 4, 8, ... img_resolution; ValueError unless it is a power of two above 2."""
    if img_resolution < 4 or img_resolution & (img_resolution - 1) != 0:
        raise ValueError("img_resolution must be a power of two and at least 4, got %r" % (img_resolution,))
    return [2**i for i in range(2, img_resolution.bit_length())]


def shape_at(resolution, base_shape):
    """Return height and width of the block at `resolution`, its longer side."""
    height, width = base_shape
    if min(height, width) < 1 or max(height, width) != 4:
        raise ValueError("base_shape must be two integers, the larger one 4, got %r" % (base_shape,))
    return resolution * height // 4, resolution * width // 4


def num_channels(resolution, channel_base, channel_max):
    """Return the feature channels of the block at `resolution`."""
    return min(channel_base // resolution, channel_max)


def half_precision_from(img_resolution, num_fp16_res):
    """Return the lowest block resolution that runs in float16; the 4x4 blocks never do."""
    return max(img_resolution * 2 // 2**num_fp16_res, 8)


def working_dtype(use_fp16, force_fp32, device):
    """Return the dtype a block computes in: float16 only if requested, allowed, and on CUDA."""
    return torch.float16 if use_fp16 and not force_fp32 and device.type == "cuda" else torch.float32


def features_format(channels_last, device):
    """Return the memory format of features: channels-last on a CPU, and where the block asks for it."""
    return torch.channels_last if channels_last or device.type == "cpu" else torch.contiguous_format


def scaled_clamp(clamp, gain):
    """Return the clamping limit after a change of gain; None stays None."""
    return None if clamp is None else clamp * gain


def scale_channels(x, factors):
    """Multiply each channel of each sample of `x` [N, C, H, W] by its number in `factors` [N, C]."""
    factors = factors.to(x.dtype).reshape(x.shape[0], x.shape[1], 1, 1)
    if x.device.type == "cpu":
        return x * factors  # adding a zero would cost time, and change the sign of zeros
    return fma.fma(x, factors, misc.constant(0, dtype=x.dtype, device=x.device))


def modulated_conv2d(x, weight, styles, noise=None, up=1, resample_filter=None, demodulate=True, fused=True):
    """Convolve each sample with its own modulated weights and add noise.

    x [N, I, H, W]; weight [O, I, k, k] and styles [N, I] float32; noise broadcastable to the result or None.
    Returns [N, O, H*up, W*up] in the dtype of x. `fused` builds the weights of every sample and runs one
    grouped convolution; otherwise the features are scaled before and after an ordinary one: equal up to
    rounding. "pointwise" does the first if k is 1, as products of matrices.
    Source: StyleGAN2 equations 1 (modulation) and 3 (demodulation).
    """
    batch, channels_in, height, width = x.shape
    channels_out, _, kernel, _ = weight.shape
    misc.assert_shape(styles, [batch, channels_in])
    if fused == "pointwise":
        fused = kernel == 1

    if x.dtype == torch.float16 and demodulate:
        # Demodulation cancels any factor per output channel or per sample, so take one that cannot overflow.
        fan_in = channels_in * kernel * kernel
        weight = weight / (weight.abs().amax(dim=[1, 2, 3], keepdim=True) + EPSILON) / math.sqrt(fan_in)
        styles = styles / (styles.abs().amax(dim=1, keepdim=True) + EPSILON)

    demodulation = None
    if demodulate:
        # sum over i, k of (s_i * w_oik)^2, which needs no weights of each sample
        power = styles.square().matmul(weight.square().sum(dim=[2, 3]).t())
        demodulation = (power + EPSILON).rsqrt()

    geometry = dict(f=resample_filter, up=up, padding=kernel // 2, flip_weight=(up == 1))
    if fused and batch > 0:
        per_sample = weight.unsqueeze(0) * styles.reshape(batch, 1, channels_in, 1, 1)
        if demodulation is not None:
            per_sample = per_sample * demodulation.reshape(batch, channels_out, 1, 1, 1)
        if kernel == 1 and up == 1:  # a matrix for each sample, in either memory format
            y = torch.bmm(per_sample.to(x.dtype).flatten(2), x.flatten(2))
            y = y.reshape(batch, channels_out, height, width)
            return y if noise is None else y + noise.to(y.dtype)
        grouped = per_sample.to(x.dtype).reshape(batch * channels_out, channels_in, kernel, kernel)
        y = x.reshape(1, batch * channels_in, height, width)
        y = conv2d_resample.conv2d_resample(y, grouped, groups=batch, **geometry)
        y = y.reshape(batch, channels_out, y.shape[2], y.shape[3])
        return y if noise is None else y + noise.to(y.dtype)

    y = scale_channels(x, styles)
    y = conv2d_resample.conv2d_resample(y, weight.to(x.dtype), **geometry)
    if demodulation is None:
        return y if noise is None else y + noise.to(y.dtype)
    if noise is None:
        return scale_channels(y, demodulation)
    return fma.fma(y, demodulation.to(y.dtype).reshape(batch, channels_out, 1, 1), noise.to(y.dtype))


@persistence.persistent_class
class Dense(torch.nn.Module):
    """Fully connected layer whose weights are scaled when used, so that all learn at one rate.

    [N, in_features] -> [N, out_features]. `lr_multiplier` scales the learning rate: the stored weights are
    divided by it. Source: Progressive GAN (1710.10196), section 4.1.
    """

    def __init__(self, in_features, out_features, activation="linear", lr_multiplier=1, bias_init=0):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.activation = activation
        self.weight_gain = lr_multiplier / math.sqrt(in_features)
        self.bias_gain = lr_multiplier
        self.weight = torch.nn.Parameter(torch.randn([out_features, in_features]) / lr_multiplier)
        self.bias = torch.nn.Parameter(torch.full([out_features], float(bias_init) / lr_multiplier))

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

    With num_ws None the result stays [N, w_dim] and cannot be truncated; with w_avg_beta None no average is
    kept. z_dim 0 maps labels alone (the discriminator's use). Source: StyleGAN (1812.04948), section 2.
    """

    def __init__(
        self,
        z_dim,
        c_dim,
        w_dim,
        num_ws,
        num_layers=8,
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
        if num_ws is not None and w_avg_beta is not None:
            self.register_buffer("w_avg", torch.zeros([w_dim]))

    def forward(self, z, c, truncation_psi=1, truncation_cutoff=None, update_emas=False):
        parts = []
        if self.z_dim > 0:
            misc.assert_shape(z, [None, self.z_dim])
            parts.append(unit_rms(z.to(torch.float32)))
        if self.c_dim > 0:
            misc.assert_shape(c, [None, self.c_dim])
            parts.append(unit_rms(self.embed(c.to(torch.float32))))
        w = torch.cat(parts, dim=1)
        for index in range(self.num_layers):
            w = getattr(self, "fc%d" % index)(w)

        if update_emas and self.w_avg_beta is not None:
            with torch.no_grad():
                self.w_avg.copy_(w.mean(dim=0).lerp(self.w_avg, self.w_avg_beta))
        if self.num_ws is None:
            return w
        ws = w.unsqueeze(1).repeat(1, self.num_ws, 1)
        if truncation_psi == 1:
            return ws
        cutoff = self.num_ws if truncation_cutoff is None else truncation_cutoff
        return torch.cat([self.w_avg.lerp(ws[:, :cutoff], truncation_psi), ws[:, cutoff:]], dim=1)

    def extra_repr(self):
        return "z_dim=%d, c_dim=%d, w_dim=%d, num_ws=%s" % (self.z_dim, self.c_dim, self.w_dim, self.num_ws)


@persistence.persistent_class
class StyledConv(torch.nn.Module):
    """Modulated 3x3 convolution, optional upsampling, noise, bias, activation.

    x [N, in_channels, H/up, W/up], w [N, w_dim] -> [N, out_channels, H, W], H and W of `resolution`.
    Source: StyleGAN2, figure 2.
    """

    def __init__(
        self,
        in_channels,
        out_channels,
        w_dim,
        resolution,
        kernel_size=3,
        up=1,
        use_noise=True,
        activation="lrelu",
        resample_filter=(1, 3, 3, 1),
        conv_clamp=None,
        channels_last=False,
        base_shape=(4, 4),
    ):
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.w_dim = w_dim
        self.resolution = resolution
        self.height, self.width = shape_at(resolution, base_shape)
        self.up = up
        self.use_noise = use_noise
        self.activation = activation
        self.conv_clamp = conv_clamp
        self.padding = kernel_size // 2
        self.act_gain = float(bias_act.activation_funcs[activation].def_gain)

        self.affine = Dense(w_dim, in_channels, bias_init=1)
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        weight = torch.randn([out_channels, in_channels, kernel_size, kernel_size])
        self.weight = torch.nn.Parameter(weight.to(memory_format=memory_format))
        self.register_buffer("resample_filter", upfirdn2d.setup_filter(list(resample_filter)))
        if use_noise:
            self.register_buffer("noise_const", torch.randn([self.height, self.width]))
            self.noise_strength = torch.nn.Parameter(torch.zeros([]))
        self.bias = torch.nn.Parameter(torch.zeros([out_channels]))

    def noise(self, batch, noise_mode):
        """Draw this layer's noise, in float32 so that the random stream is the same in every precision."""
        if noise_mode not in ("random", "const", "none"):
            raise ValueError("noise_mode must be 'random', 'const' or 'none', got %r" % (noise_mode,))
        if not self.use_noise or noise_mode == "none":
            return None
        if noise_mode == "const":
            return self.noise_const * self.noise_strength
        shape = [batch, 1, self.height, self.width]
        return torch.randn(shape, device=self.noise_strength.device) * self.noise_strength

    def forward(self, x, w, noise_mode="random", fused_modconv=True, gain=1):
        misc.assert_shape(x, [None, self.in_channels, self.height // self.up, self.width // self.up])
        x = modulated_conv2d(
            x,
            self.weight,
            self.affine(w),
            noise=self.noise(x.shape[0], noise_mode),
            up=self.up,
            resample_filter=self.resample_filter,
            fused=fused_modconv,
        )
        limit = scaled_clamp(self.conv_clamp, gain)
        return bias_act.bias_act(
            x, self.bias.to(x.dtype), act=self.activation, gain=self.act_gain * gain, clamp=limit
        )

    def extra_repr(self):
        sizes = (self.in_channels, self.out_channels, self.resolution, self.up)
        return "%d -> %d, resolution=%d, up=%d" % sizes


@persistence.persistent_class
class ToRGB(torch.nn.Module):
    """Modulated 1x1 convolution to image channels, without demodulation.

    x [N, in_channels, H, W], w [N, w_dim] -> [N, out_channels, H, W]. Source: StyleGAN2, figure 7.
    """

    def __init__(self, in_channels, out_channels, w_dim, kernel_size=1, conv_clamp=None, channels_last=False):
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.w_dim = w_dim
        self.conv_clamp = conv_clamp
        self.weight_gain = 1 / math.sqrt(in_channels * kernel_size**2)

        self.affine = Dense(w_dim, in_channels, bias_init=1)
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        weight = torch.randn([out_channels, in_channels, kernel_size, kernel_size])
        self.weight = torch.nn.Parameter(weight.to(memory_format=memory_format))
        self.bias = torch.nn.Parameter(torch.zeros([out_channels]))

    def forward(self, x, w, fused_modconv=True):
        styles = self.affine(w) * self.weight_gain
        x = modulated_conv2d(x, self.weight, styles, demodulate=False, fused=fused_modconv)
        return bias_act.bias_act(x, self.bias.to(x.dtype), clamp=self.conv_clamp)


@persistence.persistent_class
class ScaledConv(torch.nn.Module):
    """Plain convolution with weights scaled when used, optional resampling, bias and activation.

    [N, I, H, W] -> [N, O, H*up/down, W*up/down]. With `trainable` False weight and bias are buffers, which is
    how FreezeD (2002.10964) keeps them out of the optimizer.
    """

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        bias=True,
        activation="linear",
        up=1,
        down=1,
        resample_filter=(1, 3, 3, 1),
        conv_clamp=None,
        channels_last=False,
        trainable=True,
    ):
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.activation = activation
        self.up = up
        self.down = down
        self.conv_clamp = conv_clamp
        self.padding = kernel_size // 2
        self.weight_gain = 1 / math.sqrt(in_channels * kernel_size**2)
        self.act_gain = float(bias_act.activation_funcs[activation].def_gain)
        self.register_buffer("resample_filter", upfirdn2d.setup_filter(list(resample_filter)))

        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        weight = torch.randn([out_channels, in_channels, kernel_size, kernel_size])
        weight = weight.to(memory_format=memory_format)
        offset = torch.zeros([out_channels]) if bias else None
        if trainable:
            self.weight = torch.nn.Parameter(weight)
            self.bias = None if offset is None else torch.nn.Parameter(offset)
        else:
            self.register_buffer("weight", weight)
            if offset is None:
                self.bias = None
            else:
                self.register_buffer("bias", offset)

    def forward(self, x, gain=1):
        x = conv2d_resample.conv2d_resample(
            x,
            (self.weight * self.weight_gain).to(x.dtype),
            f=self.resample_filter,
            up=self.up,
            down=self.down,
            padding=self.padding,
            flip_weight=(self.up == 1),
        )
        bias = None if self.bias is None else self.bias.to(x.dtype)
        limit = scaled_clamp(self.conv_clamp, gain)
        return bias_act.bias_act(x, bias, act=self.activation, gain=self.act_gain * gain, clamp=limit)

    def extra_repr(self):
        sizes = (self.in_channels, self.out_channels, self.activation, self.up, self.down)
        return "%d -> %d, %s, up=%d, down=%d" % sizes


@persistence.persistent_class
class SynthesisBlock(torch.nn.Module):
    """All layers of the generator at one resolution; `in_channels` 0 makes the first, with its constant.

    x [N, in_channels, H/2, W/2] or None, img [N, C, H/2, W/2] or None, ws [N, num_conv + num_torgb, w_dim]
    -> (x [N, out_channels, H, W], img [N, C, H, W] or None).
    Source: StyleGAN2, figure 7: 'orig' (a), 'skip' (b), 'resnet' (c).
    """

    def __init__(
        self,
        in_channels,
        out_channels,
        w_dim,
        resolution,
        img_channels,
        is_last,
        architecture="skip",
        resample_filter=(1, 3, 3, 1),
        conv_clamp=256,
        use_fp16=False,
        fp16_channels_last=False,
        fused_modconv_default=True,
        base_shape=(4, 4),
        **layer_kwargs,
    ):
        super().__init__()
        if architecture not in ("orig", "skip", "resnet"):
            raise ValueError("architecture must be 'orig', 'skip' or 'resnet', got %r" % (architecture,))
        self.in_channels = in_channels
        self.w_dim = w_dim
        self.resolution = resolution
        self.height, self.width = shape_at(resolution, base_shape)
        self.img_channels = img_channels
        self.is_last = is_last
        self.architecture = architecture
        self.use_fp16 = use_fp16
        self.channels_last = use_fp16 and fp16_channels_last
        self.fused_modconv_default = fused_modconv_default
        self.num_conv = 1 if in_channels == 0 else 2
        self.num_torgb = 1 if is_last or architecture == "skip" else 0
        self.register_buffer("resample_filter", upfirdn2d.setup_filter(list(resample_filter)))

        shared = dict(conv_clamp=conv_clamp, channels_last=self.channels_last)
        styled = dict(base_shape=base_shape, **shared, **layer_kwargs)
        upsampling = dict(up=2, resample_filter=resample_filter)
        if in_channels == 0:
            self.const = torch.nn.Parameter(torch.randn([out_channels, self.height, self.width]))
        else:
            self.conv0 = StyledConv(in_channels, out_channels, w_dim, resolution, **upsampling, **styled)
        self.conv1 = StyledConv(out_channels, out_channels, w_dim, resolution, **styled)
        if self.num_torgb:
            self.torgb = ToRGB(out_channels, img_channels, w_dim, **shared)
        if in_channels != 0 and architecture == "resnet":
            self.skip = ScaledConv(
                in_channels,
                out_channels,
                kernel_size=1,
                bias=False,
                channels_last=self.channels_last,
                **upsampling,
            )

    def choose_fused(self, fused_modconv, device):
        """Choose how modulated convolutions run: an explicit choice of the caller has priority.

        On a CPU scale-convolve-scale trains faster, generates as fast, and holds no weights of each sample.
        """
        if fused_modconv is not None:
            return fused_modconv
        if device.type == "cpu":
            return False
        if self.fused_modconv_default == "inference_only":
            return not self.training
        return bool(self.fused_modconv_default)

    def forward(self, x, img, ws, force_fp32=False, fused_modconv=None, noise_mode="random"):
        misc.assert_shape(ws, [None, self.num_conv + self.num_torgb, self.w_dim])
        rows = iter(ws.unbind(dim=1))
        dtype = working_dtype(self.use_fp16, force_fp32, ws.device)
        memory_format = features_format(self.channels_last, ws.device)
        fused = self.choose_fused(fused_modconv, ws.device)
        styled = dict(noise_mode=noise_mode, fused_modconv=fused)

        if self.in_channels == 0:
            x = self.const.to(dtype).unsqueeze(0).repeat(ws.shape[0], 1, 1, 1)
            x = x.contiguous(memory_format=memory_format)
            x = self.conv1(x, next(rows), **styled)
        else:
            misc.assert_shape(x, [None, self.in_channels, self.height // 2, self.width // 2])
            x = x.to(dtype=dtype, memory_format=memory_format)
            if self.architecture == "resnet":
                shortcut = self.skip(x, gain=HALVED_POWER)
                x = self.conv0(x, next(rows), **styled)
                x = shortcut + self.conv1(x, next(rows), gain=HALVED_POWER, **styled)
            else:
                x = self.conv0(x, next(rows), **styled)
                x = self.conv1(x, next(rows), **styled)

        if img is not None:
            img = upfirdn2d.upsample2d(img, self.resample_filter)
        if self.num_torgb:
            rgb = self.torgb(x, next(rows), fused_modconv=fused)
            rgb = rgb.to(dtype=torch.float32, memory_format=torch.contiguous_format)
            img = rgb if img is None else img + rgb  # summed in float32 whatever the block computes in
        return x, img


@persistence.persistent_class
class SynthesisNetwork(torch.nn.Module):
    """Intermediate latents to images: ws [N, num_ws, w_dim] -> img [N, img_channels, H, W] float32."""

    def __init__(
        self,
        w_dim,
        img_resolution,
        img_channels,
        channel_base=32768,
        channel_max=512,
        num_fp16_res=4,
        **block_kwargs,
    ):
        super().__init__()
        self.w_dim = w_dim
        self.img_resolution = img_resolution
        self.img_channels = img_channels
        self.num_fp16_res = num_fp16_res
        self.block_resolutions = block_sizes(img_resolution)
        self.img_resolution_log2 = len(self.block_resolutions) + 1
        self.num_ws = 0

        lowest_half = half_precision_from(img_resolution, num_fp16_res)
        channels_in = 0
        for resolution in self.block_resolutions:
            channels = num_channels(resolution, channel_base, channel_max)
            is_last = resolution == img_resolution
            block = SynthesisBlock(
                channels_in,
                channels,
                w_dim=w_dim,
                resolution=resolution,
                img_channels=img_channels,
                is_last=is_last,
                use_fp16=num_fp16_res > 0 and resolution >= lowest_half,
                **block_kwargs,
            )
            setattr(self, "b%d" % resolution, block)
            self.num_ws += block.num_conv + (block.num_torgb if is_last else 0)
            channels_in = channels

    def forward(self, ws, update_emas=False, noise_mode="random", fused_modconv=None, force_fp32=False):
        del update_emas  # nothing here is averaged
        misc.assert_shape(ws, [None, self.num_ws, self.w_dim])
        ws = ws.to(torch.float32)
        x = img = None
        first = 0
        for resolution in self.block_resolutions:
            block = getattr(self, "b%d" % resolution)
            # A block's torgb reads the same row as the first convolution of the next block.
            rows = ws.narrow(1, first, block.num_conv + block.num_torgb)
            first += block.num_conv
            x, img = block(
                x, img, rows, force_fp32=force_fp32, fused_modconv=fused_modconv, noise_mode=noise_mode
            )
        return img

    def extra_repr(self):
        sizes = (self.w_dim, self.num_ws, self.img_resolution, self.img_channels, self.num_fp16_res)
        return "w_dim=%d, num_ws=%d, img_resolution=%d, img_channels=%d, num_fp16_res=%d" % sizes


@persistence.persistent_class
class Generator(torch.nn.Module):
    """StyleGAN2's generator: z [N, z_dim], c [N, c_dim] -> img [N, img_channels, H, W] float32.

    Options of the synthesis network (channel_base, channel_max, num_fp16_res, architecture, resample_filter,
    conv_clamp, use_noise, activation, fused_modconv_default, fp16_channels_last) come as keywords or, as
    checkpoints of the first PyTorch generation have them, inside `synthesis_kwargs`. `base_shape`: see above.
    """

    def __init__(
        self,
        z_dim,
        c_dim,
        w_dim,
        img_resolution,
        img_channels,
        mapping_kwargs=None,
        synthesis_kwargs=None,
        base_shape=(4, 4),
        **more_synthesis_kwargs,
    ):
        super().__init__()
        self.z_dim = z_dim
        self.c_dim = c_dim
        self.w_dim = w_dim
        self.img_resolution = img_resolution
        self.img_channels = img_channels
        self.base_shape = list(base_shape)
        options = dict(synthesis_kwargs or {}, base_shape=self.base_shape)
        options.update(more_synthesis_kwargs)
        self.synthesis = SynthesisNetwork(w_dim, img_resolution, img_channels, **options)
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


@persistence.persistent_class
class MinibatchStd(torch.nn.Module):
    """Append each group's mean standard deviation as `num_channels` channels: [N, C, H, W] -> [N, C+F, H, W].

    Groups hold `group_size` samples (None: the whole batch), fewer if the batch is smaller; the batch must
    divide into them. Source: Progressive GAN (1710.10196), section 3.
    """

    def __init__(self, group_size, num_channels=1):
        super().__init__()
        self.group_size = group_size
        self.num_channels = num_channels

    def forward(self, x):
        batch, channels, height, width = x.shape
        size = batch if self.group_size is None else min(self.group_size, batch)
        if size == 0:
            return torch.cat([x, x.new_zeros([0, self.num_channels, height, width])], dim=1)
        if batch % size != 0:
            raise ValueError(
                "the discriminator compares samples in groups of %d, and a batch of %d does not divide into "
                "them: use a multiple of %d" % (size, batch, size)
            )
        split = [size, batch // size, self.num_channels, channels // self.num_channels, height, width]
        grouped = x.reshape(split)
        spread = (grouped.var(dim=0, unbiased=False) + EPSILON).sqrt().mean(dim=[2, 3, 4])
        planes = spread.reshape(-1, self.num_channels, 1, 1).repeat(size, 1, height, width)
        return torch.cat([x, planes], dim=1)


@persistence.persistent_class
class DiscriminatorBlock(torch.nn.Module):
    """All layers of the discriminator at one resolution; `in_channels` 0 makes the first block.

    x [N, in_channels, H, W] or None, img [N, C, H, W] or None -> (x [N, O, H/2, W/2], img or None).
    The first `freeze_layers` convolutions of the whole network, counted fromrgb, conv0, conv1, skip in each
    block starting at `first_layer_idx`, are buffers.
    Source: StyleGAN2, figure 7: 'orig' (d), 'skip' (e), 'resnet' (f).
    """

    def __init__(
        self,
        in_channels,
        tmp_channels,
        out_channels,
        resolution,
        img_channels,
        first_layer_idx,
        architecture="resnet",
        activation="lrelu",
        resample_filter=(1, 3, 3, 1),
        conv_clamp=None,
        use_fp16=False,
        fp16_channels_last=False,
        freeze_layers=0,
        base_shape=(4, 4),
    ):
        super().__init__()
        if architecture not in ("orig", "skip", "resnet"):
            raise ValueError("architecture must be 'orig', 'skip' or 'resnet', got %r" % (architecture,))
        self.in_channels = in_channels
        self.resolution = resolution
        self.height, self.width = shape_at(resolution, base_shape)
        self.img_channels = img_channels
        self.first_layer_idx = first_layer_idx
        self.architecture = architecture
        self.use_fp16 = use_fp16
        self.channels_last = use_fp16 and fp16_channels_last
        self.register_buffer("resample_filter", upfirdn2d.setup_filter(list(resample_filter)))

        layers = []
        if in_channels == 0 or architecture == "skip":
            layers.append(("fromrgb", img_channels, tmp_channels, dict(kernel_size=1)))
        layers.append(("conv0", tmp_channels, tmp_channels, dict(kernel_size=3)))
        downsampling = dict(down=2, resample_filter=resample_filter)
        layers.append(("conv1", tmp_channels, out_channels, dict(kernel_size=3, **downsampling)))
        if architecture == "resnet":
            options = dict(kernel_size=1, bias=False, **downsampling)
            layers.append(("skip", tmp_channels, out_channels, options))
        self.num_layers = len(layers)
        for index, (name, channels_in, channels_out, options) in enumerate(layers, first_layer_idx):
            if name != "skip":
                options.update(activation=activation, conv_clamp=conv_clamp)
            options.update(trainable=index >= freeze_layers, channels_last=self.channels_last)
            setattr(self, name, ScaledConv(channels_in, channels_out, **options))

    def forward(self, x, img, force_fp32=False):
        given = img if x is None else x
        dtype = working_dtype(self.use_fp16, force_fp32, given.device)
        memory_format = features_format(self.channels_last, given.device)
        if x is not None:
            misc.assert_shape(x, [None, self.in_channels, self.height, self.width])
            x = x.to(dtype=dtype, memory_format=memory_format)
        if self.in_channels == 0 or self.architecture == "skip":
            misc.assert_shape(img, [None, self.img_channels, self.height, self.width])
            img = img.to(dtype=dtype, memory_format=memory_format)
            features = self.fromrgb(img)
            x = features if x is None else x + features
            img = upfirdn2d.downsample2d(img, self.resample_filter) if self.architecture == "skip" else None

        if self.architecture == "resnet":
            shortcut = self.skip(x, gain=HALVED_POWER)
            return shortcut + self.conv1(self.conv0(x), gain=HALVED_POWER), img
        return self.conv1(self.conv0(x)), img


@persistence.persistent_class
class DiscriminatorEpilogue(torch.nn.Module):
    """Last layers of the discriminator, always float32: x [N, in_channels, H, W] -> [N, 1] logits.

    With cmap_dim above 0 the logit is the projection on `cmap` [N, cmap_dim].
    Source: StyleGAN2, appendix B; projection discriminator (1802.05637).
    """

    def __init__(
        self,
        in_channels,
        cmap_dim,
        resolution,
        img_channels,
        architecture="resnet",
        mbstd_group_size=4,
        mbstd_num_channels=1,
        activation="lrelu",
        conv_clamp=None,
        base_shape=(4, 4),
    ):
        super().__init__()
        self.in_channels = in_channels
        self.cmap_dim = cmap_dim
        self.resolution = resolution
        self.height, self.width = shape_at(resolution, base_shape)
        self.img_channels = img_channels
        self.architecture = architecture
        if architecture == "skip":
            self.fromrgb = ScaledConv(img_channels, in_channels, kernel_size=1, activation=activation)
        self.mbstd = MinibatchStd(mbstd_group_size, mbstd_num_channels) if mbstd_num_channels > 0 else None
        self.conv = ScaledConv(
            in_channels + mbstd_num_channels,
            in_channels,
            kernel_size=3,
            activation=activation,
            conv_clamp=conv_clamp,
        )
        self.fc = Dense(in_channels * self.height * self.width, in_channels, activation=activation)
        self.out = Dense(in_channels, 1 if cmap_dim == 0 else cmap_dim)

    def forward(self, x, img, cmap):
        misc.assert_shape(x, [None, self.in_channels, self.height, self.width])
        x = x.to(dtype=torch.float32, memory_format=torch.contiguous_format)
        if self.architecture == "skip":
            misc.assert_shape(img, [None, self.img_channels, self.height, self.width])
            x = x + self.fromrgb(img.to(dtype=torch.float32, memory_format=torch.contiguous_format))
        if self.mbstd is not None:
            x = self.mbstd(x)
        x = self.out(self.fc(self.conv(x).flatten(1)))
        if self.cmap_dim == 0:
            return x
        misc.assert_shape(cmap, [None, self.cmap_dim])
        return (x * cmap).sum(dim=1, keepdim=True) / math.sqrt(self.cmap_dim)


@persistence.persistent_class
class Discriminator(torch.nn.Module):
    """StyleGAN2's discriminator: img [N, img_channels, H, W], c [N, c_dim] -> logits [N, 1] float32."""

    def __init__(
        self,
        c_dim,
        img_resolution,
        img_channels,
        architecture="resnet",
        channel_base=32768,
        channel_max=512,
        num_fp16_res=4,
        conv_clamp=256,
        cmap_dim=None,
        block_kwargs=None,
        mapping_kwargs=None,
        epilogue_kwargs=None,
        base_shape=(4, 4),
    ):
        super().__init__()
        self.c_dim = c_dim
        self.img_resolution = img_resolution
        self.img_channels = img_channels
        self.base_shape = list(base_shape)
        sizes = block_sizes(img_resolution)
        self.img_resolution_log2 = len(sizes) + 1
        self.block_resolutions = sizes[:0:-1]

        def channels_at(resolution):
            return num_channels(resolution, channel_base, channel_max)

        if c_dim == 0:
            cmap_dim = 0
        elif cmap_dim is None:
            cmap_dim = channels_at(4)
        lowest_half = half_precision_from(img_resolution, num_fp16_res)
        shared = dict(img_channels=img_channels, architecture=architecture, conv_clamp=conv_clamp)
        shared["base_shape"] = self.base_shape
        layer_count = 0
        for resolution in self.block_resolutions:
            channels = channels_at(resolution)
            block = DiscriminatorBlock(
                0 if resolution == img_resolution else channels,
                channels,
                channels_at(resolution // 2),
                resolution=resolution,
                first_layer_idx=layer_count,
                use_fp16=num_fp16_res > 0 and resolution >= lowest_half,
                **shared,
                **(block_kwargs or {}),
            )
            setattr(self, "b%d" % resolution, block)
            layer_count += block.num_layers
        if c_dim > 0:
            options = dict(z_dim=0, c_dim=c_dim, w_dim=cmap_dim, num_ws=None, w_avg_beta=None)
            self.mapping = MappingNetwork(**dict(mapping_kwargs or {}, **options))
        self.b4 = DiscriminatorEpilogue(
            channels_at(4), cmap_dim=cmap_dim, resolution=4, **shared, **(epilogue_kwargs or {})
        )

    def forward(self, img, c, update_emas=False, force_fp32=False):
        del update_emas  # nothing here is averaged
        misc.assert_shape(img, [None, self.img_channels, *shape_at(self.img_resolution, self.base_shape)])
        x = None
        for resolution in self.block_resolutions:
            x, img = getattr(self, "b%d" % resolution)(x, img, force_fp32=force_fp32)
        cmap = self.mapping(None, c) if self.c_dim > 0 else None
        return self.b4(x, img, cmap)

    def extra_repr(self):
        sizes = (self.c_dim, self.img_resolution, self.img_channels)
        return "c_dim=%d, img_resolution=%d, img_channels=%d" % sizes
