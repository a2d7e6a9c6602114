"""EMA of the generator, measured in images seen, and power-function averages."""

from __future__ import annotations

import torch

EMA_RAMPUP = 0.05  # from scratch: the half-life is at most this part of the images seen
# Exponents of the averages kept for `finetune.train.posthoc_ema`, with relative standard deviations of 0.05
# and 0.10. Source: Karras et al. 2024 (2312.02696), section 3.
POWERS = {"power-0.05": 16.97, "power-0.10": 6.94}


def ema_decay(batch: int, half_life_nimg: float, *, nimg: int = 0, rampup: float | None = None) -> float:
    """Return the decay of the EMA for one batch: weights halve after `half_life_nimg` images.

    With `rampup` (training from scratch) the half-life is at most that fraction of the images seen so far, so
    that the initial random weights decay quickly.
    """
    if rampup is not None:
        half_life_nimg = min(half_life_nimg, nimg * rampup)
    return 0.5 ** (batch / max(half_life_nimg, 1e-8))


def num_updates(nimg: int, batch: int, d_warmup_nimg: float) -> int:
    """Return how often G was updated after `nimg` images; a new D first trains alone."""
    return int(max(0, nimg - d_warmup_nimg) // batch)


def power_decay(update: int, exponent: float) -> float:
    """Return the decay of a power-function average at update number `update` (the first is 1).

    Source: Karras et al. 2024 (2312.02696), section 3.1.
    """
    return (1 - 1 / update) ** (exponent + 1)


@torch.no_grad()
def update_average(average: torch.nn.Module, module: torch.nn.Module, decay: float) -> None:
    """Move the parameters of `average` towards `module`'s; buffers (w_avg, magnitude averages) are copied."""
    move = torch.optim.swa_utils.get_ema_multi_avg_fn(decay)
    move(list(average.parameters()), list(module.parameters()), None)
    for mean, value in zip(average.buffers(), module.buffers(), strict=True):
        mean.copy_(value)
