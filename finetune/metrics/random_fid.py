"""random-FID: the Fréchet distance in the features of several randomly initialized networks.

It needs no download and does not favor the classes of ImageNet. A single random network is one sample, so the
mean and the spread over at least three seeds are reported. `RandomFeatures` is the definition; keep seeds and
number of images equal between everything that is compared.
Source: Naeem et al. 2020 (2002.09797); Lee et al. 2022 (2208.09218).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch

from finetune.metrics.features import RandomFeatures
from finetune.metrics.frechet import FeatureStatistics

SEEDS = (0, 1, 2)


def random_fid(
    images_a: torch.Tensor,
    images_b: torch.Tensor,
    seeds: Sequence[int] = SEEDS,
    *,
    device: torch.device | str = "cpu",
    batch: int = 32,
) -> tuple[float, float]:
    """Return mean and sample deviation over `seeds` for two sets `[N, C, H, W]` of images in [-1, 1]."""
    networks = {str(seed): RandomFeatures(seed, device) for seed in seeds}
    sides = []
    for images in (images_a, images_b):
        found = {name: FeatureStatistics() for name in networks}
        for part in images.split(batch):
            add_features(networks, part.to(device), found)
        sides.append(found)
    return mean_and_spread([sides[0][name].distance(sides[1][name]) for name in networks])


@torch.no_grad()
def add_features(networks: dict, img: torch.Tensor, found: dict[str, FeatureStatistics]) -> None:
    """Add the features of `img` to the statistics of each network."""
    for name, network in networks.items():
        found[name].add(network(img))


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and sample standard deviation; the latter is 0 for a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
