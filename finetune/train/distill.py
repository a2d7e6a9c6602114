"""Self-distillation: regularize the generator toward its EMA, image by image.

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
from finetune.metrics.perceptual import ImageDistance
from finetune.models import Network
from finetune.train.latents import Latents, NoiseReplay, map_latents
from finetune.train.paired_augment import augment_pair

NORMS_DECAY = 0.05  # weight of the newest step in the averages behind `auto:`
MAX_GRAD_RATIO = 4.0  # bound of a single step, times the ratio of `auto:`
MIN_RMS = 1e-3  # of student minus teacher (an eighth of a gray level); below, `auto:` is scaled down


@dataclass(frozen=True)
class Distillation:
    """Interval and weight of the distillation loss.

    weight: λ, 0 to measure the distance only; or, if ratio is given, a factor of the λ that makes the
    gradient of the distance, at the image and averaged over steps, `ratio` times as long as the adversarial
    one. interval: computed every k-th step and counted k times. resolution: pixels of the longer side at
    which images are compared, if it has more. augment: change both images by one random draw before they are
    compared. tf32: compute the distance in TF32 on CUDA, whose rounding is far below any distance that
    matters.
    """

    distance: ImageDistance
    weight: float
    interval: int
    resolution: int
    ratio: float | None = None
    augment: bool = False
    tf32: bool = False

    def due(self, step: int) -> bool:
        """Return whether step number `step` (from 0) has a distillation term."""
        return step % self.interval == 0

    @property
    def scale(self) -> float:
        """λ times the interval, so that its average over steps is λ."""
        return self.weight * self.interval

    def image_gradient(
        self,
        teacher: Network,
        img: torch.Tensor,
        latents: Latents,
        replay: NoiseReplay,
        synthesis: dict,
        adversarial: torch.Tensor | None = None,
        norms: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Return the gradient of λ·d (batch mean) with respect to the student's images, and the distances.

        img: `[N, C, H, W]`, detached. adversarial, norms: the other gradient, and `TrainState.sd_norms`,
        which is updated; required if λ follows a ratio. Returns (`[N, C, H, W]`, or None with weight 0;
        `[N]`).
        """
        with torch.no_grad():
            ws = map_latents(teacher, latents)
            with replay.again():
                target = teacher.synthesis(ws, **synthesis)
        img = img.detach().requires_grad_(bool(self.weight))
        with float32_math(tf32=self.tf32):
            pair = area_resize(img, self.resolution), area_resize(target, self.resolution)
            distances = self.distance(*(augment_pair(*pair) if self.augment else pair))
            if not self.weight:
                return None, distances
            (gradient,) = torch.autograd.grad(distances.mean() * self.scale, img)
        if self.ratio is not None:
            assert adversarial is not None and norms is not None, "a ratio needs something to compare with"
            unit = gradient.norm() / self.scale
            newest = torch.stack([adversarial.norm(), unit]).float()
            # An overflow in float16 costs this step; in the averages it would stay.
            norms.copy_(torch.where(newest.isfinite().all(), norms.lerp(newest, NORMS_DECAY), norms))
            gradient = gradient * self.auto_weight(norms)
            # Bound the step: the running norms lag when the distance starts near 0.
            most = MAX_GRAD_RATIO * self.ratio * adversarial.norm() * self.scale
            # Fade out differences below MIN_RMS: they are rounding noise.
            fade = (img.detach() - target).square().mean().sqrt() / MIN_RMS
            bound = (most / gradient.norm().clamp_min(1e-30)).clamp(max=1) * fade.clamp(max=1)
            gradient = gradient * bound
        return gradient, distances.detach()

    def auto_weight(self, norms: torch.Tensor) -> torch.Tensor:
        """Return λ (a scalar) for running norms `[adversarial, distillation]`; 0 while the distance is 0.

        Both averages begin at 0 with equal decay, so their ratio is right from the start. λ itself is not
        bounded: typical values differ a thousandfold between backbones.
        """
        assert self.ratio is not None, "a fixed weight follows no norms"
        weight = self.ratio * norms[0] / norms[1].clamp_min(1e-30)
        return torch.where(norms[1] > 0, weight, 0)


def area_resize(img: torch.Tensor, resolution: int) -> torch.Tensor:
    """Average `[N, C, H, W]` by the whole factor after which the longer side is at most `resolution`."""
    factor = -(-max(img.shape[2:]) // resolution)
    # Its gradient adds in a fixed order, which that of `F.interpolate` does not on CUDA.
    return img if factor == 1 else F.avg_pool2d(img, factor, ceil_mode=True)
