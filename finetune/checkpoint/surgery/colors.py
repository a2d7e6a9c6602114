"""Change the number of image channels: gray, RGB, RGBA."""

from __future__ import annotations

from typing import Any

import torch

ALLOWED = (1, 3, 4)


def conversion(before: int, after: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the matrix `[after, before]` and offset `[after]` that convert images between channel counts.

    Gray is the mean of red, green and blue; a new alpha is 1 (opaque), an old one is dropped.
    """
    gray = {1: torch.ones(1, 1), 3: torch.full([1, 3], 1 / 3), 4: torch.tensor([[1 / 3, 1 / 3, 1 / 3, 0]])}
    color = {1: torch.ones(3, 1), 3: torch.eye(3), 4: torch.eye(3, 4)}
    matrix = gray[before] if after == 1 else color[before]
    offset = torch.zeros(after)
    if after == 4:
        matrix = torch.cat([matrix, torch.zeros(1, before)])
        offset[3] = 1.0
    return matrix, offset


def change(old: Any, new: Any, changed: dict[str, str]) -> None:
    """Convert the layers that give or take image channels, and describe the changes in `changed`."""
    if hasattr(new, "synthesis"):
        _change_torgb(old, new, changed)
    else:
        _change_fromrgb(old, new, changed)


def _change_torgb(old: Any, new: Any, changed: dict[str, str]) -> None:
    """Give the image of the old generator, converted."""
    matrix, offset = conversion(old.img_channels, new.img_channels)
    layers: list[tuple[str, Any, Any, float]] = []
    if hasattr(new.synthesis, "layer_names"):
        before, after = old.synthesis.layer_names[-1], new.synthesis.layer_names[-1]
        pair = getattr(old.synthesis, before), getattr(new.synthesis, after)
        layers.append((f"synthesis.{after}", *pair, 1 / new.synthesis.output_scale))
    else:
        last = min(new.img_resolution, old.img_resolution)
        for size in new.synthesis.block_resolutions:
            source: Any = getattr(old.synthesis, f"b{size}", None)
            block = getattr(new.synthesis, f"b{size}")
            if hasattr(source, "torgb") and hasattr(block, "torgb"):
                # The images of all blocks are summed, so the offset is added in one of them only.
                layers.append((f"synthesis.b{size}.torgb", source.torgb, block.torgb, float(size == last)))
    for name, source, layer, scale in layers:
        layer.weight.copy_(torch.einsum("oc,cikl->oikl", matrix.to(source.weight), source.weight))
        layer.bias.copy_(matrix.to(source.bias) @ source.bias + offset.to(source.bias) * scale)
        what = f"converted from {old.img_channels} to {new.img_channels} channels"
        changed[f"{name}.weight"] = changed[f"{name}.bias"] = what


def _change_fromrgb(old: Any, new: Any, changed: dict[str, str]) -> None:
    """Score an image as the old discriminator scores the image converted to its channels."""
    matrix, offset = conversion(new.img_channels, old.img_channels)
    for size in (*new.block_resolutions, 4):
        source = getattr(getattr(old, f"b{size}", None), "fromrgb", None)
        layer = getattr(getattr(new, f"b{size}"), "fromrgb", None)
        if source is None or layer is None:
            continue
        used = (source.weight * source.weight_gain)[:, :, 0, 0]
        layer.weight.copy_((used @ matrix.to(used) / layer.weight_gain)[:, :, None, None])
        layer.bias.copy_(source.bias + used @ offset.to(used))
        what = f"converted from {old.img_channels} to {new.img_channels} channels"
        changed[f"b{size}.fromrgb.weight"] = changed[f"b{size}.fromrgb.bias"] = what
