"""Everything that changes during training, in one named object, and everything that does not, in another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from finetune.distributed import SINGLE, ProcessGroup
from finetune.train.ada import AdaController
from finetune.train.distill import Distillation


@dataclass
class TrainState:
    """What training changes. What is not in here (or in torch's random state and the sampler) does not exist.

    One clock: `nimg`, the images D has seen; `step` counts iterations. `teacher` is G_ema itself unless
    another one was asked for. `label_generator` draws the labels of generated pictures. `sd_norms`: running
    averages of the norms of the adversarial and the unweighted distillation gradient at the image, from which
    `--sd-weight auto:` follows.
    """

    G: torch.nn.Module
    D: torch.nn.Module
    G_ema: torch.nn.Module
    teacher: torch.nn.Module
    opt_G: torch.optim.Optimizer  # noqa: N815
    opt_D: torch.optim.Optimizer  # noqa: N815
    augment_pipe: torch.nn.Module | None
    ada: AdaController
    path_mean: torch.Tensor
    sd_norms: torch.Tensor
    nimg: int = 0
    step: int = 0
    label_generator: torch.Generator = field(default_factory=torch.Generator)


@dataclass(frozen=True)
class Plan:
    """What training keeps fixed: the recipe in the units that the loop uses (images, not kimg).

    batch: images of all processes together; batch_gpu: in one part. d_warmup_nimg: images over which D learns
    alone, because it is new. lr_warmup_nimg: images over which learning rates rise from 0. skip_overflow:
    leave out gradients that are not finite, which float16 layers may give now and then.
    """

    device: torch.device
    total_nimg: int
    batch: int
    batch_gpu: int
    gamma: float
    mixing: float
    r1_interval: int
    path_interval: int | None
    path_weight: float
    path_decay: float
    ema_nimg: float
    ema_rampup: float | None
    teacher_nimg: float | None
    blur_sigma: float
    blur_nimg: float
    distillation: Distillation | None
    labels: Callable[[int], torch.Tensor]
    d_warmup_nimg: float = 0.0
    lr_warmup_nimg: float = 0.0
    skip_overflow: bool = False
    seed: int = 0
    processes: ProcessGroup = SINGLE
    synthesis: dict = field(default_factory=dict)
    discriminator: dict = field(default_factory=dict)

    def blur_at(self, nimg: int) -> float:
        """Standard deviation in pixels of the blur of D's input, fading linearly."""
        return self.blur_sigma * max(0.0, 1 - nimg / self.blur_nimg) if self.blur_sigma else 0.0

    def rate_share(self, network: str, nimg: int) -> float:
        """What part of its learning rate a network (G or D) has after `nimg` images: a straight line up to 1.

        In Adam's first steps all weights move by the whole rate at once, in directions that one noisy
        gradient has set.
        Source: Ma and Yarats 2019 (1910.04209): linear warm-up, there over 2/(1 - beta2) steps.
        """
        if not self.lr_warmup_nimg:
            return 1.0
        begun = self.d_warmup_nimg if network == "G" else 0.0
        return min(1.0, (nimg - begun + self.batch) / self.lr_warmup_nimg)
