"""The average generator: exponential moving average of the weights, measured in images seen."""

from __future__ import annotations

import torch


def ema_decay(batch: int, half_life_nimg: float, *, nimg: int = 0, rampup: float | None = None) -> float:
    """Return the decay of the EMA for one batch: weights halve after `half_life_nimg` images.

    With `rampup` (training from scratch) the half-life is at most that fraction of the images seen so far, so
    that the initial random weights decay quickly.
    """
    if rampup is not None:
        half_life_nimg = min(half_life_nimg, nimg * rampup)
    return 0.5 ** (batch / max(half_life_nimg, 1e-8))


@torch.no_grad()
def update_average(average: torch.nn.Module, module: torch.nn.Module, decay: float) -> None:
    """Move the parameters of `average` towards `module`'s; buffers (w_avg, magnitude averages) are copied."""
    move = torch.optim.swa_utils.get_ema_multi_avg_fn(decay)
    move(list(average.parameters()), list(module.parameters()), None)
    for mean, value in zip(average.buffers(), module.buffers(), strict=True):
        mean.copy_(value)
