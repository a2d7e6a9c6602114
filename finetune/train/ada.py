"""Adaptive discriminator augmentation: adjust the probability by the sign of D on real images.

Source: Karras et al. 2020 (2006.06676), section 3.1: r_t = E[sign(D(real))] is held at a target.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

INTERVAL = 4  # steps between adjustments


@dataclass
class AdaController:
    """Collects the signs of D on real images and moves the augmentation probability towards the target.

    `target` None keeps `p` fixed. `swing_kimg` is how many kimg it takes to move p from 0 to 1.
    """

    p: float
    target: float | None
    swing_kimg: float
    sign_sum: torch.Tensor | float = 0.0
    count: int = 0

    def observe(self, sign_sum: torch.Tensor, count: int) -> None:
        """Take note of the sum of the signs of D's logits on `count` (augmented) real images."""
        if self.target is not None:
            self.sign_sum = self.sign_sum + sign_sum
            self.count += count

    def update(self, step: int, batch: int) -> float:
        """Return the probability to use from now on, after step number `step` (from 1) of `batch` images."""
        if self.target is not None and step % INTERVAL == 0 and self.count:
            mean_sign = float(self.sign_sum) / self.count
            direction = (mean_sign > self.target) - (mean_sign < self.target)
            self.p = min(1.0, max(0.0, self.p + direction * batch * INTERVAL / (self.swing_kimg * 1000)))
            self.sign_sum, self.count = 0.0, 0
        return self.p

    def state_dict(self) -> dict[str, float]:
        """Return the probability, and the signs collected since its last adjustment."""
        return {"p": self.p, "sign_sum": float(self.sign_sum), "count": self.count}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take over what `state_dict` returned."""
        self.p, self.sign_sum, self.count = float(state["p"]), float(state["sign_sum"]), int(state["count"])
