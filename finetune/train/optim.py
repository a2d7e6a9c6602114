"""Adam for G and D, and its learning rate as a function of the images seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

BETA2, EPS = 0.99, 1e-8
ROLLBACK_FACTOR = 0.5  # of the learning rates, for each rollback


@dataclass(frozen=True)
class LearningRate:
    """The learning rate and betas of one optimizer.

    lazy_interval: an extra step is taken every so many iterations (None: never). These make (k+1)/k as many
    updates, so rate and memory shrink by the inverse. Source: Karras et al. 2020 (1912.04958), appendix B,
    "lazy regularization". warmup_nimg: images over which the rate rises from 0, beginning at start_nimg.
    """

    base: float
    beta1: float
    lazy_interval: int | None
    batch: int
    warmup_nimg: float = 0.0
    start_nimg: float = 0.0

    @property
    def lazy_ratio(self) -> float:
        """k/(k+1) for an extra step every k iterations, else 1."""
        return 1.0 if self.lazy_interval is None else self.lazy_interval / (self.lazy_interval + 1)

    @property
    def betas(self) -> tuple[float, float]:
        """Adam's betas, to the power k/(k+1)."""
        return self.beta1**self.lazy_ratio, BETA2**self.lazy_ratio

    def at(self, nimg: int, rollbacks: int = 0) -> float:
        """Return the learning rate after `nimg` images: base × k/(k+1) × warm-up × 0.5^rollbacks."""
        return self.full(rollbacks) * self.warmup(nimg)

    def full(self, rollbacks: int = 0) -> float:
        """Return the learning rate after the warm-up."""
        return self.base * self.lazy_ratio * ROLLBACK_FACTOR**rollbacks

    def warmup(self, nimg: int) -> float:
        """Return the factor of the warm-up after `nimg` images, a straight line from 0 to 1.

        In Adam's first steps all weights move by the whole rate, in directions that one noisy gradient set.
        Source: Ma and Yarats 2019 (1910.04209): linear warm-up, there over 2/(1 - beta2) steps.
        """
        if not self.warmup_nimg:
            return 1.0
        return min(1.0, max(0.0, nimg - self.start_nimg + self.batch) / self.warmup_nimg)


def build_adam(network: torch.nn.Module, rate: LearningRate) -> torch.optim.Adam:
    """Build Adam over all parameters of a network; on CUDA one kernel whose numbers are all on the device."""
    parameters = list(network.parameters())
    options: dict[str, Any] = {"lr": rate.full()}
    if parameters[0].is_cuda:
        lr = torch.tensor(rate.full(), device=parameters[0].device)
        options = {"lr": lr, "fused": True, "capturable": True}
    return torch.optim.Adam(parameters, betas=rate.betas, eps=EPS, **options)


def load_adam(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the moments of `state`, whatever device they come from. Raises ValueError if they do not fit."""
    own = optimizer.state_dict()["param_groups"]
    groups = [{**group, "params": saved["params"]} for group, saved in zip(own, state["param_groups"])]
    optimizer.load_state_dict({"state": state["state"], "param_groups": groups})


def set_learning_rate(
    optimizer: torch.optim.Optimizer, rate: LearningRate, nimg: int, rollbacks: int
) -> None:
    """Set learning rate and betas for the step after `nimg` images."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate.at(nimg, rollbacks))
        else:
            group["lr"] = rate.at(nimg, rollbacks)
        group["betas"] = rate.betas
