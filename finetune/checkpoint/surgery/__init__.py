"""Change the number of classes, channels or pixels of a checkpoint, or add a discriminator.

A network of the new shape is built and every tensor of the same name and shape is copied. Layers whose shape
changes are computed from the old weights, so that the network's function changes as little as possible.
Parameters initialized at random are reported.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch

from finetune.checkpoint.load import Checkpoint
from finetune.checkpoint.rebuild import tensors_of
from finetune.checkpoint.surgery import blocks, colors, labels
from finetune.errors import ConfigError
from finetune.models import stylegan2


@dataclass(frozen=True)
class TargetShape:
    """The shape to give the networks; None keeps that of the checkpoint.

    c_dim: number of classes, 0 for none. classes: `keep`, `extend` or `fresh`, how embeddings derive from the
    old ones. class_names: of the new classes; embeddings are kept by name if the checkpoint states names too,
    else by number. new_d: build a discriminator, because the file has none or to replace it.
    """

    c_dim: int | None = None
    classes: str | None = None
    channels: int | None = None
    resolution: int | None = None
    new_d: bool = False
    class_names: tuple[str, ...] = ()


@dataclass
class Operation:
    """A change to one network: the tensors kept, changed (with a description) and initialized at random."""

    network: str
    what: str
    kept: list[str] = field(default_factory=list)
    changed: dict[str, str] = field(default_factory=dict)
    initialized: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Return the report: the number of tensors kept, and all others grouped by change."""
        title = f"{self.network}, {self.what}"
        lines = [f"{title}: {len(self.kept)} tensors unchanged"]
        by_what: dict[str, list[str]] = {}
        for name, what in self.changed.items():
            by_what.setdefault(what, []).append(name)
        lines += [f"{title}: changed {_shorten(names)}: {what}" for what, names in by_what.items()]
        if self.initialized:
            lines.append(f"{title}: initialized at random: {_shorten(self.initialized)}")
        return lines


def operate(checkpoint: Checkpoint, wanted: TargetShape, seed: int = 0) -> tuple[Checkpoint, list[Operation]]:
    """Return a checkpoint of the given shape and the changes to each network; `checkpoint` is not modified.

    Raises ConfigError, naming the option, for impossible changes: another resolution of a StyleGAN3, a number
    of channels other than 1, 3 and 4, `keep` with more classes than before, `extend` with fewer.
    """
    G: Any = checkpoint.best
    target = {
        "c_dim": G.c_dim if wanted.c_dim is None else wanted.c_dim,
        "img_channels": G.img_channels if wanted.channels is None else wanted.channels,
        "img_resolution": G.img_resolution if wanted.resolution is None else wanted.resolution,
    }
    _check(checkpoint, wanted, target)
    steps = [(option, value) for option, value in target.items() if getattr(G, option) != value]
    kept = _classes_kept(checkpoint, wanted, target["c_dim"])
    is_moved = wanted.classes is not None and kept != list(range(G.c_dim))
    if G.c_dim == target["c_dim"] and (wanted.classes == "fresh" or is_moved):
        steps.insert(0, ("c_dim", G.c_dim))
    operations: list[Operation] = []
    networks: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for name in ("G", "G_ema", "D"):
            network = getattr(checkpoint, name)
            # The same seed for G and G_ema, so that new parameters are equal in both.
            torch.manual_seed(seed + (name == "D"))
            if name == "D" and wanted.new_d:
                networks[name], done = _new_discriminator(G, target)
                operations.append(done)
            elif network is not None:
                for option, value in steps:  # in sequence: each starts from the result of the previous one
                    network, done = _change(name, network, option, value, wanted.classes, kept)
                    operations.append(done)
                networks[name] = network
    return dataclasses.replace(checkpoint, **networks), operations


def _classes_kept(checkpoint: Checkpoint, wanted: TargetShape, c_dim: int) -> list[int | None]:
    """Return, for each new class, the old one whose embedding it gets; None for those without one.

    Classes correspond by name. Old classes without a known name keep their number.
    """
    before, names = checkpoint.network.c_dim, checkpoint.class_names
    by_number = [index if index < before else None for index in range(c_dim)]
    if not (wanted.classes and names and wanted.class_names):
        return by_number
    by_name = {name: index for index, name in enumerate(names)}
    by_number[: len(names)] = [None] * min(len(names), c_dim)
    return [by_name.get(name, index) for name, index in zip(wanted.class_names, by_number, strict=True)]


def _check(checkpoint: Checkpoint, wanted: TargetShape, target: dict[str, int]) -> None:
    G: Any = checkpoint.best
    if target["img_channels"] not in colors.ALLOWED:
        raise ConfigError(f"--channels {target['img_channels']}: must be 1 (gray), 3 (RGB) or 4 (RGBA).")
    before, after = G.img_resolution, target["img_resolution"]
    if before != after:
        if checkpoint.family != "stylegan2":
            raise ConfigError(
                f"--resolution {after}: the layers of StyleGAN3 are designed for one resolution ({before}). "
                "Only StyleGAN2 can add or drop blocks; omit the option."
            )
        if after < 8 or after & (after - 1):
            raise ConfigError(f"--resolution {after}: must be a power of two, 8 or more.")
    old, new = G.c_dim, target["c_dim"]
    if wanted.classes == "keep" and 0 < old < new:
        raise ConfigError(
            f"--classes keep: the checkpoint has {old} classes, fewer than the {new} of the images. "
            "Use extend or fresh."
        )
    if wanted.classes == "extend" and 0 < new < old:
        raise ConfigError(
            f"--classes extend: the checkpoint has {old} classes, more than the {new} of the images. "
            "Use keep or fresh."
        )


def _new_discriminator(G: Any, target: dict[str, int]) -> tuple[torch.nn.Module, Operation]:
    """Build a discriminator of the size published for a generator like G."""
    settings = {**G.init_kwargs, **(G.init_kwargs.get("synthesis_kwargs") or {})}
    size = {name: settings.get(name, {"channel_base": 32768, "channel_max": 512}[name]) for name in SIZES}
    if settings.get("use_radial_filters"):  # configuration R has twice the channels, in the generator only
        size = {name: value // 2 for name, value in size.items()}
    D = stylegan2.Discriminator(
        **target,
        **size,
        base_shape=settings.get("base_shape", (4, 4)),
        num_fp16_res=settings.get("num_fp16_res", 4),
        conv_clamp=settings.get("conv_clamp", 256),
    )
    names = [name for name, _ in D.named_parameters()]
    return D.eval().requires_grad_(False), Operation("D", "new discriminator", initialized=names)


SIZES = ("channel_base", "channel_max")
WORDS = {"c_dim": "classes", "img_channels": "channels", "img_resolution": "pixels"}


def _change(
    name: str, network: Any, option: str, value: int, classes: str | None, kept: list[int | None]
) -> tuple[torch.nn.Module, Operation]:
    """Build a network like `network` with another constructor argument, and fill it from the old weights."""
    new = type(network)(*network.init_args, **{**network.init_kwargs, option: value})
    before = getattr(network, option)
    same_number = "fresh classes" if classes == "fresh" else "classes by name"
    done = Operation(name, f"{WORDS[option]} {before} → {value}" if before != value else same_number)
    old_tensors, new_tensors = tensors_of(network), tensors_of(new)
    for key, tensor in new_tensors.items():
        source = old_tensors.get(_old_name(key, network, new))
        if source is not None and source.shape == tensor.shape:
            tensor.copy_(source)
            done.kept.append(key)
    if option == "c_dim":
        labels.change(network, new, classes, kept, done.changed)
    if option == "img_channels":
        colors.change(network, new, done.changed)
    if option == "img_resolution":
        blocks.change(network, new, done.changed)
    done.kept = [key for key in done.kept if key not in done.changed]
    done.changed = {key: what for key, what in done.changed.items() if what != labels.DRAWN}
    from_old = {*done.kept, *done.changed}
    done.initialized = [key for key, _ in new.named_parameters() if key not in from_old]
    return new.eval().requires_grad_(False), done


def _old_name(key: str, old: Any, new: Any) -> str:
    """Return the name of a tensor in the old network; StyleGAN3's last layer has its channels in the name."""
    if not hasattr(getattr(new, "synthesis", None), "layer_names"):
        return key
    return key.replace(new.synthesis.layer_names[-1], old.synthesis.layer_names[-1])


def _shorten(names: list[str]) -> str:
    """Return the layers of the tensors, each once; a long list is abbreviated."""
    layers = list(dict.fromkeys(name.rpartition(".")[0] or name for name in names))
    return ", ".join(layers) if len(layers) <= 12 else f"{', '.join(layers[:10])} and {len(layers) - 10} more"
