"""Latents and noise of a batch, drawn once and shared by student and teacher.

`Latents` holds z, c, the style-mixing cut and the second latent; `NoiseReplay` lets a second network draw the
same noise maps by starting from the same random state, and leaves that state as if it had never run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.overrides import TorchFunctionMode

from finetune.models import Network


@dataclass(frozen=True)
class Latents:
    """`z [N, z_dim]` and labels `c [N, c_dim]`; with mixing, styles from layer `cut` on come from z2."""

    z: torch.Tensor
    c: torch.Tensor
    z2: torch.Tensor | None = None
    cut: int | torch.Tensor | None = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the fields that are set."""
        return {name: value for name, value in vars(self).items() if value is not None}


def draw_latents(G: Network, c: torch.Tensor, mixing: float, *, as_tensors: bool = False) -> Latents:
    """Draw latents for the labels `c`; with probability `mixing` styles from a random layer on come from z2.

    as_tensors: always the same fields, and `cut` a tensor (the number of rows for no mixing).
    Source: Karras et al. 2019 (1812.04948), section 3.1.
    """
    z = torch.randn([len(c), G.z_dim], device=c.device)
    if not mixing:
        return Latents(z, c)
    # On the CPU: a decision on the device would force a synchronization.
    cut = int(torch.randint(1, G.num_ws, []))
    mixed = bool(torch.rand([]) < mixing)
    if as_tensors:
        layer = torch.full([], cut if mixed else G.num_ws, device=c.device)
        return Latents(z, c, torch.randn_like(z) if mixed else z, layer)
    return Latents(z, c, torch.randn_like(z), cut) if mixed else Latents(z, c)


def map_latents(G: Network, latents: Latents, update_emas: bool = False) -> torch.Tensor:
    """Return `ws [N, num_ws, w_dim]` of the latents through the mapping network of `G`."""
    ws = G.mapping(latents.z, latents.c, update_emas=update_emas)
    if isinstance(latents.cut, torch.Tensor):
        from_z = torch.arange(G.num_ws, device=ws.device).unsqueeze(1) < latents.cut
        ws = torch.where(from_z, ws, G.mapping(latents.z2, latents.c))
    elif latents.cut is not None:
        ws = torch.cat([ws[:, : latents.cut], G.mapping(latents.z2, latents.c)[:, latents.cut :]], dim=1)
    return ws


class NoiseReplay(TorchFunctionMode):
    """The noise maps that one network draws in a block, for another network to use in the same order."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[torch.Tensor] = []
        self.replayed: Iterator[torch.Tensor] | None = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not torch.randn:
            return func(*args, **(kwargs or {}))
        if self.replayed is not None:
            return next(self.replayed)
        self.drawn.append(func(*args, **(kwargs or {})))
        return self.drawn[-1]

    def again(self) -> NoiseReplay:
        """Return it again, in the same order, inside the block; nothing is drawn."""
        self.replayed = iter(self.drawn)
        return self
