# SPDX-License-Identifier: Apache-2.0
"""Adaptive discriminator augmentation: a chain of random, differentiable image transformations.

Source: Karras et al. 2020, "Training Generative Adversarial Networks with Limited Data" (arXiv 2006.06676),
appendix B. All transformations of one kind are collected first and applied once: the geometric ones as a
single resampling of the image, the color ones as a single affine map of RGB space.

This file is embedded in exported pickles: it imports only what those may import and is read by Python 3.8.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

from torch_utils import persistence
from torch_utils.ops import conv2d_gradfix, grid_sample_gradfix, upfirdn2d

# Low-pass filters of two orthogonal wavelets. sym6 resamples images: upsampling with it and downsampling with
# its mirror image gives the image back exactly, so transformations that do nothing really do nothing.
SYM6 = [
    0.0154041093, 0.0034907121, -0.1179901111, -0.0483117426, 0.4910559419, 0.7876411410,
    0.3379294217, -0.0726375228, -0.0210602925, 0.0447249018, 0.0017677119, -0.0078007083,
]  # fmt: skip
SYM2 = [-0.1294095226, 0.2241438680, 0.8365163037, 0.4829629131]

# Power of natural images in the four octave bands of the image filter, lowest band first.
BAND_POWER = [10 / 13, 1 / 13, 1 / 13, 1 / 13]


def octave_filter_bank(lowpass, num_bands):
    """Make zero-phase filters `[num_bands, taps]` for octaves, the lowest first; they add up to one impulse.

    The highest band is what a wavelet's low-pass leaves over; the bands below it are the bank of one octave
    less, stretched to twice its length, behind that low-pass.
    """
    lowpass = np.asarray(lowpass, dtype=np.float64)
    low = np.convolve(lowpass, lowpass[::-1]) / 2
    high = -low
    high[low.size // 2] += 1
    bank = np.ones([1, 1])
    while len(bank) < num_bands:
        stretched = np.zeros([len(bank), bank.shape[1] * 2 - 1])
        stretched[:, ::2] = bank
        rows = [np.convolve(row, low) for row in stretched]
        margin = (rows[0].size - high.size) // 2
        bank = np.stack([*rows, np.pad(high, margin)])
    return bank


_constants = {}


def _constant(values, device, keep=True):
    """Return a float32 tensor of a nested tuple, kept for each device unless the values follow from data.

    Copying one to the device each time would make the host wait, which a CUDA graph does not allow.
    """
    if not keep:
        return torch.tensor(values, dtype=torch.float32, device=device)
    key = (values, str(device))
    if key not in _constants:
        _constants[key] = torch.tensor(values, dtype=torch.float32, device=device)
    return _constants[key]


class _Draws:
    """Random numbers for a batch of images, or the same quantile of each distribution for every image."""

    def __init__(self, num_images, device, quantile=None):
        self.num_images = num_images
        self.device = device
        self.quantile = quantile

    def unit(self, columns=1):
        """Draw uniformly from [0, 1): `[N, columns]`."""
        if self.quantile is None:
            return torch.rand([self.num_images, columns], device=self.device)
        return torch.full([self.num_images, columns], float(self.quantile), device=self.device)

    def symmetric(self, limit, columns=1):
        """Draw uniformly from [-limit, limit): `[N, columns]`."""
        return (self.unit(columns) * 2 - 1) * limit

    def level(self, count):
        """Draw one of the integers 0 … count-1, as float: `[N, 1]`."""
        return torch.floor(self.unit() * count)

    def normal(self, std, columns=1):
        """Draw from a normal with mean 0: `[N, columns]`. Quantiles erfinv(2q-1)·std lack the factor √2."""
        if self.quantile is None:
            return torch.randn([self.num_images, columns], device=self.device) * std
        return torch.erfinv(self.unit(columns) * 2 - 1) * std

    def half_normal(self, std):
        """Draw the magnitude of a normal: `[N, 1]`."""
        return self.normal(std).abs() if self.quantile is None else torch.erfinv(self.unit()) * std

    def gate(self, probability, drawn, neutral):
        """Keep `drawn` for randomly selected images and use `neutral` for the others."""
        chosen = torch.rand([self.num_images, 1], device=self.device) < probability
        return torch.where(chosen, drawn, torch.full_like(drawn, neutral))


class _Warp:
    """Where each image's pixels come from: `source = linear · target + offset`, in pixels from the center.

    Transformations are appended in the order in which they change the image; the map from target to source
    is the inverse of all of them together, so each appended one multiplies its own inverse from the right.
    """

    def __init__(self, num_images, device):
        self.linear = torch.eye(2, device=device).repeat(num_images, 1, 1)  # [N, 2, 2]
        self.offset = torch.zeros([num_images, 2, 1], device=device)

    def enlarge(self, factors):
        """Scale the image by `factors [N, 2]` along x and y."""
        self.linear = self.linear / factors.unsqueeze(1)

    def rotate(self, angle):
        """Turn the image by `angle [N, 1]` radians, counter-clockwise as seen."""
        cos, sin = angle.cos(), angle.sin()
        turn_back = torch.cat([cos, -sin, sin, cos], dim=1).reshape(-1, 2, 2)
        self.linear = self.linear @ turn_back

    def move(self, distance):
        """Shift the image by `distance [N, 2]` pixels."""
        self.offset = self.offset - self.linear @ distance.unsqueeze(2)


class _ColorMap:
    """An affine map of RGB space for each image, `linear · rgb + offset`; steps multiply from the left."""

    def __init__(self, num_images, device):
        self.linear = torch.eye(3, device=device).repeat(num_images, 1, 1)  # [N, 3, 3]
        self.offset = torch.zeros([num_images, 3, 1], device=device)
        self.gray = torch.full([3, 3], 1 / 3, device=device)  # projection on the gray axis

    def add(self, amount):
        """Brighten by `amount [N, 1]`."""
        self.offset = self.offset + amount.unsqueeze(2)

    def multiply(self, factor):
        """Scale all channels by `factor [N, 1]`."""
        self.apply(torch.eye(3, device=factor.device) * factor.unsqueeze(2))

    def scale_luma(self, factor):
        """Scale the part along the gray axis by `factor [N, 1]`."""
        self.apply(torch.eye(3, device=factor.device) + self.gray * (factor - 1).unsqueeze(2))

    def scale_chroma(self, factor):
        """Scale the part across the gray axis by `factor [N, 1]`."""
        self.apply(self.gray + (torch.eye(3, device=factor.device) - self.gray) * factor.unsqueeze(2))

    def rotate_hue(self, angle):
        """Turn colors around the gray axis by `angle [N, 1]` radians (Rodrigues' formula)."""
        cos, sin = angle.cos().unsqueeze(2), angle.sin().unsqueeze(2)
        across = _constant(((0.0, -1.0, 1.0), (1.0, 0.0, -1.0), (-1.0, 1.0, 0.0)), angle.device)
        identity = torch.eye(3, device=angle.device)
        self.apply(self.gray + (identity - self.gray) * cos + across * (sin / math.sqrt(3)))

    def apply(self, matrix):
        self.linear = matrix @ self.linear
        self.offset = matrix @ self.offset


def reflect_pad(x, left, right, top, bottom):
    """Pad an image by reflection, in several steps if one reflection is not wide enough.

    By flips, whose gradient adds in a fixed order; that of `F.pad` on CUDA does not.
    """
    while left or right or top or bottom:
        most_x, most_y = x.shape[3] - 1, x.shape[2] - 1
        if min(most_x, most_y) < 1:
            return F.pad(x, [left, right, top, bottom], mode="replicate")
        step = [min(left, most_x), min(right, most_x), min(top, most_y), min(bottom, most_y)]
        x = _reflect_axis(_reflect_axis(x, 3, step[0], step[1]), 2, step[2], step[3])
        left, right, top, bottom = left - step[0], right - step[1], top - step[2], bottom - step[3]
    return x


def _reflect_axis(x, dim, before, after):
    """Pad one axis by reflection, by less than its size."""
    if not before and not after:
        return x
    first, last = x.narrow(dim, 1, before), x.narrow(dim, x.shape[dim] - 1 - after, after)
    return torch.cat([first.flip(dim), x, last.flip(dim)], dim=dim)


def _multiply_rows_and_columns(images, resize, x_argument, y_argument):
    """Apply a linear map of rows, `resize(rows, argument)`, to rows and columns of images, as matrices.

    On CPUs these products are several times faster than convolutions with a dozen taps for each channel.
    """
    matrices = []
    for size, argument in [(images.shape[3], x_argument), (images.shape[2], y_argument)]:
        unit_rows = torch.eye(size, dtype=images.dtype, device=images.device)
        matrices.append(resize(unit_rows[None, None], argument)[0, 0])
    return matrices[1].t() @ (images @ matrices[0])


def _convolve_each(x, taps):
    """Convolve each image of `[N, C, H, W]` with its own `taps [N, T]` along x and y, edges reflected."""
    N, C, H, W = x.shape
    reach = taps.shape[1] // 2
    taps = taps.to(x.dtype).repeat_interleave(C, dim=0)
    x = reflect_pad(x, reach, reach, reach, reach).reshape(1, N * C, H + 2 * reach, W + 2 * reach)
    x = conv2d_gradfix.conv2d(x, taps[:, None, None, :], groups=N * C)
    x = conv2d_gradfix.conv2d(x, taps[:, None, :, None], groups=N * C)
    return x.reshape(N, C, H, W)


@persistence.persistent_class
class AugmentPipe(torch.nn.Module):
    """Augment images at random; every probability is a multiplier of the buffer `p`, which training adapts.

    Images are `[N, C, H, W]` float32 or float64 with range [-1, 1]. Color transformations take 1, 3 or 4
    channels: gray is an RGB image of three equal channels whose result is averaged, and of four channels the
    last (alpha) keeps its values. Everything else treats all channels alike. The result can be differentiated
    twice.

    Source: arXiv 2006.06676, appendix B; the defaults of the strengths are the paper's.
    """

    def __init__(
        self,
        xflip=0, rotate90=0, xint=0, xint_max=0.125,
        scale=0, rotate=0, aniso=0, xfrac=0, scale_std=0.2, rotate_max=1, aniso_std=0.2, xfrac_std=0.125,
        brightness=0, contrast=0, lumaflip=0, hue=0, saturation=0,
        brightness_std=0.2, contrast_std=0.5, hue_max=1, saturation_std=1,
        imgfilter=0, imgfilter_bands=(1, 1, 1, 1), imgfilter_std=1,
        noise=0, cutout=0, noise_std=0.1, cutout_size=0.5,
    ):  # fmt: skip
        super().__init__()
        self.register_buffer("p", torch.ones([]))

        # Pixel blitting: probabilities, and the largest shift as a fraction of the image size.
        self.xflip = float(xflip)
        self.rotate90 = float(rotate90)
        self.xint = float(xint)
        self.xint_max = float(xint_max)

        # General geometry: probabilities, log2 standard deviations, half turns, fractions of the image size.
        self.scale = float(scale)
        self.rotate = float(rotate)
        self.aniso = float(aniso)
        self.xfrac = float(xfrac)
        self.scale_std = float(scale_std)
        self.rotate_max = float(rotate_max)
        self.aniso_std = float(aniso_std)
        self.xfrac_std = float(xfrac_std)

        # Color: probabilities, and strengths (contrast and saturation as log2, hue in half turns).
        self.brightness = float(brightness)
        self.contrast = float(contrast)
        self.lumaflip = float(lumaflip)
        self.hue = float(hue)
        self.saturation = float(saturation)
        self.brightness_std = float(brightness_std)
        self.contrast_std = float(contrast_std)
        self.hue_max = float(hue_max)
        self.saturation_std = float(saturation_std)

        # Image filter: probability, its multiplier for each octave, log2 standard deviation of the gains.
        self.imgfilter = float(imgfilter)
        self.imgfilter_bands = [float(band) for band in imgfilter_bands]
        self.imgfilter_std = float(imgfilter_std)

        # Corruptions: probabilities, standard deviation of the noise's strength, side of the hole (fraction).
        self.noise = float(noise)
        self.cutout = float(cutout)
        self.noise_std = float(noise_std)
        self.cutout_size = float(cutout_size)

        self.register_buffer("Hz_geom", upfirdn2d.setup_filter(SYM6))
        bank = octave_filter_bank(SYM2, num_bands=len(BAND_POWER))
        self.register_buffer("Hz_fbank", torch.as_tensor(bank, dtype=torch.float32))

    def forward(self, images, debug_percentile=None, full_padding=False):
        """Augment a batch: `[N, C, H, W]` to the same shape and dtype.

        With `debug_percentile` q in (0, 1) every strength is the q-quantile of its distribution instead of a
        random one; which images are touched is still decided by chance, and noise stays noise.
        `full_padding` pads by as much as any draw may need instead of what this batch needs, which takes
        memory and lets the host run ahead of the device.
        """
        draws = _Draws(images.shape[0], images.device, debug_percentile)
        images = self._geometry(images, draws, full_padding)
        images = self._color(images, draws)
        images = self._filter_octaves(images, draws)
        images = self._add_noise(images, draws)
        return self._cut_out(images, draws)

    # ---- Geometry

    def _geometry(self, images, draws, full_padding):
        kinds = [self.xflip, self.rotate90, self.xint, self.scale, self.rotate, self.aniso, self.xfrac]
        if not any(probability > 0 for probability in kinds):
            return images
        size = _constant((images.shape[3], images.shape[2]), images.device)
        warp = _Warp(images.shape[0], images.device)
        self._draw_blits(warp, draws, size)
        self._draw_general(warp, draws, size)
        return self._resample(images, warp, full_padding)

    def _draw_blits(self, warp, draws, size):
        """Draw mirroring, quarter turns, and shifts by whole pixels."""
        if self.xflip > 0:
            mirrored = draws.gate(self.xflip * self.p, draws.level(2), 0)
            warp.enlarge(torch.cat([1 - 2 * mirrored, torch.ones_like(mirrored)], dim=1))
        if self.rotate90 > 0:
            quarters = draws.gate(self.rotate90 * self.p, draws.level(4), 0)
            warp.rotate(quarters * (math.pi / 2))
        if self.xint > 0:
            share = draws.gate(self.xint * self.p, draws.symmetric(self.xint_max, columns=2), 0)
            warp.move(torch.round(share * size))

    def _draw_general(self, warp, draws, size):
        """Scale, rotate, stretch, rotate again, shift.

        Rotating before and after the stretch makes its direction random; the probability asked is that of at
        least one of the two.
        """
        p_rotate = 1 - torch.sqrt((1 - self.rotate * self.p).clamp(0, 1))
        if self.scale > 0:
            factor = draws.gate(self.scale * self.p, torch.exp2(draws.normal(self.scale_std)), 1)
            warp.enlarge(factor.repeat(1, 2))
        if self.rotate > 0:
            warp.rotate(draws.gate(p_rotate, draws.symmetric(math.pi * self.rotate_max), 0))
        if self.aniso > 0:
            factor = draws.gate(self.aniso * self.p, torch.exp2(draws.normal(self.aniso_std)), 1)
            warp.enlarge(torch.cat([factor, 1 / factor], dim=1))
        if self.rotate > 0:
            limit = math.pi * self.rotate_max if draws.quantile is None else 0.0
            warp.rotate(draws.gate(p_rotate, draws.symmetric(limit), 0))
        if self.xfrac > 0:
            share = draws.gate(self.xfrac * self.p, draws.normal(self.xfrac_std, columns=2), 0)
            warp.move(share * size)

    def _resample(self, images, warp, full_padding=False):
        """Read the images at the warp's source positions, at twice the resolution so that nothing aliases."""
        H, W = images.shape[2:]
        device = images.device
        support = self.Hz_geom.shape[0] // 2  # pixels that the two filters together look beyond a position
        margin = support - 1  # samples at double resolution that the second filter reads beyond the image
        left, right, top, bottom = most = [W - 1, W - 1, H - 1, H - 1]
        if not full_padding:
            left, right, top, bottom = self._padding(warp, H, W, support, most)
        images = self._enlarge(images, left, right, top, bottom)

        # affine_grid and grid_sample measure in halves of their own images: the former covers W + margin
        # pixels, the latter the padded image, whose center has moved by half the difference of the paddings.
        # Both put the center of pixel i at sample 2i + 1/2, where a symmetric filter of even length leaves
        # it; sym6 leaves it at 2i.
        target = _constant((W + margin, H + margin), device) / 2
        source = _constant((W + left + right, H + top + bottom), device, keep=full_padding) / 2
        moved = _constant(((left - right,), (top - bottom,)), device, keep=full_padding) / 2
        offset = warp.offset + moved + (warp.linear.sum(dim=2, keepdim=True) - 1) / 4
        theta = torch.cat([warp.linear * target, offset], dim=2) / source[:, None]
        shape = [images.shape[0], images.shape[1], 2 * (H + margin), 2 * (W + margin)]
        grid = F.affine_grid(theta.to(images.dtype), shape, align_corners=False)
        images = grid_sample_gradfix.grid_sample(images, grid)
        return self._shrink(images, margin)

    def _enlarge(self, images, left, right, top, bottom):
        """Reflect-pad by so many pixels a side and double the resolution."""
        if images.device.type == "cpu":

            def double(rows, padding):
                rows = F.pad(rows, [*padding, 0, 0], mode="reflect")
                return upfirdn2d.upsample2d(rows, self.Hz_geom[None, :], up=[2, 1])

            return _multiply_rows_and_columns(images, double, [left, right], [top, bottom])
        return upfirdn2d.upsample2d(reflect_pad(images, left, right, top, bottom), self.Hz_geom, up=2)

    def _shrink(self, images, margin):
        """Halve the resolution; `margin` samples on every side are there for the filter only."""
        if images.device.type == "cpu":

            def halve(rows, margin):
                taps = self.Hz_geom[None, :]
                return upfirdn2d.downsample2d(rows, taps, down=[2, 1], padding=[-margin, 0], flip_filter=True)

            return _multiply_rows_and_columns(images, halve, margin, margin)
        return upfirdn2d.downsample2d(images, self.Hz_geom, down=2, padding=-margin, flip_filter=True)

    @staticmethod
    def _padding(warp, height, width, support, most):
        """Return the pixels to add left, right, above and below: one number per side for the whole batch."""
        cx, cy = (width - 1) / 2, (height - 1) / 2
        device = warp.linear.device
        corners = _constant(((-cx, cx, cx, -cx), (-cy, -cy, cy, cy)), device)
        reach = (warp.linear @ corners + warp.offset).permute(1, 0, 2).flatten(1)
        reach = torch.stack([-reach[0], reach[0], -reach[1], reach[1]]).max(dim=1).values
        beyond = reach - _constant((cx, cx, cy, cy), device) + support
        return [min(max(math.ceil(pixels), 0), limit) for pixels, limit in zip(beyond.tolist(), most)]

    # ---- Color

    def _color(self, images, draws):
        kinds = [self.brightness, self.contrast, self.lumaflip, self.hue, self.saturation]
        if not any(probability > 0 for probability in kinds):
            return images
        color = _ColorMap(images.shape[0], images.device)
        if self.brightness > 0:
            color.add(draws.gate(self.brightness * self.p, draws.normal(self.brightness_std), 0))
        if self.contrast > 0:
            color.multiply(draws.gate(self.contrast * self.p, torch.exp2(draws.normal(self.contrast_std)), 1))
        if self.lumaflip > 0:
            color.scale_luma(1 - 2 * draws.gate(self.lumaflip * self.p, draws.level(2), 0))
        if self.hue > 0:
            color.rotate_hue(draws.gate(self.hue * self.p, draws.symmetric(math.pi * self.hue_max), 0))
        if self.saturation > 0:
            factor = torch.exp2(draws.normal(self.saturation_std))
            color.scale_chroma(draws.gate(self.saturation * self.p, factor, 1))
        return self._recolor(images, color.linear.to(images.dtype), color.offset.to(images.dtype))

    @staticmethod
    def _recolor(images, linear, offset):
        channels = images.shape[1]
        if channels == 1:
            gain = linear.sum(dim=2).mean(dim=1)[:, None, None, None]
            return images * gain + offset.mean(dim=1)[:, :, None, None]
        if channels not in (3, 4):
            raise ValueError(
                "Color augmentation works on images of 1, 3 or 4 channels, not {}: set brightness, "
                "contrast, lumaflip, hue and saturation to 0.".format(channels)
            )
        colors = images[:, :3].flatten(2)
        colors = torch.baddbmm(offset, linear, colors).reshape(images[:, :3].shape)
        return colors if channels == 3 else torch.cat([colors, images[:, 3:]], dim=1)

    # ---- Filter and corruptions

    def _filter_octaves(self, images, draws):
        """Amplify or attenuate octaves of the image; each step keeps the power of natural images."""
        if not self.imgfilter > 0:
            return images
        num_bands = self.Hz_fbank.shape[0]
        power = _constant(tuple(BAND_POWER), images.device)
        gains = torch.ones([images.shape[0], num_bands], device=images.device)
        for band, multiplier in enumerate(self.imgfilter_bands):
            drawn = torch.exp2(draws.normal(self.imgfilter_std))
            step = torch.ones_like(gains)
            step[:, band : band + 1] = draws.gate(self.imgfilter * self.p * multiplier, drawn, 1)
            gains = gains * step / (power * step.square()).sum(dim=1, keepdim=True).sqrt()
        return _convolve_each(images, gains @ self.Hz_fbank)

    def _add_noise(self, images, draws):
        if not self.noise > 0:
            return images
        strength = draws.gate(self.noise * self.p, draws.half_normal(self.noise_std), 0)
        return images + torch.randn_like(images) * strength[:, :, None, None].to(images.dtype)

    def _cut_out(self, images, draws):
        """Blank a rectangle whose center is anywhere in the image."""
        if not self.cutout > 0:
            return images
        height, width = images.shape[2:]
        side = torch.full([images.shape[0], 1], self.cutout_size, device=images.device)
        side = draws.gate(self.cutout * self.p, side, 0)
        center = draws.unit(columns=2)
        x = (torch.arange(width, device=images.device) + 0.5) / width
        y = (torch.arange(height, device=images.device) + 0.5) / height
        outside_x = (x - center[:, :1]).abs() >= side / 2
        outside_y = (y - center[:, 1:]).abs() >= side / 2
        keep = outside_y[:, None, :, None] | outside_x[:, None, None, :]
        return images * keep.to(images.dtype)
