"""Another resolution of a StyleGAN2: blocks are added at the end of G and the beginning of D, or dropped."""

from __future__ import annotations

import math
from typing import Any

import torch

NUM_COLORS = 4096  # drawn to fit the layers that read images; some hundred times their unknowns


def change(old: Any, new: Any, changed: dict[str, str]) -> None:
    """Join what was taken over to what is new, in a generator or discriminator; notes it in `changed`."""
    if hasattr(new, "synthesis"):
        _silence_new_blocks(old, new, changed)
    elif "resnet" in (block.architecture for block in _blocks(new)):
        (_add_input_blocks if new.img_resolution > old.img_resolution else _drop_input_blocks)(
            old, new, changed
        )


def _silence_new_blocks(old: Any, new: Any, changed: dict[str, str]) -> None:
    """Let new blocks add nothing to the enlarged picture at first; dropped ones leave the one before them."""
    for size in new.synthesis.block_resolutions:
        block = getattr(new.synthesis, f"b{size}")
        if size > old.img_resolution and block.architecture == "skip":
            block.torgb.weight.zero_()
            block.torgb.bias.zero_()
            name, what = f"synthesis.b{size}.torgb", "0: adds nothing to the enlarged picture at first"
            changed[f"{name}.weight"] = changed[f"{name}.bias"] = what


def _add_input_blocks(old: Any, new: Any, changed: dict[str, str]) -> None:
    """Begin with blocks that hand on the halved picture as the old first layer read it.

    Their shortcuts are fitted so, on random colors; their convolutions begin with nothing to add.
    """
    colors = _colors(old.img_channels)
    first = old.block_resolutions[0]
    wanted = _read(getattr(old, f"b{first}").fromrgb, colors)
    features = None
    for block in _blocks(new)[: len(new.block_resolutions) - len(old.block_resolutions)]:
        name = f"b{block.resolution}"
        if features is None:
            # As many of the old first layer's features as there is room for.
            source, count = getattr(old, f"b{first}").fromrgb, len(block.fromrgb.bias)
            picked = torch.linspace(0, len(source.bias) - 1, count).round().long()
            block.fromrgb.weight.copy_(source.weight[picked])
            block.fromrgb.bias.copy_(source.bias[picked])
            changed[f"{name}.fromrgb.weight"] = changed[f"{name}.fromrgb.bias"] = (
                f"from {first} pixels' fromrgb"
            )
            features = _read(block.fromrgb, colors)
        # The shortcut is scaled by sqrt(1/2), as the branch that it is added to.
        used = _fit(features, wanted if block.resolution == 2 * first else _grown(features, block))
        block.skip.weight.copy_((used / (block.skip.weight_gain * math.sqrt(0.5)))[:, :, None, None])
        block.conv1.weight.zero_()
        block.conv1.bias.zero_()
        changed[f"{name}.skip.weight"] = "fitted: hands on the halved picture as the old first layer read it"
        changed[f"{name}.conv1.weight"] = changed[f"{name}.conv1.bias"] = "0: adds nothing at first"
        features = features @ used.t()


def _grown(features: torch.Tensor, block: Any) -> torch.Tensor:
    """The same features, repeated to the channels that follow."""
    channels = block.skip.out_channels
    return features.repeat(1, math.ceil(channels / features.shape[1]))[:, :channels]


def _drop_input_blocks(old: Any, new: Any, changed: dict[str, str]) -> None:
    """Begin with a layer that reads a plain color as the dropped blocks read an area of it."""
    colors = _colors(old.img_channels)
    dropped = _blocks(old)[: len(old.block_resolutions) - len(new.block_resolutions)]
    size = 8 * 2 ** len(dropped)  # its middle is far from the edges after every halving
    middle = []
    for some in colors.split(256):
        x: Any = None
        img = some[:, :, None, None].expand(-1, -1, size, size).contiguous()
        for block in dropped:
            x, img = _run(block, x, img)
        middle.append(x[:, :, x.shape[2] // 2, x.shape[3] // 2])
    wanted = torch.cat(middle)
    layer = _blocks(new)[0].fromrgb
    # Undo the leaky ReLU on what is wanted, then colors and a constant have to make it.
    before = wanted / layer.act_gain
    before = torch.where(before < 0, before / 0.2, before) if layer.activation == "lrelu" else before
    solution = _fit(torch.cat([colors, torch.ones(len(colors), 1)], dim=1), before)
    layer.weight.copy_((solution[:, :-1] / layer.weight_gain)[:, :, None, None])
    layer.bias.copy_(solution[:, -1])
    name = f"b{new.img_resolution}.fromrgb"
    what = "fitted: reads a color as the dropped blocks read an area of it"
    changed[f"{name}.weight"] = changed[f"{name}.bias"] = what


def _blocks(D: Any) -> list[Any]:
    return [getattr(D, f"b{size}") for size in D.block_resolutions]


def _colors(channels: int) -> torch.Tensor:
    """Random colors `[NUM_COLORS, channels]`: half of the cube, half near gray, as images have them."""
    everywhere = torch.rand(NUM_COLORS // 2, channels) * 2 - 1
    grays = (torch.rand(NUM_COLORS // 2, 1) * 2 - 1) + torch.randn(NUM_COLORS // 2, channels) * 0.2
    return torch.cat([everywhere, grays.clamp(-1, 1)])


def _read(fromrgb: Any, colors: torch.Tensor) -> torch.Tensor:
    """What a 1×1 layer makes of colors: `[N, O]`."""
    return fromrgb(colors[:, :, None, None])[:, :, 0, 0]


def _run(block: Any, x: Any, img: Any) -> tuple[torch.Tensor, Any]:
    """A block of D without its check of the picture's size: the layers fit any."""
    if x is None:
        x, img = block.fromrgb(img), None
    shortcut = block.skip(x, gain=math.sqrt(0.5))
    return shortcut + block.conv1(block.conv0(x), gain=math.sqrt(0.5)), img


def _fit(inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """The matrix `[O, I]` that comes nearest to making outputs `[N, O]` of inputs `[N, I]`."""
    solution = torch.linalg.lstsq(inputs.double(), outputs.double(), driver="gelsd").solution
    return solution.t().to(outputs.dtype)
