"""Weights between those of two networks of one architecture."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import torch

from finetune.checkpoint.rebuild import tensors_of
from finetune.errors import ConfigError
from finetune.models import Network

BLOCK = re.compile(r"(?:synthesis\.)?b(\d+)\.")  # of StyleGAN2's generator and of both discriminators


class Interpolation:
    """A network `network` with weights between those of `A` and `B`, which are not changed.

    ConfigError lists the differences if they are not of one architecture.
    """

    def __init__(self, A: Network, B: Network) -> None:
        self.a, self.b = tensors_of(A), tensors_of(B)
        if problem := difference(A, B):
            raise ConfigError(problem, hint="Only networks of one architecture can be interpolated.")
        self.network = copy.deepcopy(A)

    @torch.no_grad()
    def set(self, alpha: float | Callable[[str], float]) -> Network:
        """Set the weights to A + alpha (B - A) and return the network: exactly A for 0, exactly B for 1.

        alpha: one number, or a function of the name of a tensor.
        """
        for name, tensor in tensors_of(self.network).items():
            a, b = self.a[name].to(tensor.device), self.b[name].to(tensor.device)
            weight = alpha(name) if callable(alpha) else alpha
            tensor.copy_(a.lerp(b, weight) if a.is_floating_point() else (b if weight >= 0.5 else a))
        return self.network


def difference(A: Network, B: Network) -> str | None:
    """Return a sentence on how the architectures of two networks differ, None if they are equal."""
    a, b = tensors_of(A), tensors_of(B)
    names = [name for name in {**a, **b} if name not in a or name not in b or a[name].shape != b[name].shape]
    if not names:
        return None
    shapes = [list(side[names[0]].shape) if names[0] in side else "absent" for side in (a, b)]
    return (
        f"the networks differ in {len(names)} of {len({**a, **b})} tensors, the first being {names[0]}: "
        f"{shapes[0]} and {shapes[1]}."
    )


def resolution_of(name: str, network: Network) -> int | None:
    """Return the resolution at which the layer of a tensor works, None for mapping networks.

    In StyleGAN3 it is the sampling rate of the layer's output.
    """
    if match := BLOCK.match(name):
        return int(match[1])
    part, _, rest = name.partition(".")
    if part != "synthesis":
        return None
    layer = getattr(network.synthesis, rest.partition(".")[0])
    return int(getattr(layer, "out_sampling_rate", None) or layer.sampling_rate)
