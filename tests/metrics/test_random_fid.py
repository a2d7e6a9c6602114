"""random-FID as a distance: 0 between equals, growing with the difference, a spread over its networks."""

import pytest
import torch

from finetune.metrics.features import RandomFeatures
from finetune.metrics.frechet import FeatureStatistics
from finetune.metrics.random_fid import mean_and_spread, random_fid


def images(shift, n=24):
    coarse = torch.rand([n, 3, 3, 3], generator=torch.Generator().manual_seed(0)) * 2 - 1
    img = torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bilinear", align_corners=False)
    return (img * (1 - shift)).clamp(-1, 1)


def test_random_fid_grows_with_difference():
    real = images(0)
    same, near, far = (random_fid(real, images(shift), seeds=(0, 1))[0] for shift in (0, 0.2, 0.6))
    assert same == pytest.approx(0, abs=1e-6)
    assert 1e-3 < near < far / 4


def test_random_fid_mean_and_spread():
    real, fake = images(0), images(0.5)
    values = []
    for seed in (0, 1, 2):
        sides = FeatureStatistics(), FeatureStatistics()
        for side, img in zip(sides, (real, fake), strict=True):
            side.add(RandomFeatures(seed)(img))
        values.append(sides[0].distance(sides[1]))
    mean, spread = random_fid(real, fake, batch=7)
    assert mean == pytest.approx(sum(values) / 3, rel=1e-4)
    assert spread == pytest.approx(torch.tensor(values).std().item(), rel=1e-3)
    assert spread > 0


def test_random_fid_single_seed_has_no_spread():
    assert mean_and_spread([2.5]) == (2.5, 0.0)
