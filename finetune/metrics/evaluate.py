"""Distances between what a generator makes and a set of real pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from finetune.data import ImageSet, images_to_float
from finetune.errors import ConfigError
from finetune.metrics.features import EfficientNetLite0, RandomFeatures
from finetune.metrics.frechet import FeatureStatistics
from finetune.metrics.random_fid import SEEDS, add_features, mean_and_spread
from finetune.sampling import to_uint8

METRICS = ("random-fid", "fd-effnet")
BATCH = 16  # bounds memory; no number depends on it


@dataclass(frozen=True)
class Distance:
    """One metric: its value, and the spread over its random networks (0 where there is only one network)."""

    value: float
    spread: float = 0.0


class Evaluation:
    """The real side of `distances`, computed once and compared with as many generators as wanted.

    `random-fid`: `RandomFeatures` over the seeds 0, 1, 2 (mean and spread). `fd-effnet`: the Fréchet distance
    in `EfficientNetLite0.pooled`. Raises ConfigError for an unknown metric, WeightsMissing for `fd-effnet`
    without its package.
    """

    def __init__(
        self,
        image_set: ImageSet,
        which: Sequence[str] = METRICS,
        *,
        device: torch.device | str = "cpu",
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        unknown = [name for name in which if name not in METRICS]
        if unknown:
            raise ConfigError(f"no metric is called {', '.join(unknown)}; there are {', '.join(METRICS)}.")
        self.which = tuple(which)
        self.device = torch.device(device)
        self.image_set = image_set
        self._networks: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
        if "random-fid" in which:
            self._networks |= {f"random-{seed}": RandomFeatures(seed, self.device) for seed in SEEDS}
        if "fd-effnet" in which:
            self._networks["effnet"] = EfficientNetLite0(self.device).pooled
        self._real = self._statistics(_real_images(image_set), len(image_set), progress)

    def distances(
        self,
        G: torch.nn.Module,
        num: int,
        seed: int = 0,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> dict[str, Distance]:
        """Compare `num` pictures of `G` (no truncation, stored noise, labels as in the set) with the real.

        The same seed draws the same latents and labels for every generator. Distances grow as `num` shrinks,
        so only those of equal `num` can be compared. `progress(done, total)` counts pictures.
        """
        if num < 2:
            raise ConfigError(f"a distance needs at least 2 generated pictures, not {num}.")
        fake = self._statistics(_generated_images(G, self.image_set, num, seed), num, progress)
        found = {name: fake[name].distance(self._real[name]) for name in self._networks}
        result = {}
        for metric in self.which:
            if metric == "random-fid":
                result[metric] = Distance(*mean_and_spread([found[f"random-{s}"] for s in SEEDS]))
            else:
                result[metric] = Distance(found["effnet"])
        return result

    def _statistics(
        self, batches: Iterator[torch.Tensor], total: int, progress
    ) -> dict[str, FeatureStatistics]:
        found = {name: FeatureStatistics() for name in self._networks}
        done = 0
        for img in batches:
            add_features(self._networks, images_to_float(img.to(self.device)), found)
            done += len(img)
            if progress is not None:
                progress(done, total)
        return found


def distances(
    G_ema: torch.nn.Module,
    image_set: ImageSet,
    num: int,
    seed: int = 0,
    which: Sequence[str] = METRICS,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Distance]:
    """`Evaluation` for a single generator."""
    return Evaluation(image_set, which, device=device).distances(G_ema, num, seed, progress=progress)


def _real_images(image_set: ImageSet) -> Iterator[torch.Tensor]:
    for start in range(0, len(image_set), BATCH):
        pictures = [image_set[i][0] for i in range(start, min(start + BATCH, len(image_set)))]
        yield torch.from_numpy(np.stack(pictures))


@torch.no_grad()
def _generated_images(G: torch.nn.Module, image_set: ImageSet, num: int, seed: int) -> Iterator[torch.Tensor]:
    """Pictures as they would be stored: rounded to uint8 `[N, C, H, W]`."""
    device = next(G.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn([num, G.z_dim], generator=generator)
    c = image_set.random_labels(num, generator) if G.c_dim else torch.zeros([num, 0])
    for z_part, c_part in zip(z.split(BATCH), c.split(BATCH), strict=True):
        img = G(z_part.to(device), c_part.to(device), noise_mode="const")
        yield torch.from_numpy(to_uint8(img)).movedim(-1, 1)
