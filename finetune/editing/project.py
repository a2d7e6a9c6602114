"""Find the w of given images, and tune a generator until it reproduces them.

Source: StyleGAN2 (1912.04958), appendix D, with stored instead of optimized noise maps; Roich et al.,
"Pivotal Tuning for Latent-based Editing of Real Images" (2106.05744).
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from finetune.directions import principal_directions
from finetune.errors import TrainingError
from finetune.metrics.perceptual import ImageDistance
from finetune.models import Network
from finetune.sampling import device_of, synthesize

LR_W, LR_W_PLUS = 0.1, 0.05  # W+ starts from the result in W
NOISE = 0.05  # standard deviation of the noise added to w at the start, relative to that of w
RAMP_UP, RAMP_DOWN, NOISE_UNTIL = 0.05, 0.25, 0.75  # as parts of the steps
LR_TUNING = 3e-4
PIXEL_WEIGHT = 1.0  # of the mean squared error beside the perceptual distance
LARGEST_SIDE = 256  # larger images are compared at this size
EXACT: dict[str, Any] = {"noise_mode": "const", "force_fp32": True}  # gradients may underflow in float16

Progress = Callable[[], None]


@dataclass(frozen=True)
class Projection:
    """The image of `ws` `[num_ws, w_dim]`, uint8 `[H, W, C]`, and how far it is from its target.

    distance: perceptual; rmse: root mean square error in steps of 8-bit images, 0 to 255.
    """

    ws: torch.Tensor
    image: np.ndarray
    distance: float
    rmse: float


class Projector:
    """Project images `[1, C, H, W]`, -1 to 1, of the output size of `G` into its w.

    distance: of two batches of images. label: of the w's that the search starts from, by default all classes.
    The same seed gives the same result.
    """

    def __init__(
        self, G: Network, distance: ImageDistance, *, seed: int = 0, label: Sequence[float] | None = None
    ) -> None:
        self.G = G
        self.distance = distance
        self.seed = seed
        self.device = device_of(G)
        statistics = principal_directions(G, G.w_dim, label=label)
        self.mean = statistics.mean.to(self.device)
        self.std = float(statistics.std.square().sum().sqrt())

    def project(self, target: torch.Tensor, steps: int, space: str = "w+", progress: Progress = lambda: None):
        """Return ws `[num_ws, w_dim]` after `steps` steps in W and, for space "w+", as many in W+.

        In W all layers share one w, which is easy to edit; in W+ each has its own, which comes closer.
        """
        w = self._optimize(target, self.mean.expand(1, -1), steps, LR_W, progress)
        if space == "w+":
            w = self._optimize(target, w.repeat(self.G.num_ws, 1), steps, LR_W_PLUS, progress)
        return w.expand(self.G.num_ws, -1).clone()

    def _optimize(
        self, target: torch.Tensor, start: torch.Tensor, steps: int, lr: float, progress: Progress
    ) -> torch.Tensor:
        """Return the rows `start` `[1 or num_ws, w_dim]` after `steps` of Adam."""
        generator = torch.Generator().manual_seed(self.seed)
        w = start.clone().requires_grad_(True)
        optimizer = torch.optim.Adam([w], betas=(0.9, 0.999))
        exploring = len(start) == 1
        for step in range(steps):
            time = step / steps
            optimizer.param_groups[0]["lr"] = lr * schedule(time)
            noise = torch.randn(start.shape, generator=generator).to(self.device)
            strength = NOISE * self.std * max(0.0, 1 - time / NOISE_UNTIL) ** 2 if exploring else 0.0
            img = self.G.synthesis((w + strength * noise).expand(1, self.G.num_ws, -1), **EXACT)
            loss = self.loss(img, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            progress()
        return w.detach()

    def loss(self, img: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the perceptual distance plus the mean squared error; TrainingError if it is not finite."""
        loss = self.distance(*map(downsample, (img, target))).sum()
        loss = loss + PIXEL_WEIGHT * (img - target).square().mean()
        if not bool(torch.isfinite(loss)):
            raise TrainingError(
                "The distance to the image is not finite.", hint="Use other weights or images."
            )
        return loss

    def tune(
        self,
        targets: Sequence[torch.Tensor],
        pivots: Sequence[torch.Tensor],
        steps: int,
        progress: Progress = lambda: None,
    ) -> Network:
        """Return a copy of G whose synthesis network was trained to make each target from its ws.

        Each target is used `steps` times.
        """
        G = copy.deepcopy(self.G)
        G.synthesis.requires_grad_(True)
        optimizer = torch.optim.Adam(G.synthesis.parameters(), lr=LR_TUNING, betas=(0.9, 0.999))
        pairs = itertools.cycle(zip(targets, pivots))
        for target, ws in itertools.islice(pairs, steps * len(targets)):
            loss = self.loss(G.synthesis(ws.unsqueeze(0), **EXACT), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            progress()
        return G.requires_grad_(False)

    @torch.no_grad()
    def result(self, G: Network, ws: torch.Tensor, target: torch.Tensor) -> Projection:
        """Return the image of `ws` made by `G`, and its distances to the target."""
        img = G.synthesis(ws.unsqueeze(0), **EXACT)
        distance = float(self.distance(*map(downsample, (img, target))))
        rmse = float((img - target).square().mean().sqrt()) * 127.5
        return Projection(ws.cpu(), synthesize(G, ws), distance, rmse)


def schedule(time: float) -> float:
    """Return the relative learning rate at `time`, 0 to 1: a linear ramp up, and a cosine ramp down."""
    ramp = min(1.0, (1 - time) / RAMP_DOWN)
    return (0.5 - 0.5 * math.cos(ramp * math.pi)) * min(1.0, (time + 1e-3) / RAMP_UP)


def downsample(img: torch.Tensor) -> torch.Tensor:
    """Average images down to `LARGEST_SIDE` pixels at most."""
    factor = max(img.shape[2:]) // LARGEST_SIDE
    return F.avg_pool2d(img, factor) if factor > 1 else img
