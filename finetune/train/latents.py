"""What a generated batch depends on, drawn once so that student and teacher can be given exactly the same.

A `Draw` holds z, c, the style-mixing cut and the second latent; `NoiseReplay` lets a second network draw the
same noise maps by starting from the same random state, and leaves that state as if it had never run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Draw:
    """One batch of latents: `z [N, z_dim]`, `c [N, c_dim]`; with mixing, `z2` rules from row `cut` on."""

    z: torch.Tensor
    c: torch.Tensor
    z2: torch.Tensor | None = None
    cut: int | None = None


def draw_latents(G: torch.nn.Module, c: torch.Tensor, mixing: float) -> Draw:
    """Draw latents for the labels `c`; with probability `mixing` a second latent takes over at a random row.

    Source: Karras et al. 2019 (1812.04948), section 3.1.
    """
    z = torch.randn([len(c), G.z_dim], device=c.device)
    if not mixing:
        return Draw(z, c)
    # On the CPU: a decision taken on the device would have to be waited for.
    cut = int(torch.randint(1, G.num_ws, []))
    mixed = bool(torch.rand([]) < mixing)
    return Draw(z, c, torch.randn_like(z), cut) if mixed else Draw(z, c)


def map_latents(G: torch.nn.Module, draw: Draw, update_emas: bool = False) -> torch.Tensor:
    """`ws [N, num_ws, w_dim]` of a draw through the mapping network of `G`."""
    ws = G.mapping(draw.z, draw.c, update_emas=update_emas)
    if draw.cut is not None:
        ws = torch.cat([ws[:, : draw.cut], G.mapping(draw.z2, draw.c)[:, draw.cut :]], dim=1)
    return ws


class NoiseReplay:
    """The random state of a device at the moment of construction."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.state = _get_state(device)

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Inside, random numbers come as they came after construction; outside, nothing has happened."""
        now = _get_state(self.device)
        _set_state(self.device, self.state)
        try:
            yield
        finally:
            _set_state(self.device, now)


def _get_state(device: torch.device) -> torch.Tensor:
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.mps.get_rng_state() if device.type == "mps" else torch.get_rng_state()


def _set_state(device: torch.device, state: torch.Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    elif device.type == "mps":
        torch.mps.set_rng_state(state)
    else:
        torch.set_rng_state(state)
