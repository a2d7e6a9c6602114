"""What a generated batch depends on, drawn once so that student and teacher can be given exactly the same.

A `Draw` holds z, c, the style-mixing cut and the second latent; `NoiseReplay` lets a second network draw the
same noise maps by starting from the same random state, and leaves that state as if it had never run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.overrides import TorchFunctionMode

from finetune.models import Network


@dataclass(frozen=True)
class Draw:
    """Latents `z [N, z_dim]` and labels `c [N, c_dim]`; with mixing, styles from row `cut` on are z2's."""

    z: torch.Tensor
    c: torch.Tensor
    z2: torch.Tensor | None = None
    cut: int | torch.Tensor | None = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """The fields that are there."""
        return {name: value for name, value in vars(self).items() if value is not None}


def draw_latents(G: Network, c: torch.Tensor, mixing: float, *, as_tensors: bool = False) -> Draw:
    """Draw latents for the labels `c`; with probability `mixing` a second latent takes over at a random row.

    as_tensors: always the same fields, and `cut` a tensor (the number of rows for no mixing).
    Source: Karras et al. 2019 (1812.04948), section 3.1.
    """
    z = torch.randn([len(c), G.z_dim], device=c.device)
    if not mixing:
        return Draw(z, c)
    # On the CPU: a decision taken on the device would have to be waited for.
    cut = int(torch.randint(1, G.num_ws, []))
    mixed = bool(torch.rand([]) < mixing)
    if as_tensors:
        row = torch.full([], cut if mixed else G.num_ws, device=c.device)
        return Draw(z, c, torch.randn_like(z) if mixed else z, row)
    return Draw(z, c, torch.randn_like(z), cut) if mixed else Draw(z, c)


def map_latents(G: Network, draw: Draw, update_emas: bool = False) -> torch.Tensor:
    """`ws [N, num_ws, w_dim]` of a draw through the mapping network of `G`."""
    ws = G.mapping(draw.z, draw.c, update_emas=update_emas)
    if isinstance(draw.cut, torch.Tensor):
        from_z = torch.arange(G.num_ws, device=ws.device).unsqueeze(1) < draw.cut
        ws = torch.where(from_z, ws, G.mapping(draw.z2, draw.c))
    elif draw.cut is not None:
        ws = torch.cat([ws[:, : draw.cut], G.mapping(draw.z2, draw.c)[:, draw.cut :]], dim=1)
    return ws


class NoiseReplay(TorchFunctionMode):
    """The noise maps that one network draws, for another network to use in the same order."""

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

    def recording(self) -> NoiseReplay:
        """Keep what `torch.randn` returns inside the block."""
        self.replayed = None
        return self

    def again(self) -> NoiseReplay:
        """Return it again, in the same order, inside the block; nothing is drawn."""
        self.replayed = iter(self.drawn)
        return self
