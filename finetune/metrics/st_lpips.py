"""ST-LPIPS, a perceptual distance that tolerates small shifts; its weights come in a package.

The package `stlpips-pytorch` (BSD-2) holds backbone and linear heads in one file for each backbone, read as
data here; none of its code is run. A backbone is a chain of convolutions, ReLUs, max-pools of stride 1 and
blurs of stride 2, which alias less than the strided layers of AlexNet and VGG16.
Source: Ghildyal and Liu 2022 (2207.13686).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from finetune.metrics.features import read_packaged, resize, to_rgb
from finetune.models.augment import reflect_pad

PACKAGE, EXTRA = "stlpips_pytorch", "st-lpips"
FILES = {
    "alex": (
        "weights/vST0.0/alex_shift_tolerant.pth",
        "b356b382f96010f77d085ee8343ecd9fd322d0a56e8de2b2d0549fafcad8b9ee",
    ),
    "vgg": (
        "weights/vST0.0/vgg_shift_tolerant.pth",
        "44597da68f49c1837c100ff52299050f274d102eb102e5837178c79be6f0e250",
    ),
}
# Layers of each stage: c, a convolution padded by so many pixels; r, ReLU; p, max-pool of that size; b, blur.
STAGES = {
    "alex": ("c2 b r", "p3 b c2 r", "p3 b c1 r", "c1 r", "c1 r"),
    "vgg": ("c1 r c1 r", "p2 b c1 r c1 r", *["p2 b c1 r c1 r c1 r"] * 3),
}
POOLED_SIZE = 64  # part of the definition of `pooled`
# Mean and standard deviation of ImageNet's colors, for values from -1 to 1.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class Blur(nn.Module):
    """A binomial 3×3 blur of stride 2 after reflection padding by 2 pixels."""

    kernel: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        taps = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.register_buffer("kernel", torch.outer(taps, taps))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kernel = self.kernel.expand(x.shape[1], 1, 3, 3)
        return F.conv2d(reflect_pad(x, 2, 2, 2, 2), kernel, stride=2, groups=x.shape[1])


class StLpips(nn.Module):
    """The backbone `alex` or `vgg` of ST-LPIPS, frozen. Raises WeightsMissing without its package."""

    shift: torch.Tensor
    scale: torch.Tensor

    def __init__(self, backbone: str, device: torch.device | str = "cpu") -> None:
        super().__init__()
        weights = read_packaged(PACKAGE, *FILES[backbone], EXTRA)
        names = iter(name for name in weights if name.startswith("net.") and name.endswith(".weight"))

        def layer(kind: str, size: str) -> nn.Module:
            if kind == "p":
                return nn.MaxPool2d(int(size), 1)
            if kind != "c":
                return Blur() if kind == "b" else nn.ReLU()
            name = next(names)
            channels_out, channels_in, kernel, _ = weights[name].shape
            conv = nn.Conv2d(channels_in, channels_out, kernel, padding=int(size))
            conv.load_state_dict({"weight": weights[name], "bias": weights[name.replace("weight", "bias")]})
            return conv

        self.blocks = nn.ModuleList(
            nn.Sequential(*(layer(each[0], each[1:]) for each in stage.split())) for stage in STAGES[backbone]
        )
        self.heads = [weights[f"lin{i}.model.1.weight"].flatten().to(device) for i in range(5)]
        self.register_buffer("shift", torch.tensor(SHIFT).reshape(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(SCALE).reshape(1, 3, 1, 1))
        self.eval().requires_grad_(False).to(device)

    def stages(self, img: torch.Tensor) -> list[torch.Tensor]:
        """Return the feature maps of `img [N, 3, H, W]`, to be compared with the weights `heads`."""
        x, maps = (img - self.shift) / self.scale, []
        for block in self.blocks:
            x = block(x)
            maps.append(x)
        return maps

    def pooled(self, img: torch.Tensor) -> torch.Tensor:
        """Return the last features `[N, C]`, averaged over the image, first resized to 64 pixels.

        At every position they are scaled to a mean square of 1 over the channels: the distance compares
        directions alone, and the kernel of KID needs features of about that size.
        """
        x = self.stages(resize(to_rgb(img), POOLED_SIZE))[-1]
        return F.normalize(x, dim=1).mean(dim=[2, 3]) * x.shape[1] ** 0.5
