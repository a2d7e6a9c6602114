"""Write the `.pt` of the StyleGAN2 port by rosinality: `g_ema` and `latent_avg`, `g` and `d` if asked for.

Names and shapes: finetune/checkpoint/rosinality.py.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from finetune.checkpoint import rosinality as layout
from finetune.checkpoint.load import NETWORKS, Checkpoint
from finetune.checkpoint.rebuild import fill, tensors_of
from finetune.checkpoint.state_dict import rebuild_state
from finetune.checkpoint.unpickle.stubs import Tensor
from finetune.errors import ExportError
from finetune.export.torch_save import Check, on_cpu, save_tensors
from finetune.models import Network


def write(path: str | os.PathLike, checkpoint: Checkpoint, *, check: Check | None = None) -> None:
    """Write the networks of `checkpoint`; see `save_tensors` for the rest.

    Raises ExportError for a network that the port does not have, naming each difference.
    """
    content: dict[str, Any] = {}
    for name in NETWORKS:
        if (network := getattr(checkpoint, name)) is not None:
            if problems := _problems(network):
                raise ExportError(
                    f"{name} is not supported by the StyleGAN2 port: {'; '.join(problems)}.",
                    hint="Use stylegan-pkl, safetensors or state-dict.",
                )
            content[layout.NAMES[name]] = _their_tensors(network)
    if checkpoint.best is not None:
        content[layout.LATENT_AVG] = mean = on_cpu(checkpoint.best.mapping.w_avg)
        if checkpoint.G is not None and not torch.equal(checkpoint.G.mapping.w_avg.cpu(), mean):
            content[layout.G_LATENT_AVG] = on_cpu(checkpoint.G.mapping.w_avg)
    save_tensors(path, checkpoint, content, check)


def _their_tensors(network: Network) -> dict[str, torch.Tensor]:
    ours = tensors_of(network)
    resolution = network.img_resolution
    if hasattr(network, "synthesis"):
        names = layout.generator_names(resolution, network.mapping.num_layers)
        filters, gain = layout.generator_filters(resolution), layout.UPSAMPLING_GAIN
    else:
        names = layout.discriminator_names(resolution)
        filters, gain = layout.discriminator_filters(resolution), 1
    found = {}
    for name, theirs in names:
        before, behind = layout.extra_axes(name)
        tensor = on_cpu(ours[name])
        found[theirs] = tensor.reshape([1] * before + list(tensor.shape) + [1] * behind)
    return found | {theirs: on_cpu(ours[name]) * gain for name, theirs in filters if theirs}


def _problems(network: Network) -> list[str]:
    """Return the differences to the port that it has no options for, one phrase each."""
    filters = {tuple(tensor.shape) for name, tensor in network.named_buffers() if name.endswith("_filter")}
    facts = [
        ("classes", network.c_dim, 0),
        ("image channels", network.img_channels, 3),
        ("base_shape", getattr(network, "base_shape", [4, 4]), [4, 4]),
        ("filter sizes", filters, {(4, 4)}),
    ]
    if not hasattr(network, "synthesis"):
        first, last = getattr(network, f"b{network.block_resolutions[0]}"), network.b4
        facts += [
            ("architecture", first.architecture, "resnet"),
            ("activations", {first.conv0.activation, last.conv.activation}, {"lrelu"}),
            ("mbstd_num_channels", getattr(last.mbstd, "num_channels", 0), 1),
        ]
    elif hasattr(network.synthesis, "input"):
        return ["StyleGAN3, not StyleGAN2"]
    else:
        mapping, block = network.mapping, network.synthesis.b4
        dense = [getattr(mapping, f"fc{index}") for index in range(mapping.num_layers)]
        facts += [
            ("architecture", block.architecture, "skip"),
            ("activations", {block.conv1.activation, *(layer.activation for layer in dense)}, {"lrelu"}),
            ("use_noise", block.conv1.use_noise, True),
            ("z_dim", network.z_dim, network.w_dim),
            ("widths of the mapping network", {layer.out_features for layer in dense}, {network.w_dim}),
            ("lr_multiplier of the mapping network", {layer.bias_gain for layer in dense}, {0.01}),
        ]
    return [f"{what} {seen} instead of {wanted}" for what, seen, wanted in facts if seen != wanted]


def reopen(path: Path, device: torch.device) -> dict[str, Network]:
    """Read a file as the port does, with torch.load, without the entries of this package."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    found = {}
    for name, theirs in layout.NAMES.items():
        if theirs in content:
            tensors = {key: _stub(tensor) for key, tensor in content[theirs].items()}
            mean = content.get(layout.G_LATENT_AVG if name == "G" else "", content.get(layout.LATENT_AVG))
            state = layout.read_state(tensors, None if mean is None else _stub(mean), stated=None)
            found[name] = rebuild_state(name, state)
    fill(found.values())
    return {name: network.module.to(device) for name, network in found.items()}


def _stub(tensor: torch.Tensor) -> Tensor:
    return Tensor(tensor.numpy(), str(tensor.dtype).removeprefix("torch."), offset=0)
