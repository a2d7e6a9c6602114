"""Self-distillation: hold the student to its own moving average, image by image.

    L_G = E[softplus(-D(G(z)))] + λ E[d(G(z), stopgrad(G_ema(z)))]

Source: Nowinowski & Krawiec 2026 (2605.08577). Student and teacher are given the same z, c, mixing cut,
second latent, noise maps, convolution order and precision, so that equal weights give a distance of exactly
0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from finetune.device import float32_math
from finetune.metrics.perceptual import Distance
from finetune.models import Network
from finetune.train.latents import Draw, NoiseReplay, map_latents

NORMS_DECAY = 0.05  # weight of the newest step in the averages behind `auto:`
MOST_PULL = 4.0  # times what `auto:` asks for, in one step
VISIBLE = 1e-3  # root mean square of a difference (an eighth of a gray level) from which `auto:` counts


@dataclass(frozen=True)
class Distillation:
    """When and how strongly the student is held to the teacher.

    weight: λ; or, where ratio is given, a factor of the λ that makes the gradient of the distance, at the
    image and averaged over steps, `ratio` times as long as the adversarial one. interval: computed every k-th
    step and counted k times. resolution: pixels at which images are compared, if fewer than they have. tf32:
    compute the distance in TF32 on CUDA, whose rounding is far below any distance that matters.
    """

    distance: Distance
    weight: float
    interval: int
    resolution: int
    ratio: float | None = None
    tf32: bool = False

    def due(self, step: int) -> bool:
        """Whether step number `step` (from 0) has a distillation term."""
        return step % self.interval == 0

    @property
    def scale(self) -> float:
        """λ times the interval, so that its average over steps is λ."""
        return self.weight * self.interval

    def image_gradient(
        self,
        teacher: Network,
        img: torch.Tensor,
        draw: Draw,
        replay: NoiseReplay,
        synthesis: dict,
        adversarial: torch.Tensor | None = None,
        norms: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradient of λ·d (averaged over the batch) with respect to the student's images, and the
        distances.

        img: `[N, C, H, W]`, detached. adversarial, norms: the other gradient, and `TrainState.sd_norms`,
        which is moved on; needed if λ follows a ratio. Returns (`[N, C, H, W]`, `[N]`).
        """
        with torch.no_grad():
            ws = map_latents(teacher, draw)
            with replay.again():
                target = teacher.synthesis(ws, **synthesis)
        img = img.detach().requires_grad_()
        with float32_math(tf32=self.tf32):
            distances = self.distance(area_resize(img, self.resolution), area_resize(target, self.resolution))
            (gradient,) = torch.autograd.grad(distances.mean() * self.scale, img)
        if self.ratio is not None:
            assert adversarial is not None and norms is not None, "a ratio needs something to compare with"
            unit = gradient.norm() / self.scale
            norms.lerp_(torch.stack([adversarial.norm(), unit]).float(), NORMS_DECAY)
            gradient = gradient * self.auto_weight(norms)
            # The averages lag where a distance of nothing begins to grow: its first steps would be far too
            # strong.
            most = MOST_PULL * self.ratio * adversarial.norm() * self.scale
            # And what is not to be seen is rounding, of which no weight should make a pull.
            visible = (img.detach() - target).square().mean().sqrt() / VISIBLE
            bound = (most / gradient.norm().clamp_min(1e-30)).clamp(max=1) * visible.clamp(max=1)
            gradient = gradient * bound
        return gradient, distances.detach()

    def auto_weight(self, norms: torch.Tensor) -> torch.Tensor:
        """λ (a scalar) for running averages `[adversarial, distillation]`; 0 while there is nothing to pull.

        Both averages begin at 0 and move alike, so their ratio is right from the start. λ itself has no
        bound: what is usual differs a thousandfold between backbones.
        """
        assert self.ratio is not None, "a fixed weight follows no norms"
        weight = self.ratio * norms[0] / norms[1].clamp_min(1e-30)
        return torch.where(norms[1] > 0, weight, 0)


def area_resize(img: torch.Tensor, resolution: int) -> torch.Tensor:
    """Average `[N, C, H, W]` down to `resolution` pixels; smaller images stay as they are."""
    if img.shape[-1] <= resolution:
        return img
    return F.interpolate(img, size=(resolution, resolution), mode="area")
