"""Change the resolution of a StyleGAN2: add or drop blocks at the end of G and the beginning of D."""

from __future__ import annotations

import math
from typing import Any

import torch

NUM_COLORS = 4096  # random colors to fit fromrgb layers on; some hundred times their unknowns


def change(old: Any, new: Any, changed: dict[str, str]) -> None:
    """Connect copied and new blocks of a generator or discriminator; describe the changes in `changed`."""
    if hasattr(new, "synthesis"):
        _silence_new_blocks(old, new, changed)
    elif "resnet" in (block.architecture for block in _blocks(new)):
        (_add_input_blocks if new.img_resolution > old.img_resolution else _drop_input_blocks)(
            old, new, changed
        )


def _silence_new_blocks(old: Any, new: Any, changed: dict[str, str]) -> None:
    """Set the torgb layers of new blocks to 0, so that G initially gives its former image, upsampled."""
    for size in new.synthesis.block_resolutions:
        block = getattr(new.synthesis, f"b{size}")
        if size > old.img_resolution and block.architecture == "skip":
            block.torgb.weight.zero_()
            block.torgb.bias.zero_()
            name, what = f"synthesis.b{size}.torgb", "0: adds nothing to the upsampled image initially"
            changed[f"{name}.weight"] = changed[f"{name}.bias"] = what


def _add_input_blocks(old: Any, new: Any, changed: dict[str, str]) -> None:
    """Fit new blocks to give the features of the old first layer, of the image at half the size.

    Their skip layers are fitted on random colors; their convolutions are set to 0.
    """
    colors = _colors(old.img_channels)
    first = old.block_resolutions[0]
    wanted = _read(getattr(old, f"b{first}").fromrgb, colors)
    features = None
    for block in _blocks(new)[: len(new.block_resolutions) - len(old.block_resolutions)]:
        name = f"b{block.resolution}"
        if features is None:
            # As many features of the old first layer as there are channels.
            source, count = getattr(old, f"b{first}").fromrgb, len(block.fromrgb.bias)
            picked = torch.linspace(0, len(source.bias) - 1, count).round().long()
            block.fromrgb.weight.copy_(source.weight[picked])
            block.fromrgb.bias.copy_(source.bias[picked])
            changed[f"{name}.fromrgb.weight"] = changed[f"{name}.fromrgb.bias"] = (
                f"copied from b{first}.fromrgb"
            )
            features = _read(block.fromrgb, colors)
        # Skip layer and residual branch are both scaled by sqrt(1/2).
        used = _fit(features, wanted if block.resolution == 2 * first else _grown(features, block))
        block.skip.weight.copy_((used / (block.skip.weight_gain * math.sqrt(0.5)))[:, :, None, None])
        block.conv1.weight.zero_()
        block.conv1.bias.zero_()
        changed[f"{name}.skip.weight"] = "fitted: features of the old first layer, at half the size"
        changed[f"{name}.conv1.weight"] = changed[f"{name}.conv1.bias"] = "0: adds nothing initially"
        features = features @ used.t()


def _grown(features: torch.Tensor, block: Any) -> torch.Tensor:
    """Repeat features to the number of channels of the next block."""
    channels = block.skip.out_channels
    return features.repeat(1, math.ceil(channels / features.shape[1]))[:, :channels]


def _drop_input_blocks(old: Any, new: Any, changed: dict[str, str]) -> None:
    """Fit the new first layer to give the features of the dropped blocks on areas of one color."""
    colors = _colors(old.img_channels)
    dropped = _blocks(old)[: len(old.block_resolutions) - len(new.block_resolutions)]
    size = 8 * 2 ** len(dropped)  # large enough that padding does not reach the center
    middle = []
    for some in colors.split(256):
        x: Any = None
        img = some[:, :, None, None].expand(-1, -1, size, size).contiguous()
        for block in dropped:
            x, img = _run(block, x, img)
        middle.append(x[:, :, x.shape[2] // 2, x.shape[3] // 2])
    wanted = torch.cat(middle)
    layer = _blocks(new)[0].fromrgb
    # Invert the leaky ReLU; what remains is linear in the color and 1.
    before = wanted / layer.act_gain
    before = torch.where(before < 0, before / 0.2, before) if layer.activation == "lrelu" else before
    solution = _fit(torch.cat([colors, torch.ones(len(colors), 1)], dim=1), before)
    layer.weight.copy_((solution[:, :-1] / layer.weight_gain)[:, :, None, None])
    layer.bias.copy_(solution[:, -1])
    name = f"b{new.img_resolution}.fromrgb"
    what = "fitted: features of the dropped blocks on areas of one color"
    changed[f"{name}.weight"] = changed[f"{name}.bias"] = what


def _blocks(D: Any) -> list[Any]:
    return [getattr(D, f"b{size}") for size in D.block_resolutions]


def _colors(channels: int) -> torch.Tensor:
    """Return random colors `[NUM_COLORS, channels]`: half uniform, half near gray as in images."""
    everywhere = torch.rand(NUM_COLORS // 2, channels) * 2 - 1
    grays = (torch.rand(NUM_COLORS // 2, 1) * 2 - 1) + torch.randn(NUM_COLORS // 2, channels) * 0.2
    return torch.cat([everywhere, grays.clamp(-1, 1)])


def _read(fromrgb: Any, colors: torch.Tensor) -> torch.Tensor:
    """Apply a 1×1 layer to colors `[N, C]`; returns `[N, O]`."""
    return fromrgb(colors[:, :, None, None])[:, :, 0, 0]


def _run(block: Any, x: Any, img: Any) -> tuple[torch.Tensor, Any]:
    """Run a block of D without its check of the image size."""
    if x is None:
        x, img = block.fromrgb(img), None
    shortcut = block.skip(x, gain=math.sqrt(0.5))
    return shortcut + block.conv1(block.conv0(x), gain=math.sqrt(0.5)), img


def _fit(inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """Return the least-squares matrix `[O, I]` from inputs `[N, I]` to outputs `[N, O]`."""
    solution = torch.linalg.lstsq(inputs.double(), outputs.double(), driver="gelsd").solution
    return solution.t().to(outputs.dtype)
